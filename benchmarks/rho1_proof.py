"""Do excess-loss weights find noise, and does it help? Runs, table, plot and JSON of the experiment in README.

    python benchmarks/rho1_proof.py --out OUT                       500 s for 22 of its 39 runs on 2 CPU cores; goes on if stopped
    python benchmarks/rho1_proof.py --out OUT --device cuda --model tiny --seeds 5 --steps 4000 --ref-steps 8000 --batch-size 32

A reference (1 head) is trained on clean stdlib:b. Then, with 30 % of the training lines of stdlib:a replaced by random
characters and with none, for each seed, equal numbers of updates of:

    uniform      w = 1 (--lambda 1)
    weighted     --mode weighted           shuffle   the same weights, permuted among the tokens
    token_skip   --mode token_skip         random    as many tokens left out as token_skip does, drawn at random
    abs          --mode weighted --score abs
    oracle       knows the noise: weight 0 on it, equal weights elsewhere (with noise only)

The scripts' own `main` runs, in `--jobs` processes of one thread; two of its parts are replaced here: the closing report by
nothing, and the held-out evaluation by head 1 on every fourth held-out row, summed by document. stdlib:a and stdlib:b share
no file and hold out the same files whatever the seed. Differences to uniform: mean over seeds, with a 95 % interval from
10,000 bootstrap samples of the documents, the same documents for both runs (paired). Every score's area under the curve as a
detector of noise is logged in every update: the probability that a noise token scores lower than a clean one.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
WEIGHTED, SKIP = ["--mode", "weighted"], ["--mode", "token_skip"]
VARIANTS = {
    "uniform": ["--lambda", "1"],
    "weighted": WEIGHTED,
    "token_skip": SKIP,
    "abs": [*WEIGHTED, "--score", "abs"],
    "shuffle": [*WEIGHTED, "--control", "shuffle"],
    "random": [*SKIP, "--control", "random"],
    "oracle": "--lambda 0 --score reference --temperature 0.01 --epsilon 0 --max-weight 1e9".split(),
}
SCORES = ("excess", "abs", "loss", "reference")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of runs and results")
    parser.add_argument("--model", default="", help="as --model of the scripts; empty: a Llama of 4 layers, width 96")
    parser.add_argument("--noise-frac", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-heads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--ref-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    return parser.parse_args()


def words_of(args, out, **changes):
    values = dict(
        model=args.model or out / "config.json", seq_len=256, batch_size=args.batch_size, mtp_schedule="constant", lr=3e-3,
        tracker="none", save_every=0, device=args.device, warmup_steps=min(40, args.steps // 4),
    )  # fmt: skip
    return [str(word) for k, v in (values | changes).items() for word in (f"--{k.replace('_', '-')}", v)]


def heldout_by_document(model, batches, data, num_heads, ranks, found):
    """Stands in for `runs.evaluate_heldout`: head 1 on every fourth row; sums by document go to `found`."""
    import numpy as np
    import torch

    from common import IGNORE
    from data import load_batch

    numbers, sums = np.arange(0, len(data.heldout), 4), {}
    model.eval()
    with torch.no_grad(), ranks.autocast():
        for first in range(0, len(numbers), 32):
            part = numbers[first : first + 32]
            batch = load_batch(data.heldout, part, 1, ranks.device)
            loss, correct = (v[0].cpu().double() for v in model(batch.x_BT, batch.targets_KBT, with_correct=True))
            valid = (batch.targets_KBT[0] != IGNORE).cpu().double()
            document = data.heldout[part]["document"]
            for d in np.unique(document[document >= 0]):
                here = torch.from_numpy(document == d)
                here[:, :-1] = here[:, 1:].clone()  # the target's document
                old = sums.get(int(d), (0.0, 0.0, 0.0))
                sums[int(d)] = tuple(o + v[here].sum().item() for o, v in zip(old, (loss, correct, valid)))
    model.train()
    found["documents"] = sums
    loss, correct, count = (sum(s[i] for s in sums.values()) for i in range(3))
    metrics = {f"eval/loss_head_{k + 1}": loss / count for k in range(num_heads)}  # the loop prints all heads: head 1's for each
    metrics |= {f"eval/acc_head_{k + 1}": correct / count for k in range(num_heads)}
    return metrics | {"eval/bits_per_byte": float("nan")}


def run(module, words, found=None):
    """The script's `main` with these arguments in this process."""
    import tyro

    if found is not None:
        module.evaluate_heldout = functools.partial(heldout_by_document, found=found)
    module.report = lambda *ignored: None
    module.main(tyro.cli(module.Args, args=words))


def job(task):
    """One run, in a process of the pool; its result is a file that is there only if the run is finished."""
    args, out, noise, variant, seed = task
    name = f"noise {noise} {variant} {seed}"
    file = out / f"{name}.json"
    if file.exists():
        return name, None
    import torch

    import rho1_wmtp

    torch.set_num_threads(1)
    began, found = time.time(), {}
    plain, reference = rho1_wmtp.rho1_metrics, rho1_wmtp.Reference

    def with_areas(told, run_args):
        import dataclasses

        metrics = plain(told, run_args)
        *_, loss_N, ref_N, noise_N = torch.cat(told, 1).cpu().double()
        for score in SCORES if 0 < noise_N.sum() < len(noise_N) else ():
            score_N = rho1_wmtp.token_scores(loss_N, ref_N, dataclasses.replace(run_args, score=score))
            metrics[f"auc/{score}"] = rho1_wmtp.noise_auc(score_N, noise_N)
        return metrics

    class Oracle(reference):
        def __call__(self, batch, part="train"):
            return rho1_wmtp.weights_of_targets(batch.is_noise_BT.float(), 1)

    rho1_wmtp.rho1_metrics = with_areas
    rho1_wmtp.Reference = Oracle if variant == "oracle" else reference
    shutil.rmtree(out / name, ignore_errors=True)
    words = words_of(args, out, data="stdlib:a", noise_frac=noise, seed=seed, num_heads=args.num_heads, max_steps=args.steps,
                     run_dir=out / name, ref_model=out / "reference")  # fmt: skip
    words += ["--ref-online", *VARIANTS[variant]]  # a run sees a tenth of the rows
    try:
        run(rho1_wmtp, words, found)
    finally:
        rho1_wmtp.rho1_metrics, rho1_wmtp.Reference = plain, reference
    lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    keys = ("weights/on_noise", "weights/on_clean", "weights/ess_frac", "rho1/kept_frac", "rho1/overlap_untrained",
            "train/loss_head_1", *(f"auc/{score}" for score in SCORES))  # fmt: skip
    curves = {key: [line.get(key) for line in lines[:-1]] for key in keys if any(key in line for line in lines)}
    record = dict(noise=noise, variant=variant, seed=seed, command=["rho1_wmtp.py", *words],
                  documents=found["documents"], curves=curves, seconds=time.time() - began)  # fmt: skip
    file.with_suffix(".tmp").write_text(json.dumps(record))
    file.with_suffix(".tmp").replace(file)
    shutil.rmtree(out / name / "checkpoints")
    return name, record["seconds"]


def summary(results, args):
    """One row for each noise and variant: means over seeds, standard deviations, differences to uniform with intervals."""
    import numpy as np

    random, rows = np.random.default_rng(0), []
    for noise in sorted({r["noise"] for r in results}, reverse=True):
        of = {v: sorted((r for r in results if r["noise"] == noise and r["variant"] == v), key=lambda r: r["seed"])
              for v in VARIANTS}  # fmt: skip
        names = sorted(of["uniform"][0]["documents"], key=int)
        draws = random.integers(0, len(names), (10_000, len(names)))

        def totals(runs):
            """Loss, correct, targets: `[seeds, documents, 3]`."""
            return np.array([[r["documents"][d] for d in names] for r in runs])  # noqa: B023

        for variant, runs in of.items():
            if not runs:
                continue
            row = dict(noise=noise, variant=variant, seeds=[r["seed"] for r in runs])
            sums = totals(runs)
            for i, key in enumerate(("loss", "acc")):
                by_seed = sums[..., i].sum(1) / sums[..., 2].sum(1)
                spread = by_seed.std(ddof=1) if len(runs) > 1 else None
                row |= {key: by_seed.mean(), f"{key}_sd": spread, f"{key}_seeds": by_seed.tolist()}
                other = totals([u for u in of["uniform"] if u["seed"] in row["seeds"]])
                difference = (sums - other)[..., i].mean(0)  # of each document, mean over seeds
                count = sums[0, :, 2]
                drawn = difference[draws].sum(1) / count[draws].sum(1)
                row |= {f"{key}_difference": difference.sum() / count.sum(),
                        f"{key}_interval": np.quantile(drawn, [0.025, 0.975]).tolist()}  # fmt: skip
            last = max(1, args.steps // 5)
            for key in runs[0]["curves"]:
                values = [v for r in runs for v in r["curves"][key][-last:] if v is not None]
                row[key] = float(np.mean(values)) if values else None
            rows.append(row)
    return rows


def table(rows):
    columns = (
        "noise | weights | held-out loss (sd) | to uniform [95 %] | accuracy (sd) | to uniform [95 %] | w on noise | on clean"
    )
    print(f"| {columns} | ess |\n{'|---' * 9}|")
    for r in rows:
        cells = [f"{r['noise']:g}", r["variant"]]
        for key in ("loss", "acc"):
            sd = "" if r[f"{key}_sd"] is None else f" ({r[f'{key}_sd']:.4f})"
            low, high = r[f"{key}_interval"]
            cells += [f"{r[key]:.4f}{sd}", f"{r[f'{key}_difference']:+.4f} [{low:+.4f}, {high:+.4f}]"]
        cells += ["" if r.get(key) is None else f"{r[key]:.3f}" for key in ("weights/on_noise", "weights/on_clean")]
        print(f"| {' | '.join(cells)} | {r['weights/ess_frac']:.3f} |")
    print(f"\narea under the curve, last fifth of the updates\n| model | {' | '.join(SCORES)} |\n{'|---' * 5}|")
    for r in rows:
        if r["variant"] != "oracle" and r.get("auc/excess") is not None:
            print(f"| {r['variant']} | {' | '.join(format(r[f'auc/{score}'], '.3f') for score in SCORES)} |")


def plot(rows, results, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    noises = sorted({r["noise"] for r in rows}, reverse=True)
    widths = [1.2] * len(noises) + [1]
    figure, axes = plt.subplots(1, len(widths), figsize=(4 * len(widths), 3.4), width_ratios=widths, layout="constrained")
    for ax, noise in zip(axes, noises):
        here = [r for r in rows if r["noise"] == noise and r["variant"] != "uniform"]
        for y, r in enumerate(here):
            (low, high), middle = r["loss_interval"], r["loss_difference"]
            ax.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color="C0", capsize=3)
        ax.axvline(0, color="0.6", linewidth=1)
        ax.set(yticks=range(len(here)), yticklabels=[r["variant"] for r in here], xlabel="held-out loss to uniform (nats)",
               title=f"{noise:.0%} of the lines noise")  # fmt: skip
        ax.invert_yaxis()
    of = [r for r in results if r["variant"] == "weighted" and "auc/excess" in r["curves"]]
    for score in SCORES if of else ():
        curves = np.array([[np.nan if v is None else v for v in r["curves"][f"auc/{score}"]] for r in of])
        window = max(1, curves.shape[1] // 20)
        smooth = np.convolve(np.nanmean(curves, 0), np.ones(window) / window, mode="valid")
        axes[-1].plot(np.arange(len(smooth)) + window, smooth, label=score)
    axes[-1].set(xlabel="update", ylabel="noise scores lower (area)", title="scores as detectors (weighted)", ylim=(0, 1))
    if of:
        axes[-1].legend()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main():
    args = parse()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    began, os.environ["OMP_NUM_THREADS"] = time.time(), "1"
    config = dict(model_type="llama", vocab_size=259, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
                  num_attention_heads=4, initializer_range=0.05, max_position_embeddings=2048, tie_word_embeddings=False,
                  pad_token_id=0, eos_token_id=1, bos_token_id=None)  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    settings = out / "settings.json"
    mine = {k: v for k, v in vars(args).items() if k not in ("out", "jobs", "seeds", "variants")}
    if settings.exists() and json.loads(settings.read_text()) != mine:
        raise SystemExit(f"error: --out {out}: holds runs with other settings ({settings.read_text()}); name a new folder")
    settings.write_text(json.dumps(mine))
    if not (out / "reference" / "model").exists():
        import torch

        import baseline_mtp

        torch.set_num_threads(args.jobs)
        words = words_of(args, out, data="stdlib:b", num_heads=1, max_steps=args.ref_steps, run_dir=out / "reference", seed=0)
        run(baseline_mtp, words, {})
        shutil.rmtree(out / "reference" / "checkpoints")
        print(f"reference {time.time() - began:.0f} s", flush=True)
    tasks = [(args, out, noise, variant, seed) for seed in range(args.seeds) for noise in (args.noise_frac, 0.0)
             for variant in args.variants if noise or variant != "oracle"]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(args.jobs, initializer=quiet, initargs=(out,)) as pool:
        for number, (name, seconds) in enumerate(pool.imap_unordered(job, tasks, chunksize=1), start=1):
            took = "was there" if seconds is None else f"{seconds:.0f} s"
            print(f"{number:>3}/{len(tasks)}  {name:<28} {took}, {time.time() - began:.0f} s in all", flush=True)
    results = [json.loads(file.read_text()) for file in sorted(out.glob("noise *.json"))]
    rows = summary(results, args)
    from runs import commit, versions

    machine = dict(cores=len(os.sched_getaffinity(0)), processor=platform.processor() or platform.machine(), versions=versions())
    record = dict(command=" ".join(["python", *sys.argv]), **commit(), **machine, seconds=time.time() - began, settings=mine)
    (out / "rho1_proof.json").write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    table(rows)
    plot(rows, results, out / "rho1_proof.png")
    print(f"\n{out}/rho1_proof.json, rho1_proof.png; {time.time() - began:.0f} s")


def quiet(out):
    """Lines of the runs go to a file of each process."""
    sys.stdout = open(out / f"printed-{os.getpid()}.txt", "a", buffering=1)


if __name__ == "__main__":
    main()
