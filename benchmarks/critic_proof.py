"""Do the critic's weights help, in likelihood and in preference? Runs, table, picture and JSON.

    python benchmarks/critic_proof.py --out OUT                  five fresh seeds, 3 to 7
    python benchmarks/critic_proof.py --out OUT2 --task sums     additions, half of them wrong

CLAIM, written before the first run: on the fresh seeds `window` has a lower loss and a higher
preference than `equal_correct`, and a higher preference than `window_shuffled`; all three 95 %
intervals exclude 0. Of sums: `ratio` is as often right as `equal_all` when greedy, and when sampled
within 0.05 of that; `equal_all` imitates the errors: sampled, about half are right.

bugs: for each seed (it fixes the held-out files too) a policy trains on the correct functions of
stdlib-bugs, a value on that policy, and from both each arm. Judged: head 1's loss on correct
held-out functions; preference: how often a function is likelier than its broken sibling. sums: a
policy trains on all records, a value on it, and each arm from scratch. Judged: the share of right
answers to held-out sums. Every run is the script (`oracle`: a changed copy), on
one thread; the table has all runs in OUT. Intervals: paired bootstrap over the items of all seeds.
"""

from pathlib import Path

import numpy as np
import tools
from common import Ranks, build_model, generate, imitate_all, load_data
from critic_wmtp import siblings

ALL, CORRECT, SHUFFLED = {"train_on": "all"}, {"train_on": "correct"}, {"control": "shuffle"}
EQUAL, RATIO = {"lambda": 1, "value_head": None}, {"weights": "ratio", "strength": 1}
WINDOW = {"weights": "window"}
ARMS = {
    "equal_correct": EQUAL | CORRECT,
    "equal_all": EQUAL | ALL,
    "window": WINDOW | ALL,
    "window_shuffled": WINDOW | ALL | SHUFFLED,
    "ratio": RATIO | ALL,
    "ratio_shuffled": RATIO | ALL | SHUFFLED,
    "ratio_8": RATIO | ALL | {"strength": 8},
    "advantage": {"weights": "advantage"} | ALL,
    "oracle": WINDOW | ALL | {"epsilon": 0, "strength": 10},  # 0 on known faults
    "window_correct": WINDOW | CORRECT,
    # Added after the claim was judged
    "window_correct_shuffled": WINDOW | CORRECT | SHUFFLED,
    "ratio_8_correct": RATIO | CORRECT | {"strength": 8},
    "ratio_8_correct_shuffled": RATIO | CORRECT | SHUFFLED | {"strength": 8},
}
ORACLE = ("= window_scores(logit_BT, target_BT)", "= -batch.is_noise_BT.float()")
TASKS = {
    "bugs": dict(batch_size=8, steps=200, base_steps=500, value_steps=400, arms=list(ARMS)),
    "sums": dict(batch_size=64, steps=800, base_steps=800, value_steps=1500),
}
TASKS["sums"]["arms"] = ["equal_correct", "equal_all", "ratio"]


def judge_bugs(model, tokenizer, seed):
    args = tools.data_args("stdlib-bugs", seed=seed)
    return judge_functions(model, load_data(args, tokenizer, Ranks()).heldout)


def judge_functions(model, rows):
    """`(loss, tokens)` of every function; `(preferred to its broken sibling, 1)`."""
    sums_D3 = tools.document_sums(model, imitate_all(rows), np.arange(len(rows)))
    loss_N, _, count_N = sums_D3[rows[:]["document"][:, 0]].T  # a row is a document
    pairs = [(right[0], wrong[0]) for wrong, right in siblings(rows) if right and wrong]
    loss = [(loss_N[right], count_N[right]) for right, _ in pairs]
    margins = [np.sign(loss_N[wrong] - loss_N[right]) for right, wrong in pairs]
    return dict(loss=loss, preference=[((1 + margin) / 2, 1) for margin in margins])  # ties half


def judge_sums(model, tokenizer, seed):
    """`(right, 1)` of every held-out sum, greedy and sampled."""
    args, figures = tools.data_args("sums", seq_len=16, seed=seed), {}
    heldout = load_data(args, tokenizer, Ranks()).heldout
    columns = heldout[np.flatnonzero(heldout["reward"][:] > 0.5)]  # each sum once
    rows = zip(columns["input_ids"].tolist(), columns["is_target"].argmax(1))
    prompts = [ids[:start] for ids, start in rows]
    numbers = [text.rstrip("=").split("+") for text in tokenizer.batch_decode(prompts)]
    answers = [f"{int(a) + int(b):03d}"[::-1] for a, b in numbers]
    for key, temperature in (("greedy", 0), ("sampled", 1)):
        done = generate(model.eval(), prompts, 5, tokenizer.eos_token_id, temperature=temperature)
        texts = [tokenizer.decode(tokens) for tokens in done.tokens]
        figures[key] = [(float(text == answer), 1) for text, answer in zip(texts, answers)]
    return figures


def one_run(args, what, name, seed):
    """One run of a base policy, a value or an arm; kept in a file."""
    out, is_sums, label = Path(args.out), args.task == "sums", f"{what} {name} {seed}"
    run_dir, changed = out / label, out / f"{name}.py"
    script = changed if changed.exists() else "critic_wmtp.py"
    scratch = dict(model=args.model or out / "config.json", lr=3e-3, warmup_steps=40)
    ready = dict(model=out / f"base policy {seed}", lr=1e-3, warmup_steps=20)
    flags = dict(tools.PROOF_FLAGS, device=args.device, run_dir=run_dir, seed=seed)
    flags |= dict(num_heads=args.num_heads, batch_size=args.batch_size, value_batches=1)
    if is_sums:
        flags |= dict(data="sums", seq_len=16, value_lr=3e-3)
    if what == "base":
        flags |= scratch | dict(max_steps=args.base_steps)
        flags |= ARMS["equal_all" if is_sums else "equal_correct"]
    elif what == "value":
        flags |= ready | dict(value_steps=args.value_steps, max_steps=1)
    else:
        value = out / f"value window {seed}"
        flags |= scratch if is_sums else ready
        flags |= dict(max_steps=args.steps, value_head=value / "value_head.safetensors")
        flags |= ARMS[name]

    def work():
        lines, command = tools.train(script, flags, out / f"{label}.txt")
        figures = dict(what=what, name=name, seed=seed, command=command)
        if what == "value":
            figures["value"] = next(line for line in lines if "value/auc" in line)
        if what == "arm":
            loaded = build_model(str(run_dir), args.num_heads)
            figures["items"] = (judge_sums if is_sums else judge_bugs)(*loaded, seed)
            ess = [line["weights/ess_frac"] for line in lines if "weights/ess_frac" in line]
            figures["ess"] = float(np.mean(ess[-100:]))
        return figures

    return tools.kept(out / f"{label}.json", work)


def summary(results):
    """One row an arm: means over seeds, and differences to others on the seeds of both."""
    runs, rows = {(r["name"], r["seed"]): r for r in results if r["what"] == "arm"}, []
    for name in dict.fromkeys(name for name, _ in runs):
        own = {seed: run for (arm, seed), run in runs.items() if arm == name}
        row = dict(name=name, ess=float(np.mean([run["ess"] for run in own.values()])))
        others = dict(correct="equal_correct", all="equal_all", shuffled=f"{name}_shuffled")
        for key in next(iter(own.values()))["items"]:
            totals = [np.sum(run["items"][key], 0) for run in own.values()]
            row[key] = float(np.mean([total / count for total, count in totals]))
            for label, other in others.items():
                seeds = [seed for seed in own if (other, seed) in runs and other != name]
                pairs = [[runs[n, seed]["items"][key] for n in (name, other)] for seed in seeds]
                if pairs:
                    one, two = np.concatenate(pairs, 1)
                    result = tools.difference_with_interval(one[:, 0], two[:, 0], one[:, 1])
                row[f"{key} to {label}"] = result if pairs else None
        rows.append(row)
    return rows


def main():
    parser = tools.proof_parser(__doc__, None, None, ARMS)
    parser.set_defaults(seeds=5, arms=None)
    parser.add_argument("--task", choices=TASKS, default="bugs")
    parser.add_argument("--first-seed", type=int, default=3)
    parser.add_argument("--base-steps", type=int)
    parser.add_argument("--value-steps", type=int)
    args = parser.parse_args()
    for name, value in TASKS[args.task].items():
        setattr(args, name, getattr(args, name) or value)
    out, settings = tools.prepare_proof(args, ("jobs", "seeds", "first_seed", "arms"), num_layers=5)
    tools.write_changed(out / "oracle.py", "critic_wmtp.py", *ORACLE)
    phases = [[("base", "policy")], [("value", "window")], [("arm", arm) for arm in args.arms]]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for phase in phases:  # each needs the one before
        tasks = [(args, *task, seed) for seed in seeds for task in phase]
        tools.run_jobs(one_run, tasks, args.jobs)
    results = [tools.json.loads(file.read_text()) for file in sorted(out.glob("* * *.json"))]
    rows, values = summary(results), [r for r in results if "value" in r]
    record = dict(command=tools.command(), **tools.machine(args.device), settings=settings)
    record["seconds_of_runs"] = sum(result["seconds"] for result in results)
    record["commands"] = [r["command"] for r in results if r["seed"] == args.first_seed]
    tools.write_json(out / "critic_proof.json", {**record, "rows": rows, "values": values})
    print(*(f"V {v['name']} {v['seed']}: {v['value']}" for v in values), sep="\n")
    tools.print_table(list(rows[0]), [map(tools.cell, row.values()) for row in rows])
    keys = [key for key in rows[0] if key.endswith("to correct")]
    results = [(key, "arms", row["name"], row[key]) for row in rows for key in keys]
    tools.plot_differences(results, out / "critic_proof.png")


if __name__ == "__main__":
    main()
