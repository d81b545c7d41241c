"""Every measure of the multi-token papers on a finished run or any checkpoint, whichever algorithm made it.

    python evaluate.py                                   the newest run in runs/: held-out text and decoding speed
    python evaluate.py --run-dir runs/X --suites heldout speed humaneval
    python evaluate.py --model Qwen/Qwen2.5-0.5B --data my.jsonl --suites heldout
    python evaluate.py --suites mbpp --solutions mine.jsonl          score given programs; needs no model
    python evaluate.py --compare runs/A runs/B                       one table, differences with intervals

| suite | measures |
|---|---|
| heldout | each head: loss, perplexity, accuracy, top-5, confidence, calibration; by position and by kind of token |
| speed | greedy decoding with 1..H heads: tokens per second, per forward, acceptance by draft position |
| humaneval, mbpp, code_contests | pass@k of generated programs, run in a sandbox |

Results: `results.json` (flat `suite/metric` keys), charts and `report.html` in the run's `eval/` or `--out`, and the run's
tracker. README defines every key. Sources: Gloeckle et al. 2024 (arXiv 2404.19737), Chen et al. 2021 (arXiv 2107.03374,
eq. 1: pass@k), Guo et al. 2017 (arXiv 1706.04599: calibration error).
"""

import dataclasses
import hashlib
import io
import json
import keyword
import math
import statistics
import sys
import time
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from common import IGNORE, Ranks, UsageError, load_mtp, load_tokenizer, model_dir, run_script, setup_ranks
from data import heldout_batches, load_data
from decoding import generate
from runs import Tracker, command_words, commit, versions, write_whole

SUITES = ("heldout", "speed", "humaneval", "mbpp", "code_contests")

# Shapes: B sequences, T positions, K heads, N valid targets, V vocabulary.


@dataclass
class Args:
    # What is evaluated
    run_dir: str = ""
    """A finished run; empty: the newest one in runs/."""
    model: str = ""
    """Instead of a run: a Hugging Face or Meta checkpoint (folder or hub name)."""
    suites: list[Literal["heldout", "speed", "humaneval", "mbpp", "code_contests"]] = field(
        default_factory=lambda: ["heldout", "speed"]
    )
    """What to measure."""
    compare: list[str] = field(default_factory=list)
    """Evaluated runs to set side by side; the first is what the others are compared with."""
    out: str = ""
    """Folder for the results; empty: eval/ in the run folder (--model: eval/<name>)."""
    seed: int = 0
    """Of sampling and of the bootstrap."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, then Metal, then the CPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    """Type of the weights and products in decoding, of the products elsewhere."""
    batch_size: int = 16
    """Rows at once, held-out text and sampling."""

    # Data, for --model (a run knows its own)
    data: str = "stdlib"
    """As in training: its held-out part is measured."""
    seq_len: int = 256
    """Tokens a row."""

    # Speed
    speed_prompts: int = 8
    """Held-out beginnings to go on from; also the larger batch size."""
    speed_tokens: int = 128
    """Tokens to add to each."""
    rounds: int = 3
    """Timed rounds, in which all settings take turns; medians are reported."""

    # Programs
    problems: str = ""
    """File of problems for mbpp or code_contests; empty: from the hub."""
    solutions: str = ""
    """JSON lines of task_id and completion or solution, scored instead of generated programs."""
    n: int = 20
    """Programs a problem."""
    k: list[int] = field(default_factory=lambda: [1, 10, 100])
    """The k of pass@k; those above n are left out."""
    temperature: float = 0.8
    """Of sampling; 0: greedy, which needs n = 1."""
    top_p: float = 0.95
    """Nucleus of sampling."""
    max_new_tokens: int = 512
    """Longest program."""
    decode: Literal["speculative", "plain"] = "speculative"
    """speculative: all heads draft; plain: head 1 alone."""
    limit: int = 0
    """First so many problems; 0: all."""
    sandbox: Literal["bwrap", "none"] = "bwrap"
    """Where programs run; none only with --i-understand-untrusted-code."""
    i_understand_untrusted_code: bool = False
    """Programs of a model may do anything that this user may."""
    timeout: float = 10.0
    """Seconds by the clock for a program and its tests."""

    def __post_init__(self):
        for name in ("batch_size", "seq_len", "speed_prompts", "speed_tokens", "rounds", "n", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if not 0 < self.top_p <= 1 or self.temperature < 0 or self.timeout <= 0 or min(self.k, default=1) < 1:
            raise UsageError("--top-p above 0 to 1, --temperature at least 0, --timeout above 0, --k at least 1")
        if self.temperature == 0 and self.n > 1:
            raise UsageError(f"--n {self.n}: greedy programs of a problem are all alike; use --n 1 or --temperature 0.8")
        if self.run_dir and self.model:
            raise UsageError("--run-dir and --model: give one of them")


# ---------------------------------------------------------------------------------------------------------- held-out text
def token_figures(model, x_BT, targets_KBT, chunk=1024):
    """Of every valid target: loss (nats), whether most likely, whether among the five most likely, largest probability.

    Returns `[4, K, B, T]` fp32, NaN where there is no target.
    """
    hidden = model.hidden(x_BT, targets_KBT.shape[0]).flatten(0, -2)
    out = []
    for states, target in zip(hidden.split(chunk), targets_KBT.flatten().split(chunk)):
        logits = F.linear(states, model.causal_lm.lm_head.weight.to(states.dtype)).float()
        if model.softcap is not None:
            logits = torch.tanh(logits / model.softcap) * model.softcap
        logp = logits.log_softmax(-1)
        chosen = logp.gather(-1, target.clamp(min=0)[:, None])
        top = logp.max(-1)
        figures = [-chosen[:, 0], top.indices == target, (logp > chosen).sum(-1) < 5, top.values.exp()]
        out.append(torch.stack([f.float() for f in figures]).masked_fill(target == IGNORE, math.nan))
    return torch.cat(out, 1).view(4, *targets_KBT.shape)


def calibration_error(confidence_N, correct_N, bins=15):
    """Expected calibration error over equal bins of confidence (1706.04599, eq. 3)."""
    number_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    gaps = np.bincount(number_N, confidence_N - correct_N, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence_N))


CLASSES = ("keyword", "name", "operator", "number", "string", "comment", "white_space", "other")


def character_classes(text):
    """Class of every character of Python source by the `tokenize` module, as an index into `CLASSES`; what does not parse is "other"."""
    classes = np.full(len(text), CLASSES.index("other"), np.int8)
    starts = np.cumsum([0, *map(len, text.splitlines(keepends=True))])
    kinds = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment", tokenize.OP: "operator"}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = kinds.get(token.type)
            if token.type == tokenize.NAME:
                kind = "keyword" if keyword.iskeyword(token.string) else "name"
            elif tokenize.tok_name[token.type].startswith("FSTRING"):
                kind = "string"
            if kind:
                start, end = (starts[line - 1] + column for line, column in (token.start, token.end))
                classes[start:end] = CLASSES.index(kind)
    except (tokenize.TokenError, SyntaxError, IndexError):
        pass
    blank = np.array([c.isspace() for c in text], bool)
    return np.where(blank & (classes == CLASSES.index("other")), CLASSES.index("white_space"), classes)


def token_classes(ids_N, tokenizer):
    """Class of every token of one document, by its first character that is no space; -1 where that cannot be told."""
    if isinstance(tokenizer, transformers.ByT5Tokenizer):
        text = bytes(int(i) - tokenizer.offset for i in ids_N if i >= tokenizer.offset)
        try:
            string = text.decode()
        except UnicodeDecodeError:
            return np.full(len(ids_N), -1)
        of_bytes = np.repeat(character_classes(string), [len(c.encode()) for c in string])
        out = np.full(len(ids_N), -1)
        out[np.asarray(ids_N) >= tokenizer.offset] = of_bytes
        return out
    string = tokenizer.decode(ids_N, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    again = tokenizer(string, add_special_tokens=False, return_offsets_mapping=True) if tokenizer.is_fast else {"input_ids": []}
    special = np.isin(ids_N, tokenizer.all_special_ids)
    out = np.full(len(ids_N), -1)
    if list(again["input_ids"]) == list(np.asarray(ids_N)[~special]):
        of_characters = character_classes(string)
        found = []
        for start, end in again["offset_mapping"]:
            inner = next((i for i in range(start, end) if not string[i].isspace()), start)
            found.append(of_characters[inner] if end > start else -1)
        out[~special] = found
    return out


def heldout_suite(model, tokenizer, data, args, ranks):
    """Metrics of the `heldout` suite, and sums by document for the comparison of runs."""
    num_heads = len(model.heads.layers)
    figures, positions, documents, places = [], [], [], []
    with torch.inference_mode(), ranks.autocast():
        for batch in heldout_batches(data, args.batch_size, num_heads, ranks):
            figures.append(token_figures(model, batch.x_BT, batch.targets_KBT).cpu().numpy())
    figures = np.concatenate(figures, 2)[:, :, : len(data.heldout)].astype(np.float64)  # [4, K, rows, T]
    columns = data.heldout[:]
    ids, document, length = columns["input_ids"], columns["document"], figures.shape[-1]
    classes = np.full(ids.shape, -1)
    for number in np.unique(document[document >= 0]):
        classes[document == number] = token_classes(ids[document == number], tokenizer)
    metrics, by_document = {}, {"document": np.unique(document[document >= 0])}
    for k in range(1, num_heads + 1):
        row, t = np.nonzero(~np.isnan(figures[0, k - 1]))
        loss, correct, top5, confidence = figures[:, k - 1, row, t]
        metrics |= {
            f"heldout/loss_head_{k}": loss.mean(),
            f"heldout/perplexity_head_{k}": math.exp(min(700.0, loss.mean())),
            f"heldout/acc_head_{k}": correct.mean(),
            f"heldout/top5_head_{k}": top5.mean(),
            f"heldout/confidence_head_{k}": confidence.mean(),
            f"heldout/calibration_error_head_{k}": calibration_error(confidence, correct),
            f"heldout/targets_head_{k}": len(loss),
        }
        if k > 1:
            for name in ("loss", "acc"):
                metrics[f"heldout/{name}_ratio_head_{k}"] = (
                    metrics[f"heldout/{name}_head_{k}"] / metrics[f"heldout/{name}_head_1"]
                    if metrics[f"heldout/{name}_head_1"]
                    else math.nan
                )
        first = 0
        while first < length:  # buckets of tokens seen: 1 to 16, 17 to 32, 33 to 64, ..
            last = max(16, 2 * first)
            inside = (t >= first) & (t < last)
            if inside.any():
                metrics[f"heldout/acc_head_{k}/seen_{first + 1}_to_{min(last, length)}"] = correct[inside].mean()
            first = last
        kind = classes[row, t + k]
        for number, name in enumerate(CLASSES):
            if (kind == number).any():
                metrics[f"heldout/acc_head_{k}/class_{name}"] = correct[kind == number].mean()
                metrics[f"heldout/loss_head_{k}/class_{name}"] = loss[kind == number].mean()
                metrics[f"heldout/targets_head_{k}/class_{name}"] = int((kind == number).sum())
        places = np.searchsorted(by_document["document"], document[row, t])
        for name, values in (("loss", loss), ("acc", correct), ("count", np.ones_like(loss))):
            by_document[f"{name}_head_{k}"] = np.bincount(places, values, minlength=len(by_document["document"]))
    metrics["heldout/bits_per_byte"] = metrics["heldout/loss_head_1"] / math.log(2) * data.heldout_tokens / data.heldout_bytes
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in metrics.items()}, by_document


# ------------------------------------------------------------------------------------------------------------------- speed
def speed_suite(model, data, args, ranks, say):
    """Metrics of the `speed` suite: 1..H heads at batch 1 and at `--speed-prompts`, taking turns; medians of rounds."""
    num_heads, count = len(model.heads.layers), args.speed_prompts
    columns = data.heldout[:]
    prompts = []
    for i in np.linspace(0, len(columns["input_ids"]) - 1, min(4 * count, len(columns["input_ids"]))).astype(int):
        ids, kept = columns["input_ids"][i], columns["document"][i] >= 0
        target = np.flatnonzero(columns["is_target"][i])
        end = target[0] if len(target) and target[0] > 0 else min(64, kept.sum() // 2)  # a record's prompt, or 64 tokens
        if end > 0 and len(prompts) < count:
            prompts.append(ids[:end].tolist())
    longest = getattr(model.causal_lm.config, "max_position_embeddings", None) or math.inf
    if max(map(len, prompts)) + args.speed_tokens + num_heads > longest:
        raise UsageError(f"--speed-tokens {args.speed_tokens}: prompt and drafts leave the model's {longest} positions")
    settings = [(k, size) for size in sorted({1, len(prompts)}) for k in range(1, num_heads + 1)]
    seconds, texts, stats = {s: [] for s in settings}, {}, {}
    for number in range(args.rounds + 1):  # the first round warms up and is not counted
        for k, size in settings:
            done, began = [], time.perf_counter()
            for first in range(0, len(prompts), size):
                done.append(generate(model, prompts[first : first + size], args.speed_tokens, None, num_heads=k))
                if number == 0 and first >= 2 * size:
                    break
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[k, size].append(time.perf_counter() - began)
                texts[k, size], stats[k, size] = [t for d in done for t in d.tokens], done
        say(f"speed     round {number} of {args.rounds}")
    metrics, tokens = {"speed/prompts": len(prompts), "speed/new_tokens": args.speed_tokens}, len(prompts) * args.speed_tokens
    for k, size in settings:
        key, passes = f"heads_{k}_batch_{size}", sum(d.forwards for d in stats[k, size])
        median = statistics.median(seconds[k, size])
        metrics[f"speed/tokens_per_s_{key}"] = tokens / median
        metrics[f"speed/ms_per_forward_{key}"] = 1000 * median / passes
        if k > 1:
            steps = sum(d.row_steps for d in stats[k, size])
            accepted = sum(d.accepted for d in stats[k, size]) / max(1, steps)
            metrics[f"speed/speedup_{key}"] = statistics.median(
                a / b for a, b in zip(seconds[1, size], seconds[k, size])
            )
            metrics[f"speed/tokens_per_forward_{key}"] = sum(d.new_tokens for d in stats[k, size]) / max(1, steps)
            metrics |= {f"speed/accepted_{key}/draft_{j + 1}": float(a) for j, a in enumerate(accepted)}
    metrics["speed/identical"] = all(texts[s] == texts[1, 1] for s in settings)
    return metrics


# ---------------------------------------------------------------------------------------------------------------- programs
def sample_programs(suite, problems, model, tokenizer, args, file, say):
    """Texts of `--n` completions a problem, `{(task_id, number): text}`; those in `file` are kept, new ones added to it."""
    texts = {}
    if file.exists():  # an interrupted evaluation goes on; a last line cut short is dropped
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break
            texts[record["task_id"], record["number"]] = record["text"]
        if texts:
            say(f"{suite:<9} {len(texts)} samples found in {file}")
    heads = len(model.heads.layers) if args.decode == "speculative" else 1
    longest = (getattr(model.causal_lm.config, "max_position_embeddings", None) or math.inf) - args.max_new_tokens - heads
    todo, too_long = [], 0
    for problem in problems:
        ids = tokenizer(problem.prompt, add_special_tokens=False).input_ids
        too_long += len(ids) > longest
        for number in range(args.n):
            if (problem.task_id, number) not in texts:
                if len(ids) > longest:
                    texts[problem.task_id, number] = ""
                else:
                    todo.append((problem, number, ids))
    if too_long:
        say(f"{suite:<9} {too_long} prompts leave no room for --max-new-tokens {args.max_new_tokens}: counted as failed")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as f:
        for (task_id, number), text in texts.items():
            f.write(json.dumps(dict(task_id=task_id, number=number, text=text)) + "\n")
        for first in range(0, len(todo), args.batch_size):
            part = todo[first : first + args.batch_size]
            stops = part[0][0].stops
            reach = max(map(len, stops), default=0) + heads + 8

            def finished(tokens, stops=stops, reach=reach):
                tail = tokenizer.decode(tokens[-reach:], skip_special_tokens=True)
                return any(stop in tail for stop in stops)

            seeds = [int(hashlib.sha256(f"{args.seed} {p.task_id} {n}".encode()).hexdigest()[:12], 16) for p, n, _ in part]
            done = generate(model, [ids for *_, ids in part], args.max_new_tokens, tokenizer.eos_token_id, num_heads=heads,
                            temperature=args.temperature, top_p=args.top_p, seeds=seeds, finished=finished)  # fmt: skip
            for (problem, number, _), tokens in zip(part, done.tokens):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                cut = min((text.find(stop) for stop in problem.stops if stop in text), default=len(text))
                texts[problem.task_id, number] = text[:cut]
                f.write(json.dumps(dict(task_id=problem.task_id, number=number, text=text[:cut])) + "\n")
            f.flush()
            say(f"{suite:<9} {first + len(part)} of {len(todo)} programs written")
    return texts
