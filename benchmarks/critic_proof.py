"""Does a value head find the tokens that decide, and do its weights help?

    python benchmarks/critic_proof.py --out OUT

For each seed (it fixes the held-out files too) a policy trains on the correct functions of
stdlib-bugs (--base-steps), and a value of each kind on that policy. From the same policy, with
equal numbers of updates:

    uniform      w = 1 on correct functions      critic     weights from a separate value
    uniform_all  w = 1 on all functions          frozen     a value on the policy's frozen trunk
    random       critic's weights, drawn anew    shuffle    critic's weights, permuted in a function

Every run is the script as it stands, in a process of one thread. Judged: the script's own
`value/..` figures, after stage 1 and (`value_end/..`) after stage 2; of the final models head 1's
loss and accuracy on correct held-out functions, and preference: how often a function is likelier
than its broken sibling, ties half. Differences to `uniform`: mean over seeds, with a 95 % interval
from a paired bootstrap over the functions of all seeds. No peers: the arms compare.
"""

import shutil
from pathlib import Path

import numpy as np
import tools

ARMS = {
    "uniform": {"lambda": 1, "value_steps": 0, "value_coef": 0},
    "uniform_all": {"lambda": 1, "value_steps": 0, "value_coef": 0, "train_on": "all"},
    "critic": {"value": "separate"},
    "frozen": {"value": "frozen"},
    "shuffle": {"value": "separate", "control": "shuffle"},
    "random": {"value": "separate", "control": "random"},
}
KINDS = ("separate", "frozen")  # values with a stage 1
FIGURES = ("auc", "auc_position", "pairs", "fault_token", "fault_token_chance")
VALUE = dict(temperature=0.7, epsilon=0.05, max_weight=3.0, gamma=1.0)
VALUE |= dict(value_lr=1e-3, value_coef=0.1, pair_coef=1.0, train_on="correct", control="none")


def judge(run_dir, seed, num_heads):
    """Loss, correct and targets of every held-out function and of its broken sibling, head 1."""
    import torch

    from common import IGNORE, Ranks, build_model, imitate_all, load_data

    model, tokenizer = build_model(str(run_dir), num_heads)
    data = load_data(tools.data_args("stdlib-bugs", seed=seed), tokenizer, Ranks())
    rows, siblings = imitate_all(data.heldout), {}
    for batch, loss_BT, correct_BT in tools.heldout_losses(model, rows, np.arange(len(rows))):
        count = (batch.targets_KBT[0] != IGNORE).sum(1)
        sums = torch.stack([loss_BT.sum(1), correct_BT.float().sum(1), count.float()], 1)
        for number, figures in zip(batch.rows_B.tolist(), sums.tolist()):
            row = rows[number]
            side = "right" if row["reward"] > 0.5 else "wrong"
            siblings.setdefault(str(row["sibling"]), {})[side] = figures
    functions = {}
    for name, sides in siblings.items():
        if len(sides) == 2:
            right, wrong = sides["right"], sides["wrong"]
            preference = float(right[0] < wrong[0]) + 0.5 * (right[0] == wrong[0])
            functions[name] = [*right, preference]
    return functions


def one_run(args, what, name, seed):
    """One run of the base policy, a value or an arm; kept in a file."""
    out = Path(args.out)
    label = f"{what} {name} {seed}"
    run_dir = out / label
    flags = dict(tools.PROOF_FLAGS, data="stdlib-bugs", noise_frac=0.0, device=args.device)
    flags |= dict(num_heads=args.num_heads, batch_size=args.batch_size, seed=seed, run_dir=run_dir)
    script = "critic_wmtp.py"
    if what == "base":
        script = "baseline_mtp.py"
        flags |= dict(model=args.model or out / "config.json", lr=3e-3, max_steps=args.base_steps)
        flags |= dict(warmup_steps=40)
    else:
        flags |= VALUE | dict(model=out / f"base policy {seed}", lr=1e-3, warmup_steps=20)
        flags |= {"lambda": args.lambda_, "gae_lambda": args.gae_lambda}
    if what == "value":
        flags |= dict(value=name, value_steps=args.value_steps, value_batches=1, max_steps=1)
        flags["value_coef"] = 0
    if what == "arm":
        flags |= dict(max_steps=args.steps, value_batches=1) | ARMS[name]
        if "value" in ARMS[name]:
            kind = ARMS[name]["value"]
            flags["value_head"] = out / f"value {kind} {seed}" / "value_head.safetensors"

    def work():
        shutil.rmtree(run_dir, ignore_errors=True)
        words = tools.as_flags(flags)
        tools.run_script(script, words, out / f"{label}.txt")
        lines = tools.read_metrics(run_dir)
        judged = [
            {key.split("/")[1]: value for key, value in line.items() if key.startswith("value")}
            for line in lines
            if {"value/auc", "value_end/auc"} & line.keys()
        ]
        figures = dict(what=what, name=name, seed=seed, judged=judged)
        figures["command"] = " ".join([script, *words]).replace(str(out), "OUT")
        if what == "arm":
            figures["functions"] = judge(run_dir, seed, args.num_heads)
            ess = [line["weights/ess_frac"] for line in lines if "weights/ess_frac" in line]
            figures["ess_frac"] = float(np.mean(ess[-100:]))
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return figures

    return tools.kept(out / f"{label}.json", work)


def summary(results):
    """One row an arm: means over seeds, deviations, differences to uniform over all functions."""
    runs = {(r["name"], r["seed"]): r for r in results if r["what"] == "arm"}
    rows = []
    for name in ARMS:
        seeds = [seed for arm, seed in runs if arm == name and ("uniform", seed) in runs]
        if not seeds:
            continue
        arm, uniform = [], []  # of each seed: `[functions, 4]`
        for seed in seeds:
            one, other = runs[name, seed]["functions"], runs["uniform", seed]["functions"]
            names = sorted(one.keys() & other.keys())
            arm.append(np.array([one[n] for n in names]))
            uniform.append(np.array([other[n] for n in names]))
        row = dict(name=name, seeds=seeds, functions=sum(map(len, arm)))
        row["ess_frac"] = float(np.mean([runs[name, seed]["ess_frac"] for seed in seeds]))
        both, base = np.concatenate(arm), np.concatenate(uniform)
        for place, key in ((0, "loss"), (1, "acc"), (3, "preference")):
            per_function = key == "preference"
            count = np.ones(len(both)) if per_function else both[:, 2]
            by_seed = [
                float(a[:, place].sum() / (len(a) if per_function else a[:, 2].sum())) for a in arm
            ]
            row[key], row[f"{key}_sd"] = tools.mean_and_sd(by_seed)
            row[f"{key}_seeds"] = by_seed
            result = tools.difference_with_interval(both[:, place], base[:, place], count)
            row[f"{key}_difference"], row[f"{key}_interval"] = result
        rows.append(row)
    return rows


def values_of(results):
    """Figures of each kind of value after stage 1 and stage 2, mean and deviation over seeds."""
    wanted = [("stdlib-bugs, stage 1", "value", kind, 0) for kind in KINDS]
    wanted += [("stdlib-bugs, stage 2", "arm", "frozen", -1)]
    rows = []
    for where, what, name, place in wanted:
        runs = [r for r in results if (r["what"], r["name"]) == (what, name) and r["judged"]]
        if not runs:
            continue
        row = dict(where=where, name=name, seeds=len(runs))
        for key in FIGURES:
            each = [run["judged"][place][key] for run in runs if key in run["judged"][place]]
            row[key], row[f"{key}_sd"] = tools.mean_and_sd(each) if each else (None, None)
        rows.append(row)
    return rows


def show(rows, values):
    lines = []
    for row in values:
        figures = [
            "" if row[key] is None else tools.with_sd(row[key], row[f"{key}_sd"], 3)
            for key in FIGURES
        ]
        lines.append([row["name"], row["where"], *figures])
    tools.print_table(["value", "after", *FIGURES], lines)
    lines = []
    for row in rows:
        cells = [row["name"]]
        for key in ("loss", "acc", "preference"):
            cells += tools.difference_cells(row, key)
        lines.append([*cells, f"{row['ess_frac']:.3f}"])
    difference = "to uniform [95 %]"
    header = ["weights", "loss (sd)", difference, "accuracy (sd)", difference]
    tools.print_table([*header, "preference (sd)", difference, "ess"], lines)


def main():
    parser = tools.proof_parser(__doc__, 200, 8, ARMS)
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--value-steps", type=int, default=400)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.3)
    parser.add_argument("--gae-lambda", type=float, default=0.95)
    args = parser.parse_args()
    free = ("jobs", "seeds", "arms")  # what may change when it goes on
    out, settings = tools.prepare_proof(args, free, num_layers=5)
    phases = [[("base", "policy")], [("value", kind) for kind in KINDS]]
    phases.append([("arm", arm) for arm in args.arms])
    results = []
    for phase in phases:  # each needs the one before
        tasks = [(args, *task, seed) for seed in range(args.seeds) for task in phase]
        results += tools.run_jobs(one_run, tasks, args.jobs)
    rows, values = summary(results), values_of(results)
    record = dict(command=tools.command(), **tools.machine(args.device), settings=settings)
    record["seconds_of_runs"] = sum(result["seconds"] for result in results)
    record["commands"] = [result["command"] for result in results if result["seed"] == 0]
    tools.write_json(out / "critic_proof.json", {**record, "rows": rows, "values": values})
    show(rows, values)
    print(f"\n{out}/critic_proof.json")


if __name__ == "__main__":
    main()
