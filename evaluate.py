"""Every measure of the multi-token papers on a finished run or any checkpoint, whichever algorithm made it.

    python evaluate.py                                       the newest run in runs/: held-out text and decoding speed
    python evaluate.py --run-dir runs/X --suites heldout speed humaneval
    python evaluate.py --model Qwen/Qwen2.5-0.5B --data my.jsonl --suites heldout
    python evaluate.py --suites mbpp --problems mbpp.jsonl --solutions mine.jsonl         score given programs; needs no model
    python evaluate.py --compare runs/A runs/B               evaluated runs side by side, differences with intervals

    suite                               measures
    heldout                             each head: loss, perplexity, accuracy, top-5, calibration; by position, by kind of token
    speed                               greedy decoding with 1..H heads: tokens per second and per forward, drafts accepted
    humaneval, mbpp, code_contests      pass@k of sampled programs, each run in a sandbox (`sandbox.py`)

Results go to eval/ in the run folder or to --out: results.json (flat keys `suite/metric`, defined in README), charts,
report.html, samples and verdicts; and to the run's tracker. Run again, and finished samples are kept.
Sources: Gloeckle et al. 2024 (arXiv 2404.19737), Chen et al. 2021 (2107.03374, eq. 1: pass@k), Guo et al. 2017 (1706.04599,
eq. 3: calibration error).
"""

import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import keyword
import math
import shlex
import statistics
import sys
import textwrap
import time
import tokenize
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import manual  # noqa: F401 -- first: answers --help without torch
import numpy as np
import torch
import transformers

import report
from common import IGNORE, TokenLosses, UsageError, check_vocabulary, load_mtp, load_tokenizer, max_positions, model_dir
from common import run_script, setup_ranks
from compare import FILES, compare_runs, load_run
from data import heldout_batches, load_data, make_targets
from decoding import generate
from outcomes import TAGS
from runs import Tracker, commit, versions, write_whole
from sandbox import Limits, open_sandbox
from suites import SUITES as PROGRAMS
from suites import Samples, job_of, load_problems, read_solutions, sample_programs, score_programs

# Shapes: B rows, T positions, K heads, N valid targets.


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
    """Folder for the results; empty: eval/ in the run folder, for --model and --solutions eval/<name>."""
    seed: int = 0
    """Of sampling; for --model also of the held-out split."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, then Metal, then the CPU."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and products."""
    batch_size: int = 16
    """Rows at once, of held-out text and of programs being written."""

    # Data
    data: str = ""
    """As in training, and its held-out part is measured; empty: the run's own, for --model stdlib."""
    seq_len: int = 0
    """Tokens a row; 0: the run's own, for --model 256."""

    # Speed
    speed_prompts: int = 8
    """Held-out beginnings to go on from, and the larger batch size."""
    speed_tokens: int = 128
    """Tokens to add to each."""
    rounds: int = 3
    """Timed rounds in which all settings take turns; medians are reported."""

    # Programs
    problems: str = ""
    """File with the problems of the one program suite named; empty: HumanEval from its package, the others from the hub."""
    shots: int = 3
    """Solved tasks that MBPP's prompts show first, 0 to 3; 0 asks as --data mbpp trains."""
    limit: int = 0
    """The first so many problems; 0: all."""
    solutions: str = ""
    """JSON lines of task_id and completion or solution, scored instead of sampled programs."""
    n: int = 20
    """Programs for each problem."""
    k: list[int] = field(default_factory=lambda: [1, 10, 100])
    """The k of pass@k; those above n are left out."""
    temperature: float = 0.8
    """Of sampling; 0: greedy, which needs n = 1."""
    top_p: float = 0.95
    """Probability mass that is sampled from."""
    max_new_tokens: int = 512
    """Longest program."""
    decode: Literal["auto", "plain", "speculative"] = "auto"
    """speculative: all heads draft; plain: head 1 alone; auto: speculative where there is more than one head."""
    sandbox: Literal["bwrap", "none"] = "bwrap"
    """Where programs run; none only with --i-understand-untrusted-code."""
    i_understand_untrusted_code: bool = False
    """Model-written programs may then do whatever this user may."""
    timeout: float = 10.0
    """Seconds by the clock for a program and its tests."""

    def __post_init__(self):
        for name in ("batch_size", "speed_prompts", "speed_tokens", "rounds", "n", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("seed", "seq_len", "limit", "temperature"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: above 0 and at most 1")
        if not 0 < self.timeout < math.inf:
            raise UsageError(f"--timeout {self.timeout}: above 0 seconds")
        if not 0 <= self.shots <= 3:
            raise UsageError(f"--shots {self.shots}: 0 to 3")
        if not self.suites:
            raise UsageError("--suites: name one or more")
        if min(self.k, default=0) < 1:
            raise UsageError(f"--k {' '.join(map(str, self.k))}: one or more numbers of at least 1")
        programs = [suite for suite in dict.fromkeys(self.suites) if suite in PROGRAMS]
        if self.temperature == 0 and self.n > 1 and programs and not self.solutions:
            raise UsageError(f"--n {self.n}: at --temperature 0 all programs of a problem are alike; use --n 1")
        if self.run_dir and self.model:
            raise UsageError(f"--run-dir {self.run_dir} --model {self.model}: give one of them")
        for flag, value in (("problems", self.problems), ("solutions", self.solutions)):
            if value and len(programs) != 1:
                raise UsageError(f"--{flag} {value}: name one of {', '.join(PROGRAMS)} in --suites, not {len(programs)}")
        if self.solutions and len(set(self.suites)) > 1:
            raise UsageError(f"--solutions {self.solutions}: scores programs alone; --suites {programs[0]}")
        if self.solutions and self.limit:
            raise UsageError(f"--limit {self.limit}: only for sampled programs, and --solutions gives its own")
        if len(self.compare) == 1:
            raise UsageError(f"--compare {self.compare[0]}: name two runs or more")


# ---------------------------------------------------------------------------------------------------------- held-out text
LOGITS = 2**23  # that exist at once: 32 MB


def token_figures(model, x_BT, targets_KBT):
    """Of every valid target: loss (nats), whether most likely, whether among the five most likely, largest probability.

    Returns `[4, K, B, T]` fp32, NaN where there is no target.
    """
    hidden, out = model.hidden(x_BT, targets_KBT.shape[0]).flatten(0, -2), []
    rows = max(1, LOGITS // model.causal_lm.lm_head.weight.shape[0])
    for states, target in zip(hidden.split(rows), targets_KBT.flatten().split(rows)):
        logp = TokenLosses.logits(states, model.causal_lm.lm_head.weight, model.softcap).log_softmax(-1)
        chosen, (top, most_likely) = logp.gather(-1, target.clamp(min=0)[:, None]), logp.max(-1)
        figures = [-chosen[:, 0], most_likely == target, (logp > chosen).sum(-1) < 5, top.exp()]
        out.append(torch.stack([f.float() for f in figures]).masked_fill(target == IGNORE, math.nan))
    return torch.cat(out, 1).view(4, *targets_KBT.shape)


def calibration_error(confidence_N, correct_N, bins=15):
    """Expected calibration error over equal bins of confidence (1706.04599, eq. 3)."""
    number_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    gaps = np.bincount(number_N, confidence_N - correct_N, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence_N))


CLASSES = ("keyword", "name", "operator", "number", "string", "comment", "white_space")


def character_classes(text):
    """Class of every character of Python source by the `tokenize` module, an index into `CLASSES`; None if it does not parse."""
    kinds = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment", tokenize.OP: "operator"}
    classes = np.full(len(text), CLASSES.index("white_space"))
    starts = np.cumsum([0, *(len(line) for line in io.StringIO(text))])
    try:
        ast.parse(textwrap.dedent(text))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = kinds.get(token.type)
            if token.type == tokenize.NAME:
                kind = "keyword" if keyword.iskeyword(token.string) else "name"
            elif tokenize.tok_name[token.type].startswith("FSTRING"):  # Python 3.12 and newer
                kind = "string"
            if kind:
                start, end = (starts[line - 1] + column for line, column in (token.start, token.end))
                classes[start:end] = CLASSES.index(kind)
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return classes


def token_classes(ids_N, tokenizer):
    """Class of every token of one text by its first character that is no space; -1 for special tokens and unless it is Python."""
    ids_N, none, spans = np.asarray(ids_N), np.full(len(ids_N), -1), []
    plain = ~np.isin(ids_N, tokenizer.all_special_ids)
    if isinstance(tokenizer, transformers.ByT5Tokenizer):
        text = bytes((ids_N[plain] - tokenizer.offset).tolist()).decode("utf-8", "replace")
        spans = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])  # the character that each byte is of
        spans = [(c, c + 1) for c in spans]
    elif tokenizer.is_fast:
        text = tokenizer.decode(ids_N[plain], clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if again["input_ids"] == ids_N[plain].tolist():
            spans = again["offset_mapping"]
    if len(spans) != plain.sum() or (classes := character_classes(text)) is None:
        return none
    none[plain] = [classes[next((c for c in range(a, b) if not text[c].isspace()), a)] if b > a else -1 for a, b in spans]
    return none


def heldout_suite(model, tokenizer, data, args, ranks):
    """Metrics of the `heldout` suite; and for each document the sums that runs are compared by."""
    num_heads, figures = len(model.heads.layers), []
    with torch.inference_mode():
        for batch in heldout_batches(data, args.batch_size, num_heads, ranks):
            figures.append(token_figures(model, batch.x_BT, batch.targets_KBT).cpu().numpy())
            wrong_K = (~np.isfinite(figures[-1][0]) & (batch.targets_KBT.cpu().numpy() != IGNORE)).any((1, 2))
            if wrong_K.any():
                raise UsageError(f"--suites heldout: the loss of head {1 + wrong_K.argmax()} is not finite; nothing to report")
    figures = np.concatenate(figures, 2)[:, :, : len(data.heldout)]  # [4, K, rows, T]
    columns = data.heldout[:]
    document, length = columns["document"], figures.shape[-1]
    numbers, classes = np.unique(document[document >= 0]), np.full(document.shape, -1)
    for number in numbers:
        own = (document == number) & columns["is_target"]
        classes[own] = token_classes(columns["input_ids"][own], tokenizer)
    metrics, documents = {}, {"document": numbers.tolist()}
    for k in range(1, num_heads + 1):
        row, t = np.nonzero(~np.isnan(figures[0, k - 1]))
        if len(row) == 0:
            raise UsageError(f"--seq-len {length}: head {k} has no held-out target")
        loss, correct, top5, confidence = figures[:, k - 1, row, t].astype(np.float64)
        means = dict(loss=loss, acc=correct, top5=top5, confidence=confidence)
        metrics |= {f"heldout/{name}_head_{k}": float(values.mean()) for name, values in means.items()}
        metrics |= {
            f"heldout/perplexity_head_{k}": math.exp(min(700.0, loss.mean())),
            f"heldout/calibration_error_head_{k}": calibration_error(confidence, correct),
            f"heldout/targets_head_{k}": len(loss),
        }
        for name in ("loss", "acc") if k > 1 else ():
            first = metrics[f"heldout/{name}_head_1"]
            metrics[f"heldout/{name}_ratio_head_{k}"] = metrics[f"heldout/{name}_head_{k}"] / first if first else None
        edges = [0, *(2**n for n in range(4, length.bit_length() + 1) if 2**n < length), length]
        for start, end in zip(edges, edges[1:]):
            inside = (t >= start) & (t < end)
            metrics[f"heldout/acc_head_{k}/seen_{start + 1}_to_{end}"] = float(correct[inside].mean()) if inside.any() else None
        kind = classes[row, t + k]
        for number, name in enumerate(CLASSES):
            if (own := kind == number).any():
                metrics[f"heldout/acc_head_{k}/class_{name}"] = float(correct[own].mean())
                metrics[f"heldout/loss_head_{k}/class_{name}"] = float(loss[own].mean())
                metrics[f"heldout/targets_head_{k}/class_{name}"] = int(own.sum())
        places = np.searchsorted(numbers, document[row, t])
        for name, values in (("loss", loss), ("acc", correct), ("count", np.ones_like(loss))):
            documents[f"{name}_head_{k}"] = np.bincount(places, values, minlength=len(numbers)).tolist()
    metrics["heldout/bits_per_byte"] = metrics["heldout/loss_head_1"] / math.log(2) * data.heldout_tokens / data.heldout_bytes
    return {name: value for name, value in metrics.items() if value is not None}, documents


# ------------------------------------------------------------------------------------------------------------------ speed
def beginnings(data, count):
    """Up to `count` prompts from all over the held-out rows: a record's own, of packed text the first 64 tokens of a row."""
    columns, prompts = data.heldout[:], []
    for row in np.unique(np.linspace(0, len(data.heldout) - 1, 4 * count).astype(int)):
        target = np.flatnonzero(columns["is_target"][row])
        end = target[0] if len(target) and target[0] > 0 else min(64, len(target) // 2)
        if end > 0:
            prompts.append(columns["input_ids"][row, :end].tolist())
    return [prompts[i] for i in np.unique(np.linspace(0, len(prompts) - 1, count).astype(int))] if prompts else []


def speed_prompts(model, data, args):
    """The prompts of the `speed` suite; UsageError if there are none or the model has no room to go on from them."""
    prompts, num_heads = beginnings(data, args.speed_prompts), len(model.heads.layers)
    if not prompts:
        raise UsageError("--suites speed: no held-out row has two tokens or more to begin with")
    longest = max_positions(model.causal_lm.config)
    if (needed := max(map(len, prompts)) + args.speed_tokens + num_heads) > longest:
        raise UsageError(f"--speed-tokens {args.speed_tokens}: prompts, text and drafts take {needed} of {longest} positions")
    return prompts


def speed_suite(model, prompts, args, ranks):
    """Metrics of the `speed` suite: 1..H heads at batch 1 and at `--speed-prompts`, taking turns; medians over rounds."""
    num_heads = len(model.heads.layers)
    settings = [(k, size) for size in sorted({1, len(prompts)}) for k in range(1, num_heads + 1)]
    seconds, texts, done = {s: [] for s in settings}, {}, {}
    for number in range(args.rounds + 1):  # the first round warms up and is not counted
        for k, size in settings:
            parts = [prompts[i : i + size] for i in range(0, len(prompts), size)][: None if number else 2]
            began = time.perf_counter()
            done[k, size] = [generate(model, part, args.speed_tokens, None, num_heads=k) for part in parts]
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[k, size] += [time.perf_counter() - began] * (number > 0)
            texts[k, size] = [tokens for part in done[k, size] for tokens in part.tokens]
    metrics, tokens = {"speed/prompts": len(prompts), "speed/new_tokens": args.speed_tokens}, len(prompts) * args.speed_tokens
    for k, size in settings:
        key, median = f"heads_{k}_batch_{size}", statistics.median(seconds[k, size])
        metrics[f"speed/tokens_per_s_{key}"] = tokens / median
        metrics[f"speed/ms_per_forward_{key}"] = 1000 * median / sum(part.forwards for part in done[k, size])
        if k > 1:
            steps = max(1, sum(part.row_steps for part in done[k, size]))
            ratios = [plain / ours for plain, ours in zip(seconds[1, size], seconds[k, size])]
            metrics[f"speed/speedup_{key}"] = statistics.median(ratios)
            metrics[f"speed/tokens_per_forward_{key}"] = sum(part.new_tokens for part in done[k, size]) / steps
            accepted = sum(part.accepted for part in done[k, size]) / steps
            metrics |= {f"speed/accepted_{key}/draft_{j}": float(a) for j, a in enumerate(accepted, start=1)}
        wrong = sum(a != b for a, b in zip(texts[k, size], texts[1, 1]))
        if wrong:
            ranks.say(f"speed     {wrong} of {len(prompts)} texts with {k} head(s) at batch {size} differ from plain decoding")
    if num_heads == 1:
        ranks.say("speed     the model has one head: nothing drafts, so plain decoding alone was timed")
    metrics["speed/identical"] = all(texts[s] == texts[1, 1] for s in settings)
    return metrics


# ------------------------------------------------------------------------------------------------------ what is evaluated
def newest_run(say):
    """The finished run in runs/ that was started last; says which later ones are unfinished."""
    runs = sorted(Path("runs").glob("*/args.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    if not runs:
        raise UsageError("--run-dir: no run in runs/ yet; python baseline_mtp.py makes one, or name a checkpoint by --model")
    finished = [file.parent for file in runs if (file.parent / "model").is_dir()]
    if not finished:
        raise UsageError(unfinished(runs[0].parent))
    for file in runs[: runs.index(finished[0] / "args.json")]:
        say(f"run       {file.parent} is newer and not finished: left out")
    return finished[0]


def unfinished(run_dir):
    record = report.read_json(run_dir / "args.json", f"--run-dir {run_dir}")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    steps = f"{max(0, len(lines))} of {record['args']['max_steps']} updates" if lines else "no update"
    return f"--run-dir {run_dir}: not finished ({steps} recorded, no model/); `python {record['command']}` goes on with it"


def load_subject(args, ranks):
    """Model, tokenizer, `args.json` of the run (for --model empty), and the folder of the run or None."""
    run_dir, record = None, {}
    if args.model and (Path(args.model) / "args.json").exists():  # its own data, seed and held-out text are in there
        raise UsageError(f"--model {args.model}: a run of this project; use --run-dir {args.model}")
    if not args.model:
        run_dir = Path(args.run_dir) if args.run_dir else newest_run(ranks.say)
        if not (run_dir / "args.json").exists():
            raise UsageError(f"--run-dir {run_dir}: no run of this project (no args.json); a plain checkpoint goes to --model")
        if not (run_dir / "model").is_dir():
            raise UsageError(unfinished(run_dir))
        record = report.read_json(run_dir / "args.json", f"--run-dir {run_dir}")
    name = args.model or str(run_dir)
    model, tokenizer = load_mtp(name), load_tokenizer(model_dir(name))
    check_vocabulary(name, model, tokenizer)
    return model.to(ranks.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32).eval(), tokenizer, record, run_dir


def load_heldout(args, record, model, tokenizer, ranks):
    """The data set whose held-out part is measured, and its name: the run's own, unless --data names another."""
    own = record.get("args", {})
    name, seq_len = args.data or own.get("data", "stdlib"), args.seq_len or own.get("seq_len", 256)
    longest = max_positions(model.causal_lm.config)
    if seq_len > longest:
        raise UsageError(f"--seq-len {seq_len}: the model has positions for {longest} tokens at most")
    outcomes = own.get("reward_model", ""), own.get("condition_on_outcome", False)
    data = load_data(name, tokenizer, seq_len, own.get("seed", args.seed), own.get("noise_frac", 0.0), ranks, *outcomes)
    if name == own.get("data"):
        here, there = data.heldout_fingerprint, record.get("heldout_fingerprint")
        if seq_len != own["seq_len"]:  # cut into other rows: then all documents must be those of the run
            here, there = data.fingerprint, record.get("data_fingerprint")
        if here != there:
            raise UsageError(
                f"--data {name}: not the held-out text of the run ({there} there, {here} here: another Python or changed files), "
                "and what is held out here may have been trained on; name other text by --data"
            )
    return data, name


def weight_samples(model, tokenizer, run_dir, ranks):
    """Held-out rows of a run with weights (its weights.json): tokens, weight and loss of each head for each token."""
    file, samples = Path(run_dir or "") / "weights.json", []
    for row in json.loads(file.read_text()) if run_dir and file.exists() else ():
        ids, num_heads = np.array([row["ids"]]), len(model.heads.layers)
        is_target = np.array([[w is not None for w in row["weight"]]])
        targets_KBT = torch.from_numpy(make_targets(ids, np.zeros_like(ids), is_target, num_heads)).to(ranks.device)
        with torch.inference_mode():
            loss_KT = token_figures(model, torch.from_numpy(ids).to(ranks.device), targets_KBT)[0, :, 0].tolist()
        of_token = [[None] * k + [None if math.isnan(v) else v for v in loss[:-k]] for k, loss in enumerate(loss_KT, start=1)]
        if isinstance(tokenizer, transformers.ByT5Tokenizer):
            data = [bytes([i - tokenizer.offset]) if i >= tokenizer.offset else b"" for i in row["ids"]]
            tokens = [byte.decode("utf-8", "surrogateescape") for byte in data]
        else:
            tokens = [tokenizer.decode([i], skip_special_tokens=True) for i in row["ids"]]
        samples.append({"tokens": tokens, "weight": row["weight"], "loss": of_token})
    return samples


# ---------------------------------------------------------------------------------------------------------------- results
def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def fingerprint_of(path):
    """Of a file, or of the files in a folder: names, sizes, and 64 blocks of each."""
    path, found = Path(path), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(f for f in path.glob("*") if f.is_file()):
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as f:
            for start in range(0, size, max(65536, size // 64)):
                f.seek(start)
                found.update(f.read(65536))
    return found.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------- main
class Results:
    """`results.json`, written after every suite; what is not measured again stays. `fingerprint`: of model or solutions."""

    def __init__(self, out, name, fingerprint):
        self.out, self.values = out, {}
        if (out / FILES[0]).exists():
            self.values = report.read_json(out / FILES[0], f"--out {out}")
            if self.values.get("fingerprint") != fingerprint:
                held = self.values.get("subject")
                raise UsageError(f"--out {out}: holds the results of other weights or solutions ({held}); name another folder")
        report.make_folder(out)
        self.values |= dict(subject=name, fingerprint=fingerprint, **commit(), versions=versions())

    def add(self, suite, metrics, args, began, **settings):
        source = dict(command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), seed=args.seed)
        kept = {key: value for key, value in self.values.items() if not key.startswith(f"{suite}/")}
        record = source | commit() | dict(seconds=round(time.time() - began, 1)) | settings
        self.values = kept | source | {"suites": kept.get("suites", {}) | {suite: record}} | metrics
        write_whole(self.out / FILES[0], json.dumps(self.values, indent=1))

    def add_programs(self, suite, outcomes):
        file = self.out / FILES[2]
        before = report.read_json(file, f"--out {self.out}") if file.exists() else {}
        write_whole(file, json.dumps(before | {suite: outcomes}))


def score_solutions(suite, problems, sandbox, args, say):
    """Score the programs of --solutions; returns the `Results`."""
    jobs = [(task_id, job.id[1], job) for task_id, job in read_solutions(args.solutions, problems)]
    began, fingerprint = time.time(), hashlib.sha256(Path(args.solutions).read_bytes()).hexdigest()[:16]
    results = Results(Path(args.out or f"eval/{Path(args.solutions).stem}"), args.solutions, fingerprint)
    told = digest([p.scoring() for p in problems])
    made_by = dict(suite=suite, solutions=fingerprint, problems=told)
    samples = Samples(results.out / f"{suite}-{digest(made_by)}.jsonl", made_by)
    metrics, outcomes = score_programs(suite, jobs, sandbox, args, samples, say)
    how = dict(solutions=args.solutions, problems=told, timeout=args.timeout, sandbox=args.sandbox)
    results.add(suite, metrics, args, began, **how)
    results.add_programs(suite, outcomes)
    if metrics[f"{suite}/problems"] < len(problems):
        say(f"{suite:<9} {metrics[f'{suite}/problems']} of {len(problems)} problems have a program in the file; only they count")
    return results


def program_suite(suite, problems, model, tokenizer, sandbox, args, results, say):
    """Sample and score programs; adds to `results`."""
    began, num_heads = time.time(), 1 if args.decode == "plain" else len(model.heads.layers)
    settings = dict(temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)
    made_by = settings | dict(
        problems=digest([p.scoring() for p in problems]), prompts=digest([(p.prompt, p.stops) for p in problems]),
        model=results.values["fingerprint"], seed=args.seed, dtype=args.dtype, heads_in_decoding=num_heads,
    )  # fmt: skip
    problems, samples = problems[: args.limit or None], Samples(results.out / f"{suite}-{digest(made_by)}.jsonl", made_by)
    say(f"{suite:<9} {len(problems)} problems x {args.n} programs, {'plain' if num_heads == 1 else 'speculative'} decoding")
    decoding = sample_programs(suite, problems, model, tokenizer, num_heads, args, samples, say)
    jobs = [
        (p.task_id, n, job_of(p, samples.texts[p.task_id, n], whole=False, sample=n)) for p in problems for n in range(args.n)
    ]
    metrics, outcomes = score_programs(suite, jobs, sandbox, args, samples, say)
    metrics |= {f"{suite}/{key}": value for key, value in dict(n=args.n, **settings).items()} | decoding
    results.add(suite, metrics, args, began, **made_by, timeout=args.timeout, sandbox=args.sandbox)
    results.add_programs(suite, outcomes)


def evaluate(args, problems, sandbox, ranks):
    """Run the suites on a run or model; returns the `Results`."""
    model, tokenizer, record, run_dir = load_subject(args, ranks)
    name, num_heads = args.model or str(run_dir), len(model.heads.layers)
    if record.get("args", {}).get("condition_on_outcome"):  # the model is asked for correct programs
        problems = {s: [dataclasses.replace(p, prompt=TAGS[True] + p.prompt) for p in some] for s, some in problems.items()}
    if args.decode == "speculative" and num_heads == 1:
        raise UsageError(f"--decode speculative: {name} has one head and nothing drafts; use --decode plain")
    parameters = sum(p.numel() for p in model.parameters())
    ranks.say(f"model     {name}, {parameters / 1e6:.2f} M parameters, {num_heads} head(s)")
    out = Path(args.out or (run_dir / "eval" if run_dir else f"eval/{Path(args.model).name}"))
    if {"heldout", "speed"} & set(args.suites):
        data, data_name = load_heldout(args, record, model, tokenizer, ranks)
        rows, length = data.heldout[:]["input_ids"].shape
        ranks.say(f"data      {data_name}, {rows:,} held-out rows of {length} tokens")
        prompts = speed_prompts(model, data, args) if "speed" in args.suites else []
    results = Results(out, name, fingerprint_of(model_dir(name)) if Path(model_dir(name)).exists() else name)
    for suite in dict.fromkeys(args.suites):
        began = time.time()
        if suite == "heldout":
            metrics, documents = heldout_suite(model, tokenizer, data, args, ranks)
            write_whole(out / FILES[1], json.dumps(documents))
            results.values["heldout_fingerprint"] = data.heldout_fingerprint
            results.add(suite, metrics, args, began, data=data_name, seq_len=length, dtype=args.dtype)
        elif suite == "speed":
            metrics = speed_suite(model, prompts, args, ranks)
            machine = dict(device=ranks.device.type, threads=torch.get_num_threads(), rounds=args.rounds)
            results.add(suite, metrics, args, began, data=data_name, seq_len=length, dtype=args.dtype, **machine)
        else:
            program_suite(suite, problems[suite], model, tokenizer, sandbox, args, results, ranks.say)
        ranks.say(f"{suite:<9} done in {time.time() - began:.1f} s")
    charts = report.draw(out, results.values, report.read_history(run_dir))
    report.write_html(out, results.values, charts, weight_samples(model, tokenizer, run_dir, ranks))
    if run_dir:
        track(run_dir, record, results, ranks)
    return results


def track(run_dir, record, results, ranks):
    """Send the metrics to the run's tracker, into the record of the training."""
    if record["args"]["tracker"] == "none" or not (run_dir / "tracker.json").exists():
        return
    tracker = Tracker(record["args"]["tracker"], run_dir, types.SimpleNamespace(**record["args"]), ranks)
    numbers = {k.replace("@", "_at_"): float(v) for k, v in results.values.items() if "/" in k}  # MLflow's names have no @
    tracker.log(record["args"]["max_steps"], numbers)
    tracker.finish([results.out / FILES[0], results.out / "report.html"])


def main(args):
    if args.compare:
        out = Path(args.out or "eval/compare")
        print(compare_runs(out, [load_run(name) for name in args.compare]))
        return print(f"\nwritten   {out}/")
    ranks = setup_ranks(args.device, args.dtype)
    if ranks.world_size > 1:
        raise UsageError(f"torchrun with {ranks.world_size} ranks: evaluate.py is one process; start it by python")
    programs = [suite for suite in PROGRAMS if suite in args.suites]
    problems = {suite: load_problems(suite, args.problems or None, ranks.say, args.shots) for suite in programs}
    with contextlib.ExitStack() as stack:
        sandbox = None
        if programs:  # first, as it may be refused
            limits = Limits(wall_s=args.timeout)
            sandbox = stack.enter_context(open_sandbox(args.sandbox, args.i_understand_untrusted_code, ranks.say, limits))
        try:
            if args.solutions:
                results = score_solutions(programs[0], problems[programs[0]], sandbox, args, ranks.say)
            else:
                results = evaluate(args, problems, sandbox, ranks)
        except KeyboardInterrupt:
            ranks.say("stopped   finished suites, samples and verdicts are kept; the same command goes on")
            raise SystemExit(130) from None
    written = "  ".join(sorted(file.name for file in results.out.iterdir()))
    print(f"\n{report.table(results.values)}\n\nwritten   {results.out}/  {written}")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
