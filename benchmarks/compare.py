"""Every algorithm and its controls on the same batches with equal updates: one table a text.

    python benchmarks/compare.py --out OUT                  410 runs: 5 seeds, 2 budgets, 4 texts
    python benchmarks/compare.py --out OUT --seeds 1        the table of what is done by then
    python benchmarks/compare.py --out OUT --texts line byte clean shift --shift mbpp.jsonl \\
        --arms equal skip mixed abs shuffle random oracle   proof of rho1; of grad: its arms below

CLAIM, written before the first run: (1) with noise lines `skip`, `weighted` and `auto` have a lower
loss than `equal` at both budgets, and `shuffle` and `random` have not; (2) on clean text no
weighting lowers the loss by more than 0.02 at three times the budget; (3) with noise by document
`documents` is within 0.02 of `oracle`, and `documents_skip` is no better; (4) of `bugs` `critic`
prefers the correct sibling more often than `equal` and than `critic_shuffle`; (5) grad gains
nothing over `equal` on noise.

It goes on if stopped, seed by seed. Every run is a script as it stands, from scratch, in fp32 on
one thread, with a learning rate's schedule of its own budget. Arms of a text see the same rows in
the same order (`correct`: the correct ones alone; `target`: clean batches besides).

clean: stdlib:a. line, byte, document: 30 % of these units are random characters. shift: stdlib,
judged on solutions of MBPP. bugs: ALL records of stdlib-bugs, split as seed 0 does; the broken
siblings are imitated too, their faults are the noise. rho1's reference has 1 head: of clean
stdlib:b; on bugs of the correct training records; on shift, and with `rho1_rows`, of just the rows
that are grad's target. V of the critic: one a seed, from that seed's first weights. `weighted` has
the effective share of tokens of `skip`; `oracle` gives noise weight 0.

Judged from the final models: head 1 on every fourth held-out row, on bugs on all correct records;
preference: how often a held-out function is likelier than its broken sibling. Differences to
`equal`, and to an arm's own control: means over seeds, with a 95 % interval from a paired bootstrap
over documents (functions). AUC: how often noise scores lower than clean text; it, the weights and
ess are of the last fifth of the updates. s: of a run with its judgement; the losses of a reference
are computed once for all arms, so the first pays.
"""

import json
import re
from pathlib import Path

import numpy as np
import tools
from matplotlib.figure import Figure

import common
from common import IGNORE, Ranks, build_model, imitate_all, load_data, load_tokenizer
from critic_wmtp import siblings

SKIP = {"mode": "token_skip", "skip_ratio": 0.3, "lambda": 0}
WEIGHTED = {"mode": "weighted", "target_ess": 0.7, "lambda": 0}
DOCUMENTS = {**SKIP, "skip_documents": 0.3}
CRITIC = {"train_on": "all"}
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
    "critic": ("critic_wmtp.py", CRITIC),
    "critic_1": ("critic_wmtp.py", {**CRITIC, "strength": 1}),
    "critic_shuffle": ("critic_wmtp.py", {**CRITIC, "control": "shuffle"}),
    "oracle": ("baseline_mtp.py", {}),
    "shuffle": ("rho1_wmtp.py", {**WEIGHTED, "control": "shuffle"}),
    "random": ("rho1_wmtp.py", {**SKIP, "control": "random"}),
    # not among the default arms of any text
    "mixed": ("rho1_wmtp.py", {"mode": "weighted"}),
    "abs": ("rho1_wmtp.py", {"mode": "weighted", "score": "abs"}),
    "rho1_rows": ("rho1_wmtp.py", {"mode": "weighted"}),
    "gate_token": ("grad_wmtp.py", {"smooth": 0}),
    "skip_grad": ("grad_wmtp.py", {"mode": "token_skip"}),
    "skip_token": ("grad_wmtp.py", {"mode": "token_skip", "smooth": 0}),
    "norm": ("grad_wmtp.py", {"score": "norm"}),
    "grad_shuffle": ("grad_wmtp.py", {"control": "shuffle"}),
    "grad_random": ("grad_wmtp.py", {"mode": "token_skip", "control": "random"}),
    "target": ("grad_wmtp.py", {"control": "target"}),
}
CONTROLS = {"skip": "random", "auto": "random", "weighted": "shuffle", "documents": "oracle"}
CONTROLS |= {"documents_skip": "documents", "critic": "critic_shuffle", "grad": "grad_shuffle"}
BASIC = "equal head_1 skip weighted auto grad shuffle random".split()
OF_BUGS = "correct critic critic_1 critic_shuffle".split()
TEXTS = {  # the default arms of each text
    "clean": BASIC,
    "line": [*BASIC, "oracle"],
    "document": [*BASIC, "oracle", "documents", "documents_skip"],
    "bugs": [*BASIC, "oracle", *OF_BUGS],
    "byte": [*BASIC, "oracle"],
    "shift": BASIC,
}
LEFT_OUT = {"bugs": ["rho1_rows"], "clean": [*OF_BUGS, "oracle"], "shift": [*OF_BUGS, "oracle"]}
FIGURES = ("weights/on_noise", "weights/on_clean", "weights/ess_frac", "noise_auc")
ORACLE = """
            clean_BT = (~batch.is_noise_BT).float()
            is_target_BT = batch.targets_KBT[0, :, :-1] >= 0
            weight_BT = clean_BT / clean_BT[:, 1:][is_target_BT].mean().clamp(min=1e-6)
"""


# ----------------------------------------------------------------------------------------- data
def write_rows(file, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not file.exists() or file.read_text() != text:  # caches are named after its time
        file.write_text(text)


def write_bugs(out):
    """Files of stdlib-bugs: all but `clean` hold the same training rows in the same order."""
    columns = "prompt completion group sibling fault_start fault_end reward".split()
    table = common._documents(tools.data_args("stdlib-bugs"), load_tokenizer(), None)
    files = {}
    for part, name in (("training", ""), ("held-out", "heldout_")):
        scored = table.loc[table["part"] == part, columns]
        plain = scored.drop(columns="reward")
        faults = [
            [] if row.fault_start < 0 else [[row.fault_start, row.fault_end, 0.0]]
            for row in plain.itertuples()
        ]
        is_correct = scored["reward"] > common.CORRECT
        files |= {f"{name}scored": scored, f"{name}clean": plain[is_correct]}
        files |= {f"{name}plain": plain, f"{name}weights": plain.assign(weights=faults)}
    for name, rows in files.items():
        write_rows(out / f"bugs_{name}.jsonl", rows.to_dict("records"))


def write_shift(args):
    """Solutions of MBPP as texts: the target set, and what is held out."""
    tasks = map(json.loads, Path(args.shift).read_text().splitlines())
    codes = [(task["task_id"], task["code"].replace("\r", "") + "\n") for task in tasks]
    for name, is_target in (("target", True), ("heldout", False)):
        rows = [{"text": code} for number, code in codes if (number > 600) == is_target]
        write_rows(Path(args.out, f"shift_{name}.jsonl"), rows)


def data_of(args, text, arm):
    """Flags of an arm's data."""
    if text == "shift":
        return dict(data="stdlib", heldout_data=f"{args.out}/shift_heldout.jsonl")
    if text == "bugs":
        kind, heldout = {"correct": "clean", "oracle": "weights"}.get(arm, "plain"), "clean"
        if arm.startswith("critic"):
            kind = heldout = "scored"
        names = dict(data=kind, heldout_data=f"heldout_{heldout}")
        return {flag: f"{args.out}/bugs_{name}.jsonl" for flag, name in names.items()}
    noise = dict(noise_frac=args.noise_frac, noise_by=text) if text != "clean" else {}
    return dict(data="stdlib:a", **noise)


def target_of(args, text):
    """What grad's --target names."""
    files = dict(bugs="bugs_clean", shift="shift_target")
    return f"{args.out}/{files[text]}.jsonl" if text in files else "stdlib:b"


# ----------------------------------------------------------------------------------------- runs
def flags_of(args, label, seed, steps):
    flags = dict(tools.PROOF_FLAGS, model=args.model or f"{args.out}/config.json")
    flags |= dict(num_heads=args.num_heads, batch_size=args.batch_size, device=args.device)
    flags |= dict(max_steps=steps, lr=3e-3, warmup_steps=min(40, steps // 4), eval_rows=8)
    return flags | dict(seed=seed, run_dir=f"{args.out}/{label}")


def helper_of(text, arm):
    """Name of the model that an arm reads: a reference, V, or none."""
    if ARMS[arm][0] == "rho1_wmtp.py":
        own = "rows" if arm == "rho1_rows" and text != "shift" else text
        return f"reference of {own}" if own in ("rows", "shift", "bugs") else "reference"
    return "value" if ARMS[arm][0] == "critic_wmtp.py" else ""


def train_helper(args, seed, name):
    """Train a reference or V; the result is kept in a file."""
    out, label = Path(args.out), f"{name} {seed}"

    def work():
        script, flags = "baseline_mtp.py", flags_of(args, label, seed, args.ref_steps)
        flags |= dict(num_heads=1, data="stdlib:b")
        if name == "value":
            script, flags = "critic_wmtp.py", flags_of(args, label, seed, 1)
            flags |= dict(value_steps=args.value_steps, warmup_steps=min(40, args.value_steps // 4))
            flags |= data_of(args, "bugs", "critic")
        elif name == "reference of bugs":
            flags |= data_of(args, "bugs", "correct")
        elif name != "reference":  # of the rows that grad reads: fewer updates
            tokenizer = load_tokenizer()
            target = target_of(args, name.removeprefix("reference of "))
            rows = load_data(tools.data_args(target), tokenizer, Ranks()).train
            rows = rows[np.linspace(0, len(rows) - 1, min(256, len(rows))).astype(int)]["input_ids"]
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            write_rows(out / f"{name}.jsonl", [{"text": text} for text in texts])
            own = dict.fromkeys(("data", "heldout_data"), out / f"{name}.jsonl")
            flags |= (
                own | flags_of(args, label, seed, max(1, args.ref_steps // 5)) | {"num_heads": 1}
            )
        lines, command = tools.train(script, flags, out / f"{label}.txt")
        value = [line for line in lines if "value/auc" in line]
        return dict(name=name, seed=seed, command=command, value=value)

    return tools.kept(out / f"{label}.json", work)


def one_run(args, seed, steps, text, arm):
    """Train and judge one arm; the result is kept in a file."""
    out, label = Path(args.out), f"{text} {arm} {steps} {seed}"

    def work():
        (script, own), helper = ARMS[arm], helper_of(text, arm)
        flags = flags_of(args, label, seed, steps) | data_of(args, text, arm) | own
        if helper == "value":
            flags["value_head"] = out / f"value {seed}" / "value_head.safetensors"
        elif helper:
            flags["ref_model"] = out / f"{helper} 0"
        elif script == "grad_wmtp.py":
            flags["target"] = target_of(args, text)
        elif arm == "oracle" and text != "bugs":
            script = out / "oracle.py"
        lines, command = tools.train(script, flags, out / f"{label}.txt")
        result = dict(text=text, arm=arm, steps=steps, seed=seed, command=command)
        result["items"] = judge(args, text, out / label, flags["num_heads"])
        lines = [line for line in lines if "train/loss" in line][-max(1, steps // 5) :]
        for key in FIGURES:
            values = [value for line in lines for k, value in line.items() if k.endswith(key)]
            result[key] = float(np.mean(values)) if values else None
        return result

    return tools.kept(out / f"{label}.json", work)


def judge(args, text, run_dir, num_heads):
    """Figures of head 1 as `(sum, count)` of each held-out document, or pair of siblings."""
    model, tokenizer = build_model(str(run_dir), num_heads)
    names = data_of(args, text, "critic")
    names = {flag: name for flag, name in names.items() if "data" in flag}
    rows = load_data(tools.data_args(**names), tokenizer, Ranks()).heldout
    numbers = np.arange(0, len(rows), 4)
    if text == "bugs":
        rows, numbers = imitate_all(rows), np.arange(len(rows))
    sums_D3 = np.zeros((rows[:]["document"].max() + 1, 3))  # loss, correct, targets
    for batch, *figures in tools.heldout_losses(model, rows, numbers):
        valid_BT = (batch.targets_KBT[0] != IGNORE).numpy()
        values_3BT = np.stack([*figures, valid_BT]).astype(float)
        document_BT = rows[batch.rows_B]["document"]
        np.add.at(sums_D3, document_BT[valid_BT], values_3BT[:, valid_BT].T)
    items = {}
    if text == "bugs":
        sums_D3 = sums_D3[rows[:]["document"][:, 0]]  # in the order of the rows, one document each
        pairs = [(right[0], wrong[0]) for wrong, right in siblings(rows) if right and wrong]
        signs = [np.sign(sums_D3[wrong, 0] - sums_D3[right, 0]) for right, wrong in pairs]
        items["preference"] = [((1 + sign) / 2, 1) for sign in signs]  # ties half
        sums_D3 = sums_D3[rows["reward"][:] > common.CORRECT]
    sums_D3 = sums_D3[sums_D3[:, 2] > 0]
    return dict(loss=sums_D3[:, [0, 2]].tolist(), acc=sums_D3[:, [1, 2]].tolist(), **items)


# ---------------------------------------------------------------------------------------- table
def summary(results):
    """One row for each text, budget and arm: figures over seeds, differences to other arms."""
    runs, rows = {(r["text"], r["steps"], r["arm"], r["seed"]): r for r in results}, []
    seeds = sorted({result["seed"] for result in results})
    for text, steps, arm in dict.fromkeys(key[:3] for key in runs):
        own = [runs[text, steps, arm, seed] for seed in seeds]
        row = dict(text=text, steps=steps, arm=arm, seeds=len(seeds), control=CONTROLS.get(arm))
        for key in own[0]["items"]:
            one_SN2 = np.array([run["items"][key] for run in own])
            row[key] = (one_SN2[..., 0].sum(1) / one_SN2[..., 1].sum(1)).tolist()  # of each seed
            for label, other in (("equal", "equal"), ("control", row["control"])):
                row[f"{key}_to_{label}"] = None
                if arm != other and (text, steps, other, seeds[0]) in runs:
                    others = [runs[text, steps, other, seed]["items"][key] for seed in seeds]
                    sums = one_SN2[..., 0].mean(0), np.array(others)[..., 0].mean(0)
                    result = tools.difference_with_interval(*sums, one_SN2[0, :, 1])
                    row[f"{key}_to_{label}"] = result
        for key in (*FIGURES, "seconds"):
            values = [run[key] for run in own]
            row[key] = None if None in values else float(np.mean(values))
        rows.append(row)
    return rows


def difference(result, note=""):
    """`-0.0123 [-0.0200, -0.0040] random`."""
    if result is None:
        return ""
    middle, (low, high) = result
    return f"{middle:+.4f} [{low:+.4f}, {high:+.4f}] {note}".rstrip()


def show(rows):
    for text in dict.fromkeys(row["text"] for row in rows):
        own = [row for row in rows if row["text"] == text]
        base = {row["steps"]: row["loss"] for row in own if row["arm"] == "equal"}
        keys = [key for key in ("loss", "acc", "preference") if key in own[0]]
        header, lines = ["updates", "arm"], []
        for key in keys:
            header += [f"{key} (sd)", "to equal [95 %]", "to its control [95 %]"]
        for row in own:
            cells = [row["steps"], row["arm"]]
            for key in keys:
                deviation = np.std(row[key], ddof=row["seeds"] > 1)
                cells.append(f"{np.mean(row[key]):.4f} ({deviation:.4f})")
                cells.append(difference(row[f"{key}_to_equal"]))
                cells.append(difference(row[f"{key}_to_control"], row["control"]))
            lower = np.less(row["loss"], base[row["steps"]]).sum()
            cells.append(f"{lower}/{row['seeds']}")
            cells += ["" if row[key] is None else f"{row[key]:.3f}" for key in FIGURES]
            lines.append([*cells, f"{row['seconds']:.0f}"])
        print(f"{text}: held-out figures of head 1, {own[0]['seeds']} seed(s)\n")
        header += ["loss below equal", "w on noise", "on clean", "ess", "AUC", "s"]
        tools.print_table(header, lines)


def plot(rows, file):
    panels = [(text, "loss") for text in dict.fromkeys(row["text"] for row in rows)]
    panels += [("bugs", "preference")] * (("bugs", "loss") in panels)
    budgets = list(dict.fromkeys(row["steps"] for row in rows))
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, (text, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        own = [row for row in rows if row["text"] == text and row[f"{key}_to_equal"]]
        arms = list(dict.fromkeys(row["arm"] for row in own))
        for number, steps in enumerate(budgets):
            results = {r["arm"]: r[f"{key}_to_equal"] for r in own if r["steps"] == steps}
            middle_N = np.array([middle for middle, _ in results.values()])
            error_2N = abs(np.array([interval for _, interval in results.values()]).T - middle_N)
            place_N = np.arange(len(results)) + 0.2 * number
            label = f"{steps} updates"
            axes.errorbar(middle_N, place_N, xerr=error_2N, fmt="o", capsize=3, label=label)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_yticks(range(len(arms)), arms)
        axes.set(title=text, xlabel=f"held-out {key}, difference to equal")
        axes.invert_yaxis()
    figure.get_axes()[0].legend()
    figure.savefig(file, dpi=110)


def tasks_of(args):
    """Seed, updates, text and arm of every run, in their order."""
    texts = {}
    for text in args.texts:
        arms = ["equal", *(arm for arm in args.arms or TEXTS[text] if arm != "equal")]
        texts[text] = [arm for arm in arms if arm not in LEFT_OUT.get(text, OF_BUGS)]
        if dropped := [arm for arm in arms if arm not in texts[text]]:
            print(f"{text:<9} left out, they do not apply: {' '.join(dropped)}")
    budgets = [(seed, steps) for seed in range(args.seeds) for steps in args.steps]
    return [
        (args, *budget, text, arm) for budget in budgets for text in texts for arm in texts[text]
    ]


def main():
    parser = tools.proof_parser(__doc__, [100, 300], 4, list(ARMS))
    parser.set_defaults(seeds=5, num_heads=4, arms=None)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS)[:4])
    parser.add_argument("--shift", default="", help="MBPP as JSON lines, for the text `shift`")
    parser.add_argument("--noise-frac", type=float, default=0.3)
    parser.add_argument("--ref-steps", type=int, default=1500, help="updates of rho1's reference")
    parser.add_argument("--value-steps", type=int, default=400, help="updates of the critic's V")
    args = parser.parse_args()
    if "shift" in args.texts and not Path(args.shift).is_file():
        parser.error(f"--shift {args.shift or '(empty)'}: no such file; the text `shift` needs it")
    free = ("jobs", "seeds", "steps", "texts", "arms", "shift")
    out, settings = tools.prepare_proof(args, free, num_layers=5)
    source = (tools.ROOT / "baseline_mtp.py").read_text()
    changed, count = re.subn(r"\n +weight_BT = .*\n", lambda _: ORACLE, source)
    assert count == 1, f"baseline_mtp.py: {count} lines that set weight_BT, 1 expected"
    (out / "oracle.py").write_text(changed)
    if "bugs" in args.texts:
        write_bugs(out)
    if "shift" in args.texts:
        write_shift(args)
    tasks = tasks_of(args)
    helpers = [(seed, helper_of(text, arm)) for _, seed, _, text, arm in tasks]
    helpers = [(seed if name == "value" else 0, name) for seed, name in helpers if name]
    helpers = [(args, *helper) for helper in dict.fromkeys(helpers)]
    helpers = tools.run_jobs(train_helper, helpers, args.jobs)
    results = tools.run_jobs(one_run, tasks, args.jobs, lambda args, seed, steps, *_: steps)
    rows = summary(results)
    record = dict(command=tools.command(), **tools.machine(args.device), settings=settings)
    record["seconds_of_runs"] = sum(result["seconds"] for result in helpers + results)
    record["commands"] = [run["command"] for run in helpers + results if run["seed"] == 0]
    record["values"] = [run["value"] for run in helpers if run["value"]]
    tools.write_json(out / "compare.json", {**record, "rows": rows})
    show(rows)
    plot(rows, out / "compare.png")
    print(f"{out}/compare.json, compare.png")


if __name__ == "__main__":
    main()
