"""Do excess-loss weights find noise, and do they help? Runs, table, picture and JSON.

    python benchmarks/rho1_proof.py --out OUT          39 runs, two at once; it goes on if stopped

A reference (1 head) trains on clean stdlib:b. Then each arm trains on stdlib:a for equally many
updates, for each seed, with 30 % of the training lines replaced by random characters and with none:

    uniform      w = 1 (--lambda 1)
    weighted     --mode weighted           shuffle   the same weights, permuted among the tokens
    token_skip   --mode token_skip         random    token_skip's weights, drawn at random
    abs          --mode weighted --score abs
    oracle       weight 0 on noise, equal weights elsewhere (a copy of baseline_mtp.py; noise only)

Every run is the script as it stands, in a process of one thread. stdlib:a and stdlib:b share no
file and hold out the same files whatever the seed. Judged from the final models: loss and accuracy
of head 1 on every fourth held-out row; difference to `uniform` as mean over seeds, with a 95 %
interval from a paired bootstrap over the documents. AUC: the probability that a noise token scores
lower than a clean one, for each score, over 64 noisy training rows. No peers: the arms compare.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import tools

WEIGHTED = dict(mode="weighted", temperature=0.7, epsilon=0.05, max_weight=3.0)
WEIGHTED |= {"score": "excess", "lambda": 0.3}
SKIP = {**WEIGHTED, "mode": "token_skip", "skip_ratio": 0.3, "lambda": 0.0}
ARMS = {
    "uniform": {**SKIP, "lambda": 1.0},
    "weighted": WEIGHTED,
    "token_skip": SKIP,
    "abs": {**WEIGHTED, "score": "abs"},
    "shuffle": {**WEIGHTED, "control": "shuffle"},
    "random": {**SKIP, "control": "random"},
    "oracle": None,
}
SCORES = ("excess", "abs", "loss", "reference")
ORACLE = """
            clean_BT = (~batch.is_noise_BT).float()
            is_target_BT = batch.targets_KBT[0, :, :-1] >= 0
            weight_BT = clean_BT / clean_BT[:, 1:][is_target_BT].mean().clamp(min=1e-6)
"""


def flags_of(args, out, **changes):
    flags = dict(tools.PROOF_FLAGS, model=args.model or out / "config.json", device=args.device)
    flags |= dict(batch_size=args.batch_size, lr=3e-3, warmup_steps=min(40, args.steps // 4))
    return tools.as_flags(flags | changes)


def write_oracle(out):
    """The baseline's source with other weights: what a fork of it would be."""
    source = (tools.ROOT / "baseline_mtp.py").read_text()
    changed, count = re.subn(r"\n +weight_BT = .*\n", lambda _: ORACLE, source)
    assert count == 1, f"baseline_mtp.py: {count} lines that set weight_BT, 1 expected"
    (out / "oracle.py").write_text(changed)


def judge(run_dir, data_name, noise, seed, num_heads, reference):
    """Sums of each held-out document `(loss, correct, targets)`, and the AUC of each score."""
    import torch
    from sklearn.metrics import roc_auc_score

    from common import IGNORE, Ranks, build_model, load_batch, load_data

    model, tokenizer = build_model(str(run_dir), num_heads)
    data = load_data(tools.data_args(data_name, seed=seed, noise_frac=noise), tokenizer, Ranks())
    numbers, documents = np.arange(0, len(data.heldout), 4), {}
    for batch, loss_BT, correct_BT in tools.heldout_losses(model, data.heldout, numbers):
        document_BT = data.heldout[batch.rows_B]["document"]
        valid_BT = (batch.targets_KBT[0] != IGNORE).numpy()
        for document in np.unique(document_BT[document_BT >= 0]).tolist():
            chosen_BT = valid_BT & (document_BT == document)
            sums = loss_BT.numpy()[chosen_BT].sum(), correct_BT.numpy()[chosen_BT].sum()
            before = documents.get(document, (0.0, 0.0, 0.0))
            new = (*map(float, sums), float(chosen_BT.sum()))
            documents[document] = [old + value for old, value in zip(before, new)]
    areas = {}
    if noise:
        numbers = np.linspace(0, len(data.train) - 1, 64).astype(int)
        batch = load_batch(data.train, numbers, 1, "cpu")
        reference_model = build_model(str(reference), 1)[0].eval()
        with torch.no_grad():
            valid_BT = batch.targets_KBT[0] != IGNORE
            models = (model, reference_model)
            loss, ref = (m(batch.x_BT, batch.targets_KBT)[0][valid_BT] for m in models)
        is_clean = ~batch.is_noise_BT.roll(-1, 1)[valid_BT]
        scores = dict(excess=loss - ref, abs=(loss - ref).abs(), loss=loss, reference=-ref)
        areas = {f"auc/{name}": float(roc_auc_score(is_clean, s)) for name, s in scores.items()}
    return documents, areas


def one_run(args, arm, noise, seed):
    """Train and judge one arm; the result is kept in a file."""
    out = Path(args.out)
    name = f"noise {noise} {arm} {seed}"
    run_dir, reference = out / name, out / "reference"

    def work():
        shutil.rmtree(run_dir, ignore_errors=True)
        flags = dict(data="stdlib:a", noise_frac=noise, seed=seed, run_dir=run_dir)
        words = flags_of(args, out, num_heads=args.num_heads, max_steps=args.steps, **flags)
        script = out / "oracle.py"
        if arm != "oracle":
            script = "rho1_wmtp.py"
            # online: a run sees a tenth of the rows
            words += tools.as_flags({**ARMS[arm], "ref_model": reference, "ref_online": True})
        tools.run_script(script, words, out / f"{name}.txt")
        documents, areas = judge(run_dir, "stdlib:a", noise, seed, args.num_heads, reference)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        figures = {"noise": noise, "arm": arm, "seed": seed, "documents": documents, **areas}
        figures["command"] = " ".join([Path(script).name, *words]).replace(str(out), "OUT")
        lines = [line for line in tools.read_metrics(run_dir) if "train/loss" in line]
        last = lines[-max(1, args.steps // 5) :]  # the last fifth of the updates
        for key in ("weights/on_noise", "weights/on_clean", "weights/ess_frac", "weights/max"):
            values = [line[key] for line in last if key in line]
            figures[key] = float(np.mean(values)) if values else None
        return figures

    return tools.kept(out / f"{name}.json", work)


def summary(results):
    """One row for each noise and arm: means over seeds, deviations, differences to uniform."""
    rows = []
    for noise in sorted({r["noise"] for r in results}, reverse=True):
        for arm in ARMS:
            runs = [r for r in results if (r["noise"], r["arm"]) == (noise, arm)]
            if not runs:
                continue
            seeds = [r["seed"] for r in runs]
            equal = [r for r in results if (r["noise"], r["arm"]) == (noise, "uniform")]
            equal = [next(r for r in equal if r["seed"] == seed) for seed in seeds]
            names = sorted(runs[0]["documents"])  # sums, base: `[seeds, documents, 3]`
            sums = np.array([[r["documents"][n] for n in names] for r in runs])
            base = np.array([[r["documents"][n] for n in names] for r in equal])
            row = dict(noise=noise, arm=arm, seeds=seeds)
            for place, key in enumerate(("loss", "acc")):
                by_seed = sums[..., place].sum(1) / sums[..., 2].sum(1)
                row[key], row[f"{key}_sd"] = tools.mean_and_sd(by_seed.tolist())
                row[f"{key}_seeds"] = by_seed.tolist()
                means = sums[..., place].mean(0), base[..., place].mean(0)
                result = tools.difference_with_interval(*means, sums[0, :, 2])
                row[f"{key}_difference"], row[f"{key}_interval"] = result
            for key in [key for key in runs[0] if key.startswith(("auc/", "weights/"))]:
                values = [r[key] for r in runs if r[key] is not None]
                row[key] = float(np.mean(values)) if values else None
            rows.append(row)
    return rows


def show(rows):
    header = "noise,weights,held-out loss (sd),to uniform [95 %],accuracy (sd),to uniform [95 %]"
    keys = ("weights/on_noise", "weights/on_clean", "weights/ess_frac")
    lines = []
    for row in rows:
        cells = [f"{row['noise']:g}", row["arm"]]
        for key in ("loss", "acc"):
            cells += tools.difference_cells(row, key)
        cells += ["" if row[key] is None else f"{row[key]:.3f}" for key in keys]
        lines.append(cells)
    tools.print_table([*header.split(","), "w on noise", "on clean", "ess"], lines)
    print("\nAUC of the scores as detectors of noise, final models\n")
    noisy = [row for row in rows if "auc/excess" in row]
    areas = [[row["arm"], *(f"{row[f'auc/{score}']:.3f}" for score in SCORES)] for row in noisy]
    tools.print_table(["model", *SCORES], areas)


def plot(rows, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    noises = sorted({row["noise"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(noises), squeeze=False, figsize=(10, 3.4))
    for ax, noise in zip(axes[0], noises):
        arms = [row for row in rows if row["noise"] == noise and row["arm"] != "uniform"]
        names, differences = [r["arm"] for r in arms], [r["loss_difference"] for r in arms]
        intervals = [r["loss_interval"] for r in arms]
        label = "held-out loss to uniform (nats)"
        tools.plot_differences(ax, names, differences, intervals, label)
        ax.set_title(f"{noise:.0%} of the lines noise")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main():
    parser = tools.proof_parser(__doc__, 250, 4, ARMS)
    parser.add_argument("--noise-frac", type=float, default=0.3)
    parser.add_argument("--ref-steps", type=int, default=1500)
    args = parser.parse_args()
    free = ("jobs", "seeds", "arms")  # what may change when it goes on
    out, settings = tools.prepare_proof(args, free, num_layers=4)
    write_oracle(out)
    reference = out / "reference"
    if not (reference / "model").exists():
        changes = dict(num_heads=1, seed=0, max_steps=args.ref_steps, run_dir=reference)
        words = flags_of(args, out, data="stdlib:b", noise_frac=0.0, **changes)
        tools.run_script("baseline_mtp.py", words, out / "reference.txt")
        print("reference trained", flush=True)
    noises = (args.noise_frac, 0.0)
    tasks = [
        (args, arm, n, seed) for seed in range(args.seeds) for n in noises for arm in args.arms
    ]
    tasks = [task for task in tasks if task[2] or task[1] != "oracle"]
    results = tools.run_jobs(one_run, tasks, args.jobs)
    rows = summary(results)
    record = dict(command=tools.command(), **tools.machine(args.device), settings=settings)
    record["seconds_of_runs"] = sum(result["seconds"] for result in results)
    commands = {r["arm"]: r["command"] for r in results if r["seed"] == 0 and r["noise"]}
    tools.write_json(out / "rho1_proof.json", {**record, "commands": commands, "rows": rows})
    show(rows)
    plot(rows, out / "rho1_proof.png")
    print(f"\n{out}/rho1_proof.json, rho1_proof.png")


if __name__ == "__main__":
    main()
