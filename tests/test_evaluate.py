"""Evaluation: every figure against something slower, what a kill leaves, what is refused."""

import html.parser
import json
import math
import random
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import baseline_mtp
import common
import data
import evaluate

CONFIG = dict(model_type="llama", vocab_size=259, hidden_size=32, intermediate_size=64)
CONFIG |= dict(num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
CONFIG |= dict(max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.1)
CONFIG |= dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)


def source(number):
    """A small Python file; all are alike but for names and numbers."""
    lines = [f"    total += {number + i} + len('{'ab' * (i % 4)}')  # {i}\n" for i in range(4)]
    head = f'"""File {number}."""\nimport math\n\n\ndef f{number}(x, total=0.5):\n'
    return head + "".join(lines) * (1 + number % 3) + "    return total if x else None\n"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model configuration, a text data set of Python, and a cache of their own."""
    import datasets

    folder = tmp_path_factory.mktemp("material")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_lines(folder / "python.jsonl", [{"text": source(n)} for n in range(80)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def train(material, run_dir, **changes):
    values = dict(model=str(material / "config.json"), data=str(material / "python.jsonl"))
    values |= dict(seq_len=64, batch_size=16, lr=1e-2, warmup_steps=5, max_steps=40, num_heads=3)
    values |= dict(mtp_schedule="constant", tracker="none", device="cpu", dtype="fp32")
    values |= dict(save_every=0, run_dir=str(run_dir))
    baseline_mtp.main(baseline_mtp.Args(**(values | changes)))
    return run_dir


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    """A run of 3 heads that has learned something."""
    return train(material, tmp_path_factory.mktemp("runs") / "three")


@pytest.fixture(scope="module")
def one_head(material, tmp_path_factory):
    return train(material, tmp_path_factory.mktemp("runs") / "one", num_heads=1, max_steps=5)


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
    name = str(material / "python.jsonl")
    return model, plain, tokenizer, data.load_data(name, tokenizer, 64, 0, 0.0, common.Ranks())


# --------------------------------------------------------------------------------- held-out text
def test_heldout_figures_equal_a_slow_loop_over_the_plain_model(loaded, evaluated):
    _, plain, _, rows = loaded
    columns, results = rows.heldout[:], results_of(evaluated)
    seen = {name: [] for name in ("loss", "acc", "top5", "confidence", "position", "document")}
    with torch.no_grad():
        for ids, document in zip(columns["input_ids"], columns["document"]):
            logp_TV = plain(torch.tensor(ids)[None].long()).logits[0].double().log_softmax(-1)
            for t in range(len(ids) - 1):
                if document[t + 1] >= 0 and document[t] == document[t + 1]:
                    ranking = logp_TV[t].argsort(descending=True).tolist()
                    seen["loss"].append(-logp_TV[t, ids[t + 1]].item())
                    seen["acc"].append(ranking[0] == ids[t + 1])
                    seen["top5"].append(ids[t + 1] in ranking[:5])
                    seen["confidence"].append(logp_TV[t].max().exp().item())
                    seen["position"].append(t)
                    seen["document"].append(document[t])
    for name in ("loss", "acc", "top5", "confidence"):
        assert results[f"heldout/{name}_head_1"] == pytest.approx(np.mean(seen[name]), abs=2e-6)
    assert results["heldout/targets_head_1"] == len(seen["loss"])
    perplexity = math.exp(np.mean(seen["loss"]))
    assert results["heldout/perplexity_head_1"] == pytest.approx(perplexity, rel=1e-5)
    bits = sum(seen["loss"]) / len(seen["loss"]) / math.log(2)
    bits *= rows.heldout_tokens / rows.heldout_bytes
    assert results["heldout/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    late = [right for right, t in zip(seen["acc"], seen["position"]) if 32 <= t < 64]
    assert results["heldout/acc_head_1/seen_33_to_64"] == pytest.approx(np.mean(late))
    documents = json.loads((evaluated / "documents.json").read_text())
    for place, number in enumerate(documents["document"]):
        own = [loss for loss, d in zip(seen["loss"], seen["document"]) if d == number]
        assert documents["loss_head_1"][place] == pytest.approx(sum(own), rel=1e-5)
        assert documents["count_head_1"][place] == len(own)
    assert sum(documents["bytes"]) == rows.heldout_bytes


def test_far_heads_are_those_that_training_ended_with(trained, evaluated):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    results = results_of(evaluated)
    for k in (1, 2, 3):
        for name in ("loss", "acc"):
            expected = last[f"eval/{name}_head_{k}"]
            assert results[f"heldout/{name}_head_{k}"] == pytest.approx(expected, abs=1e-6)
            if k > 1:
                ratio = expected / last[f"eval/{name}_head_1"]
                assert results[f"heldout/{name}_ratio_head_{k}"] == pytest.approx(ratio, rel=1e-5)


def test_calibration_error_by_hand():
    confidence = np.array([0.03, 0.06, 0.5, 1.0])  # bins 0, 0, 7 and 14 of 15
    correct = np.array([0.0, 1.0, 1.0, 1.0])
    by_hand = (2 * abs(0.045 - 0.5) + abs(0.5 - 1) + 0) / 4
    assert evaluate.calibration_error(confidence, correct) == pytest.approx(by_hand)


def test_classes_of_characters_by_hand():
    text = "if x2 >= 10:  # ü\n    s = 'a b'\n"
    marks = "kk_nn_oo_ddo__ccc_____n_o_sssss_"
    names = dict(k="keyword", n="name", o="operator", d="number", c="comment", s="string")
    expected = [names.get(mark, "white_space") for mark in marks]
    assert [str(c) for c in evaluate.token_classes(list(text))] == expected
    assert evaluate.token_classes(["It isn't ", "", "Python."]) == ["", "", ""]
    assert evaluate.token_classes(["    ", "x", " = ", "", "1"])[1:] == [
        "name",
        "operator",
        "",
        "number",
    ]


def test_classes_of_tokens_of_several_characters_and_of_bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"])
    texts = [source(n) for n in range(10)]
    backend.train_from_iterator(texts, trainers.BpeTrainer(**options))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    sample = "def f(x):\n    return x + 12  # e\n"
    ids = [*tokenizer(sample).input_ids, tokenizer.eos_token_id]
    pieces = evaluate.token_texts(ids, tokenizer)
    assert "".join(pieces) == sample and pieces[-1] == "" and len(ids) < len(sample)
    of_characters, place = evaluate.token_classes(list(sample)), 0
    for piece, found in zip(pieces[:-1], evaluate.token_classes(pieces)):
        inner = next((i for i, c in enumerate(piece) if not c.isspace()), 0)
        assert found == of_characters[place + inner], piece
        place += len(piece)
    of_bytes = transformers.ByT5Tokenizer(extra_ids=0)
    pieces = evaluate.token_texts([b + 3 for b in sample.encode()] + [1], of_bytes)
    assert pieces == [*sample, ""]


def test_parts_of_the_unembedding_change_nothing(loaded, monkeypatch):
    model, _, _, rows = loaded
    batch = next(data.heldout_batches(rows, 4, 3, common.Ranks()))
    with torch.no_grad():
        whole = evaluate.token_figures(model, batch.x_BT, batch.targets_KBT)
        monkeypatch.setattr(evaluate, "LOGITS", 37 * 259)
        parts = evaluate.token_figures(model, batch.x_BT, batch.targets_KBT)
        loss_KBT = model(batch.x_BT, batch.targets_KBT)
    assert torch.allclose(whole, parts, atol=1e-6, equal_nan=True)
    assert torch.equal(whole[0].isnan(), batch.targets_KBT == common.IGNORE)
    assert torch.allclose(whole[0].nan_to_num(), loss_KBT, atol=1e-5)


# ----------------------------------------------------------------------------------------- speed
def test_speed_says_how_many_drafts_were_taken(evaluated):
    results = results_of(evaluated)
    assert results["speed/identical"] is True and results["speed/prompts"] == 3
    for k, size in ((2, 1), (3, 1), (3, 3)):
        key = f"heads_{k}_batch_{size}"
        taken = [results[f"speed/accepted_{key}/draft_{j}"] for j in range(1, k)]
        assert taken == sorted(taken, reverse=True) and taken[0] > 0
        across = results[f"speed/tokens_per_forward_{key}"]
        passes = 3 * 23 / across  # a row's first token comes from its prompt's pass
        spare = passes * (1 + sum(taken) - across)
        assert -1e-6 < spare < 3 + 1e-6  # at most one token a row is cut off after its last draft


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
    return evaluate.load_problems(
        suite, evaluate.Args(suites=[suite], problems=str(file), **options)
    )


def test_mbpp_asks_as_its_paper(problems):
    prompt = load_problems("mbpp", problems)[3].prompt
    parts = [
        f"You are an expert Python programmer, and here is your task: Add {n}. Your code should "
        f"pass these tests:\n\nassert add(1) == {1 + n}\nassert add(-5) == {n - 5}\n[BEGIN]\n"
        for n in (2, 3, 4, 5)
    ]
    solved = [f"def add(x):\n    return x + {n}\n[DONE]\n\n" for n in (2, 3, 4)]
    assert prompt == "".join(a + b for a, b in zip(parts, solved)) + parts[3]
    assert load_problems("mbpp", problems, shots=0)[3].prompt == parts[3]


def test_humaneval_is_asked_and_judged_as_published(loaded, material, tmp_path):
    model, _, tokenizer, _ = loaded
    args = evaluate.Args(suites=["humaneval"], n=2, max_new_tokens=1)
    problem = evaluate.load_problems("humaneval", args)[0]
    published = evaluate.read_problems()[problem.task_id]
    assert published["prompt"] == problem.head == problem.prompt + "\n"
    body = published["canonical_solution"]
    for number, text in enumerate(["\n" + body, body]):
        evaluate.add_line(tmp_path / "t", task_id=problem.task_id, sample=number, text=text)
    programs, _ = evaluate.sample_programs("h", [problem], model, tokenizer, args, tmp_path / "t")
    assert [text for _, text in programs] == [problem.head + body, problem.prompt + body]
    texts = [dict(completion=body), dict(solution=problem.head + body), dict(completion="x" + body)]
    file = tmp_path / "solutions.jsonl"
    write_lines(file, [dict(task_id=problem.task_id) | text for text in texts])
    args.solutions = str(file)
    programs += evaluate.read_solutions(args, [problem])
    with evaluate.open_sandbox("bwrap") as sandbox:
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
    assert evaluate.make_problem("code_contests", task | dict(time_limit=2), "").time_s == 2.0
    file_task = evaluate.make_problem("code_contests", task | dict(input_file="in.txt"), "")
    assert not file_task.cases  # it is left out of the problems


def test_programs_are_scored_and_pass_at_k_is_unbiased(problems, tmp_path, capsys):
    right, slow = TASKS[0]["code"], "while True: pass"
    texts = {2: [right, WRONG, WRONG, slow], 3: [WRONG] * 4, 4: [TASKS[2]["code"]] * 4}
    records = [dict(task_id=t, solution=text) for t, many in texts.items() for text in many]
    file = write_lines(tmp_path / "mine.jsonl", records)
    options = dict(suites=["mbpp"], problems=problems, solutions=file, timeout=1.0)
    run(**options, k=[1, 2, 5], out=tmp_path / "e")
    results, printed = results_of(tmp_path / "e"), capsys.readouterr().out
    for k in (1, 2):
        chances = [1 - math.comb(4 - c, k) / math.comb(4, k) for c in (1, 0, 4)]
        assert results[f"mbpp/pass@{k}"] == pytest.approx(sum(chances) / 3)
    assert "mbpp/pass@5" not in results and "pass@5 left out: 4 program(s)" in printed
    counts = [results[f"mbpp/{n}"] for n in ("passed", "samples", "problems", "timed_out")]
    assert counts == [5, 12, 3, 1] and "3 of 4 problems have a program" in printed
    passed = json.loads((tmp_path / "e" / "programs.json").read_text())["mbpp"]
    assert passed["2"] == [True, False, False, False]
    verdicts = evaluate.read_lines(tmp_path / "e" / "mbpp-verdicts.jsonl")
    assert len(verdicts) == 5  # equal programs of a task ran once
    write_lines(problems, [task | {"test_list": ["assert False"]} for task in TASKS])
    run(**options, k=[1], out=tmp_path / "e")
    again = results_of(tmp_path / "e")  # verdicts count for their own tests only
    assert again["mbpp/passed"] == 0
    assert again["suites"]["mbpp"]["problems"] != results["suites"]["mbpp"]["problems"]


def test_problems_whose_tests_cannot_run_are_named_and_not_counted(problems, tmp_path, capsys):
    lacking = mbpp_task(6) | {"test_setup_code": "import no_such_package"}
    write_lines(problems, [*TASKS, lacking])
    records = [dict(task_id=task["task_id"], solution=task["code"]) for task in [*TASKS, lacking]]
    file = write_lines(tmp_path / "mine.jsonl", records)
    options = dict(suites=["mbpp"], problems=problems, k=[1])
    run(**options, solutions=file, out=tmp_path / "e")
    results = results_of(tmp_path / "e")
    assert (results["mbpp/left_out"], results["mbpp/problems"], results["mbpp/pass@1"]) == (1, 4, 1)
    assert "6 left out: its tests cannot run here" in capsys.readouterr().out
    # A wrong program may end before the tests: the reference tells
    records[-1]["solution"] = "raise SystemExit"
    file = write_lines(tmp_path / "other.jsonl", records)
    run(**options, solutions=file, out=tmp_path / "f", check_references=True)
    assert results_of(tmp_path / "f")["mbpp/left_out"] == 1
    assert "4 of 5 reference solutions pass here" in capsys.readouterr().out


def test_references_run_once_but_time_outs_again(problems, material, tmp_path, capsys):
    slow = mbpp_task(7) | {"code": "import time\ntime.sleep(3)\n" + mbpp_task(7)["code"]}
    bad = mbpp_task(8) | {"code": WRONG}
    write_lines(problems, [slow, bad, mbpp_task(9)])
    args = evaluate.Args(suites=["mbpp"], problems=str(problems), shots=0, timeout=1.0)
    loaded, ran = evaluate.load_problems("mbpp", args), []
    with evaluate.open_sandbox("bwrap", limits=evaluate.Limits(wall_s=1.0)) as sandbox:
        real = sandbox.run_all
        sandbox.run_all = lambda jobs: (ran.append(len(jobs)), real(jobs))[1]
        for _ in range(2):
            assert evaluate.check_references("mbpp", loaded, sandbox, args) == []
            printed = capsys.readouterr().out
            assert "1 of 3 reference solutions pass here" in printed
            assert "reference of 7: timed out" in printed and "reference of 8: wrong" in printed
    assert ran == [3, 1]


# -------------------------------------------------------------------------------------- sampling
SAMPLING = dict(suites=["mbpp"], shots=0, n=4, k=[1], max_new_tokens=16, batch_size=2)


def test_interrupted_sampling_ends_as_if_straight(trained, problems, monkeypatch, tmp_path, capsys):
    options = SAMPLING | dict(run_dir=trained, problems=problems)
    run(**options, out=tmp_path / "a")

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    real, calls = evaluate.generate, []
    monkeypatch.setattr(evaluate, "generate", stopping)
    with pytest.raises(SystemExit):
        run(**options, out=tmp_path / "b")
    (other,) = (f for f in (tmp_path / "a").glob("mbpp-*.jsonl") if "verdicts" not in f.name)
    file = tmp_path / "b" / other.name
    file.write_bytes(file.read_bytes() + b'{"task_id": 3, "samp')  # as a kill leaves it
    capsys.readouterr()
    run(**options, out=tmp_path / "b")
    assert "10 of 16 programs to sample" in capsys.readouterr().out and len(calls) == 4 + 5

    def texts(file):
        records = evaluate.read_lines(file)
        return {(r["task_id"], r["sample"]): r["text"] for r in records if "text" in r}

    assert texts(file) == texts(other) and len(texts(file)) == 16
    straight, resumed = results_of(tmp_path / "a"), results_of(tmp_path / "b")
    for key in ("passed", "pass@1", "tokens_per_forward"):
        assert resumed[f"mbpp/{key}"] == pytest.approx(straight[f"mbpp/{key}"])
    before = file.read_bytes()
    run(**(options | dict(n=5)), out=tmp_path / "b")  # more programs begin with those of before
    assert file.read_bytes().startswith(before) and len(texts(file)) == 20
    run(**(options | dict(temperature=0.5)), out=tmp_path / "b")
    assert len(list((tmp_path / "b").glob("mbpp-*.jsonl"))) == 3  # other settings, other file


def test_texts_end_before_the_first_stop_string(loaded, tmp_path):
    model, plain, tokenizer, _ = loaded
    args = evaluate.Args(suites=["mbpp"], n=1, temperature=0.0, max_new_tokens=60)
    prompt = source(77)[:40]

    def sample(name, stops):
        problem = evaluate.Problem("a", prompt, stops)
        return evaluate.sample_programs("m", [problem], model, tokenizer, args, tmp_path / name)

    ((_, text),), passes = sample("whole", ["no such text"])
    begun = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = plain.generate(**begun, max_new_tokens=60, do_sample=False)[0].tolist()[len(prompt) :]
    ids = ids[: ids.index(1)] if 1 in ids else ids
    assert text == tokenizer.decode(ids) and len(text) > 30 and passes >= 1
    for start, end in ((11, 15), (20, 21), (0, 3)):
        stops = ["no such text", text[start:end]]
        ((_, cut),), _ = sample(f"{start}", stops)
        assert cut == text[: text.find(text[start:end])]


def test_a_prompt_without_room_counts_as_failed(trained, problems, tmp_path, capsys):
    run(**(SAMPLING | dict(max_new_tokens=500)), run_dir=trained, problems=problems, out=tmp_path)
    printed, results = capsys.readouterr().out, results_of(tmp_path)
    assert "2 counts as failed: no room for its prompt and --max-new-tokens 500 in 512" in printed
    assert results["mbpp/pass@1"] == 0 and results["mbpp/samples"] == 16


def test_a_model_conditioned_on_outcomes_is_asked_for_right_programs(trained, problems, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    record = json.loads((trained / "args.json").read_text())
    record["args"]["condition_on_outcome"] = True
    (tmp_path / "run" / "args.json").write_text(json.dumps(record))
    asked, real = [], evaluate.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "generate", lambda *a, **o: (asked.extend(a[1]), real(*a, **o))[1])
        run(**(SAMPLING | dict(n=1)), run_dir=tmp_path / "run", problems=problems)
    starts = [bytes(i - 3 for i in ids).decode()[:15] for ids in asked]
    assert starts == ["# right\nYou are"] * 4


# ------------------------------------------------------------------------------ results, pictures
def test_suites_add_up_and_name_their_source(trained, material, tmp_path):
    few = dict(run_dir=trained, out=tmp_path / "e", speed_prompts=2, speed_tokens=4, rounds=1)
    run(**few, suites=["heldout"])
    heldout = {k: v for k, v in results_of(tmp_path / "e").items() if k.startswith("heldout/")}
    run(**few, suites=["speed"], seed=3)
    both = results_of(tmp_path / "e")
    assert heldout.items() <= both.items() and "speed/identical" in both
    assert [both["suites"][suite]["seed"] for suite in ("heldout", "speed")] == [0, 3]
    assert {"commit", "dirty", "versions", "command"} <= both.keys()
    # Any checkpoint is measured on any data; this one is the run's own model
    options = dict(data=material / "python.jsonl", seq_len=64, suites=["heldout"])
    run(model=trained / "model", out=tmp_path / "m", **options)
    assert heldout.items() <= results_of(tmp_path / "m").items()
    mine = write_lines(tmp_path / "mine", [dict(task_id=2, solution="x")])
    options = dict(suites=["mbpp"], problems=write_lines(tmp_path / "p", TASKS))
    with pytest.raises(common.UsageError, match="holds the results of other weights"):
        run(solutions=mine, out=tmp_path / "e", **options)


def test_figures_hold_the_results(evaluated):
    results = results_of(evaluated)
    figures = evaluate.draw(results)
    assert {f"{name}.png" for name in figures} == {f.name for f in evaluated.glob("*.png")}
    for axes, name in zip(figures["heads"].axes, ("loss", "acc")):
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == [results[f"heldout/{name}_head_{k}"] for k in (1, 2, 3)]
    lines = {
        line.get_label(): line.get_xydata().tolist() for line in figures["speed"].axes[0].lines
    }
    for size in (1, 3):
        keys = ("tokens_per_forward", "speedup")
        points = [[results[f"speed/{n}_heads_{k}_batch_{size}"] for n in keys] for k in (2, 3)]
        assert lines[f"batch {size}"] == points
    assert "DIFFER" not in figures["speed"].axes[0].get_title()
    wrong = evaluate.draw(results | {"speed/identical": False})["speed"].axes[0]
    assert "DIFFER" in wrong.get_title()
    assert list(evaluate.draw({"heldout/loss_head_1": 1.0, "heldout/acc_head_1": 0.5})) == ["heads"]
    assert evaluate.draw({"seed": 0}) == {}


def test_the_table_holds_the_results(evaluated):
    results, table = results_of(evaluated), evaluate.table(results_of(evaluated))
    assert table.loc["heldout/loss", "2"] == f"{results['heldout/loss_head_2']:.4f}"
    assert table.loc["heldout/targets", "1"] == str(results["heldout/targets_head_1"])
    speedup = results["speed/speedup_heads_3_batch_1"]
    assert table.loc["speed/speedup_batch_1", "3"] == f"{speedup:,.4f}"
    assert table.loc["speed/identical", ""] == "True" and table.loc["speed/identical", "1"] == ""


class Spans(html.parser.HTMLParser):
    """Collects title, style and text of every span, and the tags."""

    def __init__(self, text):
        super().__init__()
        self.spans, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "span":
            self.spans.append(dict(attributes) | {"text": ""})

    def handle_data(self, text):
        if self.spans:
            self.spans[-1]["text"] += text


def test_text_is_coloured_by_weight_and_escaped(trained, tmp_path):
    text = 'if x < 1 & "<script>":\n'
    ids = [b + 3 for b in text.encode()]
    weight = [None, *np.linspace(0, 3, len(ids) - 1).tolist()]
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "weights.json").write_text(json.dumps([dict(ids=ids, weight=weight)]))
    (tmp_path / "run" / "tracker.json").write_text("{}")
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "log_to_tracker", lambda *values: sent.append(values))
        run(run_dir=tmp_path / "run", suites=["heldout"])
    raw = (tmp_path / "run" / "eval" / "weights.html").read_text()
    page = Spans(raw)
    assert ">&lt;</span>" in raw and ">&amp;</span>" in raw and "><</span>" not in raw
    assert "script" not in page.tags and "".join(span["text"] for span in page.spans) == text
    assert page.spans[0]["title"] == "no target"
    for span, w in zip(page.spans[1:], weight[1:], strict=True):
        assert span["title"] == f"weight {w:.4f}"
        assert float(span["style"].split(",")[-1].rstrip(")")) == pytest.approx(w / 3, abs=1e-3)
    ((run_dir, step, metrics, files),) = sent
    results = results_of(run_dir / "eval")
    assert step == 40 and metrics["heldout/loss_head_2"] == results["heldout/loss_head_2"]
    assert {f.name for f in files} == {"results.json", "heads.png", "weights.html"}


# ------------------------------------------------------------------------------------ comparison
def slow_interval(first_2D, other_2D, draws=4000):
    """95 % percentile interval of other - first, one resample of documents at a time."""
    draw, count, drawn = random.Random(5), len(first_2D[0]), []
    for _ in range(draws):
        places = [draw.randrange(count) for _ in range(count)]
        sums = [[sum(row[d] for d in places) for row in side] for side in (first_2D, other_2D)]
        drawn.append(sums[1][0] / sums[1][1] - sums[0][0] / sums[0][1])
    drawn = sorted(drawn)
    return drawn[draws // 40], drawn[-draws // 40]


def an_evaluation(level, shift=0.0, tokens_per_byte=1.0, **more):
    """What an evaluation keeps, of documents whose losses a token are `level + shift`."""
    level = np.asarray(level)
    size = 100.0 * (1 + np.arange(len(level)) % 3)
    count = size * tokens_per_byte
    loss, acc = (level + shift) * count, 0.5 * count
    documents = dict(document=list(range(len(level))), bytes=size, loss_head_1=loss)
    documents |= dict(acc_head_1=acc, count_head_1=count)
    results = {"heldout_fingerprint": "t", "tokenizer_fingerprint": "v"}
    results["heldout/loss_head_1"] = loss.sum() / count.sum()
    results["heldout/acc_head_1"] = acc.sum() / count.sum()
    results["heldout/bits_per_byte"] = loss.sum() / size.sum() / math.log(2)
    return dict(results=results | more, documents=documents, programs={})


def test_intervals_equal_a_slow_loop_over_resampled_documents():
    rng = np.random.default_rng(1)
    level = rng.normal(2, 0.5, 12)  # documents differ much more than the runs do
    first, other = an_evaluation(level), an_evaluation(level, rng.normal(0.1, 0.05, 12))
    key, sums = "heldout/loss_head_1", ("loss_head_1", "count_head_1")
    change, low, high = evaluate.difference(first, other, key)
    assert change == pytest.approx(other["results"][key] - first["results"][key])
    pairs = [[one["documents"][name] for name in sums] for one in (first, other)]
    slow_low, slow_high = slow_interval(*pairs)
    slack = 0.06 * (slow_high - slow_low)  # two streams of draws
    assert abs(low - slow_low) < slack and abs(high - slow_high) < slack
    bits = evaluate.difference(first, other, "heldout/bits_per_byte")
    assert bits == pytest.approx([x / math.log(2) for x in (change, low, high)], rel=1e-6)
    assert evaluate.difference(first, first, key) == (0, 0, 0)


def test_bits_per_byte_compare_across_tokenizers_and_losses_do_not():
    level = np.random.default_rng(2).normal(2, 0.5, 9)
    first = an_evaluation(level)
    other = an_evaluation(2 * level, 0.1, tokens_per_byte=0.5, tokenizer_fingerprint="w")
    change, low, high = evaluate.difference(first, other, "heldout/bits_per_byte")
    assert change == pytest.approx(0.05 / math.log(2)) and low <= change <= high
    for key in ("heldout/loss_head_1", "heldout/acc_head_1"):
        assert np.isnan(evaluate.difference(first, other, key)).all()
    elsewhere = an_evaluation(level, heldout_fingerprint="u")
    assert np.isnan(evaluate.difference(first, elsewhere, "heldout/bits_per_byte")).all()
    single = an_evaluation(level[:1])
    change, *interval = evaluate.difference(single, single, "heldout/loss_head_1")
    assert change == 0 and np.isnan(interval).all()


def test_pass_at_k_is_compared_problem_by_problem():
    def evaluation(right, problems="p", n=4):
        programs = {f"t{i}": [j < c for j in range(n)] for i, c in enumerate(right)}
        results = {"suites": {"humaneval": {"problems": problems}}}
        for k in (1, 2):
            chances = [1 - math.comb(n - c, k) / math.comb(n, k) for c in right]
            results[f"humaneval/pass@{k}"] = sum(chances) / len(right)
        return dict(results=results, documents={}, programs={"humaneval": programs})

    first, other = evaluation([0, 1, 2, 4, 0]), evaluation([1, 1, 4, 3, 0])
    change, low, high = evaluate.difference(first, other, "humaneval/pass@1")
    every = np.array(np.meshgrid(*[[0.25, 0, 0.5, -0.25, 0]] * 5)).reshape(5, -1).mean(0)
    assert change == pytest.approx(0.1)  # every: all 5^5 resamples of the five differences
    np.testing.assert_allclose([low, high], np.percentile(every, [2.5, 97.5]), atol=0.0501)
    second = evaluate.difference(first, other, "humaneval/pass@2")[0]
    assert second == pytest.approx((1 / 2 + 0 + 1 / 6 + 0 + 0) / 5)
    for changed in (evaluation([1, 1, 4, 3]), evaluation([1, 1, 4, 3, 0], problems="q")):
        assert np.isnan(evaluate.difference(first, changed, "humaneval/pass@1")).all()


def test_runs_side_by_side(trained, one_head, evaluated, tmp_path, capsys):
    options = dict(suites=["heldout", "speed"], speed_prompts=2, speed_tokens=4, rounds=1)
    run(run_dir=one_head, out=tmp_path / "one", **options, seq_len=32)
    printed = capsys.readouterr().out
    assert "one head: nothing drafts" in printed
    names = [str(evaluated), str(tmp_path / "one")]
    run(compare=names, out=tmp_path / "c")
    a, b = (results_of(name)["heldout/bits_per_byte"] for name in names)
    record = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert record[f"{names[1]} difference"]["heldout/bits_per_byte"] == pytest.approx(b - a)
    assert record[f"{names[1]} difference"]["heldout/loss_head_2"] is None
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("heldout/bits"))
    assert f"{a:.4f}" in line and f"{b - a:.4f}" in line


# ------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "values, words",
    [
        (dict(run_dir="nowhere"), ("--run-dir nowhere", "no args.json", "--model")),
        (dict(), ("no finished run in runs/ yet; python baseline_mtp.py makes one",)),
        (dict(model="nowhere/at-all"), ("--model nowhere/at-all",)),
        (dict(run_dir="a", model="b"), ("--run-dir a", "--model")),
        (dict(n=0), ("--n 0", "at least 1")),
        (dict(top_p=0.0), ("--top-p 0",)),
        (dict(suites=["mbpp"], temperature=0.0), ("--n 20", "--n 1")),
        (dict(suites=["mbpp"], solutions="x", limit=2), ("--limit 2", "--solutions")),
        (dict(compare=["a"]), ("--compare a", "two")),
        (dict(compare=["a", "b"]), ("--compare a", "not evaluated")),
        (dict(suites=["mbpp"], problems="none.jsonl"), ("--problems none.jsonl",)),
        (dict(suites=["humaneval"], sandbox="none"), ("--i-understand-untrusted-code",)),
        (dict(timeout=0.0), ("--timeout 0",)),
        (dict(k=[0]), ("--k 0",)),
        (dict(suites=[]), ("--suites", "one or more")),
    ],
)
def test_bad_input_is_one_line(values, words, material, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UsageError) as error:
        run(**values)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "suite, text, word",
    [
        ("mbpp", '{"task_id": 2, "text": "a"}\n', "needs task_id, text, code, test_list"),
        ("mbpp", '{"task_id": 1,\n', "cannot be read"),
        ("mbpp", "", "cannot be read"),
        ("mbpp", "\n".join(map(json.dumps, [*TASKS, TASKS[1]])), "task 3 occurs 2 times"),
        ("mbpp", json.dumps(TASKS[0]), "lacks task 3"),
        ("code_contests", '{"name": "a", "description": "d"}\n', "needs name, description"),
    ],
)
def test_problems_that_cannot_be_used_are_named(suite, text, word, material, tmp_path):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(common.UsageError, match=word) as error:
        load_problems(suite, tmp_path / "p.jsonl")
    assert "p.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "record, word",
    [
        (dict(task_id=99, solution="x"), "record 2: no problem has its task_id 99"),
        (dict(task_id=2), "record 2: needs completion or solution"),
        (dict(task_id=2, solution="x", completion="y"), "record 2: needs completion or solution"),
        (dict(solution="x"), "record 2: no problem has its task_id None"),
    ],
)
def test_lines_of_solutions_that_cannot_be_used_are_named(record, word, problems, tmp_path):
    file = write_lines(tmp_path / "s.jsonl", [dict(task_id=2, solution="x"), record])
    args = types.SimpleNamespace(solutions=str(file))
    with pytest.raises(common.UsageError, match=word):
        evaluate.read_solutions(args, load_problems("mbpp", problems))


def test_what_does_not_fit_the_run_is_refused(trained, material, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    record = json.loads((trained / "args.json").read_text())
    changed = record | {"heldout_fingerprint": "0123456789abcdef"}
    (tmp_path / "run" / "args.json").write_text(json.dumps(changed))
    options = dict(suites=["heldout"], out=tmp_path / "e")
    refused = [
        (dict(run_dir=tmp_path / "run"), "not the held-out text of the run .0123456789abcdef then"),
        (dict(run_dir=trained, seq_len=513), "--seq-len 513: the model has positions for 512"),
        (dict(model=trained), f"--run-dir {trained} uses its own"),
    ]
    for values, word in refused:
        with pytest.raises(common.UsageError, match=word):
            run(**values, **options)
    assert not (tmp_path / "e").exists()


def test_an_unfinished_run_says_how_many_updates_it_has(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "half", ignore=shutil.ignore_patterns("model"))
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train/lr" in line][:7]
    heldout = [dict(step=step, **{"eval/loss_head_1": 1.0}) for step in range(20)]
    write_lines(tmp_path / "half" / "metrics.jsonl", [*training, *heldout])
    with pytest.raises(common.UsageError, match=f"{training[-1]['step']} of 40 updates"):
        run(run_dir=tmp_path / "half")


def test_a_loss_that_is_not_finite_is_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "model" / common.HEADS_FILE
    tensors = load_file(file)
    next(v for k, v in tensors.items() if k.startswith("heads.3.") and v.ndim == 2)[:1] = math.nan
    save_file(tensors, file)
    with pytest.raises(common.UsageError, match="loss is not finite"):
        run(run_dir=tmp_path / "run", suites=["heldout"])
