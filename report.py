"""What `evaluate.py` shows of its figures: text for the terminal, charts and `report.html`.

Keys are those of `results.json`: `suite/metric`; what holds no slash is provenance. Nothing is drawn or listed that is not in
`results` or in the run's `metrics.jsonl`.
"""

import base64
import html
import json
import math
import re
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common import UsageError, first_line
from runs import write_whole

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008
LABELS = dict(loss="loss (nats)", acc="accuracy", top5="accuracy of the five most likely", confidence="mean confidence",
              calibration_error="calibration error", loss_ratio="loss over head 1", acc_ratio="accuracy over head 1",
              bits_per_byte="bits per byte", tokens_per_s="tokens per second", ms_per_forward="ms per forward",
              speedup="speed-up", tokens_per_forward="tokens per forward", accepted="share of passes that took",
              identical="all texts equal plain greedy")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ keys and text
def read_json(file, flag):
    """What a JSON file holds; UsageError that begins with `flag` if it cannot be read."""
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag}: {file} cannot be read ({first_line(error)}); remove or repair it") from None


def make_folder(out):
    """Make the folder of the results; UsageError if it cannot be."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from None


def read_history(run_dir):
    """The lines of a run's metrics.jsonl; none without a run."""
    file = Path(run_dir or "") / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if run_dir and file.exists() else []


def split_key(key):
    """Row and column of a metric's key: ("loss (nats)", 2) of `heldout/loss_head_2`; column None where there are no heads.

    `heldout/acc_head_2/class_name` is ("accuracy, class name", 2), `speed/accepted_heads_4_batch_8/draft_1`
    ("share of passes that took, batch 8, draft 1", 4).
    """
    name, column, rest = key.split("/", 1)[1], None, ""
    if found := re.fullmatch(r"(\w+?)_heads?_(\d+)(?:_(batch_\d+))?(?:/(\w+))?", name):
        name, column = found[1], int(found[2])
        rest = "".join(f", {part.replace('_', ' ')}" for part in found.groups()[2:] if part)
    return LABELS.get(name, name.replace("_", " ")) + rest, column


def grid(results, suite):
    """The suite's keys as a table: `{row: {column: key}}`, in the order of `results`; batch sizes stay together."""
    rows = {}
    for key in results:
        if key.startswith(suite + "/"):
            row, column = split_key(key)
            rows.setdefault(row, {})[column] = key
    return rows


def column_name(suite, number):
    """Decoding is done with so many heads, everything else is measured of one."""
    return f"head {number}" if suite != "speed" else f"{number} heads" if number > 1 else "1 head"


def suites_of(results):
    """Suites that were measured, in the order of `results`."""
    return list(dict.fromkeys(key.split("/")[0] for key in results if "/" in key))


def shown(value, sign=False):
    """A figure as text: four decimals, thousands apart; yes or no; a dash for what is missing or not finite."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:{'+' if sign else ''},}"
    if isinstance(value, (float, np.floating)):
        return f"{value:{'+' if sign else ''},.{4 if abs(value) < 100 else 1}f}"
    return str(value)


def aligned(rows):
    """Rows of strings as lines: first column to the left, the others to the right."""
    count = max(map(len, rows))
    rows = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def table(results):
    """The figures as aligned text: by head, by class of token, speed, pass@k. Position buckets are in the report alone."""
    parts = []
    for suite in suites_of(results):
        rows = grid(results, suite)
        columns = sorted({c for row in rows.values() for c in row if c is not None})
        lines = [[suite, *(column_name(suite, c) for c in columns)]]
        for row, keys in rows.items():
            if re.search(r", seen \d|^(loss|targets).*, class ", row):
                continue
            name = row
            if (kind := f"targets, {row.partition(', ')[2]}") in rows and ", class " in row:
                name += f" ({shown(results[next(iter(rows[kind].values()))])} targets)"
            values = [keys.get(c, keys.get(None) if c == columns[0] else None) for c in columns] or list(keys.values())
            lines.append(["  " + name, *("" if key is None else shown(results[key]) for key in values)])
        parts.append(aligned(lines))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------------------------- charts
def head_colours(number):
    """Of heads 1..H: dark to light, which stays ordered for the colour-blind and in print."""
    return [colormaps["viridis"](x) for x in np.linspace(0, 0.88, number)]


def running_mean(values, window):
    """Mean of the last `window` values at each place that has so many, `[len - window + 1]`."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


def mean_of(window):
    return f"mean of the last {window} updates" if window > 1 else "every update"


def series(history, key):
    """Updates and values of `key`, two arrays; None where no line of the history has it."""
    points = [(line["step"], line[key]) for line in history if line.get(key) is not None]
    return np.array(points, float).T if points else None


def by_column(results, pattern):
    """`{number: value}` of the keys that match; the pattern's one group is the number."""
    found = {int(m[1]): value for key, value in results.items() if (m := re.fullmatch(pattern, key))}
    return dict(sorted(found.items()))


def by_head(results, pattern):
    """`{number: {what: value}}` of the keys that match; the pattern's groups are the number of a head or of heads, and what."""
    found = {}
    for key, value in results.items():
        if m := re.fullmatch(pattern, key):
            found.setdefault(int(m[1]), {})[int(m[2]) if m[2].isdigit() else m[2]] = value
    return dict(sorted(found.items()))


def new_figure(height, rows=1, columns=1, **options):
    """A figure 900 pixels wide and its axes `[rows, columns]`."""
    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def draw_training(results, history):
    if not (number := len({key for line in history for key in line if key.startswith("train/loss_head_")})):
        return None
    window = max(1, len(series(history, "train/loss_head_1")[0]) // 75)
    figure, axes = new_figure(6.6, 3, sharex=True, height_ratios=[3.4, 1.2, 1])
    for k, colour in enumerate(head_colours(number), 1):
        if (points := series(history, f"train/loss_head_{k}")) is not None and len(points[0]) >= window:
            axes[0, 0].plot(points[0][window - 1 :], running_mean(points[1], window), color=colour, lw=1.3, label=f"head {k}")
        if (points := series(history, f"eval/loss_head_{k}")) is not None:
            axes[0, 0].plot(*points, "o", color=colour, markeredgecolor="white")
    for row, key in ((1, "train/loss"), (2, "train/lr")):  # no means here: the objective jumps where a head joins
        if (points := series(history, key)) is not None:
            axes[row, 0].plot(*points, color="#444444", lw=0.7 if row == 1 else 1.3)
    axes[0, 0].set_title(f"Unweighted loss of each head in training ({mean_of(window)}); dots: held-out text")
    axes[0, 0].set(ylabel="loss (nats)")
    axes[0, 0].legend(ncols=2, frameon=False)
    axes[1, 0].set(ylabel="objective (nats)")
    axes[2, 0].set(ylabel="learning rate", xlabel="update", ylim=(0, None))
    figure.align_ylabels()
    return figure


def draw_weights(results, history):
    found = {key: points for key in ("weights/ess_frac", "weights/max") if (points := series(history, key)) is not None}
    if all(np.all(points[1] == 1) for points in found.values()):
        return None  # the weights of a baseline: nothing to see
    figure, axes = new_figure(4.6, len(found), sharex=True)
    names = {"weights/ess_frac": "effective share\nof tokens", "weights/max": "largest weight\n(the mean is 1)"}
    for one, (key, points) in zip(axes[:, 0], found.items()):
        window = max(1, len(points[0]) // 75)
        one.plot(*points, color=RUN_COLOURS[5], lw=0.5)
        one.plot(points[0][window - 1 :], running_mean(points[1], window), color=RUN_COLOURS[0], lw=1.5)
        one.set(ylabel=names[key])
    axes[0, 0].set_title(f"Token weights of the targets of head 1; dark: {mean_of(window)}")
    axes[-1, 0].set(xlabel="update")
    return figure


def draw_heads(results, history):
    panels = [(f"heldout/{name}", name) for name in ("loss", "acc") if by_column(results, rf"heldout/{name}_head_(\d+)")]
    if not panels:
        return None
    figure, axes = new_figure(3.4, 1, len(panels))
    for one, (key, name) in zip(axes[0], panels):
        values = by_column(results, rf"{key}_head_(\d+)")
        bars = one.bar(list(values), list(values.values()), color=head_colours(len(values)), width=0.7)
        one.bar_label(bars, [f"{value:.3f}" for value in values.values()], padding=2)
        one.set(xlabel="head", ylabel=LABELS[name], title=f"Held-out {LABELS[name].split(' ')[0]} by head", xticks=list(values))
        one.margins(y=0.12)
        one.grid(False, axis="x")
    return figure


def draw_positions(results, history):
    found = by_head(results, r"heldout/acc_head_(\d+)/seen_(\d+_to_\d+)")
    if not found:
        return None
    buckets = sorted({b for values in found.values() for b in values}, key=lambda bucket: int(bucket.split("_")[0]))
    figure, axes = new_figure(3.8)
    for (k, values), colour in zip(found.items(), head_colours(len(found))):
        axes[0, 0].plot([buckets.index(b) for b in values], list(values.values()), "o-", color=colour, label=f"head {k}")
    axes[0, 0].set_xticks(range(len(buckets)), [bucket.replace("_to_", "–") for bucket in buckets])
    axes[0, 0].set(xlabel="tokens of the row seen before the prediction", ylabel="accuracy", ylim=(0, None))
    axes[0, 0].set_title("Held-out accuracy by position")
    axes[0, 0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_classes(results, history):
    found = by_head(results, r"heldout/acc_head_(\d+)/class_(\w+)")
    if not found:
        return None
    count = {name: results.get(f"heldout/targets_head_{min(found)}/class_{name}", 0) for name in found[min(found)]}
    names = sorted(count, key=count.get)
    figure, axes = new_figure(1.3 + 0.42 * len(names))
    for i, ((k, values), colour) in enumerate(zip(found.items(), head_colours(len(found)))):
        lower = 0.06 * (i - (len(found) - 1) / 2)  # below one another, so that none hides another
        values = {names.index(name) - lower: value for name, value in values.items() if name in count}
        axes[0, 0].plot(list(values.values()), list(values), "o", ms=7, color=colour, label=f"head {k}")
    axes[0, 0].set_yticks(range(len(names)), [f"{name.replace('_', ' ')}  ({count[name]:,})" for name in names])
    axes[0, 0].set(xlabel="accuracy", xlim=(-0.02, 1.02))
    axes[0, 0].set_title(f"Held-out accuracy by class of the target token (number of targets of head {min(found)})")
    axes[0, 0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def batch_sizes(results, name):
    """Batch sizes at which `speed/<name>_heads_k_batch_B` was measured."""
    return sorted({int(m[1]) for key in results if (m := re.fullmatch(rf"speed/{name}_heads_\d+_batch_(\d+)(?:/.*)?", key))})


def draw_acceptance(results, history):
    panels = {}  # rows do not see each other: usually every batch size has the same shares
    for size in batch_sizes(results, "accepted"):
        shares = by_head(results, rf"speed/accepted_heads_(\d+)_batch_{size}/draft_(\d+)")
        same = next((other for other in panels if panels[other] == shares), None)
        panels[f"{same} and {size}" if same else str(size)] = panels.pop(same) if same else shares
    if not panels:
        return None
    figure, axes = new_figure(3.6, 1, len(panels), sharey=True)
    for one, (name, shares) in zip(axes[0], panels.items()):
        for k, values in shares.items():
            colour = head_colours(max(shares))[k - 1]
            one.plot(list(values), list(values.values()), "o-", color=colour, label=f"{k} heads")
        one.set(xlabel="draft position", title=f"Greedy drafts taken at batch {name}", ylim=(0, None))
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylabel("share of passes")
    axes[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_speed(results, history):
    sizes = [size for size in batch_sizes(results, "speedup") if size in batch_sizes(results, "tokens_per_forward")]
    if not sizes:
        return None
    figure, axes = new_figure(4.6)
    one, ends = axes[0, 0], [1.0]
    for size, colour, marker in zip(sizes, RUN_COLOURS, "os^Dv<>"):
        up = by_column(results, rf"speed/speedup_heads_(\d+)_batch_{size}")
        across = by_column(results, rf"speed/tokens_per_forward_heads_(\d+)_batch_{size}")
        points = {k: (across[k], up[k]) for k in up if k in across}
        one.plot(*zip(*points.values()), marker + "-", color=colour, lw=0.6, label=f"batch {size}")
        for k, point in points.items():
            away = (0, 7 if size == sizes[0] else -15)
            one.annotate(str(k), point, away, textcoords="offset points", ha="center", fontsize=9, color=colour)
            ends += point
    one.axline((1, 1), slope=1, color="#777777", lw=1, ls="--", label="a pass at the cost of a plain one")
    one.axhline(1, color="#777777", lw=1, ls=":", label="plain greedy decoding")
    high = 1 + 1.12 * max(0.1, max(ends) - 1)
    warning = "" if results.get("speed/identical", True) else "; TEXTS DIFFER FROM PLAIN GREEDY"
    one.set(xlabel="tokens per forward", ylabel="speed-up by the clock", xlim=(0.98, high))
    one.set(ylim=(min(ends) - 0.1 * high, high), title="Self-speculative greedy decoding; numbers: heads" + warning)
    one.legend(frameon=False, loc="best")
    return figure


CHARTS = dict(
    training=("Training", draw_training), weights=("Token weights", draw_weights), heads=("Held-out text by head", draw_heads),
    positions=("Accuracy by position", draw_positions), classes=("Accuracy by class of token", draw_classes),
    acceptance=("Drafts taken", draw_acceptance), speed=("Decoding speed", draw_speed),
)  # fmt: skip


def draw(out, results, history):
    """Draw the charts whose figures are there into folder `out`, remove the others; returns `[(title, path), ...]`."""
    drawn = []
    for name, (title, make) in CHARTS.items():
        file = Path(out) / f"{name}.png"
        if (figure := make(results, history)) is not None:
            figure.savefig(file)
            drawn.append((title, file))
        else:
            file.unlink(missing_ok=True)
    return drawn


# --------------------------------------------------------------------------------------------------------------------- HTML
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #111; background: #fff }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; font-size: 14px; display: block; overflow-x: auto }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
td:first-child, th:first-child { text-align: left }
.words td { text-align: left; overflow-wrap: anywhere }
.words td:first-child { white-space: nowrap }
img { max-width: 100% }
pre { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; font: 14px/1.5 ui-monospace, monospace; border: 1px solid #ddd; padding: 8px }
pre span:hover { outline: 1px solid #000 }
.end::before { content: "\\21B5"; color: #777 }
.none { color: #777 }
.scale span { display: inline-block; padding: 1px 10px }
"""  # noqa: E501
HEAVIEST = (217, 95, 2)  # red, green and blue of the largest weight; black text on it keeps a contrast of 6 to 1


def weight_colour(weight, largest):
    """`#rrggbb` of a weight: white at 0, `HEAVIEST` at `largest` and above, linear in between (darker is heavier)."""
    share = min(1.0, max(0.0, weight / largest)) if largest > 0 else 0.0
    return "#" + "".join(f"{round(255 + share * (end - 255)):02x}" for end in HEAVIEST)


def visible(token):
    """A token's text for HTML: escaped, layout kept; bytes that are no character and control characters as \\x.."""
    out = []
    for c in token:
        if 0xDC80 <= ord(c) <= 0xDCFF:  # a byte that `surrogateescape` kept
            out.append(f"\\x{ord(c) - 0xDC00:02x}")
        elif c in "\t\n" or c.isprintable():
            out.append(c)
        else:
            out.append(c.encode("unicode_escape", "surrogatepass").decode())
    return html.escape("".join(out))


def coloured_text(samples):
    """Texts whose tokens are coloured by weight, with the scale; on hover the weight and each head's loss of the token."""
    largest = max((w for sample in samples for w in sample["weight"] if w is not None), default=0.0)
    scale = (f'<span style="background:{weight_colour(w, largest)}">{w:.2f}</span>' for w in np.linspace(0, largest, 7))
    out = [f'<p class="scale">weight of a token (the mean over a batch is 1): {"".join(scale)} '
           '<span class="none">grey: no target</span></p>']  # fmt: skip
    for sample in samples:
        spans = []
        for i, (token, weight) in enumerate(zip(sample["tokens"], sample["weight"], strict=True)):
            told = [f"weight {shown(weight)}"]
            told += [f"head {k}: {shown(losses[i])} nats" for k, losses in enumerate(sample["loss"], 1)]
            kind = " ".join(["none"] * (weight is None) + ["end"] * token.endswith("\n"))
            look = f'class="{kind}"' * bool(kind)
            if weight is not None:
                look += f' style="background:{weight_colour(weight, largest)}"'
            spans.append(f'<span title="{"&#10;".join(told)}" {look.strip()}>{visible(token)}</span>')
        out.append(f"<pre>{''.join(spans)}</pre>")
    return "\n".join(out)


def cell(key, value, sign=False):
    """A table cell; `<data>` holds the whole figure, the text its rounding, the tooltip its key."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return f'<td title="{html.escape(key)}"><data value="{html.escape(json.dumps(value))}">{shown(value, sign)}</data></td>'
    return f'<td title="{html.escape(key)}">{html.escape(shown(value))}</td>'


def metric_tables(results):
    """All metrics, a table a suite: heads in columns where there are heads."""
    out = []
    for suite in suites_of(results):
        rows = grid(results, suite)
        columns = sorted({c for row in rows.values() for c in row if c is not None})
        plain = {row: keys for row, keys in rows.items() if None in keys}
        out.append(f"<h3>{html.escape(suite)}</h3>")
        if columns:
            out.append("<table><tr><th></th>" + "".join(f"<th>{column_name(suite, c)}</th>" for c in columns) + "</tr>")
            for row, keys in rows.items():
                if row not in plain:
                    cells = (cell(keys[c], results[keys[c]]) if c in keys else "<td></td>" for c in columns)
                    out.append(f"<tr><td>{html.escape(row)}</td>{''.join(cells)}</tr>")
            out.append("</table>")
        if plain:
            cells = (
                f"<tr><td>{html.escape(row)}</td>{cell(keys[None], results[keys[None]])}</tr>" for row, keys in plain.items()
            )
            out.append(f"<table>{''.join(cells)}</table>")
    return "\n".join(out)


def words(value):
    """Provenance as text: `name value, name value` of a dict, floats in full, a dash for None."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {words(v)}" for k, v in value.items())
    return ", ".join(map(words, value)) if isinstance(value, list) else str(value) if isinstance(value, float) else shown(value)


def provenance_table(results):
    plain = {k: v for k, v in results.items() if "/" not in k and k != "suites"}
    rows = [f"<tr><td>{html.escape(k)}</td><td>{html.escape(words(v))}</td></tr>" for k, v in plain.items()]
    for suite, how in results.get("suites", {}).items():
        rows.append(f"<tr><td>suite {html.escape(suite)}</td><td>{html.escape(words(how))}</td></tr>")
    return f'<table class="words">{"".join(rows)}</table>'


def page(title, sections):
    """One HTML document that asks the network for nothing; its policy forbids it too. Sections: `[(heading, HTML), ...]`."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{policy}"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n'
            f"<body><h1>{html.escape(title)}</h1>\n{body}</body></html>\n"
        )
        .encode("ascii", "xmlcharrefreplace")
        .decode()
    )  # whatever the locale writes


def images(charts):
    """Charts as `<img>` that carry their PNG in themselves."""
    tag = '<p><img alt="{}" src="data:image/png;base64,{}"></p>'
    return "\n".join(tag.format(html.escape(title), base64.b64encode(Path(file).read_bytes()).decode()) for title, file in charts)


def write_html(out, results, charts, samples):
    """Write `report.html` into folder `out`: charts, weighted text, all metrics, provenance. Returns its path.

    charts: `[(title, PNG file), ...]` as from `draw`.
    samples: `[{"tokens": [str], "weight": [float or None], "loss": [[float or None] of head 1, ...]}]`, losses in nats, all
        as long as the tokens; token i's losses are those of predicting it.
    """
    sections = [("Charts", images(charts))] if charts else []
    sections += [("Held-out text, coloured by weight", coloured_text(samples))] if samples else []
    sections += [("Metrics", metric_tables(results))] if suites_of(results) else []
    sections.append(("Provenance", provenance_table(results)))
    file = Path(out) / "report.html"
    write_whole(file, page(str(results.get("subject", "evaluation")), sections))
    return file
