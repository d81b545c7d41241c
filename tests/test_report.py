"""Charts hold the figures they were given, HTML the same, and differences of runs have the intervals they should."""

import html.parser
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

import compare
import report
from common import UsageError

HISTORY = Path(__file__).parent.parent / "benchmarks" / "default_run.jsonl"
CLASSES = ("keyword", "name", "white_space")


def history():
    return [json.loads(line) for line in HISTORY.read_text().splitlines()]


def some_results(heads=3, seed=0):
    """Every kind of key, with figures that differ from one another."""
    draw = np.random.default_rng(seed).random
    out = dict(run="a <run>", command="python evaluate.py --n 2", versions={"torch": "2.13.0"}, commit="abc", dirty=False, seed=0)
    out["suites"] = {"heldout": dict(command="x", settings={"batch_size": 16}, seconds=1.5)}
    for k in range(1, heads + 1):
        out |= {f"heldout/{name}_head_{k}": draw() for name in ("loss", "acc", "perplexity", "top5", "calibration_error")}
        out |= {f"heldout/acc_head_{k}/seen_{a}_to_{b}": draw() for a, b in ((1, 16), (17, 32), (33, 50))}
        for number, name in enumerate(CLASSES):
            out |= {f"heldout/acc_head_{k}/class_{name}": draw(), f"heldout/targets_head_{k}/class_{name}": 1000 * number + k}
        for size in (1, 4):
            out[f"speed/tokens_per_s_heads_{k}_batch_{size}"] = 1000 * draw()
            if k > 1:
                out[f"speed/speedup_heads_{k}_batch_{size}"] = 1 + draw()
                out[f"speed/tokens_per_forward_heads_{k}_batch_{size}"] = 1 + draw()
                out |= {f"speed/accepted_heads_{k}_batch_{size}/draft_{j}": draw() for j in range(1, k)}
    return out | {"heldout/bits_per_byte": 2.5, "speed/identical": True, "speed/prompts": 4, "humaneval/pass@1": draw(),
                  "humaneval/n": 20, "humaneval/temperature": 0.8}  # fmt: skip


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


class Page(html.parser.HTMLParser):
    """Collects attributes of tags, `{title of a cell: (value of its <data>, its text)}`, and the text of <pre>."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.cells, self.tags, self.pre, self.spans, self.title = [], {}, [], "", [], None
        self.value, self.inside = None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        self.tags.append(tag)
        found = dict(attributes)
        if tag == "td":
            self.title, self.value = found.get("title"), None
        if tag == "data":
            self.value = found["value"]
        if tag == "pre":
            self.inside = True
        if tag == "span" and self.inside:
            self.spans.append(found)

    def handle_endtag(self, tag):
        if tag == "td":
            self.title = None
        if tag == "pre":
            self.inside = False

    def handle_data(self, data):
        if self.title:
            self.cells[self.title] = (self.value, data)
        if self.inside:
            self.pre += data


# ------------------------------------------------------------------------------------------------------------------- charts
def test_training_curves_are_the_runs_own_figures():
    lines = history()
    figure = report.draw_training({}, lines)
    losses, objective, rate = (lines_of(axes) for axes in figure.axes)
    for k in range(1, 5):
        points = [(line["step"], line[f"train/loss_head_{k}"]) for line in lines if f"train/loss_head_{k}" in line]
        window = int(re.search(r"last (\d+) updates", figure.axes[0].get_title())[1])
        assert window > 1
        slow = [
            (points[i][0], math.fsum(v for _, v in points[i - window + 1 : i + 1]) / window)
            for i in range(window - 1, len(points))
        ]
        np.testing.assert_allclose(losses[f"head {k}"], slow, rtol=1e-12)
    dots = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "o"]
    last = lines[-1]
    assert dots == [[[last["step"], last[f"eval/loss_head_{k}"]]] for k in range(1, 5)]
    for axes, key in ((objective, "train/loss"), (rate, "train/lr")):
        (drawn,) = axes.values()
        assert drawn.tolist() == [[line["step"], line[key]] for line in lines if key in line]
    short = lines[:40]  # too few for means: every update
    drawn = lines_of(report.draw_training({}, short).axes[0])["head 1"]
    assert drawn.tolist() == [[line["step"], line["train/loss_head_1"]] for line in short]


def test_weights_are_drawn_only_where_they_were_weights():
    lines = history()
    assert report.draw_weights({}, lines) is None  # a baseline
    for i, line in enumerate(lines):
        if "weights/max" in line:
            line |= {"weights/max": 1 + i % 7, "weights/ess_frac": 1 / (1 + i % 3)}
    figure = report.draw_weights({}, lines)
    for axes, key in zip(figure.axes, ("weights/ess_frac", "weights/max")):
        points = [[line["step"], line[key]] for line in lines if key in line]
        assert axes.lines[0].get_xydata().tolist() == points
        window = int(re.search(r"last (\d+) updates", figure.axes[0].get_title())[1])
        assert axes.lines[1].get_xydata()[-1].tolist() == pytest.approx(
            [points[-1][0], math.fsum(v for _, v in points[-window:]) / window], rel=1e-12
        )


def test_charts_hold_the_results():
    results = some_results()
    heads = report.draw_heads(results, [])
    for axes, name in zip(heads.axes, ("loss", "acc")):
        assert [bar.get_height() for bar in axes.patches] == [results[f"heldout/{name}_head_{k}"] for k in (1, 2, 3)]
        assert [text.get_text() for text in axes.texts] == [f"{results[f'heldout/{name}_head_{k}']:.3f}" for k in (1, 2, 3)]
    (axes,) = report.draw_positions(results, []).axes
    buckets = ["1–16", "17–32", "33–50"]
    assert [label.get_text() for label in axes.get_xticklabels()] == buckets
    for k in (1, 2, 3):
        values = [results[f"heldout/acc_head_{k}/seen_{b.replace('–', '_to_')}"] for b in buckets]
        assert lines_of(axes)[f"head {k}"].tolist() == [[i, v] for i, v in enumerate(values)]
    (axes,) = report.draw_classes(results, []).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["keyword  (1)", "name  (1,001)", "white space  (2,001)"]  # most targets on top
    for k in (1, 2, 3):
        drawn = sorted(lines_of(axes)[f"head {k}"].tolist(), key=lambda point: point[1])
        assert [x for x, _ in drawn] == [results[f"heldout/acc_head_{k}/class_{name}"] for name in CLASSES]
        assert [round(y) for _, y in drawn] == [0, 1, 2]


def test_speed_charts_hold_the_results():
    results = some_results()
    figure = report.draw_acceptance(results, [])
    assert [axes.get_title()[-7:] for axes in figure.axes] == ["batch 1", "batch 4"]
    for axes, size in zip(figure.axes, (1, 4)):
        for k in (2, 3):
            values = [[j, results[f"speed/accepted_heads_{k}_batch_{size}/draft_{j}"]] for j in range(1, k)]
            assert lines_of(axes)[f"{k} heads"].tolist() == values
    for key in [key for key in results if "accepted" in key and "_batch_1/" in key]:
        results[key.replace("_batch_1/", "_batch_4/")] = results[key]
    (axes,) = report.draw_acceptance(results, []).axes  # the same shares once
    assert axes.get_title().endswith("batch 1 and 4")
    (axes,) = report.draw_speed(results, []).axes
    for size in (1, 4):
        values = [[results[f"speed/{n}_heads_{k}_batch_{size}"] for n in ("tokens_per_forward", "speedup")] for k in (2, 3)]
        assert lines_of(axes)[f"batch {size}"].tolist() == values
    assert "DIFFER" not in axes.get_title()
    (axes,) = report.draw_speed(results | {"speed/identical": False}, []).axes
    assert "DIFFER" in axes.get_title()


def test_only_what_was_measured_is_drawn(tmp_path):
    assert report.draw(tmp_path, {"seed": 0}, []) == [] and not list(tmp_path.iterdir())
    assert [f.name for _, f in report.draw(tmp_path, {}, history())] == ["training.png"]
    results = some_results()
    drawn = report.draw(tmp_path, results, history())
    names = {"training.png", "heads.png", "positions.png", "classes.png", "acceptance.png", "speed.png"}
    assert {f.name for _, f in drawn} == names == {f.name for f in tmp_path.iterdir()}
    for _, file in drawn:
        data = file.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20]) == 900  # width in its header
    left = {k: v for k, v in results.items() if not k.startswith("speed/")}  # evaluated again without speed: no old picture
    assert not {"acceptance.png", "speed.png"} & {f.name for _, f in report.draw(tmp_path, left, history())}
    assert {f.name for f in tmp_path.iterdir()} == names - {"acceptance.png", "speed.png"}
    assert [f.name for _, f in report.draw(tmp_path, some_results(heads=1), [])] == ["heads.png", "positions.png", "classes.png"]


# ------------------------------------------------------------------------------------------------------------ text and HTML
def test_html_holds_all_figures_and_asks_the_network_for_nothing(tmp_path):
    results = some_results() | {"heldout/acc_ratio_head_2": math.nan, "mbpp/n": None}
    charts = report.draw(tmp_path, results, history())
    file = report.write_html(tmp_path, results, charts, [])
    text = file.read_text()
    page = Page(text)
    metrics = {k: v for k, v in results.items() if "/" in k}
    assert set(page.cells) == set(metrics)
    for key, value in metrics.items():
        exact, seen = page.cells[key]
        if isinstance(value, bool) or value is None or value != value:
            assert seen == ("yes" if value is True else "-")
        else:
            assert json.loads(exact) == value
            assert math.isclose(float(seen.replace(",", "")), value, abs_tol=0.0500001 if value >= 100 else 0.0000500001)
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert len(links) == len(charts) == 6 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "script" not in page.tags and "link" not in page.tags and "url(" not in text and "@import" not in text
    assert "a &lt;run&gt;" in text and "coloured by weight" not in text and "torch 2.13.0" in text and "batch_size 16" in text
    bare = report.write_html(tmp_path, {"run": "r"}, [], []).read_text()
    assert "<h2>Charts" not in bare and "<h2>Metrics" not in bare and "<img" not in bare


def test_text_coloured_by_weight(tmp_path):
    tokens = ["<script>", "if", "\t", " ", "\n", '"&', "\udcc3", "\x00", "é"]
    weight = [None, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 0.25, 2.5]
    loss = [[None, *np.arange(1.0, 9.0)], [None, None, *np.arange(11.0, 18.0)]]
    text = report.write_html(tmp_path, {"run": "r"}, [], [dict(tokens=tokens, weight=weight, loss=loss)]).read_text()
    assert "<script" not in text and text.isascii()
    page = Page(text)
    assert page.pre == '<script>if\t \n"&\\xc3\\x00é'  # layout kept, bytes that are no text shown
    assert page.spans[0]["title"].splitlines() == ["weight -", "head 1: - nats", "head 2: - nats"]
    assert page.spans[1]["title"].splitlines() == ["weight 0.0000", "head 1: 1.0000 nats", "head 2: - nats"]
    assert page.spans[8]["title"].splitlines() == ["weight 2.5000", "head 1: 8.0000 nats", "head 2: 17.0000 nats"]
    assert "style" not in page.spans[0] and page.spans[0]["class"] == "none" and page.spans[4]["class"] == "end"
    colours = [span["style"].removeprefix("background:") for span in page.spans[1:]]
    assert colours == [report.weight_colour(w, 3.0) for w in weight[1:]]
    with pytest.raises(ValueError):
        report.coloured_text([dict(tokens=tokens, weight=weight[:-1], loss=loss)])
    report.coloured_text([dict(tokens=["a"], weight=[None], loss=[[None]])])  # a text without a target


def luminance(colour):
    """Relative luminance of sRGB, as WCAG 2 defines it for contrast."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(c * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4) for c, p in zip((0.2126, 0.7152, 0.0722), parts))


def test_a_heavier_token_is_darker_and_black_text_stays_readable():
    lights = [luminance(report.weight_colour(w, 3.0)) for w in np.linspace(0, 3, 40)]
    assert lights[0] == pytest.approx(1) and all(a > b for a, b in zip(lights, lights[1:]))
    assert (lights[-1] + 0.05) / 0.05 > 4.5  # WCAG 2, level AA
    assert report.weight_colour(7.0, 3.0) == report.weight_colour(3.0, 3.0) and report.weight_colour(0, 0) == "#ffffff"


def test_terminal_table_holds_the_figures():
    results = some_results()
    lines = report.table(results).splitlines()
    split = [re.split(r" {2,}", line.strip()) for line in lines]
    row = {name: values for name, *values in split}
    assert row["loss (nats)"] == [f"{results[f'heldout/loss_head_{k}']:.4f}" for k in (1, 2, 3)]
    assert row["speed-up, batch 4"] == [f"{results[f'speed/speedup_heads_{k}_batch_4']:.4f}" for k in (2, 3)]
    assert row["pass@1"] == [f"{results['humaneval/pass@1']:.4f}"] and row["n"] == ["20"]
    assert row["all texts equal plain greedy"] == ["yes"] and row["bits per byte"] == ["2.5000"]
    name = next(line for line in lines if "class name" in line)
    assert "(1,001 targets)" in name and name.endswith(f"{results['heldout/acc_head_3/class_name']:.4f}")
    header = next(line for line in lines if line.startswith("heldout"))
    end = header.index("head 2") + 6  # columns are aligned
    assert next(line for line in lines if line.startswith("  loss (nats)"))[:end].endswith(row["loss (nats)"][1])
    assert report.table({"seed": 0}) == ""


# ------------------------------------------------------------------------------------------------------- runs side by side
def test_bootstrap_equals_a_slow_loop_over_resampled_documents():
    rng = np.random.default_rng(1)
    count = rng.integers(50, 400, 12)
    level = rng.normal(2, 0.5, 12)  # documents differ much more than the runs do
    first = np.stack([level * count, count])
    other = np.stack([(level + rng.normal(0.1, 0.05, 12)) * count, count])
    difference, low, high = compare.bootstrap(first[None], other[None])[0]
    draw, drawn, unpaired = random.Random(5), [], []
    for _ in range(10_000):
        ones = [draw.randrange(12) for _ in range(12)]
        twos = [draw.randrange(12) for _ in range(12)]
        a = sum(first[0][d] for d in ones) / sum(first[1][d] for d in ones)
        drawn.append(sum(other[0][d] for d in ones) / sum(other[1][d] for d in ones) - a)
        unpaired.append(sum(other[0][d] for d in twos) / sum(other[1][d] for d in twos) - a)
    drawn, unpaired = sorted(drawn), sorted(unpaired)
    assert difference == pytest.approx(other[0].sum() / count.sum() - first[0].sum() / count.sum(), rel=1e-12)
    slack = 0.05 * (drawn[9750] - drawn[250])  # two streams of 10,000 draws
    assert abs(low - drawn[250]) < slack and abs(high - drawn[9750]) < slack
    assert unpaired[9750] - unpaired[250] > 4 * (high - low)
    both = compare.bootstrap(np.stack([first, first[::-1]]), np.stack([other, other[::-1]]))
    assert both[0].tolist() == pytest.approx([difference, low, high], rel=1e-12)  # the same documents, whatever else is asked


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, hits, size = np.random.default_rng(2), 0, 40
    for number in range(200):
        level, ones = rng.normal(3, 1, size), np.ones(size)
        first, other = np.stack([level, ones]), np.stack([level + rng.normal(0.2, 0.3, size), ones])
        _, low, high = compare.bootstrap(first[None], other[None], resamples=1000, seed=number)[0]
        hits += low <= 0.2 <= high
    assert 0.90 <= hits / 200 <= 0.99


def a_run(name, seed=0, documents=6, heads=2, programs=None, **more):
    """A run whose results are those of its documents and programs."""
    rng = np.random.default_rng(seed)
    arrays, results = {"document": np.arange(documents) * 3}, {"heldout_fingerprint": "f00"}
    for k in range(1, heads + 1):
        count = 50 + 10 * np.arange(documents)
        arrays |= {f"loss_head_{k}": rng.random(documents) * count, f"acc_head_{k}": rng.integers(0, 50, documents)}
        arrays[f"count_head_{k}"] = count
        results |= {f"heldout/{n}_head_{k}": arrays[f"{n}_head_{k}"].sum() / count.sum() for n in ("loss", "acc")}
    results["heldout/bits_per_byte"] = results["heldout/loss_head_1"] / math.log(2) * 1.5
    return compare.Run(name, Path(name), results | more, history()[:50], arrays, programs or {})


def of_json(folder):
    return json.loads((folder / "compare.json").read_text())


def test_identical_runs_differ_by_nothing(tmp_path):
    printed = compare.compare_runs(tmp_path, [a_run("one"), a_run("two")])
    found = of_json(tmp_path)
    assert len(found["differences"]["B"]) == 5 and all(row == [0, 0, 0] for row in found["differences"]["B"].values())
    assert printed.count("+0.0000  [+0.0000, +0.0000]") == 5 and found["notes"] == []
    assert {f.name for f in tmp_path.iterdir()} == {"compare.json", "compare.html", "compare_training.png", "compare_heads.png"}


def test_differences_are_those_of_the_results(tmp_path):
    first, other, third = a_run("one <1>", seed=1), a_run("two", seed=2, heads=3), a_run("three", seed=3, heads=1)
    third.documents = {k: v[::-1] for k, v in third.documents.items()}  # in another order
    printed = compare.compare_runs(tmp_path, [first, other, third])
    found, page = of_json(tmp_path), Page((tmp_path / "compare.html").read_text())
    for letter, run in (("B", other), ("C", third)):
        for key in {k for k in run.results if "/" in k} & set(first.results):
            difference, low, high = found["differences"][letter][key]
            assert difference == pytest.approx(run.results[key] - first.results[key], rel=1e-9) and low < difference < high
    loss, bits = (np.array(found["differences"]["B"][f"heldout/{n}"]) for n in ("loss_head_1", "bits_per_byte"))
    np.testing.assert_allclose(bits, loss / math.log(2) * 1.5, rtol=1e-9)
    assert set(found["differences"]["C"]) == {"heldout/loss_head_1", "heldout/acc_head_1", "heldout/bits_per_byte"}
    line = next(line for line in printed.splitlines() if line.startswith("heldout loss (nats), head 3"))
    assert line.split()[-5:] == ["-", f"{other.results['heldout/loss_head_3']:.4f}", "-", "-", "-"]  # on one run alone
    assert found["metrics"]["heldout/loss_head_2"]["C"] is None
    assert page.cells["heldout/loss_head_1"][0] == json.dumps(third.results["heldout/loss_head_1"])
    assert "one &lt;1&gt;" in (tmp_path / "compare.html").read_text()
    for name, value in page.attributes:
        assert name not in ("src", "href") or value.startswith("data:")


def test_what_does_not_compare_gets_no_difference_but_a_line(tmp_path):
    first = a_run("one")
    for other, why in (
        (a_run("two", heldout_fingerprint="0ther"), "texts are not the same"),
        (a_run("two", heldout_fingerprint=None), "texts are not the same"),
        (a_run("two", documents=5), "documents are not the same"),
    ):
        printed = compare.compare_runs(tmp_path, [first, other])
        assert of_json(tmp_path)["differences"] == {"B": {}} and why in printed
    other = a_run("two", seed=1)
    other.documents["loss_head_1"] = other.documents["loss_head_1"] * 1.01  # of another evaluation
    printed = compare.compare_runs(tmp_path, [first, other])
    assert "heldout/loss_head_1" not in of_json(tmp_path)["differences"]["B"] and "than results.json" in printed
    assert "heldout/loss_head_2" in of_json(tmp_path)["differences"]["B"]
    other.documents = {}
    assert "by document are not there" in compare.compare_runs(tmp_path, [first, other])
    printed = compare.compare_runs(tmp_path, [a_run("one", documents=1), a_run("two", seed=1, documents=1)])
    assert "fewer than 2 documents" in printed and of_json(tmp_path)["differences"]["B"]["heldout/loss_head_1"][1:] == [
        None,
        None,
    ]
    broken = a_run("two", seed=1, **{"heldout/loss_head_1": math.nan})
    assert re.search(r"loss \(nats\), head 1 +[\d.]+ +- +-", compare.compare_runs(tmp_path, [first, broken]))
    assert "NaN" not in (tmp_path / "compare.json").read_text()
    speed = {"speed/speedup_heads_2_batch_1": 1.25}
    printed = compare.compare_runs(tmp_path, [a_run("one", **speed), a_run("two", **{"speed/speedup_heads_2_batch_1": 1.5})])
    assert of_json(tmp_path)["differences"]["B"]["speed/speedup_heads_2_batch_1"] == [0.25, None, None]
    assert "speed: no intervals" in printed
    for more in ({"suites": {"speed": {"data": "mbpp"}}}, {"speed/new_tokens": 16}):
        printed = compare.compare_runs(tmp_path, [a_run("one", **speed), a_run("two", **speed, **more)])
        assert "not timed alike" in printed and "speed/speedup_heads_2_batch_1" not in of_json(tmp_path)["differences"]["B"]
    for runs in ([first], [first] * 27):
        with pytest.raises(UsageError, match="--compare"):
            compare.compare_runs(tmp_path, runs)


def test_pass_at_k_is_compared_problem_by_problem(tmp_path):
    def run(name, right, n=4, **more):
        programs = {"humaneval": {f"t{i}": [j < c for j in range(n)] for i, c in enumerate(right)}}
        pass_1 = sum(right) / n / len(right)
        pass_2 = sum(1 - math.comb(n - c, 2) / math.comb(n, 2) for c in right) / len(right)  # Chen et al. 2021, eq. 1
        return a_run(name, programs=programs, **({"humaneval/pass@1": pass_1, "humaneval/pass@2": pass_2} | more))

    first, other = run("one", [0, 1, 2, 4, 0]), run("two", [1, 1, 4, 3, 0])
    compare.compare_runs(tmp_path, [first, other])
    changes = of_json(tmp_path)["differences"]["B"]
    assert changes["humaneval/pass@1"][0] == pytest.approx(0.1)
    # Of 5 differences by problem (1/4, 0, 1/2, -1/4, 0), all 5^5 resamples
    every = np.array(np.meshgrid(*[[0.25, 0, 0.5, -0.25, 0]] * 5)).reshape(5, -1).mean(0)
    np.testing.assert_allclose(changes["humaneval/pass@1"][1:], np.percentile(every, [2.5, 97.5]), atol=0.0501)
    assert changes["humaneval/pass@2"][0] == pytest.approx((1 / 2 + 0 + 1 / 6 + 0 + 0) / 5)
    printed = compare.compare_runs(tmp_path, [first, run("two", [1, 1, 4, 3])])
    assert "humaneval: no differences, since the problems are not the same" in printed
    scored = ({"suites": {"humaneval": {"problems": digest}}} for digest in "ab")  # other tests under the same names
    printed = compare.compare_runs(tmp_path, [run("one", [1, 0], **next(scored)), run("two", [1, 1], **next(scored))])
    assert "humaneval: no differences, since the problems are not the same" in printed
    printed = compare.compare_runs(
        tmp_path, [run("one", [1, 0], **{"humaneval/temperature": 0.2}), run("two", [1, 1], **{"humaneval/temperature": 0.8})]
    )
    assert "not sampled alike (temperature 0.2" in printed


def test_overlaid_curves_hold_every_runs_figures():
    lines = history()
    runs = [a_run("one", seed=1), a_run("two", seed=2, heads=3), a_run("three")]
    runs[1].history, runs[2].history = lines[40:90], []
    names = ["A  one", "B  two", "C  three"]
    (axes,) = compare.overlay_training(runs, names).axes
    drawn = lines_of(axes)
    for run, name in zip(runs[:2], names):
        assert drawn[name].tolist() == [[line["step"], line["train/loss_head_1"]] for line in run.history]
    assert "C  three" not in drawn
    (axes,) = compare.overlay_heads(runs, names).axes
    for run, name in zip(runs, names):
        values = [[k, run.results[f"heldout/loss_head_{k}"]] for k in range(1, 4) if f"heldout/loss_head_{k}" in run.results]
        assert lines_of(axes)[name].tolist() == values
    assert "not the same" not in axes.get_title()
    runs[1].results["heldout_fingerprint"] = "0ther"
    assert "not the same" in compare.overlay_heads(runs, names).axes[0].get_title()
    assert compare.overlay_training(runs[2:], names[2:]) is None
