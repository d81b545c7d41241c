"""From `--data` to batches, each fact against something counted another way."""

import functools
import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import roc_auc_score
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing

import common
from common import IGNORE, Ranks, load_batch, micro_batches
from conftest import bytes_tokenizer, refused, write_lines

BYTES = bytes_tokenizer()
MBPP = Path(__file__).parents[2] / "shared/data/mbpp.jsonl"
both_kinds = pytest.mark.parametrize("kind", ["text", "records"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load(name, tokenizer=BYTES, seq_len=32, seed=0, noise_frac=0.0, **options):
    return common.load_data(str(name), tokenizer, seq_len, seed, noise_frac, Ranks(), **options)


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


def records_of(rows, tokenizer=BYTES):
    """Prompt and completion of each row, separated by `is_target`."""
    text = functools.partial(text_of, tokenizer=tokenizer)
    pairs = zip(runs_of(rows), runs_of(rows, "is_target"))
    return [(text(ids[~is_target]), text(ids[is_target])) for ids, is_target in pairs]


def numbers_heldout(texts, seed=0, **columns):
    columns["completion" if columns else "text"] = texts
    train_N, heldout_N = common._split(datasets.Dataset.from_dict(columns), seed, "x")
    assert sorted([*train_N, *heldout_N]) == list(range(len(texts)))
    return heldout_N.tolist()


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


def test_split_depends_on_no_order_and_moves_little_with_more_documents():
    texts = [f"{n}" * 20 for n in range(1000, 1400)]
    heldout = {texts[n] for n in numbers_heldout(texts)}
    assert {texts[::-1][n] for n in numbers_heldout(texts[::-1])} == heldout
    assert {texts[n] for n in numbers_heldout(texts, seed=1)} != heldout
    more = texts + [f"{n}" * 20 for n in range(2000, 2040)]
    assert len(heldout ^ {more[n] for n in numbers_heldout(more)}) <= 4


def test_groups_and_copies_stay_on_one_side():
    texts = [f"{n // 3}" * 9 for n in range(600)]  # three copies of each
    assert set(Counter(texts[n] for n in numbers_heldout(texts)).values()) == {3}
    texts, group = [f"{n}" * 9 for n in range(600)], [n % 60 for n in range(600)]
    held = Counter(group[n] for n in numbers_heldout(texts, prompt=["p"] * 600, group=group))
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


@pytest.mark.parametrize("tokenizer", [BYTES, FAST], ids=["bytes", "fast"])
def test_noise_is_flagged_where_lines_differ(tmp_path, tokenizer):
    """Which lines changed is seen by comparing texts: flagged tokens are these, all others not."""
    file = write(tmp_path / "a.jsonl", some_texts(300))
    clean, noisy = (load(file, tokenizer, noise_frac=f) for f in (0.0, 0.3))
    texts, documents, total, changed = texts_of(clean.train, tokenizer), runs_of(noisy.train), 0, 0
    for text, ids, is_noise in zip(texts, documents, runs_of(noisy.train, "is_noise"), strict=True):
        noise, rest = "", ""
        lines = text.splitlines(keepends=True), text_of(ids, tokenizer).splitlines(keepends=True)
        for old, new in zip(*lines, strict=True):
            body, is_changed = new.rstrip("\r\n") if old != new else "", old != new
            assert len(old) == len(new) and new.endswith(old[len(body) :])  # line ends stay
            assert not is_changed or (old.strip() and re.fullmatch("[ -~]+", body))
            noise, rest = noise + body, rest + new[len(body) :]
            total, changed = total + bool(old.strip()), changed + is_changed
        assert text_of(ids[is_noise], tokenizer) == noise
        assert text_of(ids[~is_noise], tokenizer) == rest
        assert np.flatnonzero(ids == tokenizer.bos_token_id).tolist() == [0] * (tokenizer is FAST)
    assert abs(changed / total - 0.3) < 4 * math.sqrt(0.3 * 0.7 / total) and total > 1000
    assert not noisy.heldout[:]["is_noise"].any()


def test_noise_is_in_completions_and_a_function_of_seed_and_document(tmp_path):
    file = write(tmp_path / "a.jsonl", [mbpp_task(n) for n in (511, *range(601, 640))])
    clean, noisy = load(file, seq_len=300), load(file, seq_len=300, noise_frac=0.5)
    first = records_of(noisy.train)
    assert [p for p, _ in records_of(clean.train)] == [p for p, _ in first]
    assert records_of(clean.train) != first
    other = load(file, FAST, 310, noise_frac=0.5).train
    assert records_of(other, FAST) == first
    assert records_of(load(file, seq_len=300, noise_frac=0.5, seed=1).train) != first


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
    write(file, some_texts(59))
    assert load(file).train.cache_files != rows[0].cache_files


@pytest.mark.parametrize("name", ["a.parquet", "a.b.jsonl.gz", "folder"])
def test_documents_of_a_file_or_a_folder(tmp_path, name):
    texts, file = [text.replace("\r\n", "\n") for text in some_texts(40)], tmp_path / name
    table = datasets.Dataset.from_dict({"id": [1] * 40, "content": texts})
    if name == "folder":  # names from which datasets would guess splits
        file.mkdir()
        for n, text in enumerate(texts):
            (file / f"{('train', 'test')[n % 2]}-{n}.txt").write_text(text)
    else:
        (table.to_parquet if name == "a.parquet" else table.to_json)(file)
    loaded = load(file)
    assert Counter(texts_of(loaded.train) + texts_of(loaded.heldout)) == Counter(texts)


@pytest.mark.parametrize("name, number, held", [("a.txt", 2, 1), ("a.py.gz", 350, 10)])
def test_any_other_file_is_one_text_and_holds_out_its_last_lines(tmp_path, name, number, held):
    lines, file = [f"line {n} é\n" for n in range(number)], tmp_path / name
    whole = "".join(lines).encode()
    file.write_bytes(gzip.compress(whole) if ".gz" in name else whole)
    loaded = load(file)
    assert texts_of(loaded.train) == ["".join(lines[:-held])]
    assert texts_of(loaded.heldout) == ["".join(lines[-held:])]
    text = "".join(lines[-held:]).encode()
    assert (loaded.heldout_bytes, loaded.heldout_tokens) == (len(text), len(text) + 1)
    order0 = -sum(math.log2(text.count(byte) / len(text)) for byte in text) / len(text)
    assert loaded.order0_bits_per_byte == pytest.approx(order0)


def mbpp_task(number):
    code = f"def f{number}(x):\r\n  y = x\r\n  return y + {number}"
    tests = [f"assert f{number}({n}) == {n}" for n in range(3)]
    return dict(task_id=number, text=f"Write function {number}.", code=code, test_list=tests)


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
    records = common.stdlib_bugs(common.stdlib_texts()[::20])
    siblings = list(zip(records[::2], records[1::2]))
    for right, wrong in siblings:
        assert (right["reward"], wrong["reward"]) == (1, 0)
        assert all(right[k] == wrong[k] for k in ("prompt", "group", "sibling"))
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
    assert common.stdlib_bugs(["def f():\n    return g(1.5)\n"]) == []  # nothing to break


def test_heldout_records_go_with_their_rows_and_long_ones_are_left_out(monkeypatch, capsys):
    texts = common.stdlib_texts()[::40]
    monkeypatch.setattr(common, "stdlib_texts", lambda: texts)
    loaded, records = load("stdlib-bugs", seq_len=200), common.stdlib_bugs(texts)
    for row, record in zip(loaded.heldout, loaded.heldout_records, strict=True):
        assert text_of(row["input_ids"][row["is_target"]]) == record["completion"]
        assert (row["reward"], row["sibling"]) == (record["reward"], record["sibling"])
    assert not {r["sibling"] for r in loaded.heldout_records} & set(loaded.train["sibling"])
    num_long = sum(len((r["prompt"] + r["completion"]).encode()) > 199 for r in records)  # and EOS
    printed = re.findall(r"left out (\d+) of .* records.*--seq-len 200", capsys.readouterr().out)
    assert sum(map(int, printed)) == num_long
    assert len(loaded.records) + len(loaded.heldout) == len(records) - num_long
    assert set(loaded.train["reward"][:]) == {1}


def test_only_correct_records_are_imitated_unless_all_are(tmp_path):
    """Three records a prompt, of rewards 1, 0 and one that is missing and scored."""
    rewards = [("good", 1.0), ("bad", 0.0), ("odd", None)]
    records = [dict(completion=c, reward=r, prompt=f"{n}:") for n in range(40) for c, r in rewards]

    def score(prompts, completions):
        return np.array([0.6 if p[0] in "12" else 0.25 for p in prompts])

    loaded = load(write(tmp_path / "a.jsonl", records), score=score)
    for (prompt, completion), row in zip(records_of(loaded.train), loaded.train, strict=True):
        missing = 0.6 if prompt[0] in "12" else 0.25
        assert row["reward"] == dict(good=1, bad=0, odd=missing)[completion]
    options = (loaded.train, np.arange(len(loaded.train)), 3, "cpu")
    correct, everything = (load_batch(*options, train_on) for train_on in ("correct", "all"))
    is_valid, is_correct_B = everything.targets_KBT != IGNORE, correct.reward_B > 0.5
    assert torch.equal(is_valid[0].sum(1), correct.completion_BT.sum(1))
    assert torch.equal(correct.targets_KBT != IGNORE, is_valid & is_correct_B[None, :, None])


RECORD = {"prompt": "a", "completion": "b"}
UNUSABLE = {  # what the message says: content of the file
    "cannot be loaded": '{"text": "a"}\n{"text": \n',
    "columns body, title; needs text": [{"body": "x", "title": "y"}],
    "part (no record fits --seq-len 300)": [RECORD | {"prompt": p * 300} for p in "abc"],
    "record 1 has the reward 1.5; from 0 to 1": [RECORD | {"reward": 1.5}],
    "the reward nan; from 0 to 1 (--reward-model": [RECORD | {"reward": None}],
    "no training record has a reward above 0.5": [RECORD | dict(reward=0, prompt=p) for p in "abc"],
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_files_that_cannot_be_used(tmp_path, message):
    content, file = UNUSABLE[message], tmp_path / "a.jsonl"
    if isinstance(content, str):
        file.write_text(content)
    else:
        write(file, content)
    refused(lambda: load(file, seq_len=300), f"--data {file}", message)


def test_flags_out_of_range():
    refused(lambda: load("stdlib", seq_len=1), "--seq-len 1:")
    refused(lambda: load("stdlib", noise_frac=math.nan), "--noise-frac nan:")
    refused(lambda: load("nonesuch"), "--data nonesuch: no such file")
