"""From what `--data` names to batches: documents, held-out split, noise, tokens, packed rows, targets.

Everything here is a function of its arguments: the documents held out of (data, seed), the noise of (seed, document),
the rows of a step of (seed, step). So there is no iterator to save, and any number of ranks sees the same batches.

Shapes: B batch, T positions, K heads, N rows or tokens.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import torch

import bugs
import outcomes
from common import IGNORE, UsageError, first_line


@dataclasses.dataclass
class Data:
    """Packed rows of `seq_len` tokens, memory-mapped, and what was measured on the held-out documents.

    Columns of `train` and `heldout`: `input_ids`, `document` (number of the document a token is of, -1 padding),
    `is_target` (False in prompts and padding), `is_noise` (True where `--noise-frac` put it).
    """

    train: object
    heldout: object
    fingerprint: str  # of the documents and their split
    tokenizer_fingerprint: str  # of all that makes tokens of text
    heldout_fingerprint: str  # of the held-out rows alone: where it is the same, held-out figures compare
    heldout_bytes: int  # UTF-8 bytes of held-out target text
    heldout_tokens: int  # tokens of the same text, end-of-sequence tokens included
    order0_bits_per_byte: float  # entropy of the byte frequencies of that text
    zlib_bits_per_byte: float  # the same text as one stream through zlib level 9
    prompt: str  # the beginning of a held-out document
    heldout_records: object = None  # of data with outcomes: the record of each held-out row, in order


PRESETS = ("stdlib", "mbpp", "stdlib-bugs", "stdlib:a", "stdlib:b")


def load_data(name, tokenizer, seq_len, seed, noise_frac, ranks, reward_model="", tagged=False):
    """Read, split by document, tokenise once into a cache, and memory-map what `--data` names.

    Args:
        name: a preset, a file or URL that `datasets` reads (.jsonl, .json, .parquet, .csv; anything else is text),
            or a hub name `owner/name` (its split `train`). Columns: `text` or `content`; or `prompt` and `completion`.
        seed: fixes which documents are held out: in shuffled order, as many as fit into 3 % of the bytes (at most
            4 MB). MBPP keeps its own split: training on tasks 601-974, held out 511-600, 11-510 left for evaluation.
            `stdlib:a` and `stdlib:b` train on one half each of what `stdlib` trains on with seed 0, and hold out the
            same as it, whatever the seed: for a reference model that has seen nothing of what it scores or is judged on.
        noise_frac: share of the non-blank training lines replaced by random printable characters.
        reward_model, tagged: of records with outcomes, see `outcomes.py`. Their rows have the columns `reward` and `sibling`
            too; 10 % of the bytes are held out, siblings together, and held-out figures are of the correct ones.

    Raises:
        UsageError: nothing there, columns missing, no document left that fits.
    """
    load = functools.partial(_load_data, name, tokenizer, seq_len, seed, noise_frac, reward_model, tagged, ranks.device)
    with ranks.first() as alone:  # rank 0 fills the cache, the others then find it
        data = load(ranks.say) if alone else None
    return data or load(lambda text: None)


def _load_data(name, tokenizer, seq_len, seed, noise_frac, reward_model, tagged, device, say):
    import datasets

    datasets.disable_progress_bars()
    if not 0 <= noise_frac <= 1:
        raise UsageError(f"--noise-frac {noise_frac}: from 0 to 1")
    if seq_len < 2:
        raise UsageError(f"--seq-len {seq_len}: at least 2")
    base, _, half = name.partition(":") if name in PRESETS else (name, "", "")
    documents, task_ids = _read_documents(base)
    documents = outcomes.with_rewards(documents, name, reward_model, device, say)
    judged, folder = "reward" in documents.column_names, Path(datasets.config.HF_DATASETS_CACHE) / "wmtp"
    vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer.pad_token_id]
    if tokenizer.is_fast:  # merges, normaliser and template too: they make other tokens of the same vocabulary
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary.append({k: v for k, v in pipeline.items() if k not in ("truncation", "padding")})
    vocabulary = json.dumps(vocabulary, sort_keys=True)
    source = documents._fingerprint  # by which `datasets` keeps its own copy: path and time of change, ETag, or commit
    made_of = f"opened 1 {source} {half} {seed} {vocabulary} {seq_len} {noise_frac}"
    record = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.json"
    if not judged and (opened := _open_again(folder, record, say)):
        return opened
    documents, train_numbers, heldout_numbers = _split(documents, task_ids, 0 if half else seed, name)
    if half:  # by the text, so that copies of a file fall into one half
        sides = np.array([zlib.crc32(text.encode("utf-8", "replace")) % 2 for text in documents["text"]])
        train_numbers = train_numbers[sides[train_numbers] == "ab".index(half)]
    parts, texts, files, remarks = {}, [], {}, []
    for part, numbers, noise in (("train", train_numbers, noise_frac), ("heldout", heldout_numbers, 0.0)):
        if len(numbers) == 0:
            raise UsageError(f"--data {name}: no document left for the {part} part")
        chosen = documents.select(numbers)
        if judged and tagged:
            chosen = outcomes.with_tags(chosen, all_good=part == "heldout")
        text = hashlib.sha256()
        for batch in chosen.iter(1000):
            for values in zip(*(batch[c] for c in chosen.column_names)):
                text.update("\0".join(map(str, values)).encode("utf-8", "replace") + b"\1")
        made_of = f"2 {vocabulary} {seq_len} {noise} {seed if noise else 0} {text.hexdigest()}"
        file = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.arrow"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            _write_rows(temporary, _packed_rows(chosen, tokenizer, seq_len, noise, seed), seq_len)
            temporary.rename(file)  # a file of that name is whole
        rows = datasets.Dataset.from_file(str(file))
        if len(rows) == 0:
            longest = max(len(t) for batch in chosen.iter(1000) for t in batch[chosen.column_names[-1]])
            raise UsageError(
                f"--data {name}: no {part} record fits into --seq-len {seq_len} (longest completion: {longest} characters)"
            )
        if judged:
            kept = chosen.select(rows.select_columns("document").with_format("numpy")[:]["document"].max(1))
            reward, sibling = kept["reward"][:], kept["sibling"][:]
            if max(reward) <= outcomes.CORRECT:
                raise UsageError(f"--data {name}: no {part} record has a reward above {outcomes.CORRECT}, so none is correct")
            rows = rows.add_column("reward", reward).add_column("sibling", sibling)
        parts[part] = rows.with_format("numpy")
        files[part] = file.name
        texts.append(text.hexdigest())
        lost = len(chosen) - len(rows) if "prompt" in documents.column_names else 0
        if lost:
            remarks.append(f"data      left out {lost} of {len(chosen)} {part} records: longer than --seq-len {seq_len} tokens")
            say(remarks[-1])
    heldout = documents.select(heldout_numbers)
    if "prompt" in documents.column_names:  # records that were left out are not measured
        heldout = heldout.select(np.unique(np.array(parts["heldout"]["document"]).max(1)))
    records = list(heldout) if judged else None
    if judged:
        heldout = heldout.filter(lambda record: record["reward"] > outcomes.CORRECT)
    if judged and tagged:
        heldout = outcomes.with_tags(heldout, all_good=True)
    figures = dict(
        fingerprint=hashlib.sha256("".join(texts).encode()).hexdigest()[:16],
        tokenizer_fingerprint=hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        heldout_fingerprint=file.stem[:16],
        **_yardsticks(heldout, tokenizer),
        prompt=_first_lines(heldout),
    )
    if not judged:
        temporary = record.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(dict(files=files, remarks=remarks, figures=figures)))
        temporary.rename(record)
    return Data(**parts, **figures, heldout_records=records)


def _open_again(folder, record, say):
    """What `record` says that these documents were made into, without a look at them; None where it or a file is not there."""
    import datasets

    try:
        made = json.loads(record.read_text())
        parts = {part: datasets.Dataset.from_file(str(folder / file)) for part, file in made["files"].items()}
    except (OSError, ValueError):
        return None
    for remark in made["remarks"]:
        say(remark)
    return Data(**{part: rows.with_format("numpy") for part, rows in parts.items()}, **made["figures"])


def _read_documents(name):
    """Documents as a data set of `text`, or of `prompt` and `completion`, and MBPP's task numbers (else None)."""
    import datasets

    if name == "stdlib":
        return datasets.Dataset.from_dict({"text": _stdlib()}), None
    if name == "stdlib-bugs":
        records = bugs.stdlib_bugs(_stdlib(), Path(datasets.config.HF_DATASETS_CACHE) / "wmtp")
        return datasets.Dataset.from_dict(records), None
    path = Path(name)
    builders = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    try:
        if name == "mbpp":
            loaded = datasets.concatenate_datasets(list(datasets.load_dataset("google-research-datasets/mbpp", "full").values()))
        elif path.is_file() or "://" in name:
            suffixes = [
                s
                for s in Path(name.partition("?")[0] if "://" in name else name).suffixes
                if s not in (".gz", ".zst", ".bz2", ".xz")
            ]
            builder = builders.get(suffixes[-1] if suffixes else "", "text")
            options = {"sample_by": "document"} if builder == "text" else {}
            loaded = datasets.load_dataset(builder, data_files=name, split="train", **options)
        elif path.is_dir() and (files := sorted(map(str, path.rglob("*.txt")))):  # datasets would guess splits from names
            loaded = datasets.load_dataset("text", data_files=files, split="train", sample_by="document")
        elif path.is_dir() or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (*builders, ".txt", ".gz")):
            loaded = datasets.load_dataset(name, split="train")
        else:
            raise UsageError(f"--data {name}: no such file, nor a preset ({', '.join(PRESETS)}), nor a hub name (owner/name)")
    except UsageError:
        raise
    except Exception as error:  # what datasets raises has no common class: one line, whatever it was
        raise UsageError(f"--data {name}: cannot be loaded ({type(error).__name__}: {first_line(error)})") from error
    columns = set(loaded.column_names)
    for column in {"text", "content", "prompt", "completion"} & columns:
        if loaded.features[column].dtype not in ("string", "large_string") or (
            column == "prompt" and loaded.data.column(column).null_count
        ):
            raise UsageError(f"--data {name}: the column {column} holds something else than text")
    if {"task_id", "text", "code", "test_list"} <= columns:
        return loaded.map(mbpp_record, remove_columns=loaded.column_names), loaded["task_id"]
    if (judged := outcomes.read_pairs(loaded)) is not None:
        return judged, None
    if {"prompt", "completion"} <= columns:
        kept = ["prompt", *({"reward"} & columns), "completion"]
        return loaded.select_columns(kept).filter(lambda r: bool(r["completion"])), None
    for column in ("text", "content"):
        if column in columns:
            chosen = loaded.select_columns([column]).filter(lambda r: bool(r[column]))  # noqa: B023
            return (chosen if column == "text" else chosen.rename_column(column, "text")), None
    raise UsageError(f"--data {name}: has the columns {', '.join(sorted(columns))}; needs text, or prompt and completion")


def _stdlib():
    """Source files of this Python's standard library, without tests, tables (encodings) and bundled tools."""
    root = Path(sysconfig.get_paths()["stdlib"])
    without = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data",
               "site-packages", "dist-packages", "__pycache__"}  # fmt: skip
    files, texts = [], []
    for folder, folders, names in os.walk(root):  # site-packages, often ten times the rest, is never walked through
        folders[:] = [f for f in folders if f not in without and not (Path(folder) == root and f.startswith("config-"))]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for file in sorted(files):
        try:
            texts.append(file.read_bytes().decode("utf-8").replace("\r\n", "\n"))
        except (OSError, UnicodeDecodeError):
            continue
    texts = [t for t in texts if t.strip()]
    if len(texts) < 100:
        raise UsageError(f"--data stdlib: only {len(texts)} source files under {root}; give --data a file instead")
    return texts


def mbpp_record(record):
    """The prompt of the MBPP paper (2108.07732): the text never names the function, so the tests stand in the prompt."""
    tests = "\n".join(record["test_list"])
    prompt = (
        f"You are an expert Python programmer, and here is your task: {record['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
    return {
        "prompt": re.sub("\r\n?", "\n", prompt),
        "completion": re.sub("\r\n?", "\n", record["code"]).strip("\n") + "\n",
    }


def _split(documents, task_ids, seed, name):
    """Documents and the numbers of those to train on and of those held out."""
    import pyarrow.compute as pc

    if task_ids is not None:
        ids = np.array(task_ids)
        return documents, np.flatnonzero(ids >= 601), np.flatnonzero((ids >= 511) & (ids <= 600))
    if len(documents) == 1 and "text" in documents.column_names:  # one long text: its last 3 % of lines are the held-out file
        lines = documents[0]["text"].splitlines(keepends=True)
        cut = len(lines) - max(1, round(0.03 * len(lines)))
        documents = type(documents).from_dict({"text": [part for part in ("".join(lines[:cut]), "".join(lines[cut:])) if part]})
        if len(documents) == 2:
            return documents, np.array([0]), np.array([1])
    if len(documents) < 2:
        raise UsageError(f"--data {name}: {len(documents)} document(s) with text; training and held-out part need one each")
    texts = documents.flatten_indices().data.column(documents.column_names[-1])
    lengths = pc.binary_length(texts).to_numpy()
    judged = "group" in documents.column_names  # records with outcomes: all of a prompt, or of a file, on one side
    group = np.unique(documents["group"][:], return_inverse=True)[1] if judged else np.arange(len(lengths))
    sizes = np.bincount(group, lengths)
    if len(sizes) < 2:
        raise UsageError(f"--data {name}: all records have one prompt; training and held-out part need one each")
    budget = min(4_000_000, (0.1 if judged else 0.03) * lengths.sum())
    heldout, used = [], 0
    for number in np.random.default_rng(seed).permutation(len(sizes)):
        if used + sizes[number] <= budget:
            heldout.append(number)
            used += sizes[number]
    heldout = np.flatnonzero(np.isin(group, heldout or [int(sizes.argmin())]))
    text = documents.select_columns([c for c in ("text", "prompt", "completion") if c in documents.column_names])
    alike = np.flatnonzero(np.isin(lengths, lengths[heldout]))  # copies have the length of what they are copies of
    texts = [values for batch in text.select(alike).iter(1000) for values in zip(*batch.values())]
    kept_back = {values for values, held in zip(texts, np.isin(alike, heldout)) if held}
    copies = [number for number, values in zip(alike, texts) if values in kept_back]
    return documents, np.setdiff1d(np.arange(len(lengths)), copies), heldout


def _packed_rows(documents, tokenizer, seq_len, noise_frac, seed):
    """Blocks of packed rows, `[4, N, T]` int32: token, document, is_target, is_noise.

    Texts stand one after the other, each ended by EOS, the last row padded; a record has a row of its own, padded, and
    is left out if it does not fit.
    """
    pending, number, eos = np.zeros((4, 0), np.int32), 0, tokenizer.eos_token_id

    def padded(tokens_4T):
        missing = -tokens_4T.shape[1] % seq_len
        padding = np.array([[tokenizer.pad_token_id or 0], [-1], [0], [0]], np.int32).repeat(missing, 1)
        return np.concatenate([tokens_4T, padding], 1)

    for batch in documents.iter(256):
        texts = batch["completion"] if "completion" in batch else batch["text"]
        marks = [None] * len(texts)
        if noise_frac:
            noisy = [_with_noise(text, noise_frac, (seed, number + i)) for i, text in enumerate(texts)]
            texts, marks = map(list, zip(*noisy))
        prompts = encode(tokenizer, batch["prompt"], True, None) if "prompt" in batch else None
        pieces = [pending]
        for i, (ids, noise) in enumerate(encode(tokenizer, texts, prompts is None, marks)):
            if len(ids) == 0 or ids[-1] != eos:
                ids, noise = np.append(ids, eos), np.append(noise, 0)
            tokens_4N = np.stack([ids, np.full_like(ids, number), np.ones_like(ids), noise]).astype(np.int32)
            if prompts is not None:
                prompt = prompts[i][0]
                prompt = prompt[: len(prompt) - (len(prompt) > 0 and prompt[-1] == eos)]  # some templates end a prompt
                prompt_4N = np.stack([prompt, np.full_like(prompt, number), *np.zeros((2, len(prompt)))]).astype(np.int32)
                tokens_4N = padded(np.concatenate([prompt_4N, tokens_4N], 1))
            if prompts is None or tokens_4N.shape[1] == seq_len:
                pieces.append(tokens_4N)
            number += 1
        pending = np.concatenate(pieces, 1)
        whole = pending.shape[1] // seq_len * seq_len
        yield pending[:, :whole].reshape(4, -1, seq_len)
        pending = pending[:, whole:]
    yield padded(pending).reshape(4, -1, seq_len)


def _write_rows(file, blocks, seq_len):
    """Write blocks of rows as one Arrow stream that `datasets` maps into memory."""
    import pyarrow as pa

    names, types = ("input_ids", "document", "is_target", "is_noise"), (pa.int32(), pa.int32(), pa.bool_(), pa.bool_())
    schema = pa.schema([(n, pa.list_(t, seq_len)) for n, t in zip(names, types)])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for block_4NT in blocks:
            flat = [pa.array(column.ravel()).cast(t) for column, t in zip(block_4NT, types)]
            writer.write_table(pa.table([pa.FixedSizeListArray.from_arrays(f, seq_len) for f in flat], schema=schema))


def encode(tokenizer, texts, special_tokens, marks):
    """Token ids and noise flags of each text; `marks[i]` flags the noisy characters of text i, or is None."""
    from transformers import ByT5Tokenizer

    marks = marks or [None] * len(texts)
    if isinstance(tokenizer, ByT5Tokenizer):  # without its Python loop, and text is never read as markup
        encoded = [np.frombuffer(t.encode("utf-8", "replace"), np.uint8).astype(np.int32) + tokenizer.offset for t in texts]
        widths = [[len(c.encode("utf-8", "replace")) for c in t] if m is not None else None for t, m in zip(texts, marks)]
        return [(ids, np.zeros_like(ids) if m is None else np.repeat(m, w)) for ids, m, w in zip(encoded, marks, widths)]
    noisy = any(m is not None for m in marks)
    if noisy and not tokenizer.is_fast:
        raise UsageError("--noise-frac: needs a tokenizer that tells where its tokens lie (a fast one), or --model tiny")
    encoded, result = tokenizer(texts, add_special_tokens=special_tokens), []
    if noisy:  # GPT-2's and Llama 3's own offsets leave out the spaces of a token
        whole = tokenizer.backend_tokenizer.to_str().replace('"trim_offsets":true', '"trim_offsets":false')
        offsets = type(tokenizer.backend_tokenizer).from_str(whole).encode_batch(texts, add_special_tokens=special_tokens)
    for i, ids in enumerate(encoded["input_ids"]):
        noise = np.zeros(len(ids), np.int32)
        if marks[i] is not None:
            before = np.append(0, np.cumsum(marks[i]))  # noisy characters before each position
            starts, ends = np.array(offsets[i].offsets, int).reshape(-1, 2).T
            noise = (before[ends] > before[starts]).astype(np.int32)
        result.append((np.array(ids, np.int32), noise))
    return result


def _with_noise(text, noise_frac, key):
    """The text with that share of its non-blank lines replaced, and a flag for each character."""
    random, lines, flags = np.random.default_rng(key), [], []
    for line in text.splitlines(keepends=True):
        body = line.rstrip("\r\n")
        noisy = bool(body.strip()) and random.random() < noise_frac
        if noisy:
            line = bytes(random.integers(32, 127, len(body), np.uint8)).decode() + line[len(body) :]
        lines.append(line)
        flags.append(np.arange(len(line)) < (len(body) if noisy else 0))
    return "".join(lines), np.concatenate(flags).astype(np.int32)


def _yardsticks(documents, tokenizer):
    """What order-0 entropy and zlib need for the held-out target text, in bits per byte, and its size."""
    texts = [t for batch in documents.iter(256) for t in batch[documents.column_names[-1]]]
    stream = "".join(texts).encode("utf-8", "replace")
    frequency = np.bincount(np.frombuffer(stream, np.uint8)) / len(stream)
    frequency = frequency[frequency > 0]
    return dict(
        heldout_bytes=len(stream),
        heldout_tokens=sum(len(ids) + 1 for ids, _ in encode(tokenizer, texts, False, None)),
        order0_bits_per_byte=float(-(frequency * np.log2(frequency)).sum()),
        zlib_bits_per_byte=8 * len(zlib.compress(stream, 9)) / len(stream),
    )


def _first_lines(documents):
    """A prompt to complete: a record's own, or a held-out text up to the second line of its first longer function."""
    if "prompt" in documents.column_names:
        return next((prompt for prompt in documents["prompt"] if prompt), documents[0]["completion"][:1])
    for text in documents["text"]:
        found = re.search(r"^ *def .*:\n(?: +.*\n){1}(?=(?: +.*\n){3})", text, re.MULTILINE)
        if found and found.start() > 200:
            return text[max(0, found.start() - 400) : found.end()]
    return documents[0]["text"][:200]


@functools.lru_cache(maxsize=2)
def _epoch_order(num_rows, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def batch_rows(num_rows, batch_size, seed, step):
    """Numbers of the rows of update `step` (0-based): a pure function, in which every row comes once an epoch."""
    epochs, places = divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_rows)
    return np.array([_epoch_order(num_rows, seed, int(e))[p] for e, p in zip(epochs, places)])


@dataclasses.dataclass
class Batch:
    """One micro-batch of one rank."""

    rows_B: np.ndarray  # which rows of the data set
    x_BT: torch.Tensor  # tokens
    targets_KBT: torch.Tensor  # the token k places on, or IGNORE
    is_noise_BT: torch.Tensor  # True for tokens that `--noise-frac` made
    completion_BT: torch.Tensor = None  # True for tokens that are no prompt and no padding, whatever the outcome
    reward_B: torch.Tensor = None  # outcome, 0 to 1; 1 where the data has none


def load_batch(rows, numbers, num_heads, device, train_on="correct"):
    """The rows of these numbers as one `Batch` with targets for heads 1..num_heads; numbers < 0 give rows without targets.

    So do records that are not correct by their outcome: they are not to be imitated, unless `train_on` is "all".
    """
    columns = rows[np.maximum(numbers, 0)]
    x_BT, document_BT = columns["input_ids"].astype(np.int64), columns["document"]
    completion_BT = columns["is_target"] & (numbers >= 0)[:, None]
    reward_B = columns.get("reward", np.ones(len(numbers))).astype(np.float32)
    imitated_B = reward_B > outcomes.CORRECT if train_on == "correct" else np.full(len(numbers), True)
    targets_KBT = make_targets(x_BT, document_BT, completion_BT & imitated_B[:, None], num_heads)
    arrays = (x_BT, targets_KBT, columns["is_noise"], completion_BT, reward_B)
    return Batch(numbers, *(torch.from_numpy(a).to(device) for a in arrays))


def make_targets(x_BT, document_BT, is_target_BT, num_heads):
    """`targets[k-1, b, t] = x[b, t+k]`; IGNORE where t+k is no target, past the row, or in another document than t."""
    targets_KBT = np.full((num_heads, *x_BT.shape), IGNORE, np.int64)
    for k in range(1, min(num_heads, x_BT.shape[1] - 1) + 1):
        valid = is_target_BT[:, k:] & (document_BT[:, k:] == document_BT[:, :-k])
        targets_KBT[k - 1, :, :-k] = np.where(valid, x_BT[:, k:], IGNORE)
    return targets_KBT


def micro_batches(rows, batch_size, micro_batch_size, seed, step, num_heads, ranks, train_on="correct"):
    """This rank's share of update `step`, as micro-batches: the same rows in all, whatever ranks and accumulation."""
    numbers = batch_rows(len(rows), batch_size, seed, step).reshape(-1, ranks.world_size, micro_batch_size)
    return [load_batch(rows, part, num_heads, ranks.device, train_on) for part in numbers[:, ranks.rank]]


def heldout_batches(data, micro_batch_size, num_heads, ranks):
    """This rank's share of all held-out rows; every rank yields as many batches, rows past the end without targets."""
    total = len(data.heldout)
    for first in range(0, total, micro_batch_size * ranks.world_size):
        numbers = first + ranks.rank * micro_batch_size + np.arange(micro_batch_size)
        yield load_batch(data.heldout, np.where(numbers < total, numbers, -1), num_heads, ranks.device)


def batch_sizes(batch_size, micro_batch_size, world_size):
    """Micro-batch size (0: as large as fits) and number of micro-steps, or a UsageError that names the nearest batch sizes."""
    if batch_size < 1 or micro_batch_size < 0:
        raise UsageError(f"--batch-size {batch_size} --micro-batch-size {micro_batch_size}: at least 1 and 0")
    unit = world_size * (micro_batch_size or 1)
    if batch_size % unit:
        below = batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise UsageError(
            f"--batch-size {batch_size}: not divisible by {world_size} rank(s) x --micro-batch-size {micro_batch_size or 1} "
            f"= {unit}; nearest: --batch-size {nearest}"
        )
    micro_batch_size = micro_batch_size or batch_size // world_size
    return micro_batch_size, batch_size // (world_size * micro_batch_size)
