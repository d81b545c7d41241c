"""What do group-relative rewards do to head 1 and to the drafts of the others? Runs, table, JSON.

    python benchmarks/grpo_proof.py --out OUT          three seeds

CLAIM, written before the first run (200 updates of 16 sums x 8 completions): with `completion` and
`tree` the reward goes from 0.5 to 0.90-0.97, greedy answers stay as right as they were, KL is 0.05
to 0.2 nats a token, and mixed groups fall from 0.99 to 0.3. `tree` needs 0 to 30 % fewer updates
to a reward of 0.8. `imitate` and `head_1` reach the reward of `completion`; tokens a pass (2.6 to
3.2) tell them apart, lowest with `head_1`. `rejection`, w = max(A, 0), ends below `completion`.
`shuffle` stays within 0.03 of 0.5. `plain` is `completion` with rollouts that take longer.

For each seed (it fixes the held-out sums too) a start trains on right and wrong answers alike; each
arm goes on from it. Judged on held-out sums: the share of right answers, greedy and sampled, before
and after. Every run is the script, some with CHANGES, in a process of one thread.
"""

from pathlib import Path

import numpy as np
import tools

START = {"lambda": 1, "train_on": "all", "lr": 3e-3, "batch_size": 64, "max_steps": 1500}
ARMS = {
    "completion": {},
    "tree": {"credit": "tree"},
    "tree_own": {"credit": "tree"},  # the change of V at the target alone
    "imitate": {"head_loss": "imitate"},
    "head_1": {"head_loss": "none"},
    "rejection": {},
    "shuffle": {"control": "shuffle"},
    "plain": {"decode": "plain"},
}
CHANGES = {  # arm: lines of grpo_wmtp.py before and after
    "rejection": ("weight_BT * valid_BT", "weight_BT.clamp(min=0) * valid_BT"),
    "tree_own": (" - batch.value_BT\n", " - F.pad(batch.value_BT[:, k - 1 :], (0, k - 1))\n"),
}
LAST = 10  # updates that a figure at the end is the mean of


def one_run(args, name, seed):
    """One run of a start or an arm; its figures are kept in a file."""
    out, label = Path(args.out), f"{name} {seed}"
    run_dir, changed = out / label, out / f"{name}.py"
    flags = dict(tools.PROOF_FLAGS, device=args.device, run_dir=run_dir, seed=seed, data="sums")
    flags |= dict(num_heads=args.num_heads, seq_len=10, warmup_steps=40)
    if name == "start":
        script = "critic_wmtp.py"
        flags |= dict(START, model=args.model or out / "config.json")
    else:
        script = changed if changed.exists() else "grpo_wmtp.py"
        flags |= dict(model=out / f"start {seed}", batch_size=args.batch_size, lr=3e-4)
        flags["group_size"] = 8
        flags |= dict(warmup_steps=5, max_steps=args.steps) | ARMS[name]

    def work():
        lines, command = tools.train(script, flags, out / f"{label}.txt")
        figures = dict(name=name, seed=seed, command=command)
        if name != "start":
            figures["figures"] = figures_of(lines)
        return figures

    return tools.kept(out / f"{label}.json", work)


def figures_of(lines):
    """What the table shows of a run's metrics."""
    updates = [line for line in lines if "grpo/reward_mean" in line]
    judged = [line for line in lines if "eval/accuracy" in line]
    columns = {key: np.array([line[key] for line in updates]) for key in updates[0]}
    reward = columns["grpo/reward_mean"]
    reached = np.flatnonzero(np.convolve(reward, np.ones(LAST) / LAST, "valid") >= 0.8)
    figures = dict(reward_first=reward[:5].mean(), reward_last=reward[-LAST:].mean())
    figures["updates_to_0.8"] = reached[0] + LAST if len(reached) else np.nan
    for short, key in (("greedy", "eval/accuracy"), ("sampled", "eval/reward")):
        figures[f"{short}_before"], figures[f"{short}_after"] = judged[0][key], judged[-1][key]
    for short in ("kl", "mixed_groups", "tokens_per_forward"):
        figures[short] = columns[f"grpo/{short}"][-LAST:].mean()
    figures["tokens_first"] = columns["grpo/tokens_per_forward"][:5].mean()
    for short in ("rollout_s", "train_s"):  # of all updates
        figures[short] = columns[f"perf/{short}"].sum()
    return {name: float(value) for name, value in figures.items()}


def main():
    parser = tools.proof_parser(__doc__, 200, 128, list(ARMS))
    parser.set_defaults(num_heads=3)
    args = parser.parse_args()
    out, settings = tools.prepare_proof(args, ("jobs", "seeds", "arms"), num_layers=5)
    for name, change in CHANGES.items():
        tools.write_changed(out / f"{name}.py", "grpo_wmtp.py", *change)
    for names in (["start"], args.arms):  # a start comes before its arms
        tasks = [(args, name, seed) for seed in range(args.seeds) for name in names]
        results = tools.run_jobs(one_run, tasks, args.jobs)
    rows = []
    for name in args.arms:
        own = [result["figures"] for result in results if result["name"] == name]
        values = [[run[key] for run in own] for key in own[0]]
        rows.append([name, *([np.mean(v), np.std(v, ddof=len(v) > 1)] for v in values)])
    record = dict(command=tools.command(), **tools.machine(args.device), settings=settings)
    tools.write_json(out / "grpo_proof.json", {**record, "rows": rows, "results": results})
    cells = [[name, *(f"{mean:.3f} ({sd:.3f})" for mean, sd in row)] for name, *row in rows]
    tools.print_table(["arm", *results[0]["figures"]], cells)


if __name__ == "__main__":
    main()
