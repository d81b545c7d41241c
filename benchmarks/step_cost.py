"""Cost of a training step: rho1, grad and the critic beside the baseline.

    python benchmarks/step_cost.py [--rounds 5] [--steps 60] [--device cpu]
    python benchmarks/step_cost.py --model FOLDER/config.json --batch-size 1 --steps 20 \\
        --forms baseline "rho1, token_skip" --out benchmarks/step_cost_vocabulary.json

The scripts themselves run in one process of one thread and take turns: 4 heads, 4 x 256 tokens, the
default model, a reference of its size with 1 head, noise 0.3. The critic and a baseline of its own
train on stdlib-bugs. The peer is the baseline. A config.json beside a tokenizer shows what a large
vocabulary changes. A step's seconds come from `perf/tokens_per_s`, without the first ten. The table
gives medians over rounds, and ratios to the baseline of the same round.
"""

import statistics
import sysconfig
import tempfile
from pathlib import Path

import tools

LENGTH = 256
BUGS = dict(data="stdlib-bugs")


def forms_of(folder):
    """Script and flags of each form."""
    text = dict(data=folder / "text.txt", noise_frac=0.3)
    rho1, grad = dict(text, ref_model=folder / "reference"), dict(text, target=text["data"])
    forms = {
        "baseline": ("baseline_mtp.py", text),
        "rho1, weighted": ("rho1_wmtp.py", dict(rho1, mode="weighted")),
        "rho1, token_skip": ("rho1_wmtp.py", dict(rho1, mode="token_skip")),
        "grad, weighted": ("grad_wmtp.py", dict(grad, mode="weighted")),
        "grad, token_skip": ("grad_wmtp.py", dict(grad, mode="token_skip")),
        "baseline, records": ("baseline_mtp.py", BUGS),
    }
    for kind in ("frozen", "separate"):
        forms[f"critic, {kind}"] = ("critic_wmtp.py", dict(BUGS, value=kind, value_steps=1))
    return forms


def main():
    parser = tools.parser(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=4)
    names = list(forms_of(Path()))
    parser.add_argument("--forms", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    tools.quiet()
    folder = Path(tempfile.mkdtemp(prefix="step_cost-"))
    common = dict(seq_len=LENGTH, batch_size=args.batch_size, tracker="none", save_every=0)
    common |= dict(device=args.device, dtype="fp32", mtp_schedule="constant", num_heads=4)
    common["model"] = args.model if args.model == "tiny" else Path(args.model).resolve()
    forms = forms_of(folder)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text() for file in files[::10]]  # few: runs judge them too
    (folder / "text.txt").write_text("".join(texts))

    def run(script, **flags):
        lines, _ = tools.train(script, common | flags, folder / "last.txt")
        speeds = [line["perf/tokens_per_s"] for line in lines if "perf/tokens_per_s" in line]
        return [args.batch_size * LENGTH / speed for speed in speeds]

    if any(name.startswith("rho1") for name in args.forms):
        start = dict(num_heads=1, max_steps=20, run_dir=folder / "reference")
        run("baseline_mtp.py", data=folder / "text.txt", **start)
    seconds = {name: [] for name in args.forms}
    for number in range(args.rounds):
        for name in tools.in_turn(args.forms, number):
            script, flags = forms[name]
            steps = run(script, **flags, max_steps=args.steps, run_dir=folder / f"{name} {number}")
            seconds[name].append(statistics.median(steps[10:] or steps))
            print(f"round {number + 1}  {name:<20} {seconds[name][-1] * 1e3:8.1f} ms", flush=True)
    rows, cells = [], []
    for name, values in seconds.items():
        base = "baseline, records" if name.startswith(("critic", "baseline, r")) else "baseline"
        to_baseline = tools.spread(tools.ratios(values, seconds.get(base, values)))
        rows.append(dict(form=name, seconds=tools.spread(values), to_baseline=to_baseline))
        cells.append([name, f"{rows[-1]['seconds'][0] * 1e3:.1f}", tools.shown(to_baseline)])
    record = dict(command=tools.command(), **tools.machine(args.device), rows=rows)
    tools.write_json(args.out, record)
    tools.print_table(["form", "ms a step", "to the baseline"], cells)


if __name__ == "__main__":
    main()
