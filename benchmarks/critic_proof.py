"""Do the critic's weights help, in likelihood and in preference? Runs, table, picture and JSON.

    python benchmarks/critic_proof.py --out OUT                  five fresh seeds, 3 to 7
    python benchmarks/critic_proof.py --out OUT2 --task sums     additions, half of them wrong
    python benchmarks/critic_proof.py --out OUT --seeds 3 --arms window mlp
    python benchmarks/critic_proof.py --out OUT --seeds 3 --first-seed 0 --arms PART ..

CLAIM, written before the first run: on the fresh seeds `window` has a lower loss and a higher
preference than `equal_correct`, and a higher preference than `window_shuffled`; each of the three
95 % intervals excludes 0. Of sums: `ratio` is as often right as `equal_all` when greedy, and when
sampled within 0.05 of its own greedy share; `equal_all` imitates the errors, about half.

bugs: for each seed (it fixes the held-out files too) a policy trains on the correct functions of
stdlib-bugs, a value on that policy, and from both each arm, for equally many updates. Judged: head
1's loss on correct held-out functions, and preference: how often a function is likelier than its
broken sibling, ties half. sums: a policy trains on all of --records sums, a value on it, and each
arm from scratch. Judged: the share of right answers to 1,000 unseen sums, greedy and sampled.

Every run is the script as it stands, or a copy of it with the lines of CHANGES, in a process of one
thread. Differences: 95 % intervals of a paired bootstrap over the functions (sums) of all seeds.
"""

import shutil
from pathlib import Path

import numpy as np
import tools

EQUAL, RATIO = {"lambda": 1, "value_steps": 0}, {"weights": "ratio"}
ARMS = {
    "equal_correct": EQUAL | {"train_on": "correct"},
    "equal_all": EQUAL,
    "window": {},
    "window_shuffled": {"control": "shuffle"},
    "window_correct": {"train_on": "correct"},
    "ratio": RATIO,
    "ratio_shuffled": RATIO | {"control": "shuffle"},
    "ratio_8": RATIO | {"strength": 8},
    "advantage": {"weights": "advantage"},
    "oracle": EQUAL,
}
PARTS = {  # the window without one of its parts, or with another V; the ratio with the gate
    "no_smoothing": {},
    "no_gate": {},
    "no_centring": {},
    "no_odds": {},
    "mlp": {},
    "ratio_8_gate": RATIO | {"strength": 8, "max_weight": 1},
}
CENTRED = "window_BT - ((window_BT * target_BT).sum(1) / count_B)[:, None]"
HASHED = "self.norm(trunk_BTD + self.mix(torch.cat(embedded, -1)))"
CHANGES = {  # lines of critic_wmtp.py, before and after
    "no_smoothing": {"target_BT, reach=2": "target_BT, reach=0"},
    "no_gate": {"clamp(args.epsilon, 1)": "clamp(args.epsilon, args.max_weight)"},
    "no_centring": {CENTRED: "window_BT"},
    "no_odds": {"= window_scores(logit_BT,": "= window_scores(F.logsigmoid(logit_BT),"},
    "mlp": {HASHED: "self.norm(trunk_BTD)", "(evidence_BT * prefix_BT).cumsum(1)": "evidence_BT"},
    "oracle": {
        "args, ranks)\n            auxiliary": """args, ranks)
            clean_BT = (~batch.is_noise_BT).float()
            clean_BT /= clean_BT[:, 1:][batch.targets_KBT[0, :, :-1] >= 0].mean()
            weight_KBT = weights_of_targets(clean_BT, num_heads)
            auxiliary"""
    },
}
SHARED = {"value": "separate", "epsilon": 0.05, "strength": 1, "max_weight": 3, "gae_lambda": 0.95}
SHARED |= {"train_on": "all", "lambda": 0, "value_lr": 1e-3, "value_batches": 1, "control": "none"}
TASKS = {
    "bugs": dict(batch_size=8, steps=200, base_steps=500, value_steps=400, lr=1e-3),
    "sums": dict(batch_size=64, steps=1000, base_steps=1000, value_steps=500, lr=3e-3),
}
SUMS_ARMS = ["equal_correct", "equal_all", "ratio"]


def judge_bugs(model, tokenizer, seed):
    """Of each held-out function `(loss, tokens)`, and `(preferred to its broken sibling, 1)`."""
    from common import IGNORE, Ranks, imitate_all, load_data

    data = load_data("stdlib-bugs", tokenizer, 256, seed, 0.0, Ranks())
    rows, siblings = imitate_all(data.heldout), {}
    for batch, loss_BT, _ in tools.heldout_losses(model, rows, np.arange(len(rows))):
        losses, counts = loss_BT.sum(1).tolist(), (batch.targets_KBT[0] != IGNORE).sum(1).tolist()
        for number, loss, count in zip(batch.rows_B.tolist(), losses, counts):
            side = "right" if rows[number]["reward"] > 0.5 else "wrong"
            siblings.setdefault(str(rows[number]["sibling"]), {})[side] = (loss, count)
    items = {}
    for name, sides in siblings.items():
        if len(sides) == 2:
            right, wrong = sides["right"][0], sides["wrong"][0]
            preference = float(right < wrong) + 0.5 * (right == wrong)
            items[name] = {"loss": sides["right"], "preference": (preference, 1)}
    return items


def judge_sums(model, tokenizer, records):
    """Of each of 1,000 sums that are not among the records `(right, 1)`, greedy and sampled."""
    from common import encode, generate, sums

    everything = list(sums())
    used = {record["group"] for record in everything[:records]}
    unseen = [r["prompt"] for r in everything[records:] if r["group"] not in used][:1000]
    prompts = [ids.tolist() for ids in encode(tokenizer, unseen)]
    items = {prompt: {} for prompt in unseen}
    for key, temperature in (("greedy", 0), ("sampled", 1)):
        done = generate(model.eval(), prompts, 5, tokenizer.eos_token_id, temperature=temperature)
        for prompt, tokens in zip(unseen, done.tokens):
            right = f"{sum(map(int, prompt[:-1].split('+'))):03d}"[::-1]
            items[prompt][key] = (float(tokenizer.decode(tokens) == right), 1)
    return items


def one_run(args, what, name, seed):
    """One run of a base policy, a value or an arm; kept in a file."""
    from common import build_model

    out, is_sums = Path(args.out), args.task == "sums"
    label = f"{what} {name} {seed}"
    run_dir, scratch = out / label, args.model or out / "config.json"
    value = f"value {'mlp' if name == 'mlp' else 'window'} {seed}"
    changed = out / f"{name}.py"
    script = changed if changed.exists() else "critic_wmtp.py"
    flags = dict(tools.PROOF_FLAGS, noise_frac=0.0, device=args.device, run_dir=run_dir, seed=seed)
    flags |= dict(num_heads=args.num_heads, batch_size=args.batch_size, data="stdlib-bugs")
    flags |= dict(SHARED, model=out / f"base policy {seed}", lr=args.lr, warmup_steps=20)
    flags |= dict(pair_coef=1.0, weights="window")
    if is_sums:
        flags |= dict(data=out / "sums.jsonl", seq_len=16, pair_coef=0.0)
    if what == "base":
        flags |= EQUAL | dict(model=scratch, lr=3e-3, max_steps=args.base_steps, warmup_steps=40)
        flags["train_on"] = "all" if is_sums else "correct"
    if what == "value":
        flags |= dict(value_steps=args.value_steps, max_steps=1)
    if what == "arm":
        flags |= dict(max_steps=args.steps, value_head=out / value / "value_head.safetensors")
        flags |= {**ARMS, **PARTS}[name]
        if is_sums:
            flags |= dict(model=scratch, warmup_steps=40)

    def work():
        shutil.rmtree(run_dir, ignore_errors=True)
        words = tools.as_flags(flags)
        tools.run_script(script, words, out / f"{label}.txt")
        lines = tools.read_metrics(run_dir)
        figures = dict(what=what, name=name, seed=seed)
        figures["command"] = " ".join([Path(script).name, *words]).replace(str(out), "OUT")
        judged = [line for line in lines if "value/auc" in line]
        figures["value"] = {k[6:]: v for k, v in judged[-1].items() if "/" in k} if judged else {}
        if what == "arm":
            loaded = build_model(str(run_dir), args.num_heads)
            figures["items"] = (
                judge_sums(*loaded, args.records) if is_sums else judge_bugs(*loaded, seed)
            )
            ess = [line["weights/ess_frac"] for line in lines if "weights/ess_frac" in line]
            figures["ess"] = float(np.mean(ess[-100:]))
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return figures

    return tools.kept(out / f"{label}.json", work)


def difference(runs, name, other, key):
    """Mean difference of two arms in a figure, with its interval, over the items of all seeds."""
    pairs = []
    for seed in sorted(seed for arm, seed in runs if arm == name and (other, seed) in runs):
        one, two = runs[name, seed]["items"], runs[other, seed]["items"]
        pairs += [(*one[item][key], two[item][key][0]) for item in sorted(one)]
    value, count, base = np.array(pairs).T
    return tools.difference_with_interval(value, base, count)


def summary(results):
    """One row an arm: means over seeds, and differences to the arms that it is compared with."""
    runs = {(r["name"], r["seed"]): r for r in results if r["what"] == "arm"}
    names = list(dict.fromkeys(name for name, _ in runs))
    rows = []
    for name in names:
        own = [run for (arm, _), run in runs.items() if arm == name]
        row = dict(name=name, ess=float(np.mean([run["ess"] for run in own])))
        bases = {"equal_correct", "equal_all", f"{name}_shuffled"} - {name} & set(names)
        for key in next(iter(own[0]["items"].values())):
            sums = [np.sum([item[key] for item in run["items"].values()], 0) for run in own]
            row[f"{key}_seeds"] = [float(total / count) for total, count in sums]
            row[key] = float(np.mean(row[f"{key}_seeds"]))
            row[f"{key}_to"] = {base: difference(runs, name, base, key) for base in sorted(bases)}
        rows.append(row)
    return rows


def show(rows, values):
    for name, figures in values.items():
        print(f"V {name}: " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in figures.items()))
    keys = [key[:-3] for key in rows[0] if key.endswith("_to")]
    lines = []
    for row in rows:
        cells = [row["name"], f"{row['ess']:.2f}"]
        for key in keys:
            cells.append(f"{row[key]:.4f}")
            for base in ("equal_correct", "equal_all", f"{row['name']}_shuffled"):
                middle, (low, high) = row[f"{key}_to"].get(base, (None, (0, 0)))
                cells.append("" if middle is None else f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(cells)
    header = [[key, "to equal_correct", "to equal_all", "to its shuffle"] for key in keys]
    tools.print_table(["weights", "ess", *sum(header, [])], lines)


def plot(rows, file):
    """Loss against preference; the line is the strength of the ratio: 0, 1, 8."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    places = {row["name"]: (row["loss"], row["preference"]) for row in rows}
    curve = [places[name] for name in ("equal_all", "ratio", "ratio_8") if name in places]
    axes.plot(*zip(*curve), color="0.7", label="strength of the ratio: 0, 1, 8")
    for name, place in places.items():
        axes.plot(*place, "o", color="C0")
        axes.annotate(name, place, fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set(xlabel="loss on correct held-out functions (nats)", ylabel="preference")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main():
    parser = tools.proof_parser(__doc__, None, None, [*ARMS, *PARTS])
    parser.set_defaults(seeds=5, arms=None)
    parser.add_argument("--task", choices=TASKS, default="bugs")
    parser.add_argument("--first-seed", type=int, default=3)
    parser.add_argument("--records", type=int, default=2000, help="sums that are trained on")
    for name in ("base_steps", "value_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    args = parser.parse_args()
    for name, value in TASKS[args.task].items():
        setattr(args, name, getattr(args, name, None) or value)
    out, settings = tools.prepare_proof(args, ("jobs", "seeds", "first_seed", "arms"), num_layers=5)
    source = (tools.ROOT / "critic_wmtp.py").read_text()
    for name, lines in CHANGES.items():
        changed = source
        for old, new in lines.items():
            assert changed.count(old) == 1, f"critic_wmtp.py: {changed.count(old)} times {old}"
            changed = changed.replace(old, new)
        (out / f"{name}.py").write_text(changed)
    if args.task == "sums":
        from common import sums

        lines = [tools.json.dumps(record) + "\n" for record in list(sums())[: args.records]]
        (out / "sums.jsonl").write_text("".join(lines))
    arms = args.arms or (SUMS_ARMS if args.task == "sums" else list(ARMS))
    kinds = [kind for kind in ("window", "mlp") if kind == "window" or "mlp" in arms]
    phases = [[("base", "policy")], [("value", kind) for kind in kinds]]
    phases.append([("arm", arm) for arm in arms])
    results = []
    for phase in phases:  # each needs the one before
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        tasks = [(args, *task, seed) for seed in seeds for task in phase]
        results += tools.run_jobs(one_run, tasks, args.jobs)
    rows, values = summary(results), {}
    for kind in kinds:
        own = [r["value"] for r in results if (r["what"], r["name"]) == ("value", kind)]
        values[kind] = {key: [figures[key] for figures in own] for key in own[0]}
    record = dict(command=tools.command(), **tools.machine(args.device), settings=settings)
    record["seconds_of_runs"] = sum(result["seconds"] for result in results)
    record["commands"] = [r["command"] for r in results if r["seed"] == args.first_seed]
    tools.write_json(out / "critic_proof.json", {**record, "rows": rows, "values": values})
    show(rows, values)
    if args.task == "bugs":
        plot(rows, out / "critic_proof.png")
    print(f"\n{out}/critic_proof.json")


if __name__ == "__main__":
    main()
