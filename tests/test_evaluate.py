"""Evaluation: every figure against something slower, what a kill leaves, what is refused."""

import html
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIG, data_args, refused, run_main, short_args, write_lines

import baseline_mtp
import common
import evaluate


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    """A run of 3 heads that has learned something."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(max_position_embeddings=512)))
    options = dict(model=folder / "config.json", seq_len=64, lr=1e-2, max_steps=40, num_heads=3)
    run_main(baseline_mtp, short_args(baseline_mtp, material, folder / "three", **options))
    return folder / "three"


def run(**values):
    """`evaluate.main` with these arguments in this process; paths as text."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    evaluate.main(evaluate.Args(**values))


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The default suites on the run, small."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    run(run_dir=trained, out=out, speed_prompts=3, speed_tokens=24, rounds=1)
    return out


@pytest.fixture(scope="module")
def loaded(trained, material):
    """Model, its plain twin, tokenizer and data, by the shortest way."""
    model = common.load_mtp(str(trained)).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(trained / "model").eval()
    tokenizer = common.load_tokenizer(trained / "model")
    name = str(material / "text.jsonl")
    data = common.load_data(data_args(name, seq_len=64), tokenizer, common.Ranks())
    return model, plain, tokenizer, data


# ----------------------------------------------------------------------- held-out text and speed
def test_heldout_figures_equal_a_slow_loop_over_the_plain_model(trained, loaded, evaluated):
    """Those of far heads are what training ended with."""
    _, plain, _, rows = loaded
    columns, results, seen = rows.heldout[:], results_of(evaluated), []
    with torch.no_grad():
        for ids, document in zip(columns["input_ids"], columns["document"]):
            logp_TV = plain(torch.tensor(ids)[None].long()).logits[0].double().log_softmax(-1)
            for t in range(len(ids) - 1):
                if document[t + 1] >= 0 and document[t] == document[t + 1]:
                    is_right = logp_TV[t].argmax().item() == ids[t + 1]
                    seen.append((document[t], -logp_TV[t, ids[t + 1]].item(), is_right))
    _, losses, rights = zip(*seen)
    assert results["heldout/loss_head_1"] == pytest.approx(np.mean(losses), abs=2e-6)
    assert results["heldout/acc_head_1"] == pytest.approx(np.mean(rights), abs=2e-6)
    bits = np.mean(losses) / math.log(2) * rows.heldout_tokens / rows.heldout_bytes
    assert results["heldout/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss_head_1", "loss_head_2", "acc_head_3", "bits_per_byte"):
        assert results[f"heldout/{name}"] == pytest.approx(last[f"eval/{name}"], abs=1e-6)
    documents = json.loads((evaluated / "items.json").read_text())["heldout"]
    own = [[loss for d, loss, _ in seen if d == number] for number in sorted({s[0] for s in seen})]
    assert documents["loss_head_1"] == pytest.approx([sum(loss) for loss in own], rel=1e-5)
    assert documents["count_head_1"] == [len(loss) for loss in own]
    assert sum(documents["bytes"]) == rows.heldout_bytes
    assert sum(documents["bits"]) / sum(documents["bytes"]) == pytest.approx(bits, rel=1e-5)


# -------------------------------------------------------------------------------------- problems
def mbpp_task(number):
    tests = [f"assert add(1) == {1 + number}", f"assert add(-5) == {number - 5}"]
    code = f"def add(x):\n    return x + {number}"
    text = f"Add {number}."
    return dict(task_id=number, text=text, code=code, test_setup_code="", test_list=tests)


TASKS = [mbpp_task(n) for n in (2, 3, 4, 5)]
WRONG = "def add(x):\n    return 0"


@pytest.fixture
def problems(material, tmp_path):
    return write_lines(tmp_path / "problems.jsonl", TASKS)


def load_problems(suite, file, **options):
    args = evaluate.Args(suites=[suite], problems=str(file), **options)
    return evaluate.load_problems(suite, args)


def test_mbpp_asks_its_test_tasks(problems, tmp_path):
    """Not those that --data mbpp trains on, holds out, or shows in prompts."""
    records = [json.loads(line) for line in problems.read_text().splitlines()]
    numbers = (2, 3, 4, 11, 510, 511, 601)
    chosen = [{**records[0], "task_id": number} for number in numbers]
    loaded = load_problems("mbpp", write_lines(tmp_path / "part.jsonl", chosen))
    assert [problem.task_id for problem in loaded] == [11, 510]


def test_mbpp_asks_as_its_paper(problems):
    prompt = load_problems("mbpp", problems)[3].prompt
    expected = ""
    for n in (2, 3, 4, 5):
        asked = f"You are an expert Python programmer, and here is your task: Add {n}. Your code "
        asked += "should pass these tests:\n\n"
        asked += f"assert add(1) == {1 + n}\nassert add(-5) == {n - 5}\n[BEGIN]\n"
        expected += asked + f"def add(x):\n    return x + {n}\n[DONE]\n\n" * (n < 5)
    assert prompt == expected
    assert load_problems("mbpp", problems, shots=0)[3].prompt == asked


def test_humaneval_is_asked_and_judged_as_published(loaded, material, tmp_path):
    model, _, tokenizer, _ = loaded
    args = evaluate.Args(suites=["humaneval"], n=2, max_new_tokens=1)
    problem = evaluate.load_problems("humaneval", args)[0]
    published = evaluate.read_problems()[problem.task_id]
    assert published["prompt"] == problem.head == problem.prompt + "\n"
    body = published["canonical_solution"]
    texts = [dict(task_id=problem.task_id, sample=n, text="\n" * (1 - n) + body) for n in (0, 1)]
    file = write_lines(tmp_path / "t", texts)
    programs = evaluate.sample_programs("h", [problem], model, tokenizer, args, file)
    assert [text for _, text in programs] == [problem.head + body, problem.prompt + body]
    texts = [dict(completion=body), dict(solution=problem.head + body), dict(completion="x" + body)]
    file = tmp_path / "solutions.jsonl"
    write_lines(file, [dict(task_id=problem.task_id) | text for text in texts])
    args.solutions = str(file)
    programs += evaluate.read_solutions(args, [problem])
    sandbox = evaluate.Sandbox("bwrap")
    kinds = evaluate.run_programs("h", programs, sandbox, args, tmp_path / "verdicts")
    # A body glued to the closing quotes is a syntax error; no newline is put in between
    assert [kind == "passed" for kind in kinds] == [True, False, True, True, False]


def test_contests_bring_their_own_limits(material, tmp_path):
    none, some = dict(input=[], output=[]), dict(input=["1\n"], output=["2\n"])
    solutions = dict(language=["JAVA", "PYTHON3"], solution=["class", "print(2)"])
    task = dict(name="a", description="Double.", public_tests=some, private_tests=none)
    task |= dict(generated_tests=some, solutions=solutions)
    limits = dict(time_limit=dict(seconds=1, nanos=500000000), memory_limit_bytes=256 * 2**20)
    records = [task | limits, task | dict(name="b", time_limit=None, memory_limit_bytes=0)]
    one, two = load_problems("code_contests", write_lines(tmp_path / "c.jsonl", records))
    assert one.cases == [("1\n", "2\n")] * 2 and one.reference == "print(2)"
    assert (one.time_s, one.memory_mib, two.time_s, two.memory_mib) == (1.5, 256, 0.0, 0)
    file_task = evaluate.make_problem("code_contests", task | dict(input_file="in.txt"), "")
    assert not file_task.cases  # it is left out of the problems


def test_programs_are_scored_and_pass_at_k_is_unbiased(problems, tmp_path, capsys):
    """A problem whose tests cannot run is named and does not count."""
    lacking = mbpp_task(6) | {"test_setup_code": "import no_such_package"}
    write_lines(problems, [*TASKS, lacking])
    right, slow = TASKS[0]["code"], "while True: pass"
    texts = {2: [right, WRONG, WRONG, slow], 3: [WRONG] * 4, 4: [TASKS[2]["code"]] * 4}
    texts[6] = [lacking["code"]] * 4
    records = [dict(task_id=t, solution=text) for t, many in texts.items() for text in many]
    file = write_lines(tmp_path / "mine.jsonl", records)
    options = dict(suites=["mbpp"], problems=problems, solutions=file, timeout=1.0)
    run(**options, k=[1, 2, 5], out=tmp_path / "e")
    results = results_of(tmp_path / "e")
    for k in (1, 2):
        chances = [1 - math.comb(4 - c, k) / math.comb(4, k) for c in (1, 0, 4)]
        assert results[f"mbpp/pass@{k}"] == pytest.approx(sum(chances) / 3)
    assert "mbpp/pass@5" not in results  # with 4 programs for a problem
    names = ("passed", "samples", "problems", "timed_out", "left_out")
    assert [results[f"mbpp/{name}"] for name in names] == [5, 12, 3, 1, 1]
    assert "6 left out: its tests cannot run here" in capsys.readouterr().out
    passed = json.loads((tmp_path / "e" / "items.json").read_text())["mbpp"]
    assert passed["2"] == [True, False, False, False]
    verdicts = evaluate.read_lines(tmp_path / "e" / "mbpp-verdicts.jsonl")
    assert len(verdicts) == 7  # equal programs of a task ran once, and a reference
    write_lines(problems, [task | {"test_list": ["assert False"]} for task in [*TASKS, lacking]])
    run(**options, k=[1], out=tmp_path / "e")
    again = results_of(tmp_path / "e")  # verdicts count for their own tests only
    assert again["mbpp/passed"] == 0
    assert again["suites"]["mbpp"]["problems"] != results["suites"]["mbpp"]["problems"]


def test_kept_verdicts_are_those_of_the_rules_in_force_and_no_time_outs(tmp_path, monkeypatch):
    """After an edit of how outputs are compared, or a busy machine, a program is judged again."""
    args, sandbox = evaluate.Args(suites=["code_contests"]), evaluate.Sandbox("bwrap")
    programs, file = [(evaluate.Problem("a", cases=[("", "2")]), "print(3)")], tmp_path / "verdicts"

    def judge():
        (kind,) = evaluate.run_programs("c", programs, sandbox, args, file)
        return kind

    assert judge() == "wrong answer"
    file.write_text(file.read_text().replace("wrong answer", "timed out"))
    assert judge() == "wrong answer"
    monkeypatch.setattr(evaluate, "same_output", lambda *texts: True)
    assert judge() == "passed"


# -------------------------------------------------------------------------------------- sampling
SAMPLING = dict(suites=["mbpp"], shots=0, n=4, k=[1], max_new_tokens=16, batch_size=2)


def test_interrupted_sampling_ends_as_if_straight(trained, problems, monkeypatch, tmp_path):
    options = SAMPLING | dict(run_dir=trained, problems=problems)
    run(**options, out=tmp_path / "a")

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    real, calls = evaluate.generate, []
    monkeypatch.setattr(evaluate, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(**options, out=tmp_path / "b")
    (other,) = (f for f in (tmp_path / "a").glob("mbpp-*.jsonl") if "verdicts" not in f.name)
    file = tmp_path / "b" / other.name
    file.write_bytes(file.read_bytes() + b'{"task_id": 3, "samp')  # as a kill leaves it
    run(**options, out=tmp_path / "b")
    assert len(calls) == 4 + 5  # three batches of two were kept

    def texts(file):
        return {(r["task_id"], r["sample"]): r["text"] for r in evaluate.read_lines(file)}

    assert texts(file) == texts(other) and len(texts(file)) == 16
    straight, resumed = results_of(tmp_path / "a"), results_of(tmp_path / "b")
    assert resumed["mbpp/pass@1"] == straight["mbpp/pass@1"]
    before = file.read_bytes()
    run(**(options | dict(n=5)), out=tmp_path / "b")  # more programs begin with those of before
    assert file.read_bytes().startswith(before) and len(texts(file)) == 20


def test_texts_end_before_the_first_stop_string(loaded, tmp_path):
    model, plain, tokenizer, _ = loaded
    args = evaluate.Args(suites=["mbpp"], n=1, temperature=0.0, max_new_tokens=60)
    prompt = "def return for in if x y total ( )"

    def sample(name, stops):
        problem = evaluate.Problem("a", prompt, stops)
        return evaluate.sample_programs("m", [problem], model, tokenizer, args, tmp_path / name)

    ((_, text),) = sample("whole", ["no such text"])
    begun = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = plain.generate(**begun, max_new_tokens=60, do_sample=False)[0].tolist()[len(prompt) :]
    ids = ids[: ids.index(1)] if 1 in ids else ids
    assert text == tokenizer.decode(ids) and len(text) > 30
    for start, end in ((11, 15), (20, 21), (0, 3)):
        stops = ["no such text", text[start:end]]
        ((_, cut),) = sample(f"{start}", stops)
        assert cut == text[: text.find(text[start:end])]


def test_a_prompt_without_room_counts_as_failed(trained, problems, tmp_path, capsys):
    run(**(SAMPLING | dict(max_new_tokens=500)), run_dir=trained, problems=problems, out=tmp_path)
    printed, results = capsys.readouterr().out, results_of(tmp_path)
    assert "2 counts as failed: no room in 512 positions" in printed
    assert results["mbpp/pass@1"] == 0 and results["mbpp/samples"] == 16


# ------------------------------------------------------------------------------ results, pictures
def test_suites_add_up_and_name_their_source(trained, tmp_path):
    few = dict(run_dir=trained, out=tmp_path / "e", speed_prompts=2, speed_tokens=4, rounds=1)
    run(**few, suites=["heldout"])
    heldout = {k: v for k, v in results_of(tmp_path / "e").items() if k.startswith("heldout/")}
    run(**few, suites=["speed"], seed=3)
    both = results_of(tmp_path / "e")
    assert heldout.items() <= both.items() and "speed/identical" in both
    assert [both["arguments"][suite]["seed"] for suite in ("heldout", "speed")] == [0, 3]
    assert {"versions", "command"} <= both["suites"]["speed"].keys()
    mine = write_lines(tmp_path / "mine", [dict(task_id=2, solution="x")])
    options = dict(suites=["mbpp"], problems=write_lines(tmp_path / "p", TASKS))
    with pytest.raises(common.UsageError, match="holds the results of other weights"):
        run(solutions=mine, out=tmp_path / "e", **options)


def test_figures_and_table_hold_the_results(evaluated):
    """Speed is that of texts equal to the plain ones, with more than a token a pass."""
    results, table = results_of(evaluated), evaluate.table(results_of(evaluated))
    assert results["speed/identical"] is True
    assert all(results[f"speed/tokens_per_forward_heads_{k}_batch_1"] > 1 for k in (2, 3))
    assert table.loc["heldout/loss", "2"] == f"{results['heldout/loss_head_2']:.4f}"
    assert {f.name for f in evaluated.glob("*.png")} == {"heads.png", "speed.png"}
    figure = evaluate.draw(results)["speed"]
    line = figure.axes[0].lines[0].get_xydata()
    keys = ("tokens_per_forward", "speedup")
    points = [[results[f"speed/{name}_heads_{k}_batch_1"] for name in keys] for k in (2, 3)]
    np.testing.assert_allclose(line[~np.isnan(line).any(1)], points, atol=1e-4)


def test_text_is_coloured_by_weight_and_escaped(trained, tmp_path):
    text = 'if x < 1 & "<script>":\n'
    ids = [b + 3 for b in text.encode()]
    weight = [None, *np.linspace(0, 3, len(ids) - 1).tolist()]
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "weights.json").write_text(json.dumps([dict(ids=ids, weight=weight)]))
    run(run_dir=tmp_path / "run", suites=["heldout"])
    raw = (tmp_path / "run" / "eval" / "weights.html").read_text()
    spans = re.findall(r'<span title="(.*?)" style="[^"]*,([\d.]+)\)">(.*?)</span>', raw, re.S)
    assert "".join(html.unescape(shown) for _, _, shown in spans) == text and "<script" not in raw
    assert spans[0][0] == "no target"
    for (title, opacity, _), w in zip(spans[1:], weight[1:], strict=True):
        assert title == f"weight {w:.4f}" and float(opacity) == pytest.approx(w / 3, abs=1e-3)


# ------------------------------------------------------------------------------------ comparison
def an_evaluation(level, tokens_per_byte=1.0, **how):
    """What an evaluation keeps, of documents whose losses a token are `level`."""
    size = 100.0 * (1 + np.arange(len(level)) % 3)
    count, bits = size * tokens_per_byte, level * size * tokens_per_byte / math.log(2)
    items = dict(bytes=size, bits=bits, loss_head_1=level * count, count_head_1=count)
    results = {"suites": {"heldout": dict(text="t", tokenizer="v") | how}}
    results["heldout/loss_head_1"] = (level * count).sum() / count.sum()
    results["heldout/bits_per_byte"] = bits.sum() / size.sum()
    items = {name: values.tolist() for name, values in items.items()}
    return dict(results=results, items={"heldout": items})


def test_intervals_equal_those_of_all_resamples_of_six_documents(monkeypatch):
    monkeypatch.setattr(evaluate, "LEAST", 6)
    rng = np.random.default_rng(1)
    level = rng.normal(2, 0.5, 6)  # documents differ much more than the runs do
    first, other = an_evaluation(level), an_evaluation(level + rng.normal(0.1, 0.05, 6))
    key = "heldout/loss_head_1"
    change, low, high, count = evaluate.difference(first, other, key)
    assert change == pytest.approx(other["results"][key] - first["results"][key]) and count == 6
    losses_2D = np.array([run["items"]["heldout"]["loss_head_1"] for run in (first, other)])
    places = np.indices((6,) * 6).reshape(6, -1)  # 6^6 resamples
    changes = (losses_2D[1] - losses_2D[0])[places].sum(0)
    ratios = changes / np.array(first["items"]["heldout"]["count_head_1"])[places].sum(0)
    slow_low, slow_high = np.percentile(ratios, [2.5, 97.5])
    slack = 0.06 * (slow_high - slow_low)  # 9,999 draws
    assert abs(low - slow_low) < slack and abs(high - slow_high) < slack
    bits = evaluate.difference(first, other, "heldout/bits_per_byte")[:3]
    assert bits == pytest.approx([x / math.log(2) for x in (change, low, high)], rel=1e-6)


def test_bits_per_byte_compare_across_tokenizers_and_losses_do_not():
    level = np.random.default_rng(2).normal(2, 0.5, 10)
    first = an_evaluation(level)
    other = an_evaluation(2 * level + 0.1, tokens_per_byte=0.5, tokenizer="w")
    change, low, high, _ = evaluate.difference(first, other, "heldout/bits_per_byte")
    assert change == pytest.approx(0.05 / math.log(2)) and low <= change <= high
    elsewhere = an_evaluation(level, text="u")
    for run, name in ((other, "loss_head_1"), (elsewhere, "bits_per_byte")):
        assert np.isnan(evaluate.difference(first, run, f"heldout/{name}")[:3]).all()


def test_pass_at_k_is_compared_problem_by_problem():
    def evaluation(right, problems="p", n=4):
        programs = {f"t{i}": [j < c for j in range(n)] for i, c in enumerate(right)}
        results = {"suites": {"humaneval": {"problems": problems}}}
        results["humaneval/pass@1"] = sum(right) / n / len(right)
        return dict(results=results, items={"humaneval": programs})

    first, other = evaluation([0, 1, 2, 4, 0] * 2), evaluation([1, 1, 4, 3, 0] * 2)
    change, low, high, count = evaluate.difference(first, other, "humaneval/pass@1")
    assert change == pytest.approx(0.1) and count == 10 and low < change < high
    few = [evaluation(right) for right in ([0, 1, 2, 4, 0], [1, 1, 4, 3, 0])]
    change, low, high, count = evaluate.difference(*few, "humaneval/pass@1")
    assert change == pytest.approx(0.1) and count == 5 and np.isnan([low, high]).all()
    for changed in (evaluation([1, 1, 4, 3] * 2), evaluation([1, 1, 4, 3, 0] * 2, problems="q")):
        assert np.isnan(evaluate.difference(first, changed, "humaneval/pass@1")[0])


def test_runs_side_by_side(trained, evaluated, tmp_path, capsys):
    """The second is of another --seq-len: its losses do not compare, its bits do."""
    shutil.copytree(trained, tmp_path / "other")
    record = json.loads((trained / "args.json").read_text())
    record["args"]["lr"] = 0.5
    (tmp_path / "other" / "args.json").write_text(json.dumps(record))
    options = dict(seq_len=32, speed_prompts=3, speed_tokens=24, rounds=1)
    run(run_dir=tmp_path / "other", suites=["heldout"], out=tmp_path, **options)
    capsys.readouterr()
    run(compare=[str(evaluated), str(tmp_path)])
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    a, b = (results_of(folder)["heldout/bits_per_byte"] for folder in (evaluated, tmp_path))
    assert lines["heldout/bits_per_byte"][:3] == [f"{x:.4f}" for x in (a, b, b - a)]
    assert lines["heldout/loss_head_2"][2:5] == ["-"] * 3
    assert {line for line in lines if "." in line} == {"training.lr", "heldout.seq_len"}
    assert lines["training.lr"] == ["0.01", "0.5"] and lines["heldout.seq_len"] == ["0", "32"]
    assert "none below 10" in printed


# ------------------------------------------------------------------------------------- bad input
BAD = [
    (dict(run_dir="nowhere"), ("--run-dir nowhere", "args.json")),
    (dict(suites=["mbpp"], temperature=0.0), ("--n 20", "--n 1")),
    (dict(compare=["a", "b"]), ("--compare a", "not evaluated")),
    (dict(suites=["humaneval"], sandbox="none"), ("--i-understand-untrusted-code",)),
]


@pytest.mark.parametrize("values, words", BAD)
def test_bad_input_is_one_line(values, words, material, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(lambda: run(**values), *words)
    assert not list(tmp_path.iterdir())


BAD_TASKS = [
    ('{"task_id": 2, "text": "a"}\n', "lacks columns or tasks of mbpp"),
    ("\n".join(map(json.dumps, [*TASKS, TASKS[1]])), "a task occurs twice"),
    (json.dumps(TASKS[0]), "--shots 0"),
]


@pytest.mark.parametrize("text, word", BAD_TASKS)
def test_problems_that_cannot_be_used_are_named(text, word, material, tmp_path):
    (tmp_path / "p.jsonl").write_text(text)
    refused(lambda: load_problems("mbpp", tmp_path / "p.jsonl"), word, "p.jsonl")


def test_what_does_not_fit_the_run_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    record = json.loads((trained / "args.json").read_text())
    changed = record | {"heldout_fingerprint": "0123456789abcdef"}
    (tmp_path / "run" / "args.json").write_text(json.dumps(changed))
    for values, word in [
        (dict(run_dir=tmp_path / "run"), "not the held-out text of the run (0123456789abcdef then"),
        (dict(run_dir=trained, seq_len=513), "--seq-len 513: the model has positions for 512"),
    ]:
        options = dict(suites=["heldout"], out=tmp_path / "e")
        refused(lambda values=values, options=options: run(**values, **options), word)
    assert not (tmp_path / "e").exists()


def test_an_out_that_cannot_be_written_is_refused(problems, tmp_path):
    """A file in place of the folder, and a folder that takes no files."""
    file = write_lines(tmp_path / "mine.jsonl", [dict(task_id=2, solution="x")])
    options, before = dict(suites=["mbpp"], problems=problems, solutions=file), file.read_text()
    for out in (file, Path("/proc/self")):
        refused(lambda out=out: run(**options, out=out), f"--out {out}: ", "another folder")
    assert file.read_text() == before
