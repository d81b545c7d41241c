"""From `--data` to batches, each fact against something counted another way."""

import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import bugs
import data
from common import IGNORE, Ranks, UsageError, load_tokenizer

BYTES = load_tokenizer(None)
EOS = 1  # of BYTES; byte b is token b + 3
MBPP = Path(__file__).parents[2] / "shared/data/mbpp.jsonl"


# ------------------------------------------------------------------------------------------ helpers
@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load(name, tokenizer=BYTES, seq_len=32, seed=0, noise_frac=0.0, **options):
    return data.load_data(str(name), tokenizer, seq_len, seed, noise_frac, Ranks(), **options)


def write(path, records):
    """Records as JSON lines; texts become records of one text."""
    records = [r if isinstance(r, dict) else {"text": r} for r in records]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def some_texts(number, seed=0):
    """Documents of 1 to 12 lines: indented, blank, characters of 1 to 4 bytes, both line ends."""
    random = np.random.default_rng(seed)
    bodies = [
        "def f(w, h):",
        "    return w  # é",
        "",
        "\tname = '漢字'",
        "print('🙂')",
        "    ",
        "x,  3",
    ]
    texts = []
    for n in range(number):
        lines = [f"# file {n}", *random.choice(bodies, random.integers(0, 12))]
        texts.append("".join(line + ("\r\n" if n % 5 == 4 else "\n") for line in lines))
    return texts


def some_records(number):
    return [
        {"prompt": f"{n}?" + "p" * (n % 7), "completion": f"é{n}" + "c" * (n % 9)}
        for n in range(number)
    ]


def fast_tokenizer(bos=False, trim_offsets=False):
    """A byte-level BPE tokenizer with a few merges."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<eos>", "<bos>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    options = dict(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator(some_texts(40, 9), trainers.BpeTrainer(vocab_size=340, **options))
    if bos:
        bos = dict(single="<bos> $A", special_tokens=[("<bos>", 2)])
        built.post_processor = processors.TemplateProcessing(**bos)
    if trim_offsets:  # as GPT-2 and Llama 3 have it: a token's offsets are without its spaces
        built.post_processor = processors.ByteLevel(trim_offsets=True)
    names = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **names)


TOKENIZERS = {
    "bytes": BYTES,
    "fast": fast_tokenizer(),
    "fast with BOS": fast_tokenizer(bos=True),
    "fast with trimmed offsets": fast_tokenizer(trim_offsets=True),
}


def bytes_of(tokenizer, ids):
    """The bytes of each token, none of special ones: GPT-2's table of 256 characters, inverted."""
    if tokenizer is BYTES:
        return [bytes([i - 3]) if i >= 3 else b"" for i in ids]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [b"" if t in ("<pad>", "<eos>", "<bos>") else bytes(table[c] for c in t) for t in tokens]


def runs_of(rows, column="input_ids"):
    """The values of a column without padding, one array a document, in order."""
    columns = rows[:]
    document = columns["document"].ravel()
    cuts = np.flatnonzero(np.diff(document[document >= 0])) + 1
    return np.split(columns[column].ravel()[document >= 0], cuts)


def texts_of(rows, tokenizer=BYTES):
    """The documents of packed rows as text: every one must end in one EOS and have none before."""
    for ids in runs_of(rows):
        assert np.flatnonzero(ids == tokenizer.eos_token_id).tolist() == [len(ids) - 1]
    return [b"".join(bytes_of(tokenizer, ids.tolist())).decode() for ids in runs_of(rows)]


def records_of(rows, tokenizer=BYTES):
    """Prompt and completion of each row, told apart by `is_target`."""
    records = []
    for ids, document, is_target in zip(
        *(rows[:][c] for c in ("input_ids", "document", "is_target"))
    ):
        parts = (ids[(document >= 0) & ~is_target], ids[is_target])
        records.append(tuple(b"".join(bytes_of(tokenizer, p.tolist())).decode() for p in parts))
    return records


def documents(kind, number):
    return some_texts(number) if kind == "text" else some_records(number)


# -------------------------------------------------------------------------------------------- split
def numbers_heldout(texts, seed=0, **columns):
    dataset = datasets.Dataset.from_dict(
        {"text" if not columns else "completion": texts, **columns}
    )
    train_N, heldout_N = data._split(dataset, seed, "x")
    assert len(train_N) and len(heldout_N)
    assert sorted([*train_N, *heldout_N]) == list(range(len(texts)))
    return heldout_N.tolist()


def test_no_length_is_favoured_among_heldout_documents():
    """Over 150 seeds: 200 documents, most of them short, as files are."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 200).astype(int) + 4
    texts = [f"{n:04}".ljust(length, "x") for n, length in enumerate(lengths)]
    drawn, shares = np.zeros(200), []
    for seed in range(150):
        heldout = numbers_heldout(texts, seed)
        drawn[heldout] += 1
        shares.append(lengths[heldout].sum() / lengths.sum())
        assert shares[-1] >= 0.03
        assert min(lengths[heldout].sum() - lengths[n] for n in heldout) < 0.03 * lengths.sum()
    mean_length = (drawn * lengths).sum() / drawn.sum()
    assert mean_length == pytest.approx(lengths.mean(), rel=0.08)
    quartiles = np.array_split(np.argsort(lengths), 4)
    chances = [drawn[quartile].mean() / 150 for quartile in quartiles]
    assert max(chances) < 1.35 * min(chances)


def test_split_depends_on_no_order_and_moves_little_with_more_documents():
    texts = [f"{n}" * 20 for n in range(1000, 1400)]
    heldout = {texts[n] for n in numbers_heldout(texts)}
    assert {texts[::-1][n] for n in numbers_heldout(texts[::-1])} == heldout
    assert {texts[n] for n in numbers_heldout(texts, seed=1)} != heldout
    more = texts + [f"{n}" * 20 for n in range(2000, 2040)]
    assert len(heldout ^ {more[n] for n in numbers_heldout(more)}) <= 4


def test_groups_and_copies_stay_on_one_side():
    texts = [f"{n // 3}" * 9 for n in range(600)]  # three copies of each
    held = Counter(texts[n] for n in numbers_heldout(texts))
    assert set(held.values()) == {3}
    texts, group = [f"{n}" * 9 for n in range(600)], [n % 60 for n in range(600)]
    columns = dict(prompt=["p"] * 600, group=group)
    heldout = numbers_heldout(texts, **columns)
    held = Counter(group[n] for n in heldout)
    assert set(held.values()) == {10} and 6 <= len(held) <= 7  # 10 % of the bytes
    order = np.random.default_rng(0).permutation(600)  # nor does the order of records
    moved = dict(prompt=["p"] * 600, group=[group[n] for n in order])
    again = numbers_heldout([texts[n] for n in order], **moved)
    assert {group[order[n]] for n in again} == held.keys()
    others = [g if g in held else g + 100 for g in group]  # names of groups say nothing
    assert numbers_heldout(texts, prompt=["p"] * 600, group=others) == heldout


@pytest.mark.parametrize("kind", ["text", "records"])
def test_heldout_documents_are_those_of_the_seed_and_never_trained_on(tmp_path, kind):
    material = documents(kind, 200)
    file, read = write(tmp_path / "a.jsonl", material), texts_of if kind == "text" else records_of
    first = load(file, seq_len=50)
    train, heldout = Counter(read(first.train)), Counter(read(first.heldout))
    assert heldout and not train.keys() & heldout.keys()
    expected = material if kind == "text" else [(r["prompt"], r["completion"]) for r in material]
    assert train + heldout == Counter(expected)
    fast = TOKENIZERS["fast"]
    other = load(file, fast, seq_len=70, noise_frac=0.5)
    assert Counter(read(other.heldout, fast)) == heldout
    assert (
        other.heldout_fingerprint == first.heldout_fingerprint
        and other.fingerprint == first.fingerprint
    )
    assert other.tokenizer_fingerprint != first.tokenizer_fingerprint
    another = load(file, seq_len=50, seed=1)
    assert another.heldout_fingerprint != first.heldout_fingerprint
    changed = next(n for n, text in enumerate(expected) if text in train)
    write(file, [d for n, d in enumerate(material) if n != changed])
    less = load(file, seq_len=50)
    assert less.fingerprint != first.fingerprint  # of training text too
    assert less.heldout_fingerprint == first.heldout_fingerprint


def test_halves_of_stdlib(monkeypatch):
    texts = some_texts(300)
    monkeypatch.setattr(data, "stdlib_texts", lambda: texts + texts[:9])
    whole, a, b = (
        load(f"stdlib{half}", seed=seed) for half, seed in (("", 0), (":a", 3), (":b", 4))
    )
    assert Counter(texts_of(a.train)) + Counter(texts_of(b.train)) == Counter(texts_of(whole.train))
    assert not set(texts_of(a.train)) & set(texts_of(b.train))
    assert texts_of(a.heldout) == texts_of(b.heldout) == texts_of(whole.heldout)


@pytest.mark.parametrize("number, held", [(100, 3), (10, 1), (2, 1), (350, 10)])
def test_one_long_text_holds_out_its_last_lines(tmp_path, number, held):
    lines = [f"line {n} é\n" for n in range(number)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    loaded = load(tmp_path / "a.txt", seed=number % 2)
    assert texts_of(loaded.train) == ["".join(lines[:-held])]
    assert texts_of(loaded.heldout) == ["".join(lines[-held:])]


# --------------------------------------------------------------------------------- rows and targets
@pytest.mark.parametrize("seq_len", [2, 7, 64, 5000])
def test_rows_are_the_documents_in_order_each_ended_by_eos(tmp_path, seq_len):
    """Against a packer of one list; more documents than are tokenised at once."""
    texts = [*some_texts(600), "a</s>b<pad>", "\u2028 \x0c \x00"]  # markup is text too
    loaded = load(write(tmp_path / "a.jsonl", texts), seq_len=seq_len)
    heldout = set(texts_of(loaded.heldout))
    tokens, number, ends = [], [], 0
    for text in texts:
        if text not in heldout:
            ids = [b + 3 for b in text.encode()] + [EOS]
            tokens += ids
            number += [ends] * len(ids)
            ends += 1
    missing = -len(tokens) % seq_len
    columns = loaded.train[:]
    assert columns["input_ids"].shape[1] == seq_len and not columns["is_noise"].any()
    assert columns["input_ids"].ravel().tolist() == tokens + [0] * missing
    assert columns["document"].ravel().tolist() == number + [-1] * missing
    assert columns["is_target"].ravel().tolist() == [True] * len(tokens) + [False] * missing


@pytest.mark.parametrize("adds", ["nothing", "BOS", "EOS"])
def test_rows_of_a_fast_tokenizer(tmp_path, adds):
    """A BOS that the tokenizer adds stands once, before a prompt; its own EOS is not doubled."""
    tokenizer = fast_tokenizer(bos=adds == "BOS")
    if adds == "EOS":
        template = dict(single="$A <eos>", special_tokens=[("<eos>", 1)])
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**template)
    texts, records = some_texts(60), some_records(60)
    rows = load(write(tmp_path / "a.jsonl", texts), tokenizer).train
    assert texts_of(rows, tokenizer) == [t for t in texts if t in set(texts_of(rows, tokenizer))]
    for ids in runs_of(rows):
        assert np.flatnonzero(ids == 2).tolist() == [0] * (adds == "BOS")
    rows = load(write(tmp_path / "b.jsonl", records), tokenizer, seq_len=60).train
    assert {tuple(r.values()) for r in records} >= set(records_of(rows, tokenizer))
    for ids in runs_of(rows):
        assert np.flatnonzero(ids == 2).tolist() == [0] * (adds == "BOS")
        assert np.flatnonzero(ids == 1).tolist() == [len(ids) - 1]


def naive_targets(x_BT, document_BT, is_target_BT, num_heads):
    size, length = x_BT.shape
    targets_KBT = np.full((num_heads, size, length), IGNORE)
    for k in range(1, num_heads + 1):
        for b in range(size):
            for t in range(length - k):
                if document_BT[b, t + k] == document_BT[b, t] and is_target_BT[b, t + k]:
                    targets_KBT[k - 1, b, t] = x_BT[b, t + k]
    return targets_KBT


@pytest.mark.parametrize("length, num_heads", [(2, 1), (2, 5), (9, 4), (9, 9), (9, 30), (40, 6)])
def test_targets_equal_a_triple_loop(length, num_heads):
    random = np.random.default_rng(length * 100 + num_heads)
    for _ in range(20):
        x_BT = random.integers(0, 50, (3, length))
        document_BT = np.sort(random.integers(-1, 4, (3, length)), axis=1)[:, ::-1]
        is_target_BT = random.random((3, length)) < 0.7
        args = (x_BT, document_BT, is_target_BT, num_heads)
        np.testing.assert_array_equal(data.make_targets(*args), naive_targets(*args))


def test_targets_of_a_case_by_hand():
    """Two documents, a prompt of one token in the second, padding at the end."""
    x_BT, document_BT = np.array([[10, 11, 1, 20, 21, 1, 0]]), np.array([[0, 0, 0, 1, 1, 1, -1]])
    targets_KBT = data.make_targets(x_BT, document_BT, np.array([[1, 1, 1, 0, 1, 1, 0]], bool), 3)
    i = IGNORE
    expected = [[11, 1, i, 21, 1, i, i], [1, i, i, 1, i, i, i], [i] * 7]
    assert targets_KBT[:, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["text", "records"])
def test_targets_of_loaded_rows(tmp_path, kind):
    """They stay in their document; EOS is a target, padding and prompts are none."""
    rows = load(write(tmp_path / "a.jsonl", documents(kind, 30)), seq_len=37).train
    columns = rows[:]
    batch = data.load_batch(rows, np.arange(len(rows)), 6, "cpu")
    targets_KBT, x_BT = batch.targets_KBT.numpy(), columns["input_ids"]
    expected = naive_targets(x_BT, columns["document"], columns["is_target"], 6)
    np.testing.assert_array_equal(targets_KBT, expected)
    inner = np.argwhere((x_BT == EOS) & (np.arange(37) > 0))
    assert len(inner) > 15 and all(targets_KBT[0, b, t - 1] == EOS for b, t in inner)
    assert (columns["document"] == -1).any() and not (targets_KBT == 0).any()


def test_long_records_are_left_out_and_counted(tmp_path, capsys):
    """A record of n bytes takes n + 1 tokens: n = 19 fits into 20, n = 20 does not."""
    records = [dict(prompt=f"{n:03}", completion="c" * (16 if n % 4 else 17)) for n in range(200)]
    loaded = load(write(tmp_path / "a.jsonl", records), seq_len=20)
    assert len(loaded.train) + len(loaded.heldout) == 150
    pattern = r"left out (\d+) of (\d+) (?:train|heldout) records.*--seq-len 20"
    counts = np.array(re.findall(pattern, capsys.readouterr().out), int)
    assert counts.sum(0)[0] == 50 and counts[0, 1] - counts[0, 0] == len(loaded.train)


# ------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("num_rows, batch_size", [(12, 4), (10, 4), (7, 3), (5, 12), (1, 2)])
def test_batches_are_a_function_of_seed_and_step_and_every_row_comes_once_an_epoch(
    num_rows, batch_size
):
    steps = range(4 * num_rows)
    straight = [data.batch_rows(num_rows, batch_size, 3, s).tolist() for s in steps]
    for s in np.random.default_rng(0).permutation(steps):
        data.batch_rows(num_rows, batch_size, 4, int(s))
        assert data.batch_rows(num_rows, batch_size, 3, int(s)).tolist() == straight[s]
    whole = len(steps) * batch_size // num_rows
    epochs = np.concatenate(straight)[: whole * num_rows].reshape(whole, num_rows).tolist()
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert num_rows < 5 or len(set(map(tuple, epochs[:4]))) == 4


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2)])
def test_batches_are_the_same_for_any_ranks_and_accumulation(
    tmp_path, world_size, micro_batch_size
):
    rows = load(write(tmp_path / "a.jsonl", some_texts(25)), noise_frac=0.3).train
    assert len(rows) % 8
    ranks = [Ranks(rank, world_size) for rank in range(world_size)]
    for step in (0, 1, len(rows) // 8, 40):
        whole = data.load_batch(rows, data.batch_rows(len(rows), 8, 5, step), 3, "cpu")
        shares = [data.micro_batches(rows, 8, micro_batch_size, 5, step, 3, r) for r in ranks]
        parts = [batch for micro_step in zip(*shares, strict=True) for batch in micro_step]
        assert {batch.x_BT.shape for batch in parts} == {(micro_batch_size, 32)}
        assert np.concatenate([b.rows_B for b in parts]).tolist() == whole.rows_B.tolist()
        for name, dim in (("x_BT", 0), ("targets_KBT", 1), ("is_noise_BT", 0), ("reward_B", 0)):
            joined = torch.cat([getattr(b, name) for b in parts], dim)
            assert torch.equal(joined, getattr(whole, name))


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 1), (1, 4), (2, 4), (3, 4)])
def test_heldout_batches_have_every_row_once(tmp_path, world_size, micro_batch_size):
    loaded = load(write(tmp_path / "a.jsonl", some_texts(400)), seq_len=41)
    total = len(loaded.heldout)
    whole = data.load_batch(loaded.heldout, np.arange(total), 3, "cpu").targets_KBT
    ranks = [Ranks(rank, world_size) for rank in range(world_size)]
    shares = [list(data.heldout_batches(loaded, micro_batch_size, 3, r)) for r in ranks]
    assert {len(s) for s in shares} == {math.ceil(total / (micro_batch_size * world_size))}
    numbers = np.concatenate([b.rows_B for share in shares for b in share])
    targets = torch.cat([b.targets_KBT for share in shares for b in share], 1)
    assert sorted(numbers[numbers >= 0]) == list(range(total))
    assert (targets[:, numbers < 0] == IGNORE).all()
    assert torch.equal(targets[:, numbers >= 0], whole[:, numbers[numbers >= 0]])


@pytest.mark.parametrize("sizes, expected", [
    ((8, 0, 1), (8, 1)), ((8, 2, 1), (2, 4)), ((8, 0, 2), (4, 1)), ((24, 2, 4), (2, 3)),
    ((10, 4, 1), "nearest: --batch-size 8 or 12"), ((3, 0, 4), "nearest: --batch-size 4"),
    ((23, 3, 4), "nearest: --batch-size 12 or 24"), ((0, 0, 1), "at least 1"),
    ((4, -1, 1), "at least 1"),
])  # fmt: skip
def test_batch_sizes(sizes, expected):
    if isinstance(expected, tuple):
        assert data.batch_sizes(*sizes) == expected
    else:
        with pytest.raises(UsageError, match=rf"--batch-size {sizes[0]}\b.*{expected}"):
            data.batch_sizes(*sizes)


# -------------------------------------------------------------------------------------------- noise
@pytest.mark.parametrize("name", TOKENIZERS)
def test_noise_is_flagged_where_lines_differ(tmp_path, name):
    """Which lines changed is seen by comparing texts; a token is noise if one of its bytes is."""
    file, tokenizer = write(tmp_path / "a.jsonl", some_texts(300)), TOKENIZERS[name]
    clean, noisy = (load(file, tokenizer, noise_frac=f) for f in (0.0, 0.3))
    total, changed = 0, 0
    flags_of = runs_of(noisy.train, "is_noise")
    for text, ids, is_noise in zip(
        texts_of(clean.train, tokenizer), runs_of(noisy.train), flags_of
    ):
        pieces, flags = bytes_of(tokenizer, ids.tolist()), []
        for old, new in zip(text.split("\n"), b"".join(pieces).decode().split("\n"), strict=True):
            body = new.removesuffix("\r")
            is_changed = old != new
            assert len(old) == len(new) and old[len(body) :] == new[len(body) :]  # line ends stay
            assert not is_changed or (old.strip() and re.fullmatch("[ -~]+", body))
            flags += [is_changed] * len(body.encode()) + [False] * (len(new) - len(body) + 1)
            total, changed = total + bool(old.strip()), changed + is_changed
        ends = np.cumsum([len(p) for p in pieces])
        assert is_noise.tolist() == [any(flags[e - len(p) : e]) for p, e in zip(pieces, ends)]
    assert abs(changed / total - 0.3) < 4 * math.sqrt(0.3 * 0.7 / total) and total > 1000
    assert not noisy.heldout[:]["is_noise"].any()
    np.testing.assert_array_equal(noisy.heldout[:]["input_ids"], clean.heldout[:]["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("parity", [0, 1])
def test_noise_flags_of_tokens_that_are_spaces(name, parity):
    tokenizer = TOKENIZERS[name]
    lines = [
        "é  x \n",
        "     b  \n",
        "\n",
        "  7   \n",
        "    return w\n",
        " \n",
        "漢 \n",
        "        ~ ",
    ]
    marks = [int(n % 2 == parity and c != "\n") for n, line in enumerate(lines) for c in line]
    ((ids, is_noise),) = data.encode(tokenizer, ["".join(lines)], True, [np.array(marks)])
    pieces = bytes_of(tokenizer, ids.tolist())
    flags = [m for m, c in zip(marks, "".join(lines)) for _ in c.encode()]
    ends = np.cumsum([len(p) for p in pieces])
    assert is_noise.tolist() == [any(flags[e - len(p) : e]) for p, e in zip(pieces, ends)]


def test_noise_is_in_completions_and_a_function_of_seed_and_document(tmp_path):
    file = write(tmp_path / "a.jsonl", [mbpp_task(n) for n in (511, *range(601, 640))])
    clean, noisy = load(file, seq_len=300), load(file, seq_len=300, noise_frac=0.5)
    first = records_of(noisy.train)
    assert [p for p, _ in records_of(clean.train)] == [p for p, _ in first]
    assert records_of(clean.train) != first and len(set(c[-9:] for _, c in first)) > 5
    for options in (dict(seq_len=310), dict(tokenizer=TOKENIZERS["fast"], seq_len=300)):
        loaded = load(file, noise_frac=0.5, **options)
        assert records_of(loaded.train, options.get("tokenizer", BYTES)) == first
    assert records_of(load(file, seq_len=300, noise_frac=0.5, seed=1).train) != first


# ----------------------------------------------------------------------------- yardsticks and cache
def test_yardsticks_by_hand(tmp_path):
    """The last of ten lines is held out: a, b, newline, of which a comes twice."""
    (tmp_path / "a.txt").write_text("first\n" * 9 + "aab\n")
    loaded = load(tmp_path / "a.txt")
    assert (loaded.heldout_bytes, loaded.heldout_tokens, loaded.prompt) == (4, 5, "aab\n")
    assert loaded.order0_bits_per_byte == pytest.approx(1.5)  # 1/2 * 1 + 2 * 1/4 * 2 bits
    assert loaded.zlib_bits_per_byte == pytest.approx(8 * 12 / 4)  # header 2, block 6, checksum 4


@pytest.mark.parametrize("kind", ["text", "records"])
def test_the_cache_is_read_again_and_never_for_other_rows(tmp_path, cache, kind):
    material = documents(kind, 60)
    file = write(tmp_path / "a.jsonl", material)
    fast, bos = fast_tokenizer(), fast_tokenizer(bos=True)
    assert fast.get_vocab() == bos.get_vocab()  # the template differs alone
    variants = [{}, dict(seq_len=61), dict(noise_frac=0.5), dict(noise_frac=0.25), dict(seed=1),
                dict(noise_frac=0.5, seed=1), dict(tokenizer=fast),
                dict(tokenizer=bos)]  # fmt: skip
    rows = [load(file, **{"seq_len": 60, **v}).train for v in variants]
    files = {f: f.stat().st_mtime_ns for f in (cache / "wmtp").iterdir()}
    assert len({r.cache_files[0]["filename"] for r in rows}) == len(variants)
    for before, variant in zip(rows, variants):
        again = load(file, **{"seq_len": 60, **variant}).train
        assert again.cache_files == before.cache_files
        np.testing.assert_array_equal(again[:]["input_ids"], before[:]["input_ids"])
    assert {f: f.stat().st_mtime_ns for f in (cache / "wmtp").iterdir()} == files
    write(file, material[:30])
    assert load(file, seq_len=60).train.cache_files != rows[0].cache_files


# ----------------------------------------------------------------------------------- files and MBPP
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl.gz", ".json"])
@pytest.mark.parametrize("kind", ["text", "content", "records"])
def test_file_types(tmp_path, suffix, kind):
    material = some_records(40) if kind == "records" else [{kind: t} for t in some_texts(40)]
    table, file = (
        datasets.Dataset.from_list([r | {"id": 1} for r in material]),
        tmp_path / f"a.b{suffix}",
    )
    if suffix in (".parquet", ".csv"):
        (table.to_parquet if suffix == ".parquet" else table.to_csv)(file)
    else:
        lines = "".join(json.dumps(r) + "\n" for r in material).encode()
        file.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)
    loaded, read = load(file, seq_len=60), records_of if kind == "records" else texts_of
    both = Counter(read(loaded.train) + read(loaded.heldout))
    assert both == Counter(tuple(r.values()) if kind == "records" else r[kind] for r in material)


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.txt.gz", "folder"])
def test_anything_else_is_text(tmp_path, name):
    texts = [t.replace("\r\n", "\n") for t in some_texts(40)]
    whole = "".join(texts)
    if name == "folder":  # names from which datasets would guess splits
        (tmp_path / name).mkdir()
        for n, text in enumerate(texts):
            (tmp_path / name / f"{('train', 'test')[n % 2]}-{n}.txt").write_text(text)
    else:
        (tmp_path / name).write_bytes(
            gzip.compress(whole.encode()) if ".gz" in name else whole.encode()
        )
    loaded = load(tmp_path / name)
    both = texts_of(loaded.train) + texts_of(loaded.heldout)
    assert sorted(both) == sorted(texts) if name == "folder" else "".join(both) == whole


def mbpp_task(number):
    code = f"def f{number}(x):\r\n  y = x\r\n  return y + {number}"
    tests = [f"assert f{number}({n}) == {n}" for n in range(3)]
    return dict(task_id=number, text=f"Write function {number}.", code=code, test_list=tests)


@pytest.mark.skipif(not MBPP.is_file(), reason="the MBPP file is not beside the project")
def test_mbpp():
    tasks = {t["task_id"]: t for t in map(json.loads, MBPP.read_text().splitlines())}
    loaded = load(MBPP, seq_len=3000)
    for rows, numbers in ((loaded.train, range(601, 975)), (loaded.heldout, range(511, 601))):
        for task, (prompt, completion) in zip(
            map(tasks.get, numbers), records_of(rows), strict=True
        ):
            tests = "\n".join(task["test_list"])
            published = (  # 2108.07732, figure 1
                f"You are an expert Python programmer, and here is your task: {task['text']} "
                f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
            )
            assert prompt == re.sub("\r\n?", "\n", published)
            assert completion == re.sub("\r\n?", "\n", task["code"]).strip("\n") + "\n"


# ------------------------------------------------------------------------------ records and rewards
@pytest.fixture(scope="module")
def siblings():
    """Pairs of records, right and wrong, of every tenth source file."""
    records = bugs.stdlib_bugs(data.stdlib_texts()[::10])
    return list(zip(records[::2], records[1::2]))


def test_siblings_differ_by_one_fault_that_changes_the_code(siblings):
    assert len(siblings) > 300
    for right, wrong in siblings:
        assert (right["reward"], wrong["reward"]) == (1, 0)
        assert all(right[k] == wrong[k] for k in ("prompt", "group", "sibling"))
        code = [compile(r["prompt"] + r["completion"], "", "exec") for r in (right, wrong)]
        assert code[0].replace(co_linetable=b"") != code[1].replace(co_linetable=b"")
        start, end = wrong["fault_start"], wrong["fault_end"]
        assert (right["fault_start"], right["fault_end"]) == (-1, -1)
        assert 0 <= start < end <= len(wrong["completion"])
        assert right["completion"].startswith(wrong["completion"][:start])
        if wrong["kind"] != "dropped statement" or end > start + 1:  # all that differs lies inside
            assert right["completion"].endswith(wrong["completion"][end:])
    kinds = "operator,comparison,wrong name,constant,negated condition,dropped statement"
    assert {wrong["kind"] for _, wrong in siblings} == {*kinds.split(","), "swapped arguments"}


def test_a_fault_is_whole_words_or_the_character_after_a_gap():
    assert bugs.fault_span("    return abcd + 1\n", "    return abce + 1\n") == (11, 15)
    assert bugs.fault_span("    a()\n    b()\n", "    b()\n") == (4, 5)


def test_no_length_and_no_position_tells_the_outcome(siblings):
    lengths = np.array([[len(r["completion"]) for r in pair] for pair in siblings])
    change = lengths[:, 1] - lengths[:, 0]
    assert abs((change > 0).sum() - (change < 0).sum()) <= 5 and abs(change.mean()) < 3
    is_right = np.tile([1, 0], len(lengths))
    assert roc_auc_score(is_right, lengths.ravel()) == pytest.approx(0.5, abs=0.02)


def test_mutations_without_effect_are_no_faults():
    same = ("def f(a):\n    a()\n    return None\n", "def f(a):\n\n    a()\n")
    assert bugs.code_of(same[0]) == bugs.code_of(same[1]) != bugs.code_of("def f(a):\n    a(1)\n")
    assert bugs.stdlib_bugs(["def f():\n    return g(1.5, 1.5)\n"]) == []
    assert len(bugs.stdlib_bugs(["def f():\n    return g(1.5, 2.5)\n"])) == 2
    nonlocal_name = "def f():\n    nonlocal x\n    return g(1.5, x)\n"
    assert bugs.stdlib_bugs([nonlocal_name, "def broken(:\n"]) == []


def test_heldout_records_go_with_their_rows(monkeypatch):
    texts = data.stdlib_texts()[::40]
    monkeypatch.setattr(data, "stdlib_texts", lambda: texts)
    loaded = load("stdlib-bugs", seq_len=256)
    for row, record in zip(loaded.heldout, loaded.heldout_records, strict=True):
        completion = bytes((row["input_ids"][row["is_target"]][:-1] - 3).tolist()).decode()
        assert completion == record["completion"]
        assert (row["reward"], row["sibling"]) == (record["reward"], record["sibling"])
    assert not {r["sibling"] for r in loaded.heldout_records} & set(loaded.train["sibling"])
    correct = [r["completion"] for r in loaded.heldout_records if r["reward"] == 1]
    assert loaded.heldout_bytes == sum(len(c.encode()) for c in correct)
    assert load("stdlib-bugs", seq_len=256).heldout_records == loaded.heldout_records


def judged(number):
    """Three records a prompt, of rewards 1, 0 and 0.25."""
    records = [(f"{n}:", f"{n} {reward}", reward) for n in range(number) for reward in (1, 0, 0.25)]
    return [dict(zip(("prompt", "completion", "reward"), record)) for record in records]


def test_rewards_tags_and_whom_to_imitate(tmp_path):
    file = write(tmp_path / "a.jsonl", judged(40))
    loaded, tagged = load(file), load(file, tagged=True)
    prompts = [{p for p, _ in records_of(rows)} for rows in (loaded.train, loaded.heldout)]
    assert all(prompts) and not prompts[0] & prompts[1]
    for rows, plain, is_heldout in (
        (tagged.train, loaded.train, False),
        (tagged.heldout, loaded.heldout, True),
    ):
        for (prompt, text), (before, _), row in zip(
            records_of(rows), records_of(plain), rows, strict=True
        ):
            assert row["reward"] == float(text.split()[1])
            assert (
                prompt
                == ("# right\n" if is_heldout or row["reward"] > 0.5 else "# wrong\n") + before
            )
    numbers = np.arange(12)
    correct, everything = (
        data.load_batch(loaded.train, numbers, 3, "cpu", w) for w in ("correct", "all")
    )
    is_valid = everything.targets_KBT != IGNORE
    assert torch.equal(is_valid[0].sum(1), correct.completion_BT.sum(1))
    assert torch.equal(
        correct.targets_KBT != IGNORE, is_valid & (correct.reward_B > 0.5)[None, :, None]
    )


def test_records_without_reward_are_scored(tmp_path):
    records = [r if n % 3 else r | {"reward": None} for n, r in enumerate(judged(40))]
    file = write(tmp_path / "a.jsonl", records)
    loaded = load(
        file, score=lambda prompts, completions: np.array([1 - len(c) / 10 for c in completions])
    )
    rewards = sorted(
        loaded.train["reward"][:].tolist() + [r["reward"] for r in loaded.heldout_records]
    )
    expected = [
        1 - len(r["completion"]) / 10 if r["reward"] is None else r["reward"] for r in records
    ]
    assert rewards == pytest.approx(sorted(expected))


@pytest.mark.parametrize("location", ["2", "2,3", "[2]", "2-3", 2, [2, 3], "9", "", None])
def test_condefects(location):
    """Lines end with a line feed alone: Python's splitlines() would count a form feed too."""
    pair = dict(
        task="t", correct="a = 1\n", faulty="a = '\x0c'\nb = 3\nc = 4", fault_location=location
    )
    right, wrong = data.read_pairs(datasets.Dataset.from_list([pair]))
    assert (right["reward"], wrong["reward"], right["fault_start"]) == (1, 0, -1)
    fault = wrong["completion"][wrong["fault_start"] : wrong["fault_end"]]
    assert fault == "b = 3\n" if "2" in str(location) else wrong["fault_start"] == -1


def test_code_contests():
    """As many wrong as right programs, those in Python 3; columns or a list of solutions."""
    table = dict(language=[3, 2, 3], solution=["a", "b", "c"])
    listed = [dict(language=n, solution=text) for n, text in zip(*table.values())]
    for right in (table, listed):
        wrong = dict(language=[3, 3, 3], solution=["x", "y", "z"])
        problem = dict(description="d", solutions=right, incorrect_solutions=wrong)
        records = data.read_pairs(datasets.Dataset.from_list([problem]))
        assert [(r["completion"], r["reward"]) for r in records] == [
            ("a", 1),
            ("x", 0),
            ("c", 1),
            ("y", 0),
        ]


# ---------------------------------------------------------------------------------------- bad input
LONG, RECORD = {"text": "t" * 300}, {"prompt": "a", "completion": "b"}
UNUSABLE = {  # what the message says: file name, content
    "cannot be loaded": ("a.jsonl", '{"text": "a"}\n{"text": \n'),
    "columns body, title; needs text": ("a.jsonl", [{"body": "x", "title": "y"}]),
    "holds 1 text": ("a.jsonl", ["same", "same"]),
    "holds 0 text": ("a.jsonl", ["", ""]),
    "text holds something else": ("a.jsonl", [{"text": 1}, {"text": 2}]),
    "prompt holds something else": ("a.jsonl", [dict(prompt=p, completion="b") for p in ("a", None)]),
    "no document left for the heldout": ("a.jsonl", [mbpp_task(n) for n in range(601, 610)]),
    "no document left for the train": ("a.txt", "one line\n"),
    "no train record fits into --seq-len 300": ("a.jsonl", [mbpp_task(n) | LONG for n in (511, 601)]),
    "record 1 has the reward 1.5; from 0 to 1": ("a.jsonl", [RECORD | {"reward": 1.5}]),
    "reward nan.*--reward-model": ("a.jsonl", [RECORD | {"reward": None}]),
    "reward holds something else": ("a.jsonl", [RECORD | {"reward": "good"}]),
    "no train record has a reward above": ("a.jsonl", [r | {"reward": 0.5} for r in judged(9)]),
    "no such file": ("none.jsonl", None),
}  # fmt: skip


@pytest.mark.parametrize("message", UNUSABLE)
def test_files_that_cannot_be_used(tmp_path, message):
    name, content = UNUSABLE[message]
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content:
        write(tmp_path / name, content)
    file = re.escape(str(tmp_path / name))
    with pytest.raises(UsageError, match=rf"^--data {file}.*{message}") as caught:
        load(tmp_path / name, seq_len=300)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag, options", [
    ("--seq-len 1:", dict(seq_len=1)), ("--noise-frac -0.1:", dict(noise_frac=-0.1)),
    ("--noise-frac nan:", dict(noise_frac=float("nan"))), ("--data nonesuch: no such file", {}),
    ("--noise-frac: needs a fast tokenizer", dict(noise_frac=0.5, tokenizer="slow")),
])  # fmt: skip
def test_flags_out_of_range(tmp_path, flag, options):
    (tmp_path / "vocab.json").write_text(
        json.dumps({c: n for n, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcd"])})
    )
    if options.get("tokenizer") == "slow":
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
        options = options | {"tokenizer": tokenizer}
    name = (
        "nonesuch"
        if "nonesuch" in flag
        else write(tmp_path / "a.jsonl", ["abcd", "dcba", "aabb", "ccdd"])
    )
    with pytest.raises(UsageError, match=re.escape(flag)):
        load(name, **options)
