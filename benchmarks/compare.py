"""Every algorithm and its controls on the same batches with equal updates: one table a text.

    python benchmarks/compare.py --out OUT                420 runs: 5 seeds, 2 budgets, 4 texts
    python benchmarks/compare.py --out OUT2 --texts line byte clean shift --shift TARGET HELDOUT \\
        --arms grad gate_token skip_grad skip_token norm grad_shuffle grad_random target oracle

CLAIM, written before the first run: (1) with noise lines `skip`, `weighted` and `auto` have a lower
loss than `equal` at both budgets, and `shuffle` and `random` have not; (2) on clean text no
weighting lowers the loss by more than 0.02 at three times the budget; (3) with noise by document
`documents` is within 0.02 of `oracle`, and `documents_skip` is no better; (4) of `bugs` `critic`
prefers the correct sibling more often than `equal` and than `critic_shuffle`; (5) grad gains
nothing over `equal` on noise. Added when three seeds were known, before its own runs, `--steps 1500
--seeds 3 --texts clean line --arms skip weighted`: (6) `weighted` is still below `equal` with noise
lines, and gains less on clean text than after 300 updates.

It goes on if stopped (`--seeds 1`: the table of one seed). A run is a script as it stands, from
scratch, fp32, one thread, on a schedule of its own budget. All arms of a text and seed see the same
rows in order (`target`: also clean ones between; `correct` and `critic_correct`, the critic's
default, added late: their own). clean: stdlib:a. line, byte, document: 30 % of these units are
random characters. bugs: ALL records of stdlib-bugs, split as seed 0 does; broken siblings are
imitated too, their faults are the noise. shift: stdlib, judged on the text HELDOUT. rho1's
reference (1 head, seed 0) and grad's target are of stdlib:b, TARGET, or the correct training
records. V is trained for each seed, from its first weights. `weighted`: effective share of `skip`.

Judged from the final models: head 1 on every fourth held-out row, on bugs on the correct functions;
preference: how often one is likelier than its broken sibling. Differences: means over seeds, 95 %
by a paired bootstrap over documents (functions). AUC: noise scores lower than clean text; it,
weights and ess: last fifth of the updates. A first arm pays for data, and for reference losses.
"""

import contextlib
import itertools
from pathlib import Path

import numpy as np
import tools
from critic_proof import judge_functions

from common import CORRECT, Ranks, _documents, build_model, load_data, load_tokenizer

SKIP = {"mode": "token_skip", "skip_ratio": 0.3, "lambda": 0}
WEIGHTED = {"mode": "weighted", "target_ess": 0.7, "lambda": 0}
DOCUMENTS = {**SKIP, "skip_documents": 0.3}
ARMS = {  # script and flags
    "equal": ("baseline_mtp.py", {}),
    "head_1": ("baseline_mtp.py", {"num_heads": 1}),
    "correct": ("baseline_mtp.py", {}),
    "skip": ("rho1_wmtp.py", SKIP),
    "weighted": ("rho1_wmtp.py", WEIGHTED),
    "auto": ("rho1_wmtp.py", {**SKIP, "skip_ratio": "auto"}),
    "documents": ("rho1_wmtp.py", {**DOCUMENTS, "skip_ratio": 0}),
    "documents_skip": ("rho1_wmtp.py", {**DOCUMENTS, "skip_ratio": 0.1, "skip_ramp": 0.3}),
    "grad": ("grad_wmtp.py", {}),
    "critic": ("critic_wmtp.py", {"train_on": "all"}),
    "critic_1": ("critic_wmtp.py", {"train_on": "all", "strength": 1}),
    "critic_correct": ("critic_wmtp.py", {}),
    "critic_shuffle": ("critic_wmtp.py", {"train_on": "all", "control": "shuffle"}),
    "oracle": ("baseline_mtp.py", {}),
    "shuffle": ("rho1_wmtp.py", {**WEIGHTED, "control": "shuffle"}),
    "random": ("rho1_wmtp.py", {**SKIP, "control": "random"}),
    # by --arms alone
    "gate_token": ("grad_wmtp.py", {"smooth": 0}),
    "skip_grad": ("grad_wmtp.py", {"mode": "token_skip"}),
    "skip_token": ("grad_wmtp.py", {"mode": "token_skip", "smooth": 0}),
    "norm": ("grad_wmtp.py", {"score": "norm"}),
    "grad_shuffle": ("grad_wmtp.py", {"control": "shuffle"}),
    "grad_random": ("grad_wmtp.py", {"mode": "token_skip", "control": "random"}),
    "target": ("grad_wmtp.py", {"control": "target"}),
    # what arms read
    "reference": ("baseline_mtp.py", {"num_heads": 1}),
    "value": ("critic_wmtp.py", {"warmup_steps": 40}),
}
CONTROLS = {"skip": "random", "auto": "random", "weighted": "shuffle", "documents": "oracle"}
CONTROLS |= {"documents_skip": "documents", "critic": "critic_shuffle", "grad": "grad_shuffle"}
CONTROLS |= {"critic_correct": "correct"}
BASIC = "equal head_1 skip weighted auto grad shuffle random".split()
TEXTS = {  # the default arms of each text
    "clean": BASIC,
    "line": [*BASIC, "oracle"],
    "document": [*BASIC, "oracle", "documents", "documents_skip"],
    "bugs": [*BASIC, *"oracle correct critic critic_1 critic_shuffle critic_correct".split()],
    "byte": [*BASIC, "oracle"],
    "shift": BASIC,
}
FIGURES = ("weights/on_noise", "weights/on_clean", "weights/ess_frac", "noise_auc")
OLD = "token_weights(batch, loss_KBT)\n"  # in baseline_mtp.py
ORACLE = """(~batch.is_noise_BT).float()
            is_target_BT = batch.targets_KBT[0, :, :-1] >= 0
            weight_BT /= weight_BT[:, 1:][is_target_BT].mean().clamp(min=1e-6)
"""


# ------------------------------------------------------------------------------------------ data
def write_bugs(out):
    """Files of stdlib-bugs' records: `train`, `plain` and `weights` hold the same rows in order."""
    table = _documents(tools.data_args("stdlib-bugs"), load_tokenizer(), None)
    is_training, is_correct = table["part"] == "training", table["reward"] > CORRECT
    table = table["prompt completion sibling fault_start fault_end reward".split()]
    plain = table.drop(columns="reward")
    spans = zip(plain["fault_start"], plain["fault_end"])
    faults = [[[start, end, 0.0]] if start >= 0 else [] for start, end in spans]
    files = dict(train=table[is_training], plain=plain[is_training])
    files |= dict(clean=plain[is_training & is_correct], heldout=table[~is_training])
    files |= dict(heldout_clean=plain[~is_training & is_correct])
    files |= dict(weights=plain.assign(weights=faults)[is_training])
    for name, rows in files.items():
        text, file = rows.to_json(orient="records", lines=True), out / f"bugs_{name}.jsonl"
        if not file.exists() or file.read_text() != text:  # its time is part of names of caches
            file.write_text(text)


def target_of(args, text):
    """What grad's --target names, and rho1's reference trains on."""
    return {"bugs": f"{args.out}/bugs_clean.jsonl", "shift": args.shift[0]}.get(text, "stdlib:b")


def data_of(args, text, arm):
    """Flags of an arm's data."""
    if text == "bugs":
        start, is_critic = f"{args.out}/bugs_", ARMS[arm][0] == "critic_wmtp.py"
        names = {"correct": "clean", "reference": "clean", "oracle": "weights"}
        name = "train" if is_critic else names.get(arm, "plain")
        heldout = "heldout" if is_critic else "heldout_clean"
        return dict(data=f"{start}{name}.jsonl", heldout_data=f"{start}{heldout}.jsonl")
    if arm == "reference":
        return dict(data=target_of(args, text))
    if text == "shift":
        return dict(data="stdlib", heldout_data=args.shift[1])
    noise = dict(noise_frac=args.noise_frac, noise_by=text) if text != "clean" else {}
    return dict(data="stdlib:a", **noise)


# ------------------------------------------------------------------------------------------ runs
def read_by(args, seed, text, arm):
    """Seed, updates, text and arm of the run whose model an arm reads, or None."""
    if ARMS[arm][0] == "rho1_wmtp.py":
        return 0, args.ref_steps, text if text in ("bugs", "shift") else "clean", "reference"
    is_critic = ARMS[arm][0] == "critic_wmtp.py" and arm != "value"
    return (seed, 1, text, "value") if is_critic else None


def one_run(args, seed, steps, text, arm):
    """Train and judge an arm, or what arms read; the result is kept in a file."""
    out, label = Path(args.out), f"{seed} {steps} {text} {arm}"

    def work():
        script, own = ARMS[arm]
        flags = dict(tools.PROOF_FLAGS, model=args.model or out / "config.json", lr=3e-3)
        flags |= dict(num_heads=args.num_heads, batch_size=args.batch_size, device=args.device)
        flags |= dict(max_steps=steps, warmup_steps=min(40, steps // 4), eval_rows=8, seed=seed)
        flags |= dict(run_dir=out / label, **data_of(args, text, arm)) | own
        if read := read_by(args, seed, text, arm):
            is_rho1, folder = script == "rho1_wmtp.py", out / " ".join(map(str, read))
            file = folder if is_rho1 else folder / "value_head.safetensors"
            flags["ref_model" if is_rho1 else "value_head"] = file
        if script == "grad_wmtp.py":
            flags["target"] = target_of(args, text)
        if arm == "value":
            flags["value_steps"] = args.value_steps
        if arm == "oracle" and text != "bugs":
            script = out / "oracle.py"
        lines, command = tools.train(script, flags, out / f"{label}.txt")
        result = dict(seed=seed, steps=steps, text=text, arm=arm, command=command)
        result["value"] = [line for line in lines if "value/auc" in line]
        result["items"] = judge(args, text, out / label, flags["num_heads"])
        lines = [line for line in lines if "train/loss" in line][-max(1, steps // 5) :]
        for key in FIGURES:
            values = [value for line in lines for k, value in line.items() if k.endswith(key)]
            result[key] = float(np.mean(values)) if values else None
        return result

    return tools.kept(out / f"{label}.json", work)


def judge(args, text, run_dir, num_heads):
    """Head 1's `(sum, count)` of each held-out document; of bugs `judge_functions`."""
    model, tokenizer = build_model(str(run_dir), num_heads)
    data = tools.data_args(**data_of(args, text, "critic"))
    with contextlib.redirect_stdout(None):
        rows = load_data(data, tokenizer, Ranks()).heldout
    if text == "bugs":
        return judge_functions(model, rows)
    sums_D3 = tools.document_sums(model, rows, np.arange(0, len(rows), 4))
    sums_D3 = sums_D3[sums_D3[:, 2] > 0]
    return dict(loss=sums_D3[:, [0, 2]].tolist(), accuracy=sums_D3[:, [1, 2]].tolist())


def summary(results):
    """One row for each text, budget and arm: means over seeds, and differences to other arms."""
    runs = {(r["text"], r["steps"], r["arm"], r["seed"]): r for r in results}
    seeds, rows = sorted({result["seed"] for result in results}), []
    for text, steps, arm in dict.fromkeys(key[:3] for key in runs):
        own = [runs[text, steps, arm, seed] for seed in seeds]
        row = dict(text=text, updates=steps, arm=arm, control=CONTROLS.get(arm))
        for key in own[0]["items"]:
            items_SN2 = np.array([run["items"][key] for run in own])
            by_seed = items_SN2[..., 0].sum(1) / items_SN2[..., 1].sum(1)
            row |= {key: by_seed.mean(), f"{key} by seed": by_seed.tolist()}
            row[f"{key} sd"] = by_seed.std(ddof=1) if len(seeds) > 1 else None
            for label, other in (("equal", "equal"), ("skip", "skip"), ("control", row["control"])):
                row[f"{key} to {label}"] = None
                if other != arm and (text, steps, other, seeds[0]) in runs:
                    others = [runs[text, steps, other, seed]["items"][key] for seed in seeds]
                    sums = items_SN2[..., 0].mean(0), np.array(others)[..., 0].mean(0)
                    result = tools.difference_with_interval(*sums, items_SN2[0, :, 1])
                    row[f"{key} to {label}"] = result
        for key in (*FIGURES, "cpu_seconds"):
            values = [run[key] for run in own]
            row[key] = None if None in values else float(np.mean(values))
        rows.append(row)
    return rows


def show(rows):
    for text in dict.fromkeys(row["text"] for row in rows):
        own = [row for row in rows if row["text"] == text]
        keys = [key for key in own[0] if key != "text" and not key.endswith("by seed")]
        print(f"\n{text}, {len(own[0]['loss by seed'])} seed(s)\n")
        tools.print_table(keys, [[tools.cell(row[key]) for key in keys] for row in own])


def main():
    parser = tools.proof_parser(__doc__, [100, 300], 4, list(ARMS)[:-2])
    parser.set_defaults(seeds=5, num_heads=4, arms=None)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS)[:4])
    parser.add_argument("--shift", nargs=2, default=["", ""], metavar=("TARGET", "HELDOUT"))
    parser.add_argument("--noise-frac", type=float, default=0.3)
    parser.add_argument("--ref-steps", type=int, default=1500, help="updates of rho1's reference")
    parser.add_argument("--value-steps", type=int, default=400, help="updates of the critic's V")
    args = parser.parse_args()
    if "shift" in args.texts and not all(args.shift):
        parser.error("--texts shift: name its two texts by --shift TARGET HELDOUT")
    out, settings = tools.prepare_proof(args, ("jobs", "seeds", "steps", "texts", "arms"), 5)
    tools.write_changed(out / "oracle.py", "baseline_mtp.py", OLD, ORACLE)
    write_bugs(out)
    tasks, of_bugs = [], TEXTS["bugs"]
    for seed, steps, text in itertools.product(range(args.seeds), args.steps, args.texts):
        own = ["equal", *(args.arms or TEXTS[text])]  # some of bugs need outcomes, or noise
        own = dict.fromkeys(arm for arm in own if arm in TEXTS[text] or arm not in of_bugs)
        tasks += [(args, seed, steps, text, arm) for arm in own]
    reads = dict.fromkeys(read_by(args, seed, text, arm) for _, seed, _, text, arm in tasks)
    read = tools.run_jobs(one_run, [(args, *key) for key in reads if key], args.jobs)
    results = tools.run_jobs(one_run, tasks, args.jobs)
    rows = summary(results)
    record = dict(command=tools.command(), **tools.machine(args.device), settings=settings)
    record["commits_of_runs"] = sorted({run["commit"] for run in read + results})
    record["cpu_seconds_of_runs"] = sum(run["cpu_seconds"] for run in read + results)
    record["commands"] = [run["command"] for run in read + results if run["seed"] == 0]
    record["values"] = [run["value"] for run in read if run["value"]]
    tools.write_json(out / "compare.json", {**record, "rows": rows})
    show(rows)
    points = []
    for row, key in itertools.product(rows, ("loss", "preference")):
        panel = f"{row['text']}: {key} to equal", f"{row['updates']} updates", row["arm"]
        points.append((*panel, row.get(f"{key} to equal")))
    tools.plot_differences(points, out / "compare.png")


if __name__ == "__main__":
    main()
