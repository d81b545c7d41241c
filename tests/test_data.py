"""From `--data` to batches, each fact against something counted another way."""

import csv
import functools
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from sklearn.metrics import roc_auc_score
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing

import common
from common import IGNORE, Ranks, imitate_all, load_batch, micro_batches
from conftest import bytes_tokenizer, data_args, refused, write_lines

BYTES = bytes_tokenizer()
MBPP = Path(__file__).parents[2] / "shared/data/mbpp.jsonl"
both_kinds = pytest.mark.parametrize("kind", ["text", "records"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load(name, tokenizer=BYTES, seq_len=32, score=None, **changes):
    return common.load_data(data_args(name, seq_len=seq_len, **changes), tokenizer, Ranks(), score)


def write(file, records):
    """Records as JSON lines; texts become records of one text."""
    return write_lines(file, [r if isinstance(r, dict) else {"text": r} for r in records])


def some_texts(number, seed=0):
    """Documents of 1 to 12 lines: indented, blank, characters of 1 to 4 bytes, both line ends."""
    bodies = "def f(w, h):|    return w  # é||\tname = '漢字'|print('🙂')|    |x,  3".split("|")
    random, texts = np.random.default_rng(seed), []
    for n in range(number):
        lines = [f"# file {n}", *random.choice(bodies, random.integers(0, 12))]
        texts.append("".join(line + ("\r\n" if n % 5 == 4 else "\n") for line in lines))
    return texts


def some_documents(kind, number):
    if kind == "text":
        return some_texts(number)
    prompts = [f"{n}?" + "p" * (n % 7) for n in range(number)]
    return [dict(prompt=p, completion=f"é{n}" + "c" * (n % 9)) for n, p in enumerate(prompts)]


def fast_tokenizer(template):
    """A byte-level BPE tokenizer with a few merges."""
    special, built = {"<pad>": 0, "<eos>": 1, "<bos>": 2}, ByteLevelBPETokenizer()
    built.train_from_iterator(some_texts(40), vocab_size=340, special_tokens=[*special])
    built.post_processor = TemplateProcessing(template, special_tokens=[*special.items()])
    names = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built._tokenizer, **names)


FAST = fast_tokenizer("<bos> $A <eos>")


def text_of(ids, tokenizer=BYTES):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def runs_of(rows, column="input_ids"):
    """The values of a column without padding, one array a document, in order."""
    values, document = rows[:][column].ravel(), rows[:]["document"].ravel()
    ends = np.flatnonzero(np.diff(document[document >= 0])) + 1
    return np.split(values[document >= 0], ends)


def texts_of(rows, tokenizer=BYTES):
    """The documents of packed rows as text: every one must end in one EOS and have none before."""
    for ids in runs_of(rows):
        assert np.flatnonzero(ids == tokenizer.eos_token_id).tolist() == [len(ids) - 1]
    return [text_of(ids, tokenizer) for ids in runs_of(rows)]


def all_texts(loaded):
    return Counter(texts_of(loaded.train) + texts_of(loaded.heldout))


def records_of(rows, tokenizer=BYTES):
    """Prompt and completion of each row, separated by `is_target`."""
    text = functools.partial(text_of, tokenizer=tokenizer)
    pairs = zip(runs_of(rows), runs_of(rows, "is_target"))
    return [(text(ids[~is_target]), text(ids[is_target])) for ids, is_target in pairs]


def all_records(loaded, tokenizer=BYTES):
    return records_of(loaded.train, tokenizer) + records_of(loaded.heldout, tokenizer)


def numbers_heldout(texts, seed=0, group=None):
    documents = pd.DataFrame([common.DOCUMENT | dict(completion=text) for text in texts])
    if group:
        documents = documents.assign(group=[str(g) for g in group], reward=1.0)
    part_N = common._split(documents, seed, "x")
    assert set(part_N) == {"training", "held-out"}
    return np.flatnonzero(part_N == "held-out").tolist()


def test_no_length_is_favoured_among_heldout_documents():
    """Over 150 seeds: 200 documents, most of them short, as files are."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 200).astype(int) + 4
    texts = [f"{n:04}".ljust(length, "x") for n, length in enumerate(lengths)]
    drawn = np.zeros(200)
    for seed in range(150):
        heldout = numbers_heldout(texts, seed)
        drawn[heldout] += 1
        assert lengths[heldout].sum() >= 0.03 * lengths.sum()
        assert min(lengths[heldout].sum() - lengths[n] for n in heldout) < 0.03 * lengths.sum()
    chances = [drawn[quartile].mean() for quartile in np.array_split(np.argsort(lengths), 4)]
    assert max(chances) < 1.35 * min(chances)


def test_split_depends_on_no_order_moves_little_and_keeps_groups_and_copies_together():
    texts = [f"{n}" * 20 for n in range(1000, 1400)]
    heldout = {texts[n] for n in numbers_heldout(texts)}
    assert {texts[::-1][n] for n in numbers_heldout(texts[::-1])} == heldout
    assert {texts[n] for n in numbers_heldout(texts, seed=1)} != heldout
    more = texts + [f"{n}" * 20 for n in range(2000, 2040)]
    assert len(heldout ^ {more[n] for n in numbers_heldout(more)}) <= 4
    for seed in range(4):  # whichever comes first, one document is left to train on
        assert len(numbers_heldout(["a", "b" * 1000], seed)) == 1
    texts = [f"{n // 3}" * 9 for n in range(600)]  # three copies of each
    assert set(Counter(texts[n] for n in numbers_heldout(texts)).values()) == {3}
    texts, group = [f"{n}" * 9 for n in range(600)], [n % 60 for n in range(600)]
    held = Counter(group[n] for n in numbers_heldout(texts, group=group))
    assert set(held.values()) == {10} and 6 <= len(held) <= 7  # 10 % of the bytes


@both_kinds
def test_heldout_documents_are_those_of_the_seed_and_never_trained_on(tmp_path, kind):
    """Neither tokenizer nor length of rows nor noise moves them."""
    material, read = some_documents(kind, 200), dict(text=texts_of, records=records_of)[kind]
    file = write(tmp_path / "a.jsonl", material)
    first, another = load(file, seq_len=50), load(file, seq_len=50, seed=1)
    train, heldout = Counter(read(first.train)), Counter(read(first.heldout))
    assert heldout and not train.keys() & heldout.keys()
    whole = material if kind == "text" else [tuple(r.values()) for r in material]
    assert train + heldout == Counter(whole)
    other = load(file, FAST, seq_len=70, noise_frac=0.5)
    assert Counter(read(other.heldout, FAST)) == heldout
    for name in ("fingerprint", "heldout_fingerprint"):
        assert getattr(other, name) == getattr(first, name) != getattr(another, name)


def test_halves_of_stdlib(monkeypatch):
    texts = some_texts(300)
    monkeypatch.setattr(common, "stdlib_texts", lambda: texts + texts[:9])
    whole, a, b = (load(f"stdlib{half}", seed=n) for n, half in enumerate(("", ":a", ":b")))
    assert Counter(texts_of(a.train)) + Counter(texts_of(b.train)) == Counter(texts_of(whole.train))
    assert not set(texts_of(a.train)) & set(texts_of(b.train))
    assert texts_of(a.heldout) == texts_of(b.heldout) == texts_of(whole.heldout)


@pytest.mark.parametrize("seq_len", [2, 64, 5000])
def test_rows_are_the_documents_in_order_each_ended_by_eos(tmp_path, seq_len):
    """Against a packer of one list; more documents than are tokenised at once."""
    texts = [*some_texts(600), "a</s>b<pad>", "\u2028 \x0c \x00"]  # markup is text too
    loaded = load(write(tmp_path / "a.jsonl", texts), seq_len=seq_len)
    heldout = set(texts_of(loaded.heldout))
    tokens, document = [], []
    for number, text in enumerate(text for text in texts if text not in heldout):
        ids = [byte + 3 for byte in text.encode()] + [1]
        tokens += ids
        document += [number] * len(ids)
    missing = -len(tokens) % seq_len
    columns = loaded.train[:]
    assert columns["input_ids"].shape[1] == seq_len and not columns["is_noise"].any()
    assert columns["input_ids"].ravel().tolist() == tokens + [0] * missing
    assert columns["document"].ravel().tolist() == document + [-1] * missing
    assert columns["is_target"].ravel().tolist() == [True] * len(tokens) + [False] * missing


@both_kinds
def test_targets_equal_a_triple_loop(tmp_path, kind):
    """They stay in their document; padding and prompts are none."""
    rows = load(write(tmp_path / "a.jsonl", some_documents(kind, 30)), seq_len=37).train
    x_BT, document_BT, is_target_BT = (rows[:][c] for c in ("input_ids", "document", "is_target"))
    expected_KBT = np.full((40, *x_BT.shape), IGNORE)
    for k, b, t in np.ndindex(expected_KBT.shape):
        j = t + k + 1
        if j < 37 and document_BT[b, j] == document_BT[b, t] and is_target_BT[b, j]:
            expected_KBT[k, b, t] = x_BT[b, j]
    targets_KBT = load_batch(rows, np.arange(len(rows)), 40, "cpu").targets_KBT
    assert np.array_equal(targets_KBT, expected_KBT)


def test_every_row_comes_once_an_epoch_for_any_ranks_and_accumulation(tmp_path):
    rows = load(write(tmp_path / "a.jsonl", some_texts(25)), noise_frac=0.3).train
    args, total = SimpleNamespace(batch_size=8, seed=5), len(rows)
    straight = [common.batch_rows(total, 8, 5, step) for step in range(total)]
    epochs = np.concatenate(straight).reshape(8, total)
    assert (np.sort(epochs) == np.arange(total)).all() and (epochs[0] != epochs[1]).any()
    assert (common.batch_rows(total, 8, 6, 0) != straight[0]).any()  # another seed
    for world_size, size in ((1, 1), (2, 4), (4, 1)):
        ranks = [Ranks(rank, world_size) for rank in range(world_size)]
        for step in (total // 8, 0):  # where an epoch ends, then back to the first
            whole = load_batch(rows, straight[step], 3, "cpu")
            shares = [micro_batches(rows, args, size, step, 3, r) for r in ranks]
            parts = [batch for micro_step in zip(*shares, strict=True) for batch in micro_step]
            assert np.concatenate([b.rows_B for b in parts]).tolist() == whole.rows_B.tolist()
            for name, dim in (("x_BT", 0), ("targets_KBT", 1), ("is_noise_BT", 0)):
                joined = torch.cat([getattr(b, name) for b in parts], dim)
                assert torch.equal(joined, getattr(whole, name))


NOISE = [("line", BYTES), ("line", FAST), ("document", FAST)]


@pytest.mark.parametrize("noise_by, tokenizer", NOISE, ids=["bytes", "fast", "document"])
def test_noise_is_flagged_where_lines_differ(tmp_path, noise_by, tokenizer):
    """Which lines changed is seen by comparing texts: flagged tokens are these, all others not.

    By document, all lines that are not blank changed or none.
    """
    file = write(tmp_path / "a.jsonl", some_texts(300))
    clean, noisy = (load(file, tokenizer, noise_frac=f, noise_by=noise_by) for f in (0.0, 0.3))
    texts, documents, drawn = texts_of(clean.train, tokenizer), runs_of(noisy.train), []
    flags = runs_of(noisy.train, "is_noise")
    for number, (text, ids, is_noise) in enumerate(zip(texts, documents, flags, strict=True)):
        noise, rest, changes = "", "", []
        lines = text.splitlines(keepends=True), text_of(ids, tokenizer).splitlines(keepends=True)
        for old, new in zip(*lines, strict=True):
            body, is_changed = new.rstrip("\r\n") if old != new else "", old != new
            assert len(old) == len(new) and new.endswith(old[len(body) :])  # line ends stay
            assert not is_changed or (old.strip() and re.fullmatch("[ -~]+", body))
            noise, rest = noise + body, rest + new[len(body) :]
            changes += [is_changed] * bool(old.strip())
        assert noise_by == "line" or len(set(changes)) == 1
        drawn += changes if noise_by == "line" else changes[:1]
        key, document = (0, number), SimpleNamespace(prompt="", completion=text)
        pieces = common._pieces(document, 0.3, noise_by, key)  # of seed and number alone
        assert text_of(ids, tokenizer) == "".join(piece for piece, _ in pieces)
        assert text_of(ids[is_noise], tokenizer) == noise
        assert text_of(ids[~is_noise], tokenizer) == rest
        assert np.flatnonzero(ids == tokenizer.bos_token_id).tolist() == [0] * (tokenizer is FAST)
    assert abs(np.mean(drawn) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(drawn))
    assert len(drawn) > (1000 if noise_by == "line" else 280)
    assert not noisy.heldout[:]["is_noise"].any()


def test_noise_by_byte_replaces_single_characters(tmp_path):
    """Against the clean text, character by character: blank ones stay, the share is that asked."""
    texts = [t.encode("ascii", "replace").decode() for t in some_texts(300)]
    file = write(tmp_path / "a.jsonl", texts)
    clean, noisy = (load(file, noise_frac=f, noise_by="byte").train for f in (0.0, 0.3))
    old_N, new_N, is_noise_N = clean[:]["input_ids"], noisy[:]["input_ids"], noisy[:]["is_noise"]
    is_text_N = (clean[:]["document"] >= 0) & (old_N > ord(" ") + 3)  # a byte's id is byte + 3
    assert np.array_equal(old_N[~is_noise_N], new_N[~is_noise_N])
    assert not is_noise_N[~is_text_N].any()
    letters_N = new_N[is_noise_N] - 3
    assert letters_N.min() >= 32 and letters_N.max() < 127 and len(np.unique(letters_N)) == 95
    share, number = is_noise_N[is_text_N].mean(), is_text_N.sum()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / number) and number > 10_000
    same = (old_N == new_N)[is_noise_N].mean()  # one draw of 95 is the character that was there
    assert same < 0.03


def test_noise_by_line_is_drawn_as_it_always_was():
    """To the last bit: one number a line that is not blank, then its characters."""
    text = "".join(f"line {n}\n\n   x{n} é日\r\n" for n in range(300)) + "tail"
    random, expected = np.random.default_rng((3, 5)), ""
    for line in text.splitlines(keepends=True):
        body = line.rstrip("\r\n")
        if body.strip() and random.random() < 0.3:
            body = "".join(map(chr, random.integers(32, 127, len(body), np.uint8)))
        expected += body + line[len(line.rstrip("\r\n")) :]
    document = SimpleNamespace(prompt="p", completion=text)
    pieces = common._pieces(document, 0.3, "line", (3, 5))
    assert "".join(piece for piece, _ in pieces) == "p" + expected
    digest = hashlib.sha256(repr(pieces).encode()).hexdigest()
    assert digest.startswith("df36663d06cc1bdf")  # of the first version of this noise


def test_the_cache_is_read_again_and_never_for_other_rows(tmp_path, cache):
    file = write(tmp_path / "a.jsonl", some_texts(60))
    other = fast_tokenizer("<bos> $A")  # only the template differs
    variants = [{}, dict(seq_len=61), dict(noise_frac=0.5), dict(noise_frac=0.25), dict(seed=1)]
    variants += [dict(tokenizer=FAST), dict(tokenizer=other)]
    rows = [load(file, **variant).train for variant in variants]
    times = {f: f.stat().st_mtime_ns for f in (cache / "wmtp").iterdir()}
    assert len({r.cache_files[0]["filename"] for r in rows}) == len(variants)
    for before, variant in zip(rows, variants):
        assert load(file, **variant).train.cache_files == before.cache_files
    assert {f: f.stat().st_mtime_ns for f in (cache / "wmtp").iterdir()} == times
    stamps = file.stat().st_atime_ns, file.stat().st_mtime_ns
    write(file, [text.replace("file", "list") for text in some_texts(60)])  # of the same size
    os.utime(file, ns=stamps)
    assert load(file).train.cache_files != rows[0].cache_files


def test_after_an_edit_of_the_code_documents_and_rows_are_made_anew(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", ["a", "b"])
    assert all_texts(load(file)) == Counter("ab")

    def _pieces(document, noise_frac, noise_by, key):
        return [(document.completion * 2, False)]

    monkeypatch.setattr(common, "_pieces", _pieces)
    assert all_texts(load(file)) == Counter(["aa", "bb"])
    (tmp_path / "common.py").write_text("edited")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    longer = lambda row, _: [{"completion": row["text"] + "c"}]  # noqa: E731
    monkeypatch.setattr(common, "_documents_of_row", longer)
    assert all_texts(load(file)) == Counter(["acac", "bcbc"])


JSON = ["a.JSONL", "a.ndjson", "a.json", "list.json", "objects.json", "a.jsonl.xz", "a.b.jsonl.gz"]
PATHS = ["a::b.jsonl", "[1]?x.jsonl", "deep/**/*.jsonl", "folder", "a.parquet"]


@pytest.mark.parametrize("name", JSON + PATHS)
def test_documents_of_every_kind_of_file(tmp_path, capsys, name):
    """The suffix tells the format in any case; a path is a path whatever its name."""
    texts = ["\x1b[31mred", *(text.replace("\r\n", "\n") for text in some_texts(9))]
    file, lines = tmp_path / name, [json.dumps({"id": 1, "content": text}) for text in texts]
    content = {  # as other programs write them: on several lines, after a blank one
        "list.json": "\n" + json.dumps([{"text": text} for text in texts], indent=1),
        "objects.json": "\n".join(json.dumps({"text": text}, indent=1) for text in texts),
    }.get(name, "\n".join(lines)).encode()
    if name == "folder":  # names from which datasets would guess splits
        file.mkdir()
        for n, text in enumerate(texts):
            (file / f"{('test', 'train')[n % 2]}-{n}.txt").write_text(text)
        (file / "a.csv").write_text("left out")
    elif "**" in name:
        for n, inside in enumerate(("1.jsonl", "a/2.jsonl", "a/b/3.jsonl")):
            (tmp_path / "deep" / inside).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "deep" / inside).write_text("\n".join(lines[n::3]))
    elif name == "a.parquet":
        datasets.Dataset.from_dict({"content": texts}).to_parquet(file)
    else:
        compress = {".xz": lzma.compress, ".gz": gzip.compress}.get(file.suffix, bytes)
        file.write_bytes(compress(content))
    loaded, printed = load(file), capsys.readouterr().out
    assert all_texts(loaded) == Counter(texts)
    kind = re.search("jsonl|ndjson|json|parquet|$", name.lower())[0] or "txt"
    assert f"read as {kind}: 10 document(s); the first: '\\x1b[31mred'" in printed
    assert ("data      1 files of " in printed) == (name == "folder")


def test_one_text_is_cut_by_length_whatever_its_lines(tmp_path):
    text = "é\n" * 30 + "".join(map(str, range(50_000)))[:99_940]
    (tmp_path / "a.txt").write_text(text)
    loaded = load(tmp_path / "a.txt")
    train, heldout = texts_of(loaded.train), texts_of(loaded.heldout)
    assert Counter("".join(train + heldout)) == Counter(text)
    assert len(train) + len(heldout) == 100 and {len(t) for t in train + heldout} == {1000}
    num_bytes = sum(len(t.encode()) for t in heldout)
    assert loaded.heldout_bytes == num_bytes and 0.03 < num_bytes / len(text) < 0.045


def test_every_character_lies_in_a_token_where_offsets_leave_out_spaces():
    """A byte-level BPE tokenizer, which by itself gives the words without the space before."""
    tokenizer, text = fast_tokenizer("$A"), "if caf\u00e9:\n        return  \u65e5"
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    _, begin_N, end_N = common.encode_spans(tokenizer, [text])[0]
    covered = [((begin_N <= place) & (place < end_N)).any() for place in range(len(text))]
    assert all(covered) and (begin_N < end_N).all()


CELLS = ["NA", "null", "None", "nan", "N/A", "007", "1e5", "a,b", 'say "é"', "two\nlines", "end"]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz"])
def test_every_cell_of_a_table_is_text_and_empty_ones_are_counted(tmp_path, capsys, name):
    stream = io.StringIO()
    table = csv.writer(stream, delimiter="\t" if "TSV" in name else ",")
    rows = [[f"{c}?", c, "0.5"] for c in [*CELLS, "", ""]]
    table.writerows([["prompt", "completion", "weight"], *rows])
    content = b"\xef\xbb\xbf" + stream.getvalue().encode()  # as Excel writes it
    (tmp_path / name).write_bytes(gzip.compress(content) if ".gz" in name else content)
    loaded = load(tmp_path / name)
    assert Counter(all_records(loaded)) == Counter((f"{cell}?", cell) for cell in CELLS)
    printed = capsys.readouterr().out
    assert "11 document(s), 2 empty ones left out" in printed
    assert "has weights: their mean over the targets, 0.5, becomes 1" in printed


# ------------------------------------------------------------------------------ special tokens
MARKED = ["a<eos>b", "<bos>c", "<bos>d<eos>", "e<pad>", "f", "g"]


def test_markup_in_data_is_text_and_every_document_has_one_bos_and_one_eos(tmp_path, capsys):
    for records in (MARKED, [dict(prompt=t, completion=t) for t in MARKED]):
        loaded = load(write(tmp_path / "a.jsonl", records), FAST)
        documents = runs_of(loaded.train) + runs_of(loaded.heldout)
        texts = []
        for ids in documents:
            assert [n for n in ids if n < 3] == [2, 1] and (ids[0], ids[-1]) == (2, 1)
            texts.append(FAST.decode(ids[1:-1]))
        times = 1 if records is MARKED else 2
        assert sorted(texts) == sorted(text * times for text in MARKED)
        num_targets = sum(runs.sum() for runs in runs_of(loaded.heldout, "is_target"))
        assert loaded.heldout_tokens == num_targets  # no EOS counts twice
        assert "6 document(s), 1 end in <eos> as text, and EOS follows" in capsys.readouterr().out


def spaced_tokenizer():
    """Of Llama 2's kind: it begins every text with a space, and joins spaces to words."""
    vocabulary = "<unk> <s> </s> ▁ T o : ▁f f u r 1 2 3 4 5 6".split()
    model = tokenizers.models.BPE({t: n for n, t in enumerate(vocabulary)}, [("▁", "f")])
    model.unk_token = "<unk>"
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    built.decoder = tokenizers.decoders.Metaspace()
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **names)


def test_prompt_and_completion_are_encoded_together(tmp_path):
    """A completion gets no space of its own; a token on the border is a target.

    Spans: of the `f`, then of `ou` and of `ur`. A token has the weight of the last that it touches,
    the prompt and EOS that of the record.
    """
    tokenizer = spaced_tokenizer()
    spans, later = [[0, 1, 3], [1, 3, 0.5], [2, 4, 4]], [[1, 2, 3], [2, 4, 0.5], [3, 5, 4]]
    records = [dict(prompt=f"To{n}: ", completion="four", weights=spans) for n in (1, 2)]
    records += [dict(prompt=f"To{n}:", completion=" four", weights=later) for n in (3, 4, 5, 6)]
    loaded = load(write(tmp_path / "a.jsonl", [r | {"weight": 2} for r in records]), tokenizer)
    for row in loaded.train:
        assert row["weight"].tolist() == [2] * 5 + [6, 1, 8, 8, 2] + [1] * 22
    for rows in (loaded.train, loaded.heldout):
        for ids, is_target in zip(runs_of(rows), runs_of(rows, "is_target")):
            tokens = tokenizer.convert_ids_to_tokens(ids)
            assert tokens[:3] == ["▁", "T", "o"]
            assert tokens[4:] == [":", "▁f", "o", "u", "r", "</s>"]
            assert is_target.tolist() == [False] * 5 + [True] * 5


CHAT = "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}<eos>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<bos>assistant:{% endif %}"


def message(role, content):
    return dict(role=role, content=content)


def test_messages_go_through_the_chat_template(tmp_path, capsys):
    """Prompt and completion as messages, and whole conversations: each answer is a completion.

    Markup is special in messages alone: the same prompts as texts have other tokens.
    """
    tokenizer, answer = fast_tokenizer("<bos> $A"), [message("assistant", "é")]
    turns = [[message("user", f"{n}?")] for n in range(5)]
    records = [dict(prompt=turn, completion=answer) for turn in turns]
    records += [dict(messages=[message("user", "x"), *answer, message("user", "y"), *answer])]
    records += [dict(messages=[message("user", "without an answer")]), dict(messages=[])]
    file = write(tmp_path / "a.jsonl", records)
    refused(lambda: load(file, tokenizer), "row 1: ", "tokenizer of --model has no chat template")
    tokenizer.chat_template = CHAT
    loaded, prompts = load(file, tokenizer, seq_len=90), []
    for rows in (loaded.train, loaded.heldout):
        for ids, is_target in zip(runs_of(rows), runs_of(rows, "is_target")):
            prompts.append(tokenizer.decode(ids[~is_target]))
            assert tokenizer.decode(ids[is_target]) == "é<eos>" and ids[-1] == 1 != ids[-2]
    asked, start = "<bos>user:{}<eos>\n", "<bos>assistant:"
    expected = [asked.format(f"{n}?") + start for n in range(5)] + [asked.format("x") + start]
    expected += [asked.format("x") + start + "é<eos>\n" + asked.format("y") + start]
    assert sorted(prompts) == sorted(expected)
    assert "7 document(s), 2 empty ones left out" in capsys.readouterr().out

    texts = write(tmp_path / "b.jsonl", [dict(prompt=p, completion="é") for p in expected])
    rows = load(texts, tokenizer, seq_len=99).train
    assert all(((ids == 2).sum(), (ids == 1).sum()) == (1, 1) for ids in rows["input_ids"])
    mixed = write(tmp_path / "c.jsonl", [dict(prompt="a", completion="b"), *records])
    refused(lambda: load(mixed, tokenizer), "c.jsonl: holds messages and plain texts")


def test_weights_by_hand_and_in_the_fingerprint(tmp_path):
    """A character is its bytes, also where noise of one byte takes its place; 1 leaves no trace."""
    records, spans = [dict(prompt=f"{n}é?", completion="aéxb") for n in range(9)], [[1, 3, 3]]
    variants = [{}, dict(weight=1, weights=None), dict(weights=spans)]
    variants.append(dict(weight=0.5, weights=json.dumps(spans)))  # as in a cell of CSV
    files = [tmp_path / f"{n}.jsonl" for n in range(4)]
    for file, own in zip(files, variants):
        write(file, [record | own for record in records])
    without, ones, _, half = loaded = [load(file) for file in files]
    assert ones.train.column_names == without.train.column_names
    assert ones.fingerprint == without.fingerprint
    assert len({data.fingerprint for data in loaded}) == 3
    assert len({data.heldout_fingerprint for data in loaded}) == 1
    assert "weight" not in half.heldout.column_names
    noisy = load(files[3], noise_frac=1.0, noise_by="byte")
    assert {prompt for prompt, _ in all_records(noisy)} == {r["prompt"] for r in records}
    for rows, inside in ((half.train, 3), (noisy.train, 2)):
        expected = [0.5] * 5 + [1.5] * inside + [0.5] * 2 + [1] * (25 - inside)
        assert rows["weight"][:].tolist() == [expected] * len(rows)


def test_columns_of_alpaca(tmp_path):
    records = [dict(instruction=f"do {n}", input="", output=f"{n}") for n in range(4)]
    records += [dict(instruction=f"do {n}", input="with", output=f"{n}") for n in range(4, 8)]
    loaded = load(write(tmp_path / "a.jsonl", records))
    expected = {(f"do {n}\n" + "with\n" * (n > 3), f"{n}") for n in range(8)}
    assert set(all_records(loaded)) == expected


# -------------------------------------------------------------------------- records with outcomes
@pytest.mark.skipif(not MBPP.is_file(), reason="the MBPP file is not beside the project")
def test_mbpp():
    tasks = {t["task_id"]: t for t in map(json.loads, MBPP.read_text().splitlines())}
    loaded = load(MBPP, seq_len=3000)
    pairs = [*zip(range(601, 975), records_of(loaded.train), strict=True)]
    pairs += zip(range(511, 601), records_of(loaded.heldout), strict=True)
    for number, (prompt, completion) in pairs:
        assert re.sub("\r\n?", "\n", tasks[number]["text"]) in prompt
        assert completion == re.sub("\r\n?", "\n", tasks[number]["code"]).strip("\n") + "\n"


def test_siblings_differ_by_one_fault_that_changes_the_code_and_no_length_tells_it():
    records = list(common.stdlib_bugs(common.stdlib_texts()[::20]))
    siblings = list(zip(records[::2], records[1::2]))
    for right, wrong in siblings:
        assert (right["reward"], wrong["reward"]) == (1, 0)
        assert all(right[k] == wrong[k] for k in ("prompt", "group", "sibling"))
        if "nonlocal " not in right["completion"]:  # else it does not compile by itself
            code = [compile(r["prompt"] + r["completion"], "", "exec") for r in (right, wrong)]
            assert code[0].replace(co_linetable=b"") != code[1].replace(co_linetable=b"")
        start, end = wrong["fault_start"], wrong["fault_end"]
        assert 0 <= start < end <= len(wrong["completion"])  # all that differs lies inside
        assert right["completion"].startswith(wrong["completion"][:start])
        assert right["completion"].endswith(wrong["completion"][end:])
    lengths = [len(record["completion"]) for record in records]
    assert abs(roc_auc_score([r["reward"] for r in records], lengths) - 0.5) < 0.02


def test_the_fault_of_a_broken_function_by_hand():
    right, wrong = common.stdlib_bugs(["def f(a):\n    'text'\n    return a + 0.5\n"])
    assert (right["prompt"], right["completion"]) == ("def f(a):\n", "    return a + 0.5\n")
    assert wrong["completion"] == "    return a - 0.5\n"
    assert wrong["completion"][wrong["fault_start"] : wrong["fault_end"]] == "-"
    assert not list(common.stdlib_bugs(["def f():\n    return g(1.5)\n"]))  # nothing to break


@pytest.mark.parametrize("tokenizer", [BYTES, FAST], ids=["bytes", "fast"])
def test_rows_hold_records_and_faults_and_long_ones_are_counted(monkeypatch, capsys, tokenizer):
    texts = common.stdlib_texts()[::80]
    monkeypatch.setattr(common, "stdlib_texts", lambda: texts)
    loaded = load("stdlib-bugs", tokenizer, 200)
    faults, num_long = {}, 0
    for record in common.stdlib_bugs(texts):
        completion, (start, end) = record["completion"], (-1, -1)
        if not record["reward"]:
            start, end = record["fault_start"], record["fault_end"]
        faults[record["prompt"] + completion] = completion[start:end], record["reward"]
        size = len(common.encode(tokenizer, [record["prompt"] + completion], True)[0]) + 1
        num_long += size > 200
    for rows in (loaded.records, loaded.heldout):
        pairs, noise = records_of(rows, tokenizer), runs_of(rows, "is_noise")
        for pair, ids, is_noise, reward in zip(pairs, runs_of(rows), noise, rows["reward"]):
            fault, expected = faults.pop("".join(pair))
            assert reward == expected and is_noise.any() == (reward == 0)
            assert fault in text_of(ids[is_noise], tokenizer)
            assert tokenizer is FAST or fault == text_of(ids[is_noise])
    printed = re.findall(r"left out (\d+) of .* records.*--seq-len 200", capsys.readouterr().out)
    assert len(faults) == sum(map(int, printed)) == num_long > 0
    assert not set(loaded.heldout["sibling"]) & set(loaded.train["sibling"])
    assert set(loaded.train["reward"][:]) == {1}


def test_only_correct_records_are_imitated_unless_all_are(tmp_path):
    """Three records a prompt, of rewards 1, 0 and one that is missing and scored."""
    rewards = [("good", 1.0), ("bad", 0.0), ("odd", None)]
    records = [dict(completion=c, reward=r, prompt=f"{n}:") for n in range(40) for c, r in rewards]
    records = [record | dict(weight=len(record["completion"])) for record in records]

    def score(prompts, completions):
        return np.array([0.6 if p[0] in "12" else 0.25 for p in prompts])

    loaded = load(write(tmp_path / "a.jsonl", records), score=score)
    assert min(loaded.train["reward"]) > 0.5
    loaded.train = loaded.records
    for (prompt, completion), row in zip(records_of(loaded.train), loaded.train, strict=True):
        missing = 0.6 if prompt[0] in "12" else 0.25
        assert row["reward"] == dict(good=1, bad=0, odd=missing)[completion]
    numbers, rows = np.arange(len(loaded.train)), (loaded.train, imitate_all(loaded.train))
    correct, everything = (load_batch(r, numbers, 3, "cpu") for r in rows)
    is_valid, is_correct_B = everything.targets_KBT != IGNORE, correct.reward_B > 0.5
    assert torch.equal(is_valid[0].sum(1), correct.completion_BT.sum(1))
    assert torch.equal(correct.targets_KBT != IGNORE, is_valid & is_correct_B[None, :, None])
    for batch in (correct, everything):  # the mean over what each imitates
        weight_N = batch.weight_BT[:, 1:][batch.targets_KBT[0, :, :-1] != IGNORE]
        assert weight_N.mean().item() == pytest.approx(1) and weight_N.std() > 0.05


RECORD = {"prompt": "a", "completion": "b"}
UNUSABLE = {  # what the message says: name and content of the file
    "cannot be read (JSONDecodeError: Expecting value: line 3": '{"text": ""}\n\n{"text":\n',
    "row 2: cannot be read (UnicodeEncodeError": '{"text": "a"}\n{"text": "\\ud83d"}\n',
    "row 1: cannot be read (ValueError: columns body, title;": [{"body": "x", "title": "y"}],
    "row 1: cannot be read (TypeError: the column text holds int 42,": [{"text": 42}],
    "all of its 2 documents are empty": [{"text": ""}, {"text": None}],
    "no training document fits --seq-len 300": [RECORD | {"prompt": p * 300} for p in "abc"],
    "row 1: cannot be read (ValueError: the reward 1.5": [RECORD | {"reward": 1.5}],
    "could not convert string to float: 'x'": [RECORD | {"reward": "x"}],
    "1 of 2 documents have no reward; --reward-model": [RECORD | {"reward": r} for r in (None, 1)],
    "the weight -0.5 is no number from 0": [RECORD | {"weight": -0.5}],
    "the weight nan is no number from 0": '{"text": "a", "weight": NaN}',
    "weights: [0, 1] is not [start, end, weight]": [RECORD | {"weights": [[0, 1]]}],
    "weights: [0, 1, 'x'] is not [start, end,": [RECORD | {"weights": [[0, 1, "x"]]}],
    "weights: [0, 1, -2] is not [start, end,": [RECORD | {"weights": [[0, 1, 3], [0, 1, -2]]}],
    "weights: [1, 1, 2] is not [start, end,": [RECORD | {"weights": [[1, 1, 2]]}],
    "weights: [0, 0.5, 2] is not [start, end,": [RECORD | {"weights": [[0, 0.5, 2]]}],
    "[0, 2, 2] is not [start, end, weight]: 1 characters": [RECORD | {"weights": [[0, 2, 2]]}],
    "give one weight a row": [{"messages": [{"role": "user"}], "weights": [[0, 1, 2]]}],
    "the weights of all training targets are 0": [RECORD | dict(weight=0, prompt=p) for p in "abc"],
    "holds one text": [{"text": "a longer text", "weights": [[0, 1, 2]]}],
    "with a reward above 0.5": [RECORD | dict(reward=0, prompt=p) for p in "abc"],
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_files_that_cannot_be_used(tmp_path, message):
    content, file = UNUSABLE[message], tmp_path / "a.jsonl"
    file.write_text(content) if isinstance(content, str) else write(file, content)
    refused(lambda: load(file, seq_len=300), f"--data {file}", message)


def test_flags_that_cannot_be_used(tmp_path, monkeypatch):
    refused(lambda: load("stdlib", seq_len=1), "--seq-len 1:")
    refused(lambda: load("stdlib", noise_frac=math.nan), "--noise-frac nan: from 0 to 1")
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    Path("tables").mkdir()
    write(tmp_path / "tables" / "a.jsonl", ["x", "y"])
    for name in ("nonesuch", "", "tables/b.jsonl"):  # an empty name is not this folder
        refused(lambda n=name: load(n), f"--data {name}: no such file")
    refused(lambda: load("tables"), "--data tables: ", "no folder of texts", "/*.jsonl")
    for name in ("a.jsonl.zst", "a.xlsx"):
        Path(name).write_text("x")
        refused(lambda n=name: load(n), f"{name}: ", "unknown kind of file; known: .jsonl")
    Path("1.csv").write_text("text\na\nb\nc\n")
    Path("2.csv").write_text('text\na\n"b\nc\n')  # a quote that does not end
    refused(lambda: load("*.csv"), "--data 2.csv: cannot be read")
