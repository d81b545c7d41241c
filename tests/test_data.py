"""From `--data` to batches: split, rows, targets, noise, cache, bad input; each against something counted another way."""

import dataclasses
import gzip
import json
import math
import re
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from common import IGNORE, Ranks, UsageError, load_tokenizer

BYTES = load_tokenizer(None)
EOS = 1  # of BYTES; byte b is token b + 3
MBPP = Path(__file__).parents[2] / "shared/data/mbpp.jsonl"


# --------------------------------------------------------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load(name, tokenizer=BYTES, seq_len=32, seed=0, noise_frac=0.0):
    return data.load_data(str(name), tokenizer, seq_len, seed, noise_frac, Ranks())


def lines_of(records):
    return "".join(json.dumps(r) + "\n" for r in records)


def write_jsonl(path, records):
    path.write_text(lines_of(records))
    return path


def write_texts(path, texts):
    return write_jsonl(path, [{"text": t} for t in texts])


def some_texts(number, seed=0):
    """Different documents of 1 to 12 lines: indented code, blank lines, characters of 1 to 4 bytes, both line ends."""
    random = np.random.default_rng(seed)
    bodies = ["def area(w, h):", "    return w * h  # é", "", "\tname = '漢字'", "print('🙂 done')", "    ", "x = [1, 2,  3]"]
    texts = []
    for n in range(number):
        lines = [f"# file {n}"] + [bodies[i] for i in random.integers(0, len(bodies), random.integers(0, 12))]
        texts.append("".join(line + ("\r\n" if n % 5 == 4 else "\n") for line in lines))
    return texts


def some_records(number, seed=0):
    random = np.random.default_rng(seed)
    return [
        {"prompt": f"{n}? " + "p" * int(random.integers(0, 9)), "completion": f"é{n}" + "c" * int(random.integers(1, 9))}
        for n in range(number)
    ]


def fast_tokenizer(bos=False, eos="<eos>", lowercase=False, trim_offsets=False):
    """A byte-level BPE tokenizer with a few merges; every variant has the same vocabulary."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    built.train_from_iterator(some_texts(40, seed=9), trainer)
    if bos:
        built.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    if trim_offsets:  # as GPT-2 and Llama 3 have it: a token's offsets are without its spaces
        built.post_processor = processors.ByteLevel(trim_offsets=True)
    if lowercase:
        built.normalizer = normalizers.Lowercase()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<bos>", eos_token=eos, pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def bytes_of_tokens(tokenizer, ids):
    """The bytes that each token stands for, special tokens none: GPT-2's table of 256 printable characters, inverted."""
    if tokenizer is BYTES:
        return [bytes([i - 3]) if i >= 3 else b"" for i in ids]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    special = set(tokenizer.all_special_tokens)
    return [b"" if t in special else bytes(table[c] for c in t) for t in tokenizer.convert_ids_to_tokens(ids)]


def token_runs(rows, column="input_ids"):
    """The values of a column, padding left out, one array a document, in order."""
    columns = rows[:]
    document = columns["document"].ravel()
    kept = document >= 0
    cuts = np.flatnonzero(np.diff(document[kept])) + 1
    return np.split(columns[column].ravel()[kept], cuts)


def texts_of(rows, tokenizer=BYTES):
    """The documents of packed rows as text: every one must end in one EOS and have none before."""
    texts = []
    for ids in token_runs(rows):
        assert ids[-1] == tokenizer.eos_token_id and (ids[:-1] != tokenizer.eos_token_id).all()
        texts.append(b"".join(bytes_of_tokens(tokenizer, ids.tolist())).decode())
    return texts


def records_of(rows, tokenizer=BYTES):
    """Prompt and completion of each row, told apart by `is_target`."""
    records = []
    for ids, document, is_target in zip(*(rows[:][c] for c in ("input_ids", "document", "is_target"))):
        parts = (ids[(document >= 0) & ~is_target], ids[is_target])
        records.append(tuple(b"".join(bytes_of_tokens(tokenizer, part.tolist())).decode() for part in parts))
    return records


def naive_targets(x_BT, document_BT, is_target_BT, num_heads):
    size, length = x_BT.shape
    targets_KBT = np.full((num_heads, size, length), IGNORE)
    for k in range(1, num_heads + 1):
        for b in range(size):
            for t in range(length):
                if t + k < length and document_BT[b, t + k] == document_BT[b, t] and is_target_BT[b, t + k]:
                    targets_KBT[k - 1, b, t] = x_BT[b, t + k]
    return targets_KBT


# ----------------------------------------------------------------------------------------------------------------- split
def test_no_heldout_text_in_training(tmp_path):
    texts = some_texts(200)
    loaded = load(write_texts(tmp_path / "a.jsonl", texts))
    train, heldout = texts_of(loaded.train), texts_of(loaded.heldout)
    assert heldout and not set(train) & set(heldout)
    assert Counter(train + heldout) == Counter(texts)
    lengths = {t: len(t.encode()) for t in texts}
    budget, used = 0.03 * sum(lengths.values()), sum(lengths[t] for t in heldout)
    assert used <= budget < used + min(lengths[t] for t in train)  # no other document would fit as well


def test_no_heldout_record_in_training(tmp_path):
    records = some_records(150)
    loaded = load(write_jsonl(tmp_path / "a.jsonl", records))
    train, heldout = records_of(loaded.train), records_of(loaded.heldout)
    assert heldout and not set(train) & set(heldout)
    assert Counter(train + heldout) == Counter((r["prompt"], r["completion"]) for r in records)


def test_no_heldout_file_of_stdlib_in_training():
    loaded = load("stdlib", seq_len=512)
    stream = b"\xff".join(bytes((i[:-1] - 3).astype(np.uint8)) for i in token_runs(loaded.train))
    stream = b"\xff" + stream + b"\xff"  # no byte of UTF-8: it stands for EOS
    heldout = [t.encode() for t in texts_of(loaded.heldout)]
    assert len(heldout) > 5 and len(stream) > 20 * sum(map(len, heldout))
    for text in heldout:
        assert b"\xff" + text + b"\xff" not in stream
        assert len(text) < 500 or text not in stream
        assert b"\r" not in text


@pytest.mark.parametrize("kind", ["text", "records"])
def test_copies_of_heldout_documents_are_dropped_from_training(tmp_path, kind):
    """Every document is there three times, one of each three is drawn, so the copies must go."""
    if kind == "text":
        documents = [{"text": t} for t in some_texts(60)] * 3
        read = texts_of
    else:
        documents = some_records(60) * 3
        read = records_of
    loaded = load(write_jsonl(tmp_path / "a.jsonl", documents))
    train, heldout = Counter(read(loaded.train)), Counter(read(loaded.heldout))
    assert heldout and not train.keys() & heldout.keys()
    assert len(train) + len(heldout) == 60
    assert set(train.values()) == {3}  # copies among the training documents stay


def test_copies_of_a_completion_under_another_prompt_stay(tmp_path):
    records = [{"prompt": f"{n:03}", "completion": "same"} for n in range(100)]
    loaded = load(write_jsonl(tmp_path / "a.jsonl", records))
    assert len(loaded.train) + len(loaded.heldout) == 100


def test_split_is_fixed_by_the_seed_alone(tmp_path):
    file = write_texts(tmp_path / "a.jsonl", some_texts(200))
    first = texts_of(load(file).heldout)
    fast = fast_tokenizer()
    assert texts_of(load(file).heldout) == first
    assert texts_of(load(file, seq_len=50, noise_frac=0.5).heldout) == first
    assert texts_of(load(file, tokenizer=fast, seq_len=17).heldout, fast) == first
    assert set(texts_of(load(file, seed=1).heldout)) != set(first)


@pytest.mark.parametrize("number, held", [(100, 3), (10, 1), (2, 1), (350, 10)])
def test_one_long_text_holds_out_its_last_lines(tmp_path, number, held):
    lines = [f"line {n} é\n" for n in range(number)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    for seed in (0, 1):
        loaded = load(tmp_path / "a.txt", seed=seed)
        assert texts_of(loaded.train) == ["".join(lines[:-held])]
        assert texts_of(loaded.heldout) == ["".join(lines[-held:])]


# ------------------------------------------------------------------------------------------------------------------ rows
@pytest.mark.parametrize("seq_len", [2, 7, 64, 5000])
def test_rows_are_the_documents_in_order_each_ended_by_eos(tmp_path, seq_len):
    texts = some_texts(300)  # more than the 256 that are tokenised at once
    loaded = load(write_texts(tmp_path / "a.jsonl", texts), seq_len=seq_len)
    heldout = set(texts_of(loaded.heldout))
    expected = b"".join(bytes(b + 3 if b < 253 else 0 for b in t.encode()) + b"\x01" for t in texts if t not in heldout)
    columns = loaded.train[:]
    assert columns["input_ids"].shape[1] == seq_len
    x, document, is_target = (columns[c].ravel() for c in ("input_ids", "document", "is_target"))
    assert x[: len(expected)].tolist() == list(expected)
    assert 0 <= len(x) - len(expected) < seq_len
    assert (x[len(expected) :] == 0).all() and (document[len(expected) :] == -1).all()
    assert is_target.tolist() == [True] * len(expected) + [False] * (len(x) - len(expected))
    ends = np.flatnonzero(x[: len(expected)] == EOS)
    assert document[: len(expected)].tolist() == np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1)).tolist()
    assert not columns["is_noise"].any()


@pytest.mark.parametrize("bos", [False, True])
def test_rows_of_a_fast_tokenizer(tmp_path, bos):
    texts, tokenizer = some_texts(60), fast_tokenizer(bos=bos)
    loaded = load(write_texts(tmp_path / "a.jsonl", texts), tokenizer=tokenizer)
    train, heldout = texts_of(loaded.train, tokenizer), texts_of(loaded.heldout, tokenizer)
    assert train == [t for t in texts if t not in heldout]
    for ids in token_runs(loaded.train):
        assert (ids == 2).tolist() == [bos] + [False] * (len(ids) - 1)
    x, document = loaded.train[-1]["input_ids"], loaded.train[-1]["document"]
    assert (x[document == -1] == tokenizer.pad_token_id).all()


def test_a_tokenizer_that_adds_eos_itself_gives_one(tmp_path):
    tokenizer, texts = fast_tokenizer(), some_texts(20)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    loaded = load(write_texts(tmp_path / "a.jsonl", texts), tokenizer=tokenizer)
    assert sorted(texts_of(loaded.train, tokenizer) + texts_of(loaded.heldout, tokenizer)) == sorted(texts)


@pytest.mark.parametrize("kind", ["text", "records"])
def test_eos_is_a_target_and_padding_is_none(tmp_path, kind):
    documents = [{"text": t} for t in some_texts(30)] if kind == "text" else some_records(30)
    rows = load(write_jsonl(tmp_path / "a.jsonl", documents), seq_len=37).train
    batch = data.load_batch(rows, np.arange(len(rows)), 1, "cpu")
    x_BT, targets_BT, document_BT = batch.x_BT.numpy(), batch.targets_KBT[0].numpy(), rows[:]["document"]
    inner = np.argwhere((x_BT == EOS) & (np.arange(37) > 0))
    assert len(inner) > 20
    for b, t in inner:
        assert targets_BT[b, t - 1] == EOS
    assert (targets_BT[document_BT == -1] == IGNORE).all()
    assert (document_BT == -1).any() and not (targets_BT == 0).any()


# --------------------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("length, num_heads", [(2, 1), (2, 5), (9, 1), (9, 4), (9, 8), (9, 9), (9, 30), (40, 6)])
def test_targets_equal_a_triple_loop(length, num_heads):
    random = np.random.default_rng(length * 100 + num_heads)
    for _ in range(20):
        x_BT = random.integers(0, 50, (3, length))
        document_BT = np.sort(random.integers(-1, 4, (3, length)), axis=1)[:, ::-1]
        is_target_BT = random.random((3, length)) < 0.7
        targets_KBT = data.make_targets(x_BT, document_BT, is_target_BT, num_heads)
        np.testing.assert_array_equal(targets_KBT, naive_targets(x_BT, document_BT, is_target_BT, num_heads))


def test_targets_of_a_case_by_hand():
    """Two documents, a prompt of one token in the second, padding at the end."""
    x_BT = np.array([[10, 11, 1, 20, 21, 1, 0]])
    document_BT = np.array([[0, 0, 0, 1, 1, 1, -1]])
    is_target_BT = np.array([[1, 1, 1, 0, 1, 1, 0]], bool)
    i = IGNORE
    head_1, head_2, head_3 = [11, 1, i, 21, 1, i, i], [1, i, i, 1, i, i, i], [i] * 7
    assert data.make_targets(x_BT, document_BT, is_target_BT, 3)[:, 0].tolist() == [head_1, head_2, head_3]


@pytest.mark.parametrize("kind", ["text", "records"])
def test_targets_of_loaded_rows_stay_in_their_document(tmp_path, kind):
    documents = [{"text": t} for t in some_texts(20)] if kind == "text" else some_records(20)
    rows = load(write_jsonl(tmp_path / "a.jsonl", documents), seq_len=29).train
    columns, num_heads = rows[:], 6
    x_BT, document_BT = columns["input_ids"], columns["document"]
    targets_KBT = data.load_batch(rows, np.arange(len(rows)), num_heads, "cpu").targets_KBT.numpy()
    np.testing.assert_array_equal(targets_KBT, naive_targets(x_BT, document_BT, columns["is_target"], num_heads))
    assert targets_KBT.dtype == np.int64 and (targets_KBT != IGNORE).any((1, 2)).all()
    for k, b, t in np.argwhere(targets_KBT != IGNORE):
        assert document_BT[b, t] == document_BT[b, t + k + 1] >= 0
        assert EOS not in x_BT[b, t : t + k + 1]  # the token stands before the end of its document


def test_load_batch_gives_the_rows_asked_for(tmp_path):
    rows = load(write_texts(tmp_path / "a.jsonl", some_texts(40)), noise_frac=0.5).train
    numbers = np.array([3, 0, -1, 3])
    batch = data.load_batch(rows, numbers, 2, "cpu")
    assert batch.rows_B.tolist() == [3, 0, -1, 3]
    assert batch.x_BT.dtype == batch.targets_KBT.dtype == torch.int64 and batch.is_noise_BT.dtype == torch.bool
    assert batch.x_BT[[0, 1, 3]].tolist() == [rows[n]["input_ids"].tolist() for n in (3, 0, 3)]
    assert batch.is_noise_BT[[0, 1, 3]].tolist() == [rows[n]["is_noise"].tolist() for n in (3, 0, 3)]
    assert batch.targets_KBT.shape == (2, 4, 32)
    assert (batch.targets_KBT[:, 2] == IGNORE).all() and (batch.targets_KBT[:, 1] != IGNORE).any()


# --------------------------------------------------------------------------------------------------------------- records
def test_completion_and_eos_are_the_targets_of_head_1(tmp_path):
    records = some_records(40)
    loaded = load(write_jsonl(tmp_path / "a.jsonl", records), seq_len=40)
    seen = []
    for rows in (loaded.train, loaded.heldout):
        batch = data.load_batch(rows, np.arange(len(rows)), 1, "cpu")
        for x_T, targets_T in zip(batch.x_BT.tolist(), batch.targets_KBT[0].tolist()):
            valid = [t for t in range(40) if targets_T[t] != IGNORE]
            completion = [targets_T[t] for t in valid]
            prompt = x_T[: valid[0] + 1]  # the last token of the prompt predicts the first of the completion
            assert valid == list(range(valid[0], valid[0] + len(valid)))
            assert completion[-1] == EOS and EOS not in completion[:-1]
            assert x_T == prompt + completion + [0] * (40 - len(prompt) - len(completion))
            seen.append(tuple(bytes(i - 3 for i in part).decode() for part in (prompt, completion[:-1])))
    assert Counter(seen) == Counter((r["prompt"], r["completion"]) for r in records)


def test_records_of_a_tokenizer_with_bos(tmp_path):
    """BOS stands before the prompt and not before the completion."""
    tokenizer, records = fast_tokenizer(bos=True), some_records(30)
    rows = load(write_jsonl(tmp_path / "a.jsonl", records), tokenizer=tokenizer, seq_len=40).train
    batch = data.load_batch(rows, np.arange(len(rows)), 1, "cpu")
    known = {r["prompt"]: r["completion"] for r in records}
    for x_T, targets_T in zip(batch.x_BT.tolist(), batch.targets_KBT[0].tolist()):
        first = next(t for t in range(40) if targets_T[t] != IGNORE)
        completion = [i for i in targets_T if i != IGNORE]
        assert x_T[0] == 2 and 2 not in x_T[1:] and completion[-1] == tokenizer.eos_token_id
        assert known[tokenizer.decode(x_T[1 : first + 1])] == tokenizer.decode(completion[:-1])
        assert completion[:-1] == tokenizer(tokenizer.decode(completion[:-1]), add_special_tokens=False)["input_ids"]


def test_long_records_are_left_out_and_this_is_said(tmp_path, capsys):
    """A record of n bytes takes n + 1 tokens: n = 19 fits into 20, n = 20 does not."""
    records = [{"prompt": f"{n:03}", "completion": "c" * (16 if n % 4 else 17)} for n in range(200)]
    loaded = load(write_jsonl(tmp_path / "a.jsonl", records), seq_len=20)
    kept = records_of(loaded.train) + records_of(loaded.heldout)
    assert sorted(kept) == [(r["prompt"], r["completion"]) for r in records if len(r["completion"]) == 16]
    said = re.findall(r"left out (\d+) of (\d+) (train|heldout) records.*--seq-len 20", capsys.readouterr().out)
    assert sum(int(lost) for lost, _, _ in said) == 50
    totals = {part: (int(lost), int(total)) for lost, total, part in said}
    assert totals["train"][1] - totals["train"][0] == len(loaded.train)


def test_nothing_is_said_where_all_records_fit(tmp_path, capsys):
    load(write_jsonl(tmp_path / "a.jsonl", some_records(30)), seq_len=40)
    assert capsys.readouterr().out == ""


def test_all_records_too_long(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", some_records(30))
    with pytest.raises(UsageError, match=rf"{re.escape(str(file))}.*--seq-len 4\b"):
        load(file, seq_len=4)


# ------------------------------------------------------------------------------------------------------------------ MBPP
def mbpp_task(number):
    """A task in the columns and line ends of MBPP."""
    tests = [f"assert f{number}({n}) == {n}" for n in range(3)]
    code = f"def f{number}(x):\r\n  return x"
    return dict(task_id=number, text=f"Write function {number}.", code=code, test_list=tests, test_setup_code="")


@pytest.mark.skipif(not MBPP.is_file(), reason="the MBPP file is not beside the project (shared/data/mbpp.jsonl)")
def test_mbpp(capsys):
    tasks = [json.loads(line) for line in MBPP.read_text(encoding="utf-8").splitlines()]
    assert [t["task_id"] for t in tasks] == list(range(1, 975)) and any("\r\n" in t["code"] for t in tasks)
    loaded = load(MBPP, seq_len=3000)
    assert "left out" not in capsys.readouterr().out
    for rows, first, last in ((loaded.train, 601, 974), (loaded.heldout, 511, 600)):
        chosen = [t for t in tasks if first <= t["task_id"] <= last]
        assert len(rows) == len(chosen)  # so 1-510 are in neither part
        targets_KBT = data.load_batch(rows, np.arange(len(rows)), 1, "cpu").targets_KBT.numpy()
        for task, targets_T, (prompt, completion) in zip(chosen, targets_KBT[0], records_of(rows)):
            solution = re.sub("\r\n?", "\n", task["code"]).strip("\n") + "\n"
            targets = targets_T[targets_T != IGNORE]
            assert targets[-1] == EOS and bytes((targets[:-1] - 3).astype(np.uint8)).decode() == solution == completion
            assert task["text"].replace("\r\n", "\n") in prompt
            assert all(test.replace("\r\n", "\n") in prompt for test in task["test_list"])
            assert "\r" not in prompt + completion


def test_mbpp_columns_give_its_own_split(tmp_path):
    tasks = [mbpp_task(n) for n in (1, 10, 11, 510, 511, 600, 601, 974)]
    loaded = load(write_jsonl(tmp_path / "a.jsonl", tasks), seq_len=400)
    assert [c for _, c in records_of(loaded.train)] == [f"def f{n}(x):\n  return x\n" for n in (601, 974)]
    assert [c for _, c in records_of(loaded.heldout)] == [f"def f{n}(x):\n  return x\n" for n in (511, 600)]
    assert loaded.prompt == records_of(loaded.heldout)[0][0]


# --------------------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("num_rows, batch_size", [(12, 4), (10, 4), (7, 3), (5, 12), (9, 1), (1, 2)])
def test_every_row_comes_once_an_epoch(num_rows, batch_size):
    steps = 4 * num_rows  # at least four epochs
    numbers = np.concatenate([data.batch_rows(num_rows, batch_size, 0, s) for s in range(steps)])
    assert len(numbers) == steps * batch_size
    whole = len(numbers) // num_rows
    epochs = numbers[: whole * num_rows].reshape(whole, num_rows)
    assert all(sorted(e) == list(range(num_rows)) for e in epochs.tolist())
    if num_rows >= 5:
        assert len({tuple(e) for e in epochs[:4].tolist()}) == 4


def test_batch_rows_is_a_pure_function():
    straight = [data.batch_rows(50, 8, 3, s).tolist() for s in range(30)]
    for s in np.random.default_rng(0).permutation(30):
        data.batch_rows(50, 8, 4, int(s))
        assert data.batch_rows(50, 8, 3, int(s)).tolist() == straight[s]
    assert straight != [data.batch_rows(50, 8, 4, s).tolist() for s in range(30)]


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 8), (1, 1), (1, 4), (2, 4), (2, 1), (4, 2), (4, 1)])
def test_batches_are_the_same_for_any_ranks_and_accumulation(tmp_path, world_size, micro_batch_size):
    rows = load(write_texts(tmp_path / "a.jsonl", some_texts(25)), noise_frac=0.3).train
    assert len(rows) % 8
    for step in (0, 1, len(rows) // 8, 40):
        whole = data.load_batch(rows, data.batch_rows(len(rows), 8, 5, step), 3, "cpu")
        shares = [data.micro_batches(rows, 8, micro_batch_size, 5, step, 3, Ranks(r, world_size)) for r in range(world_size)]
        assert {len(share) for share in shares} == {8 // (world_size * micro_batch_size)}
        parts = [batch for micro_step in zip(*shares) for batch in micro_step]
        assert {batch.x_BT.shape for batch in parts} == {(micro_batch_size, 32)}
        assert np.concatenate([batch.rows_B for batch in parts]).tolist() == whole.rows_B.tolist()
        assert torch.equal(torch.cat([batch.x_BT for batch in parts]), whole.x_BT)
        assert torch.equal(torch.cat([batch.targets_KBT for batch in parts], dim=1), whole.targets_KBT)
        assert torch.equal(torch.cat([batch.is_noise_BT for batch in parts]), whole.is_noise_BT)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_heldout_batches_have_every_row_once(tmp_path, world_size, micro_batch_size):
    texts = some_texts(400)
    loaded = load(write_texts(tmp_path / "a.jsonl", texts), seq_len=41)
    total = len(loaded.heldout)
    assert total > 4 and total % 4  # the last batch is not full
    whole = data.load_batch(loaded.heldout, np.arange(total), 3, "cpu").targets_KBT
    shares = [list(data.heldout_batches(loaded, micro_batch_size, 3, Ranks(r, world_size))) for r in range(world_size)]
    assert {len(share) for share in shares} == {math.ceil(total / (micro_batch_size * world_size))}
    seen = {}
    for batch in (b for share in shares for b in share):
        assert batch.x_BT.shape == (micro_batch_size, 41)
        for b, number in enumerate(batch.rows_B.tolist()):
            if number < 0:
                assert (batch.targets_KBT[:, b] == IGNORE).all()
            else:
                assert number not in seen
                seen[number] = batch.targets_KBT[:, b]
    assert sorted(seen) == list(range(total))
    assert torch.equal(torch.stack([seen[n] for n in range(total)], dim=1), whole)


@pytest.mark.parametrize(
    "batch_size, micro_batch_size, world_size, expected",
    [(8, 0, 1, (8, 1)), (8, 2, 1, (2, 4)), (8, 0, 2, (4, 1)), (8, 2, 2, (2, 2)), (24, 2, 4, (2, 3)), (1, 0, 1, (1, 1))],
)
def test_batch_sizes(batch_size, micro_batch_size, world_size, expected):
    assert data.batch_sizes(batch_size, micro_batch_size, world_size) == expected


@pytest.mark.parametrize(
    "batch_size, micro_batch_size, world_size, nearest",
    [(10, 4, 1, "8 or 12"), (10, 0, 4, "8 or 12"), (3, 0, 4, "4"), (7, 2, 2, "4 or 8"), (1, 2, 1, "2"), (23, 3, 4, "12 or 24")],
)
def test_batch_sizes_names_the_nearest_that_work(batch_size, micro_batch_size, world_size, nearest):
    with pytest.raises(UsageError, match=rf"--batch-size {batch_size}\b.*nearest: --batch-size {nearest}$"):
        data.batch_sizes(batch_size, micro_batch_size, world_size)
    for size in map(int, nearest.split(" or ")):
        micro, accumulation = data.batch_sizes(size, micro_batch_size, world_size)
        assert micro * accumulation * world_size == size


@pytest.mark.parametrize("batch_size, micro_batch_size", [(0, 0), (-4, 0), (4, -1)])
def test_batch_sizes_below_the_least(batch_size, micro_batch_size):
    with pytest.raises(UsageError, match=f"--batch-size {batch_size} --micro-batch-size {micro_batch_size}"):
        data.batch_sizes(batch_size, micro_batch_size, 1)


# ----------------------------------------------------------------------------------------------------------------- noise
def lines_with_noise(clean, noisy):
    """Pairs of lines without their ends, clean and after noise, and a flag for each byte of the noisy text."""
    pairs, flags = [], []
    assert len(clean) == len(noisy)
    for old, new in zip(clean.split("\n"), noisy.split("\n"), strict=True):
        body_old, body_new = old.removesuffix("\r"), new.removesuffix("\r")
        assert len(body_old) == len(body_new) and old[len(body_old) :] == new[len(body_new) :]
        pairs.append((body_old, body_new))
        flags += [body_old != body_new] * len(body_new.encode()) + [False] * (len(new) - len(body_new) + 1)
    return pairs, flags[:-1]  # the last line has no end


TOKENIZERS = {
    "bytes": BYTES,
    "fast": fast_tokenizer(),
    "fast with BOS": fast_tokenizer(bos=True),
    "fast with trimmed offsets": fast_tokenizer(trim_offsets=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_is_noise_flags_the_tokens_of_replaced_characters(tmp_path, name):
    """Which lines changed is seen by comparing texts; a token is noise if one of its bytes lies in such a line."""
    file, tokenizer = write_texts(tmp_path / "a.jsonl", some_texts(150)), TOKENIZERS[name]
    clean = load(file, tokenizer)
    noisy = load(file, tokenizer, noise_frac=0.3)
    flagged = 0
    train = zip(texts_of(clean.train, tokenizer), token_runs(noisy.train), token_runs(noisy.train, "is_noise"), strict=True)
    for text, ids, is_noise in train:
        pieces = bytes_of_tokens(tokenizer, ids.tolist())
        _, flags = lines_with_noise(text, b"".join(pieces).decode())
        ends = np.cumsum([len(p) for p in pieces])
        expected = [any(flags[end - len(p) : end]) for p, end in zip(pieces, ends)]
        assert is_noise.tolist() == expected
        flagged += sum(expected)
    assert flagged > 100


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("parity", [0, 1])
def test_is_noise_where_tokens_are_spaces(name, parity):
    """Every second line is noise; some tokens are spaces alone, or a line end and the spaces after it."""
    tokenizer, lines = (
        TOKENIZERS[name],
        ["é  x \n", "     b  \n", "\n", "  7   \n", "    return w\n", " \n", "漢 \n", "        ~ "],
    )
    marks = [int(n % 2 == parity and c != "\n") for n, line in enumerate(lines) for c in line]
    ((ids, is_noise),) = data.encode(tokenizer, ["".join(lines)], True, [np.array(marks)])
    pieces = bytes_of_tokens(tokenizer, ids.tolist())
    flags = [m for m, c in zip(marks, "".join(lines)) for _ in c.encode()]
    ends = np.cumsum([len(p) for p in pieces])
    assert any(not p.strip() for p in pieces) and ends[-1] == len(flags)
    assert is_noise.tolist() == [any(flags[end - len(p) : end]) for p, end in zip(pieces, ends)]


def test_share_of_noisy_lines_and_what_noise_keeps(tmp_path):
    texts = some_texts(600)
    file = write_texts(tmp_path / "a.jsonl", texts)
    clean, noisy = load(file), load(file, noise_frac=0.3)
    changed = total = 0
    for old, new in zip(texts_of(clean.train), texts_of(noisy.train), strict=True):
        pairs, _ = lines_with_noise(old, new)  # line ends and the length of each line stay
        for body_old, body_new in pairs:
            if not body_old.strip():
                assert body_old == body_new
            else:
                total += 1
                changed += body_old != body_new
                assert body_old == body_new or re.fullmatch("[ -~]+", body_new)
    assert total > 2000
    assert abs(changed / total - 0.3) < 4 * math.sqrt(0.3 * 0.7 / total)


def test_noise_from_none_to_all(tmp_path):
    file = write_texts(tmp_path / "a.jsonl", some_texts(100))
    clean, noisy = load(file), load(file, noise_frac=1.0)
    assert not clean.train[:]["is_noise"].any()
    for old, new, is_noise in zip(texts_of(clean.train), texts_of(noisy.train), token_runs(noisy.train, "is_noise"), strict=True):
        pairs, _ = lines_with_noise(old, new)
        assert all((body_old != body_new) == bool(body_old.strip()) for body_old, body_new in pairs)
        assert is_noise.sum() == sum(len(body_new) for body_old, body_new in pairs if body_old.strip())


def test_heldout_rows_have_no_noise(tmp_path):
    file = write_texts(tmp_path / "a.jsonl", some_texts(200))
    clean, noisy = load(file), load(file, noise_frac=1.0)
    assert not noisy.heldout[:]["is_noise"].any() and noisy.train[:]["is_noise"].any()
    for column in ("input_ids", "document", "is_target"):
        np.testing.assert_array_equal(noisy.heldout[:][column], clean.heldout[:][column])
    for name in ("heldout_bytes", "heldout_tokens", "order0_bits_per_byte", "zlib_bits_per_byte", "prompt"):
        assert getattr(noisy, name) == getattr(clean, name)


def test_noise_is_in_completions_and_not_in_prompts(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", some_records(60))
    clean, noisy = load(file, seq_len=60), load(file, seq_len=60, noise_frac=1.0)
    for (prompt, old), (prompt_noisy, new), row in zip(
        records_of(clean.train), records_of(noisy.train), noisy.train, strict=True
    ):
        assert prompt == prompt_noisy and old != new and len(old) == len(new)
        assert (row["is_noise"] == (row["is_target"] & (row["input_ids"] != EOS))).all()


def test_noise_is_a_function_of_seed_and_document(tmp_path):
    tasks = [mbpp_task(n) for n in (511, *range(601, 640))]  # a split that the seed does not move
    file, fast = write_jsonl(tmp_path / "a.jsonl", tasks), fast_tokenizer()
    first = records_of(load(file, seq_len=300, noise_frac=0.5).train)
    assert records_of(load(file, seq_len=310, noise_frac=0.5).train) == first
    assert records_of(load(file, fast, seq_len=300, noise_frac=0.5).train, fast) == first
    assert records_of(load(file, seq_len=300, noise_frac=0.5, seed=1).train) != first
    text, flags = data._with_noise("one line\nanother\n", 1.0, (0, 3))
    again, flags_again = data._with_noise("one line\nanother\n", 1.0, (0, 3))
    assert text == again and flags.tolist() == flags_again.tolist() == [1] * 8 + [0] + [1] * 7 + [0]
    assert len({data._with_noise("one line\nanother\n", 1.0, key)[0] for key in ((0, 3), (0, 4), (1, 3))}) == 3


@pytest.mark.parametrize("noise_frac", [-0.1, 1.01, float("nan")])
def test_noise_out_of_range(tmp_path, noise_frac):
    file = write_texts(tmp_path / "a.jsonl", some_texts(9))
    with pytest.raises(UsageError, match=f"--noise-frac {noise_frac}"):
        load(file, noise_frac=noise_frac)


def test_noise_needs_a_tokenizer_with_offsets(tmp_path):
    """A slow tokenizer reads text without noise, and is refused with it."""
    vocabulary = {c: n for n, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcd"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    slow = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    assert not slow.is_fast
    file = write_texts(tmp_path / "a.jsonl", ["abcd", "dcba", "aabb", "ccdd"])
    assert len(token_runs(load(file, slow).train)) == 3
    with pytest.raises(UsageError, match="--noise-frac"):
        load(file, slow, noise_frac=0.5)


# ----------------------------------------------------------------------------------------------------------------- bytes
def test_bytes_equal_the_tokenizers_own(tmp_path):
    texts = [*some_texts(30), "é漢🙂\x00\x7f", "\u2028 \x0c \x85", " leading and trailing \n\n", "a\r\nb\tc"]
    loaded = load(write_texts(tmp_path / "a.jsonl", texts))
    own = [[*BYTES(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]
    runs = [ids.tolist() for rows in (loaded.train, loaded.heldout) for ids in token_runs(rows)]
    assert sorted(runs) == sorted(own)


def test_markup_in_text_is_read_as_bytes(tmp_path):
    texts = ["a</s>b", "<pad>", "<unk> </s>", "</s>", "plain"]
    assert BYTES("a</s>b", add_special_tokens=False)["input_ids"] == [100, EOS, 101]  # what must not happen
    loaded = load(write_texts(tmp_path / "a.jsonl", texts))
    runs = [ids.tolist() for rows in (loaded.train, loaded.heldout) for ids in token_runs(rows)]
    assert sorted(runs) == sorted([b + 3 for b in text.encode()] + [EOS] for text in texts)


# ------------------------------------------------------------------------------------------------------------ yardsticks
def test_yardsticks_by_hand(tmp_path):
    """The last of ten lines is held out: a, b, newline, of which a comes twice."""
    (tmp_path / "a.txt").write_text("first\n" * 9 + "aab\n")
    loaded = load(tmp_path / "a.txt")
    assert (loaded.heldout_bytes, loaded.heldout_tokens) == (4, 5)
    assert loaded.order0_bits_per_byte == pytest.approx(1.5)  # 1/2 * 1 + 2 * 1/4 * 2 bits
    assert loaded.zlib_bits_per_byte == pytest.approx(8 * 12 / 4)  # header 2, block 10 - 4, checksum 4 bytes


@pytest.mark.parametrize("kind", ["text", "records"])
@pytest.mark.parametrize("name", ["bytes", "fast with BOS"])
def test_yardsticks_equal_another_computation(tmp_path, kind, name):
    tokenizer = TOKENIZERS[name]
    documents = [{"text": t} for t in some_texts(200)] if kind == "text" else some_records(200)
    loaded = load(write_jsonl(tmp_path / "a.jsonl", documents), tokenizer, seq_len=50)
    if kind == "text":
        texts = texts_of(loaded.heldout, tokenizer)
        assert loaded.prompt and any(text.startswith(loaded.prompt) for text in texts)
    else:
        prompts, texts = zip(*records_of(loaded.heldout, tokenizer))
        assert loaded.prompt in prompts
    assert len(texts) > 2
    stream = "".join(texts).encode()
    assert loaded.heldout_bytes == len(stream)
    assert loaded.heldout_tokens == sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) + 1 for t in texts)
    counts = Counter(stream).values()
    assert loaded.order0_bits_per_byte == pytest.approx(sum(n * math.log2(len(stream) / n) for n in counts) / len(stream))
    packer = zlib.compressobj(9)
    packed = packer.compress(stream) + packer.flush()
    assert zlib.decompress(packed) == stream and loaded.zlib_bits_per_byte == pytest.approx(8 * len(packed) / len(stream))


# ----------------------------------------------------------------------------------------------------------------- cache
def cached(cache):
    """The files of tokenised rows, with what changes when one is written again."""
    return {f.name: (f.stat().st_mtime_ns, f.stat().st_ino) for f in (cache / "wmtp").iterdir()}


def rows_file(loaded):
    return Path(loaded.train.cache_files[0]["filename"]).name


def assert_same_data(one, other):
    for field in dataclasses.fields(data.Data):
        if field.name not in ("train", "heldout"):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    for rows, others in ((one.train, other.train), (one.heldout, other.heldout)):
        assert rows.column_names == others.column_names
        for column in rows.column_names:
            np.testing.assert_array_equal(rows[:][column], others[:][column])


@pytest.mark.parametrize("kind", ["text", "records"])
def test_the_second_load_reads_the_same_files(tmp_path, cache, capsys, monkeypatch, kind):
    """No document is looked at again: neither those of the first load nor what it says of them can differ."""
    records = [{"text": t} for t in some_texts(60)] if kind == "text" else some_records(60)
    file = write_jsonl(tmp_path / "a.jsonl", records)
    first, said = load(file, seq_len=20), capsys.readouterr().out
    assert ("left out" in said) == (kind == "records")
    files = cached(cache)
    assert sorted(Path(name).suffix for name in files) == [".arrow", ".arrow", ".json"]
    with monkeypatch.context() as patch:
        patch.setattr(data, "_split", None)
        patch.setattr(datasets.Dataset, "iter", None)
        second = load(file, seq_len=20)
    assert cached(cache) == files and capsys.readouterr().out == said
    assert_same_data(first, second)
    assert {Path(f["filename"]).parent for f in second.train.cache_files} == {cache / "wmtp"}


@pytest.mark.parametrize("what", ["rows gone", "record gone", "record cut"])
def test_what_was_made_of_the_documents_is_made_again_where_a_part_is_gone(tmp_path, cache, what):
    file = write_texts(tmp_path / "a.jsonl", some_texts(60))
    first, files = load(file), set(cached(cache))
    (record,) = (cache / "wmtp").glob("*.json")
    if what == "rows gone":
        (cache / "wmtp" / rows_file(first)).unlink()
    elif what == "record gone":
        record.unlink()
    else:
        record.write_bytes(record.read_bytes()[:-20])
    assert_same_data(load(file), first)
    assert set(cached(cache)) == files and json.loads(record.read_text())["figures"]["prompt"] == first.prompt


def test_another_text_length_noise_or_tokenizer_is_another_file(tmp_path, cache):
    texts = some_texts(60)
    file = write_texts(tmp_path / "a.jsonl", texts)
    first, files = load(file), set(cached(cache))
    seen = [rows_file(first)]
    for options in (
        dict(seq_len=33),
        dict(noise_frac=0.5),
        dict(tokenizer=fast_tokenizer()),
        dict(noise_frac=0.25),
        dict(seed=1),
    ):
        loaded = load(file, **options)
        seen.append(rows_file(loaded))
        assert set(cached(cache)) - files
        assert (loaded.fingerprint == first.fingerprint) == ("seed" not in options)  # of the documents and their split
        assert (loaded.tokenizer_fingerprint == first.tokenizer_fingerprint) == ("tokenizer" not in options)
        files = set(cached(cache))
    write_texts(file, [t.replace("file", "File") for t in texts])
    changed = load(file)
    assert set(cached(cache)) - files and all("File" in t for t in texts_of(changed.train) + texts_of(changed.heldout))
    seen.append(rows_file(changed))
    assert len(set(seen)) == len(seen) and changed.fingerprint != first.fingerprint


def test_the_seed_of_the_noise_is_in_the_name_of_the_file(tmp_path, cache):
    """On a split that the seed does not move: without noise the seed changes nothing, with noise it does."""
    file = write_jsonl(tmp_path / "a.jsonl", [mbpp_task(n) for n in range(511, 640)])
    first, files = rows_file(load(file, seq_len=300)), cached(cache).items()
    assert rows_file(load(file, seq_len=300, seed=1)) == first and files <= cached(cache).items()
    assert len(list((cache / "wmtp").glob("*.arrow"))) == 2
    noisy = load(file, seq_len=300, noise_frac=0.5)
    other = load(file, seq_len=300, noise_frac=0.5, seed=1)
    assert len({first, rows_file(noisy), rows_file(other)}) == 3 and len(list((cache / "wmtp").glob("*.arrow"))) == 4
    assert records_of(noisy.train) != records_of(other.train)


@pytest.mark.parametrize("variant", [dict(bos=True), dict(eos="<bos>"), dict(lowercase=True)], ids=["bos", "eos", "lowercase"])
def test_a_tokenizer_of_the_same_vocabulary_is_another_file(tmp_path, variant):
    """What makes tokens of a text is more than the vocabulary: rows of another tokenizer are never read."""
    file, tokenizer, other = write_texts(tmp_path / "a.jsonl", some_texts(60)), fast_tokenizer(), fast_tokenizer(**variant)
    assert tokenizer.get_vocab() == other.get_vocab()
    first, second = load(file, tokenizer), load(file, other)
    special = dict(bos=([2], [1]), eos=([], [2]), lowercase=([], [1]))[next(iter(variant))]
    for ids, text in zip(token_runs(second.train), texts_of(first.train, tokenizer)):
        assert ids.tolist() == special[0] + other(text, add_special_tokens=False)["input_ids"] + special[1]
    assert first.tokenizer_fingerprint != second.tokenizer_fingerprint and rows_file(first) != rows_file(second)


def test_what_a_killed_build_left_is_not_read(tmp_path, cache):
    file = write_texts(tmp_path / "a.jsonl", some_texts(60))
    expected = load(file).train[:]["input_ids"]
    for whole in list((cache / "wmtp").iterdir()):
        whole.with_suffix(".4711.tmp").write_bytes(whole.read_bytes()[:-200])
        whole.unlink()
    np.testing.assert_array_equal(load(file).train[:]["input_ids"], expected)
    assert len(list((cache / "wmtp").glob("*.arrow"))) == 2


def test_a_build_that_fails_leaves_no_data(tmp_path, cache):
    """A text that cannot be tokenised stops the build half way; a later build starts from the beginning."""

    class Failing(transformers.PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            if broken and any("file 290\n" in t for t in texts):
                raise KeyboardInterrupt
            return super().__call__(texts, **options)

    broken = True
    tokenizer = Failing(tokenizer_object=fast_tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    file = write_texts(tmp_path / "a.jsonl", [f"file {n}\n" for n in range(300)])
    with pytest.raises(KeyboardInterrupt):
        load(file, tokenizer)
    assert not list((cache / "wmtp").glob("*.arrow"))
    broken = False
    loaded = load(file, tokenizer)
    both = texts_of(loaded.train, tokenizer) + texts_of(loaded.heldout, tokenizer)
    assert sorted(both) == sorted(f"file {n}\n" for n in range(300))


# ------------------------------------------------------------------------------------------------------------- bad input
def test_no_such_preset():
    with pytest.raises(UsageError, match=r"--data nonesuch: .*stdlib, mbpp"):
        load("nonesuch")


def test_no_such_file(tmp_path):
    with pytest.raises(UsageError, match=rf"--data {re.escape(str(tmp_path))}/none.jsonl: no such file"):
        load(tmp_path / "none.jsonl")


def test_columns_missing(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "title": "y", "prompt": "z"}] * 3)
    with pytest.raises(UsageError, match=rf"--data {re.escape(str(file))}: .*body, prompt, title.*needs text"):
        load(file)


UNUSABLE = {  # what is wrong: file name, content
    "empty jsonl": ("a.jsonl", ""),
    "empty text": ("a.txt", ""),
    "broken json": ("a.jsonl", '{"text": "a"}\n{"text": \n'),
    "one line": ("a.txt", "one line\n"),
    "one record": ("a.jsonl", lines_of([{"prompt": "a", "completion": "b"}])),
    "texts empty": ("a.jsonl", lines_of([{"text": ""}] * 3)),
    "completions empty": ("a.jsonl", lines_of([{"prompt": "a", "completion": ""}] * 3)),
    "one text twice": ("a.jsonl", lines_of([{"text": "same"}] * 2)),
    "numbers for texts": ("a.jsonl", lines_of([{"text": n} for n in range(1, 4)])),
    "a prompt missing": ("a.jsonl", lines_of([*some_records(9), {"prompt": None, "completion": "b"}])),
    "no held-out task": ("a.jsonl", lines_of([mbpp_task(n) for n in range(601, 610)])),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_files_that_cannot_be_used(tmp_path, what):
    """One line that names the flag and its value, whatever is wrong with the file."""
    name, content = UNUSABLE[what]
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=rf"--data {re.escape(str(tmp_path / name))}\b") as caught:
        load(tmp_path / name, seq_len=400)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seq_len", [1, 0, -5])
def test_rows_too_short(tmp_path, seq_len):
    with pytest.raises(UsageError, match=f"--seq-len {seq_len}"):
        load(write_texts(tmp_path / "a.jsonl", some_texts(9)), seq_len=seq_len)


# ----------------------------------------------------------------------------------------------------- other file types
def write_as(folder, suffix, column):
    texts = ['say "hi", twice\n', *some_texts(30)]
    table, file = datasets.Dataset.from_dict({"id": range(len(texts)), column: texts}), folder / f"a.b{suffix}"
    if suffix == ".parquet":
        table.to_parquet(file)
    elif suffix == ".csv":
        table.to_csv(file)
    else:
        lines = lines_of(table).encode()
        file.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)
    return file, texts


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl.gz", ".jsonl", ".json"])
@pytest.mark.parametrize("column", ["text", "content"])
def test_file_types(tmp_path, suffix, column):
    file, texts = write_as(tmp_path, suffix, column)
    loaded = load(file)
    heldout = texts_of(loaded.heldout)
    assert texts_of(loaded.train) == [t for t in texts if t not in heldout]
    assert heldout == [t for t in texts if t in heldout]


def test_empty_texts_are_passed_over(tmp_path):
    texts = ["", *some_texts(20), "", None]
    loaded = load(write_texts(tmp_path / "a.jsonl", texts))
    assert sorted(texts_of(loaded.train) + texts_of(loaded.heldout)) == sorted(filter(None, texts))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_records_of_other_file_types(tmp_path, suffix):
    records = some_records(40)
    table, file = datasets.Dataset.from_list([r | {"source": "x"} for r in records]), tmp_path / f"a{suffix}"
    (table.to_parquet if suffix == ".parquet" else table.to_csv)(file)
    loaded = load(file)
    both = records_of(loaded.train) + records_of(loaded.heldout)
    assert Counter(both) == Counter((r["prompt"], r["completion"]) for r in records)


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a", "a.txt.gz"])
def test_anything_else_is_one_text(tmp_path, name):
    text = "".join(some_texts(30)).replace("\r\n", "\n")
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    loaded = load(tmp_path / name)
    (train,), (heldout,) = texts_of(loaded.train), texts_of(loaded.heldout)
    assert train + heldout == text and heldout.count("\n") == round(0.03 * text.count("\n"))


def test_a_folder_of_text_files_is_split_by_file(tmp_path):
    (tmp_path / "texts").mkdir()
    texts = [t.replace("\r\n", "\n") for t in some_texts(40)]
    for n, text in enumerate(texts):
        name = ("train", "test", "notes")[n % 3]  # names from which datasets would guess splits
        (tmp_path / "texts" / f"{name}-{n:02}.txt").write_text(text, encoding="utf-8")
    loaded = load(tmp_path / "texts")
    assert sorted(texts_of(loaded.train) + texts_of(loaded.heldout)) == sorted(texts)
