"""Cost of a training step: the baseline, rho1 with reference losses from their file or computed in the step, the critic.

    python benchmarks/step_cost.py [--rounds 5] [--steps 60] [--device auto]
    python benchmarks/step_cost.py --model FOLDER/config.json --batch-size 1 --steps 20 --forms baseline "rho1, token_skip"

The scripts themselves run, taking turns: 4 heads, batch 4 x 256 tokens, the default model, a reference of its size with 1 head,
noise 0.3 (with noise the detector's area is computed too). The critic and a baseline of its own train on records of stdlib-bugs,
half of them wrong and so without targets. A config.json beside a tokenizer shows what a large vocabulary changes.
A step's seconds are those of `perf/tokens_per_s`; the first ten of a run are left out.
A round's figure is the median over its steps; the table gives medians over rounds, and the median of the ratios within a round.
Prints a table and writes step_cost.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LENGTH = 256


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--forms", nargs="+", help="which of the forms; empty: all")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "step_cost.json"))
    args = parser.parse_args()
    import torch

    import bugs
    import data
    from runs import commit, versions

    folder = Path(tempfile.mkdtemp(prefix="step_cost-"))
    texts = data._stdlib()[:: 20 if args.model == "tiny" else 200]  # few, as every run ends with a look at the held-out ones
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    records = bugs.make_records(texts)
    rows = [dict(zip(records, values)) for values in zip(*(records[c] for c in ("prompt", "completion", "reward")))]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = args.model if args.model == "tiny" else Path(args.model).resolve()
    common = ["--seq-len", LENGTH, "--batch-size", args.batch_size, "--tracker", "none", "--save-every", 0]
    common += ["--device", args.device, "--mtp-schedule", "constant", "--model", model]
    text, judged = ["--data", folder / "text.jsonl"], ["--data", folder / "records.jsonl"]
    rho1 = ["rho1_wmtp.py", *text, "--noise-frac", 0.3, "--ref-model", folder / "reference"]
    variants = {
        "baseline": ["baseline_mtp.py", *text, "--noise-frac", 0.3],
        "rho1, weighted": [*rho1, "--mode", "weighted"],
        "rho1, token_skip": [*rho1, "--mode", "token_skip"],
        "rho1, weighted, --ref-online": [*rho1, "--mode", "weighted", "--ref-online"],
        "baseline, records": ["baseline_mtp.py", *judged],
    }
    for kind in ("shared", "frozen", "separate"):
        variants[f"critic, --value {kind}"] = ["critic_wmtp.py", *judged, "--value", kind, "--value-steps", 1]
    variants = {name: words for name, words in variants.items() if name in (args.forms or variants)}

    def run(script, *words):
        command = [sys.executable, ROOT / script, *common, *words]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    run("baseline_mtp.py", *text, "--num-heads", 1, "--max-steps", 20, "--run-dir", folder / "reference")
    run("rho1_wmtp.py", *rho1[1:], "--max-steps", 1, "--run-dir", folder / "file")  # makes the file of reference losses
    seconds = {name: [] for name in variants}
    for number in range(args.rounds):
        names = list(variants)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            run_dir = folder / f"{name} {number}"
            run(*variants[name], "--max-steps", args.steps, "--run-dir", run_dir)
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            steps = [args.batch_size * LENGTH / line["perf/tokens_per_s"] for line in lines if "perf/tokens_per_s" in line]
            seconds[name].append(statistics.median(steps[10:]))
            print(f"round {number + 1} of {args.rounds}  {name:<30} {seconds[name][-1] * 1e3:8.1f} ms a step", flush=True)
    rows = []
    for name, values in seconds.items():
        base = "baseline, records" if name.startswith(("critic", "baseline, records")) else "baseline"
        ratios = [a / b for a, b in zip(values, seconds.get(base, values))]
        rows.append(
            dict(
                form=name, seconds=statistics.median(values), baseline=base, to_baseline=statistics.median(ratios), ratios=ratios
            )
        )
    products = json.loads((run_dir / "args.json").read_text())["products"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else platform.processor()
    machine = dict(
        device=device or platform.machine(), cores=len(os.sched_getaffinity(0)), products=products, versions=versions()
    )
    words = [Path(word).name if word == args.model else word for word in sys.argv[1:] if word not in ("--out", args.out)]
    shape = {} if args.model == "tiny" else json.loads(model.read_text())
    record = dict(command=" ".join(["python benchmarks/step_cost.py", *words]), **commit(), **machine, model=shape, rows=rows)
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n| form | ms a step | to baseline (min to max) |\n{'|---' * 3}|")
    for r in rows:
        spread = f"{min(r['ratios']):.3f} to {max(r['ratios']):.3f}"
        print(f"| {r['form']} | {r['seconds'] * 1e3:.1f} | {r['to_baseline']:.3f} ({spread}) |")


if __name__ == "__main__":
    main()
