"""Do weights by excess loss or by gradient find noise, and do they help? Table, picture, JSON.

    python benchmarks/selection_proof.py --out OUT                        rho1: 39 runs
    python benchmarks/selection_proof.py --out OUT2 --algorithm grad      grad: 96 runs, and 21 more
                                         with --shift mbpp.jsonl

It goes on if stopped. Every run is a script as it stands, one thread. Each arm trains for equally
many updates, for each seed, on stdlib:a with 30 % of its lines (`line`) or single characters
(`byte`) replaced by random ones, and as it is (`clean`). rho1: a reference (1 head) trains on clean
stdlib:b first. `uniform` is --lambda 1, `abs` a score, `shuffle` permutes the weights, `random`
draws those of token_skip anew, `oracle`, a copy of baseline_mtp.py, gives noise weight 0.

grad: the target set is 256 rows of stdlib:b. `gate` and `skip` average scores, `.._token` do not;
`norm` scores by size; `target` trains on the clean rows, a batch more every 4 updates, instead of
scoring with them; `rho1` is --mode weighted with a reference trained on just these rows. `shift`:
the text is stdlib, the target and the held-out text are solutions of MBPP (601 on, and before).

CLAIM of grad, written before the first run: on noise no gain over `uniform` is shown. Expected:
averaged scores find noise lines with an AUC of 0.77 to 0.86, single ones with 0.6 to 0.7, `norm`
with less than 0.5; averaging does not help with `byte`; `gate_token` and `skip_token` do harm;
`target` gains most; on clean text grad costs 0.01 to 0.04. What `shift` shows is open.

Judged from the final models: loss and accuracy of head 1 on every fourth held-out row; difference
to `uniform` as mean over seeds, with a 95 % interval from a paired bootstrap over the documents.
AUC: how often noise scores lower than clean text, last fifth of the updates. Arms are the peers.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import tools
from matplotlib.figure import Figure

from common import IGNORE, Ranks, build_model, load_data, load_tokenizer

WEIGHTED = dict(mode="weighted", temperature=0.7, epsilon=0.05, max_weight=3.0)
WEIGHTED |= {"score": "excess", "lambda": 0.3}
SKIP = {**WEIGHTED, "mode": "token_skip", "skip_ratio": 0.3, "lambda": 0.0}
ARMS = {
    "rho1": {
        "uniform": {**SKIP, "lambda": 1.0},
        "weighted": WEIGHTED,
        "token_skip": SKIP,
        "abs": {**WEIGHTED, "score": "abs"},
        "shuffle": {**WEIGHTED, "control": "shuffle"},
        "random": {**SKIP, "control": "random"},
        "oracle": {},
    },
    "grad": {
        "uniform": {"lambda": 1.0},
        "gate": {},
        "gate_token": {"smooth": 0},
        "skip": {"mode": "token_skip"},
        "skip_token": {"mode": "token_skip", "smooth": 0},
        "norm": {"score": "norm"},
        "shuffle": {"control": "shuffle"},
        "random": {"mode": "token_skip", "control": "random"},
        "target": {"control": "target"},
        "rho1": WEIGHTED,
        "oracle": {},
    },
}
FIGURES = ("weights/on_noise", "weights/on_clean", "weights/ess_frac", "noise_auc")
LEFT_OUT = {"clean": ["oracle"], "shift": ["oracle", "norm", "shuffle", "skip_token"]}
ORACLE = """
            clean_BT = (~batch.is_noise_BT).float()
            is_target_BT = batch.targets_KBT[0, :, :-1] >= 0
            weight_BT = clean_BT / clean_BT[:, 1:][is_target_BT].mean().clamp(min=1e-6)
"""


def flags_of(args, **changes):
    model = args.model or Path(args.out, "config.json")
    flags = dict(tools.PROOF_FLAGS, model=model, device=args.device)
    flags |= dict(batch_size=args.batch_size, lr=3e-3, warmup_steps=min(40, args.steps // 4))
    return tools.as_flags(flags | changes)


def data_of(args, setting, seed):
    """Flags of the data in a setting."""
    if setting == "shift":
        return dict(data="stdlib", heldout_data=f"{args.out}/heldout.jsonl", seed=seed)
    noise = dict(noise_frac=args.noise_frac, noise_by=setting) if setting != "clean" else {}
    return dict(data="stdlib:a", seed=seed, **noise)


def target_of(args, setting):
    """What grad's --target names, and the reference that rho1 has instead."""
    if setting == "shift":
        return f"{args.out}/target.jsonl", f"{args.out}/reference_shift"
    return "stdlib:b", f"{args.out}/reference"


def write_texts(file, texts):
    Path(file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_shift(args):
    """Solutions of MBPP as texts: the target set, and what is held out."""
    tasks = map(json.loads, Path(args.shift).read_text().splitlines())
    codes = [(task["task_id"], task["code"].replace("\r", "") + "\n") for task in tasks]
    write_texts(f"{args.out}/target.jsonl", [code for number, code in codes if number > 600])
    write_texts(f"{args.out}/heldout.jsonl", [code for number, code in codes if number <= 600])


def train_reference(args, setting):
    """The model that rho1 compares with: of stdlib:b, or of the rows that grad's --target reads."""
    name, reference = target_of(args, setting)
    if Path(reference, "model").exists():
        return
    flags = dict(data=name, noise_frac=0.0, max_steps=args.ref_steps)
    if args.algorithm == "grad":
        tokenizer = load_tokenizer()
        rows = load_data(tools.data_args(name), tokenizer, Ranks()).train
        rows = rows[np.linspace(0, len(rows) - 1, min(256, len(rows))).astype(int)]["input_ids"]
        write_texts(f"{reference}.jsonl", tokenizer.batch_decode(rows, skip_special_tokens=True))
        flags = dict(data=f"{reference}.jsonl", heldout_data=f"{reference}.jsonl", eval_rows=8)
        flags["max_steps"] = args.steps
    words = flags_of(args, num_heads=1, seed=0, run_dir=reference, **flags)
    tools.run_script("baseline_mtp.py", words, f"{reference}.txt")


def judge(run_dir, flags, num_heads):
    """Loss, correct and targets of each held-out document, sums `[documents, 3]`."""
    model, tokenizer = build_model(str(run_dir), num_heads)
    rows = load_data(tools.data_args(**flags), tokenizer, Ranks()).heldout
    sums = np.zeros((rows[:]["document"].max() + 1, 3))
    for batch, *figures in tools.heldout_losses(model, rows, np.arange(0, len(rows), 4)):
        valid_BT = (batch.targets_KBT[0] != IGNORE).numpy()
        values_3BT = np.stack([*figures, valid_BT]).astype(float)
        document_BT = rows[batch.rows_B]["document"]
        np.add.at(sums, document_BT[valid_BT], values_3BT[:, valid_BT].T)
    return sums[sums[:, 2] > 0].tolist()


def one_run(args, arm, setting, seed):
    """Train and judge one arm; the result is kept in a file."""
    out, name = Path(args.out), f"{setting} {arm} {seed}"
    run_dir, (target, reference) = out / name, target_of(args, setting)
    script, own = f"{args.algorithm}_wmtp.py", dict(target=target)
    if "rho1" in (args.algorithm, arm):  # online: a run sees a tenth of the rows
        script, own = "rho1_wmtp.py", dict(ref_model=reference, ref_online=True)
    if arm == "oracle":
        script, own = out / "oracle.py", {}

    def work():
        shutil.rmtree(run_dir, ignore_errors=True)
        data, eval_rows = data_of(args, setting, seed), None if args.algorithm == "rho1" else 8
        sizes = dict(num_heads=args.num_heads, max_steps=args.steps, eval_rows=eval_rows)
        words = flags_of(args, **sizes, **data, run_dir=run_dir)
        words += tools.as_flags({**ARMS[args.algorithm][arm], **own})
        tools.run_script(script, words, out / f"{name}.txt")
        figures = dict(setting=setting, arm=arm, seed=seed)
        figures["documents"] = judge(run_dir, data, args.num_heads)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        figures["command"] = " ".join([Path(script).name, *words]).replace(str(out), "OUT")
        lines = [line for line in tools.read_metrics(run_dir) if "train/loss" in line]
        last = lines[-max(1, args.steps // 5) :]  # the last fifth of the updates
        for key in FIGURES:
            values = [value for line in last for k, value in line.items() if k.endswith(key)]
            figures[key] = float(np.mean(values)) if values else None
        return figures

    return tools.kept(out / f"{name}.json", work)


def summary(results):
    """One row for each setting and arm: means over seeds, deviations, differences to uniform."""
    runs, rows = {(r["setting"], r["arm"], r["seed"]): r for r in results}, []
    for setting, arm in dict.fromkeys((setting, arm) for setting, arm, _ in runs):
        seeds = [seed for *kind, seed in runs if kind == [setting, arm]]
        pairs = [[runs[setting, name, s]["documents"] for name in (arm, "uniform")] for s in seeds]
        sums, base = np.array(pairs).swapaxes(0, 1)  # `[seeds, documents, 3]`
        row = dict(setting=setting, arm=arm, seeds=seeds)
        for place, key in enumerate(("loss", "acc")):
            by_seed = sums[..., place].sum(1) / sums[..., 2].sum(1)
            row |= {key: by_seed.mean(), f"{key}_seeds": by_seed.tolist()}
            means = sums[..., place].mean(0), base[..., place].mean(0)
            result = tools.difference_with_interval(*means, sums[0, :, 2])
            row[f"{key}_difference"], row[f"{key}_interval"] = result
        for key in FIGURES:
            values = [runs[setting, arm, seed][key] for seed in seeds]
            row[key] = None if None in values else float(np.mean(values))
        rows.append(row)
    return rows


def show(rows):
    header = "text,weights,held-out loss (sd),to uniform [95 %],accuracy (sd),to uniform [95 %]"
    lines = []
    for row in rows:
        cells = [row["setting"], row["arm"]]
        for key in ("loss", "acc"):
            deviation = np.std(row[f"{key}_seeds"], ddof=len(row["seeds"]) > 1)
            low, high = row[f"{key}_interval"]
            cells.append(f"{row[key]:.4f} ({deviation:.4f})")
            cells.append(f"{row[f'{key}_difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(cells + ["" if row[key] is None else f"{row[key]:.3f}" for key in FIGURES])
    tools.print_table([*header.split(","), "w on noise", "on clean", "ess", "AUC"], lines)


def plot(rows, file):
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure = Figure(figsize=(5 * len(settings), 3.4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings):
        own = [r for r in rows if r["setting"] == setting and r["arm"] != "uniform"]
        middle_N = np.array([row["loss_difference"] for row in own])
        error_2N = abs(np.array([row["loss_interval"] for row in own]).T - middle_N)
        axes.errorbar(middle_N, [row["arm"] for row in own], xerr=error_2N, fmt="o", capsize=3)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set(title=setting, xlabel="held-out loss to uniform (nats)")
        axes.invert_yaxis()
    figure.savefig(file, dpi=110)


def main():
    parser = tools.proof_parser(__doc__, 250, 4, [*ARMS["rho1"], *ARMS["grad"]])
    parser.add_argument("--algorithm", choices=ARMS, default="rho1")
    parser.add_argument("--shift", default="", help="grad: MBPP as JSON lines; empty: no `shift`")
    parser.add_argument("--noise-frac", type=float, default=0.3)
    parser.add_argument(
        "--ref-steps", type=int, default=1500, help="rho1: updates of its reference"
    )
    args = parser.parse_args()
    out, settings = tools.prepare_proof(args, ("jobs", "seeds", "arms", "shift"), num_layers=4)
    source = (tools.ROOT / "baseline_mtp.py").read_text()
    changed, count = re.subn(r"\n +weight_BT = .*\n", lambda _: ORACLE, source)
    assert count == 1, f"baseline_mtp.py: {count} lines that set weight_BT, 1 expected"
    (out / "oracle.py").write_text(changed)
    texts = ["line", "clean"] if args.algorithm == "rho1" else ["line", "byte", "clean"]
    train_reference(args, "line")
    if Path(args.shift).is_file():
        write_shift(args)
        train_reference(args, "shift")
        texts.append("shift")
    elif args.algorithm == "grad":
        print(f"shift     left out: --shift {args.shift or '(empty)'} names no file", flush=True)
    arms = [arm for arm in ARMS[args.algorithm] if arm in args.arms]
    tasks = [(args, arm, t, seed) for seed in range(args.seeds) for t in texts for arm in arms]
    tasks = [task for task in tasks if task[1] not in LEFT_OUT.get(task[2], [])]
    results = tools.run_jobs(one_run, tasks, args.jobs)
    rows = summary(results)
    record = dict(command=tools.command(), **tools.machine(args.device), settings=settings)
    record["seconds_of_runs"] = sum(result["seconds"] for result in results)
    commands = {f"{r['setting']} {r['arm']}": r["command"] for r in results if r["seed"] == 0}
    file = out / f"{args.algorithm}_proof"
    tools.write_json(f"{file}.json", {**record, "commands": commands, "rows": rows})
    show(rows)
    plot(rows, f"{file}.png")
    print(f"\n{file}.json, {file.name}.png")


if __name__ == "__main__":
    main()
