"""Does a value head find the tokens that decide, and do weights from it help? Runs, table, plots and JSON.

    python benchmarks/critic_proof.py --out OUT                      under 30 minutes on 2 CPU cores; stopped, it goes on
    python benchmarks/critic_proof.py --out OUT --condefects condefects_python.jsonl.gz
    python benchmarks/critic_proof.py --out OUT --device cuda --seeds 5 --model tiny --steps 6000 --value-steps 6000

On stdlib-bugs, for each seed (which fixes the held-out files): a policy is trained on the correct functions (--base-steps), and
a value of each kind on it; then from the same policy, with equal numbers of updates:

    uniform      w = 1 on correct functions      critic     weights from a separate value
    uniform_all  w = 1 on all functions          frozen     weights from a head on the policy's trunk
    conditioned  w = 1 on all, each with a tag   shared     weights from a head learnt beside, its loss into the trunk
                 that says its outcome           shuffle    critic's weights, permuted inside of each function
                                                 random     critic's weights, drawn anew

Judged on held-out files: `value/..` of README after stage 1 and at the end; head 1's loss and accuracy on correct functions;
preference: how often a function is likelier (sum over its tokens, head 1) than its broken sibling, ties half; `conditioned` is
asked with the good tag. Differences to uniform: mean over seeds, with a 95 % interval from 10,000 bootstrap samples of the
functions of all seeds, the same functions for both runs (paired). With --condefects also the values of those programs.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ARMS = {
    "uniform": "--lambda 1 --value-steps 0 --value-coef 0",
    "uniform_all": "--lambda 1 --value-steps 0 --value-coef 0 --train-on all",
    "conditioned": "--lambda 1 --train-on all --condition-on-outcome",
    "critic": "--value separate",
    "frozen": "--value frozen",
    "shared": "--value shared",
    "shuffle": "--value separate --control shuffle",
    "random": "--value separate --control random",
}
KINDS = ("separate", "frozen")  # values with a stage 1
JUDGED = ("auc", "auc_position", "pairs", "fault_token", "fault_token_chance", "fault_line", "fault_line_chance")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of runs and results")
    parser.add_argument("--model", default="", help="as --model of the scripts; empty: a Llama of 5 layers, width 96")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-heads", type=int, default=2)
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--value-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.3)
    parser.add_argument("--gae-lambda", type=float, default=0.95)
    parser.add_argument("--condefects", default="", help="file of ConDefects pairs")
    parser.add_argument("--condefects-length", type=int, default=512, help="tokens of a program at most")
    parser.add_argument("--condefects-steps", type=int, default=150)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    return parser.parse_args()


def words_of(args, **changes):
    values = dict(data="stdlib-bugs", seq_len=256, batch_size=args.batch_size, mtp_schedule="constant", num_heads=args.num_heads,
                  tracker="none", save_every=0, device=args.device)  # fmt: skip
    return [str(word) for k, v in (values | changes).items() for word in (f"--{k.replace('_', '-')}", v)]


def heldout_records(model, batches, data, num_heads, ranks, found):
    """Stands in for `runs.evaluate_heldout`: head 1 on every held-out record, right or wrong, to `found`."""
    import numpy as np
    import torch

    from common import IGNORE
    from data import load_batch

    model.eval()
    rows = []
    with torch.no_grad(), ranks.autocast():
        for first in range(0, len(data.heldout), 32):
            numbers = np.arange(first, min(first + 32, len(data.heldout)))
            batch = load_batch(data.heldout, numbers, 1, ranks.device, train_on="all")
            loss, correct = (v[0].sum(1).tolist() for v in model(batch.x_BT, batch.targets_KBT, with_correct=True))
            count = (batch.targets_KBT[0] != IGNORE).sum(1).tolist()
            rows += [dict(sibling=data.heldout_records[n]["sibling"], right=data.heldout_records[n]["reward"] > 0.5,
                          kind=data.heldout_records[n].get("kind"), loss=loss[i], correct=correct[i], count=count[i])
                     for i, n in enumerate(numbers.tolist())]  # fmt: skip
    model.train()
    found["records"] = rows
    right = [r for r in rows if r["right"]]
    loss, correct, count = (sum(r[k] for r in right) for k in ("loss", "correct", "count"))
    metrics = {f"eval/loss_head_{k + 1}": loss / count for k in range(num_heads)}  # the loop prints all heads: head 1's for each
    metrics |= {f"eval/acc_head_{k + 1}": correct / count for k in range(num_heads)}
    return metrics | {"eval/bits_per_byte": float("nan")}


def run(module, words, found=None):
    """The script's `main` with these arguments in this process."""
    import tyro

    if found is not None:
        module.evaluate_heldout = functools.partial(heldout_records, found=found)
    module.report = lambda *ignored: None
    module.main(tyro.cli(module.Args, args=words))


def judge_at_the_end(judge, critic, *rest, moves):
    """`value.judge_value` after stage 2, where V moves in it; else nothing."""
    after = critic.moments[0] > 0
    return judge(critic, *rest) if moves and after else {}


def job(task):
    """One run, in a process of the pool; its result is a file that is there only if the run is finished."""
    args, out, what, name, seed = task
    label = f"{what} {name} {seed}"
    file, folder = out / f"{label}.json", out / label
    if file.exists():
        return label, None
    import torch

    import baseline_mtp
    import critic_wmtp
    import value as value_module

    torch.set_num_threads(1)
    began, found = time.time(), {}
    shutil.rmtree(folder, ignore_errors=True)
    common = dict(seed=seed, run_dir=folder)
    base = dict(model=out / f"base policy {seed}", lr=1e-3, warmup_steps=20)
    value = dict(value_steps=args.value_steps, value_batches=1, max_steps=1, value_coef=0)
    if what == "base":
        start = dict(model=args.model or out / "config.json", lr=3e-3, max_steps=args.base_steps)
        module, words = baseline_mtp, words_of(args, **common, **start)
    elif what == "value":
        module, words = critic_wmtp, words_of(args, **common, **base, **value, value=name)
    elif what == "condefects":
        data = dict(data=args.condefects, seq_len=args.condefects_length, value_steps=args.condefects_steps)
        module, words = critic_wmtp, words_of(args, **common, **base | value | data, value=name)
    else:
        words = words_of(args, **common, **base, max_steps=args.steps, gae_lambda=args.gae_lambda)
        weighted = "--lambda" not in ARMS[name]
        words += [*ARMS[name].split(), *(["--lambda", str(args.lambda_)] if weighted else [])]
        kind = "frozen" if name == "frozen" else "separate"
        if weighted and name != "shared":
            words += ["--value-head", str(out / f"value {kind} {seed}" / "value_head.safetensors")]
        module = critic_wmtp
    judge = value_module.judge_value
    if what == "arm":  # judged once: the values of stage 1 by their own runs, and what moves in stage 2 at its end
        judge = functools.partial(judge_at_the_end, judge, moves=name in ("frozen", "shared"))
    critic_wmtp.judge_value = judge
    run(module, words, found if what == "arm" else None)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = [{k.split("/")[-1]: v for k, v in line.items()} for line in lines if {"value/auc", "value_end/auc"} & line.keys()]
    curve = [line["value/loss"] for line in lines if "value/loss" in line]
    ess = [line["weights/ess_frac"] for line in lines if "weights/ess_frac" in line]
    record = dict(what=what, name=name, seed=seed, command=[f"{module.__name__}.py", *words], judged=judged, value_loss=curve,
                  ess_frac=statistics.mean(ess[-100:]), seconds=time.time() - began, **found)  # fmt: skip
    file.with_suffix(".tmp").write_text(json.dumps(record))
    file.with_suffix(".tmp").replace(file)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return label, record["seconds"]


def paired(results, name):
    """Of each seed and function: loss, correct and targets of the right one, and preference; of the arm and of uniform."""
    import numpy as np

    pairs, by_seed = [], {}
    for one in (r for r in results if r["what"] == "arm" and r["name"] == name):
        other = next(r for r in results if r["what"] == "arm" and r["name"] == "uniform" and r["seed"] == one["seed"])
        sides = []
        for r in (one, other):
            right = {x["sibling"]: x for x in r["records"] if x["right"]}
            wrong = {x["sibling"]: x for x in r["records"] if not x["right"]}
            sides.append({s: (right[s]["loss"], right[s]["correct"], right[s]["count"],
                              (right[s]["loss"] < wrong[s]["loss"]) + (right[s]["loss"] == wrong[s]["loss"]) / 2)
                          for s in right.keys() & wrong.keys()})  # fmt: skip
        mine = np.array([[side[s] for side in sides] for s in sorted(sides[0].keys() & sides[1].keys())])
        pairs.append(mine)
        by_seed[one["seed"]] = mine
    return (np.concatenate(pairs), by_seed) if pairs else (None, {})


def figures(sums):
    """Loss and accuracy per target, and preference per function, of `[functions, 4]`."""
    count = sums[..., 2].sum(-1)
    return dict(loss=sums[..., 0].sum(-1) / count, acc=sums[..., 1].sum(-1) / count, preference=sums[..., 3].mean(-1))


def summary(results):
    import numpy as np

    random, rows = np.random.default_rng(0), []
    for name in ARMS:
        both, by_seed = paired(results, name)
        if both is None:
            continue
        row = dict(name=name, seeds=sorted(by_seed), functions=len(both))
        row["ess_frac"] = statistics.mean(r["ess_frac"] for r in results if r["what"] == "arm" and r["name"] == name)
        each = [figures(mine[:, 0]) for mine in by_seed.values()]
        whole, other = figures(both[:, 0]), figures(both[:, 1])
        differences = {key: [] for key in whole}
        for _ in range(100):  # 100 at a time: memory
            draws = random.integers(0, len(both), (100, len(both)))
            one, two = figures(both[:, 0][draws]), figures(both[:, 1][draws])
            for key in differences:
                differences[key].append(one[key] - two[key])
        for key in whole:
            values = [e[key] for e in each]
            row |= {key: float(np.mean(values)), f"{key}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                    f"{key}_seeds": list(map(float, values)), f"{key}_difference": float(whole[key] - other[key]),
                    f"{key}_interval": np.quantile(np.concatenate(differences[key]), [0.025, 0.975]).tolist()}  # fmt: skip
        rows.append(row)
    return rows


def values_of(results):
    """For each kind of value and data: figures after stage 1 and after stage 2, mean and deviation over seeds."""
    rows = []
    wanted = [("stdlib-bugs, stage 1", "value", kind, 0) for kind in KINDS]
    wanted += [("stdlib-bugs, stage 2", "arm", arm, -1) for arm in ("frozen", "shared")]
    wanted += [("ConDefects, stage 1", "condefects", kind, 0) for kind in KINDS]
    for where, what, name, place in wanted:
        judged = [r["judged"][place] for r in results if r["what"] == what and r["name"] == name and r["judged"]]
        if judged:
            row = dict(where=where, name=name, seeds=len(judged))
            for key in JUDGED:
                each = [j[key] for j in judged if key in j]
                spread = statistics.stdev(each) if len(each) > 1 else None
                row |= {key: statistics.mean(each) if each else None, f"{key}_sd": spread}
            rows.append(row)
    return rows


def tables(rows, values):
    def with_sd(row, key, digits):
        if row[key] is None:
            return ""
        sd = row[f"{key}_sd"]
        return f"{row[key]:.{digits}f}" + ("" if sd is None else f" ({sd:.{digits}f})")

    text = "| value | after | AUC (sd) | position alone | siblings in order | drop in fault | chance | on its line | chance |\n"
    text += "|---" * 9 + "|\n"
    for r in values:
        text += f"| {r['name']} | {r['where']} | {' | '.join(with_sd(r, key, 3) for key in JUDGED)} |\n"
    text += "\n| weights | held-out loss (sd) | to uniform [95 %] | accuracy (sd) | to uniform [95 %] | preference (sd) |"
    text += " to uniform [95 %] | ess |\n" + "|---" * 8 + "|\n"
    for r in rows:
        cells = []
        for key in ("loss", "acc", "preference"):
            low, high = r[f"{key}_interval"]
            cells += [with_sd(r, key, 4), f"{r[f'{key}_difference']:+.4f} [{low:+.4f}, {high:+.4f}]"]
        text += f"| {r['name']} | {' | '.join(cells)} | {r['ess_frac']:.3f} |\n"
    return text


def plot(rows, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained", sharey=True)
    here = [r for r in rows if r["name"] != "uniform"]
    titles = dict(loss="held-out loss (nats)", acc="held-out accuracy", preference="preference")
    for ax, (key, title) in zip(axes, titles.items()):
        for y, r in enumerate(here):
            (low, high), middle = r[f"{key}_interval"], r[f"{key}_difference"]
            ax.errorbar(middle, y, xerr=[[max(0, middle - low)], [max(0, high - middle)]], fmt="o", color="C0", capsize=3)
        ax.axvline(0, color="0.6", linewidth=1)
        ax.set(yticks=range(len(here)), yticklabels=[r["name"] for r in here], xlabel=f"{title}, to uniform")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(file, dpi=110)


def picture(args, out, file):
    """A held-out function and its broken sibling by V, and the function by weight; the pair whose V differ most at the end."""
    import matplotlib
    import numpy as np
    import torch

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import critic_wmtp
    from common import Ranks, build_model
    from data import load_batch, load_data
    from value import load_value

    folder = out / "arm critic 0"
    if not (folder / "model").exists():
        return
    model, tokenizer = build_model(str(folder), args.num_heads)
    settings = critic_wmtp.Args(**{"lambda_": args.lambda_, "gae_lambda": args.gae_lambda})
    critic = critic_wmtp.Critic(model, settings).eval()
    load_value(critic.value, str(folder / "value_head.safetensors"), "separate")
    ranks, data = Ranks(), load_data("stdlib-bugs", tokenizer, 256, 0, 0.0, Ranks())
    records, reward = data.heldout_records, np.array([r["reward"] for r in data.heldout_records])
    by_sibling = {}
    for n, r in enumerate(records):
        by_sibling.setdefault(r["sibling"], {})[r["reward"]] = n
    pairs = np.array([(p[1.0], p[0.0]) for p in by_sibling.values() if len(p) == 2])
    value = []
    with torch.no_grad():
        for first in range(0, len(records), 32):
            batch = load_batch(data.heldout, np.arange(first, min(first + 32, len(records))), 1, "cpu")
            value.append(critic.logits(batch, run_policy=True).sigmoid())
        value_NT = torch.cat(value).numpy()
        rows = data.heldout[:]
        last = rows["is_target"].shape[1] - 1 - rows["is_target"][:, ::-1].argmax(1)
        ends = value_NT[np.arange(len(last)), last]
        right, wrong = (int(n) for n in pairs[(ends[pairs[:, 0]] - ends[pairs[:, 1]]).argmax()])
        some = np.concatenate([[right], np.flatnonzero(reward == 1)[:15]])  # weights are relative to others of a batch
        batch = load_batch(data.heldout, some, args.num_heads, "cpu")
        logit_BT, moments = critic.logits(batch, run_policy=True), torch.zeros(3)
        weight_T = critic_wmtp.token_weights(logit_BT, batch, moments, (0, 0, 0), settings, ranks)[0].numpy()
    panels = [("V of the function", right, value_NT[right]), ("V of its broken sibling (fault framed)", wrong, value_NT[wrong]),
              ("weights of the function", right, weight_T)]  # fmt: skip
    lines = (records[right]["prompt"] + records[right]["completion"]).count("\n")
    figure, axes = plt.subplots(1, 3, figsize=(21, 1 + 0.28 * lines), layout="constrained")
    for ax, (title, row, colour) in zip(axes, panels):
        record, x, y = records[row], 0, 0
        text, skip = record["prompt"] + record["completion"], len(record["prompt"])
        chosen = colour[skip : len(text)]
        low, high = float(chosen.min()), float(chosen.max())
        for i, character in enumerate(text):
            if character == "\n":
                x, y = 0, y + 1
                continue
            if i >= skip:
                shade = plt.get_cmap("coolwarm_r" if "V" in title else "Greens")((colour[i] - low) / max(1e-9, high - low))
                framed = record["fault_start"] <= i - skip < record["fault_end"]
                ax.add_patch(plt.Rectangle((x, -y - 0.5), 1, 1, facecolor=shade, edgecolor="black" if framed else "none"))
            ax.text(x + 0.5, -y, character, family="monospace", fontsize=8, ha="center", va="center")
            x += 1
        ax.set(xlim=(0, 80), ylim=(-lines, 1), title=f"{title}, {low:.2f} to {high:.2f}")
        ax.axis("off")
    figure.savefig(file, dpi=110)


def save(file, **values):
    from runs import commit, versions

    machine = dict(cores=len(os.sched_getaffinity(0)), processor=platform.processor() or platform.machine(), versions=versions())
    file.write_text(json.dumps(dict(command=" ".join(["python", *sys.argv]), **commit(), **machine, **values), indent=1) + "\n")


def main():
    args = parse()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    began, os.environ["OMP_NUM_THREADS"] = time.time(), "1"
    config = dict(model_type="llama", vocab_size=259, hidden_size=96, intermediate_size=256, num_hidden_layers=5,
                  num_attention_heads=4, initializer_range=0.05, max_position_embeddings=2048, tie_word_embeddings=False,
                  pad_token_id=0, eos_token_id=1, bos_token_id=None)  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    settings = out / "settings.json"
    mine = {k: v for k, v in vars(args).items() if k not in ("out", "jobs", "seeds", "arms", "condefects")}
    if settings.exists() and json.loads(settings.read_text()) != mine:
        raise SystemExit(f"error: --out {out}: holds runs with other settings ({settings.read_text()}); name a new folder")
    settings.write_text(json.dumps(mine))
    seeds, done = range(args.seeds), 0
    phases = [[("base", "policy", s) for s in seeds], [("value", kind, s) for s in seeds for kind in KINDS]]
    phases.append([("arm", arm, s) for s in seeds for arm in args.arms])
    if args.condefects:
        phases.append([("condefects", kind, s) for s in seeds for kind in KINDS])
    total = sum(map(len, phases))
    with multiprocessing.get_context("spawn").Pool(args.jobs, initializer=quiet, initargs=(out,)) as pool:
        for phase in phases:
            for label, seconds in pool.imap_unordered(job, [(args, out, *task) for task in phase], chunksize=1):
                done += 1
                took = "was there" if seconds is None else f"{seconds:.0f} s"
                print(f"{done:>3}/{total}  {label:<28} {took}, {time.time() - began:.0f} s in all", flush=True)
    files = [file for what in ("value", "arm", "condefects") for file in sorted(out.glob(f"{what} *.json"))]
    results = [json.loads(file.read_text()) for file in files]
    rows, values = summary(results), values_of(results)
    print("\n" + tables(rows, values))
    spent = sum(json.loads(file.read_text())["seconds"] for file in [*out.glob("base *.json"), *files])
    save(out / "critic_proof.json", seconds_of_runs=spent, jobs=args.jobs, settings=mine, rows=rows, values=values,
         commands=[" ".join(r["command"]).replace(str(out), "OUT") for r in results if r["seed"] == 0])  # fmt: skip
    plot(rows, out / "critic_proof.png")
    picture(args, out, out / "critic_function.png")
    print(f"{out}/critic_proof.json, critic_proof.png, critic_function.png; {time.time() - began:.0f} s")


def quiet(out):
    """Lines of the runs go to a file of each process."""
    sys.stdout = open(out / f"printed-{os.getpid()}.txt", "a", buffering=1)


if __name__ == "__main__":
    main()
