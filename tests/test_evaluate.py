"""Evaluation: every figure against something slower, what survives an interruption, what is refused."""

import importlib.metadata
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import baseline_mtp
import common
import data
import evaluate
import report
import suites
from test_run import CONFIG, material, metrics_of  # noqa: F401  (material is a fixture)

ROOT = Path(__file__).parents[1]
MBPP = ROOT.parent / "shared" / "data" / "mbpp.jsonl"


def source(number):
    """A small Python file; all are alike but for names and numbers."""
    body = "".join(f"    total = total * {number + i} + len('{'ab' * (i % 4)}')  # step {i}\n" for i in range(3 + number % 5))
    return f'"""File {number}."""\nimport math\n\n\ndef f{number}(x, total=0.5):\n{body}    return total if x else None\n'


@pytest.fixture(scope="session")
def python_text(material):  # noqa: F811
    (material / "long.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 512}))
    file = material / "python.jsonl"
    file.write_text("".join(json.dumps({"text": source(n)}) + "\n" for n in range(80)))
    return file


def train(material, python_text, run_dir, **changes):  # noqa: F811
    values = dict(
        run_dir=run_dir, model=material / "long.json", data=python_text, seq_len=64, batch_size=16, lr=1e-2, warmup_steps=5,
        max_steps=60, mtp_schedule="constant", tracker="none", device="cpu", dtype="fp32", save_every=0, num_heads=3,
    )  # fmt: skip
    args = baseline_mtp.Args(**{k: str(v) if isinstance(v, Path) else v for k, v in (values | changes).items()})
    baseline_mtp.main(args)
    return Path(run_dir)


@pytest.fixture(scope="session")
def trained(material, python_text, tmp_path_factory):  # noqa: F811
    """A run of 3 heads that has learned something."""
    return train(material, python_text, tmp_path_factory.mktemp("trained") / "runs" / "three")


@pytest.fixture(scope="session")
def one_head(material, python_text, tmp_path_factory):  # noqa: F811
    return train(material, python_text, tmp_path_factory.mktemp("one_head") / "runs" / "one", num_heads=1, max_steps=10)


def run_here(monkeypatch, *words):
    """Run the entry point in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    try:
        common.run_script(evaluate.main, evaluate.Args, "test")
    except SystemExit as stop:
        return stop.code
    return 0


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())


@pytest.fixture(scope="session")
def evaluated(trained, tmp_path_factory):
    """The default suites on the run, small."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    with pytest.MonkeyPatch.context() as patch:
        words = ("--run-dir", trained, "--out", out, "--speed-prompts", 3, "--speed-tokens", 24, "--rounds", 1)
        assert run_here(patch, *words) == 0
    return out


def load(run_dir):
    """Model, its plain twin, held-out rows and targets, by the shortest way."""
    model = common.load_mtp(str(run_dir)).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()
    record = json.loads((run_dir / "args.json").read_text())["args"]
    tokenizer = common.load_tokenizer(run_dir / "model")
    return model, plain, tokenizer, data.load_data(record["data"], tokenizer, record["seq_len"], 0, 0.0, common.Ranks())


# ----------------------------------------------------------------------------------------------------------- held-out text
def test_heldout_figures_equal_a_slow_loop_over_the_plain_model(trained, evaluated):
    model, plain, tokenizer, rows = load(trained)
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
        assert results[f"heldout/{name}_head_1"] == pytest.approx(np.mean(seen[name]), abs=2e-6), name
    assert results["heldout/targets_head_1"] == len(seen["loss"])
    assert results["heldout/perplexity_head_1"] == pytest.approx(math.exp(np.mean(seen["loss"])), rel=1e-5)
    error = 0.0
    for start in range(15):
        own = [i for i, c in enumerate(seen["confidence"]) if start / 15 <= c < (start + 1) / 15 or (start == 14 and c == 1)]
        if own:
            gap = np.mean([seen["confidence"][i] for i in own]) - np.mean([seen["acc"][i] for i in own])
            error += len(own) / len(seen["acc"]) * abs(gap)
    assert results["heldout/calibration_error_head_1"] == pytest.approx(error, abs=1e-5)
    late = [a for a, t in zip(seen["acc"], seen["position"]) if 32 <= t < 64]
    assert results["heldout/acc_head_1/seen_33_to_64"] == pytest.approx(np.mean(late))
    documents = json.loads((evaluated / "documents.json").read_text())
    for place, number in enumerate(documents["document"]):
        own = [loss for loss, d in zip(seen["loss"], seen["document"]) if d == number]
        assert documents["loss_head_1"][place] == pytest.approx(sum(own), rel=1e-5)
        assert documents["count_head_1"][place] == len(own)


def test_heldout_figures_are_those_that_training_ended_with(trained, evaluated):
    last, results = metrics_of(trained)[-1], results_of(evaluated)
    for k in (1, 2, 3):
        assert results[f"heldout/loss_head_{k}"] == pytest.approx(last[f"eval/loss_head_{k}"], abs=1e-6)
        assert results[f"heldout/acc_head_{k}"] == pytest.approx(last[f"eval/acc_head_{k}"], abs=1e-9)
    assert results["heldout/bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], abs=1e-6)
    ratio = last["eval/loss_head_3"] / last["eval/loss_head_1"]
    assert results["heldout/loss_ratio_head_3"] == pytest.approx(ratio, abs=1e-6)


def test_figures_by_class_make_up_the_whole(evaluated):
    results = results_of(evaluated)
    for k in (1, 3):
        count = {c: results.get(f"heldout/targets_head_{k}/class_{c}", 0) for c in evaluate.CLASSES}
        assert min(count.values()) > 0
        ends = results[f"heldout/targets_head_{k}"] - sum(count.values())  # end-of-sequence tokens are of no class
        assert 0 < ends <= len(json.loads((evaluated / "documents.json").read_text())["document"])
        right = sum(n * results[f"heldout/acc_head_{k}/class_{c}"] for c, n in count.items())
        whole = results[f"heldout/acc_head_{k}"] * results[f"heldout/targets_head_{k}"]
        assert right <= whole + 1e-6 <= right + ends + 2e-6


def test_classes_of_characters_by_hand():
    text = "if x2 >= 10:  # ü\n    s = 'a b'\n"
    marks = "kk_nn_oo_ddo__ccc_____n_o_sssss_"
    names = dict(k="keyword", n="name", o="operator", d="number", c="comment", s="string", _="white_space")
    assert [evaluate.CLASSES[c] for c in evaluate.character_classes(text)] == [names[m] for m in marks]
    assert evaluate.character_classes("It isn't Python at all.") is None
    assert evaluate.character_classes("    x = 1\n    return x\n") is not None  # a body by itself


def test_classes_of_tokens_of_several_characters_and_of_bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "".join(source(n) for n in range(10))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    sample = "def f(x):\n    return x + 12  # é\n"
    ids = [*tokenizer(sample).input_ids, tokenizer.eos_token_id]
    classes = evaluate.token_classes(ids, tokenizer)
    of_characters, place = evaluate.character_classes(sample), 0
    assert classes[-1] == -1 and len(ids) < len(sample)
    for token, found in zip(ids[:-1], classes):
        piece = tokenizer.decode([token])
        if "\ufffd" in piece:  # a part of é
            assert evaluate.CLASSES[found] == "comment"
            place += 0.5
            continue
        place = int(place)
        inner = next((i for i, c in enumerate(piece) if not c.isspace()), 0)
        assert found == of_characters[place + inner], piece
        place += len(piece)
    of_bytes = evaluate.token_classes([b + 3 for b in sample.encode()] + [1], transformers.ByT5Tokenizer(extra_ids=0))
    widths = [len(c.encode()) for c in sample]
    assert of_bytes.tolist() == [*np.repeat(of_characters, widths).tolist(), -1]


def test_a_tokenizer_that_does_not_say_where_its_tokens_lie_gives_no_classes():
    class Slow(transformers.PythonBackend):
        def get_vocab(self):
            return {"x": 0, "<end>": 1}

        vocab_size = 2

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return 0

    tokenizer = Slow(eos_token="<end>")
    assert not tokenizer.is_fast and evaluate.token_classes([0, 0, 1], tokenizer).tolist() == [-1, -1, -1]


def test_a_loss_that_is_not_finite_is_told(trained, monkeypatch, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "model" / common.HEADS_FILE
    tensors = load_file(file)
    next(v for k, v in tensors.items() if k.startswith("heads.3.") and v.ndim == 2)[:1] = math.nan
    save_file(tensors, file)
    assert run_here(monkeypatch, "--run-dir", tmp_path / "run", "--suites", "heldout") == 2
    assert "head 3 is not finite" in capsys.readouterr().err


def test_parts_of_the_unembedding_change_nothing(trained, monkeypatch):
    model, plain, tokenizer, rows = load(trained)
    batch = next(data.heldout_batches(rows, 4, 3, common.Ranks()))
    with torch.no_grad():
        whole = evaluate.token_figures(model, batch.x_BT, batch.targets_KBT)
        monkeypatch.setattr(evaluate, "LOGITS", 37 * 259)
        model.tile = 37, 100
        parts = evaluate.token_figures(model, batch.x_BT, batch.targets_KBT)
        loss_KBT, correct_KBT = model(batch.x_BT, batch.targets_KBT, with_correct=True)
    assert torch.allclose(whole, parts, atol=1e-6, equal_nan=True)
    assert torch.equal(whole[0].isnan(), batch.targets_KBT == common.IGNORE)
    assert torch.allclose(whole[0].nan_to_num(), loss_KBT, atol=1e-5)
    assert torch.equal(whole[1].nan_to_num().bool(), correct_KBT)


# ------------------------------------------------------------------------------------------------------------------- speed
def test_speed_says_how_many_drafts_were_taken(evaluated):
    results = results_of(evaluated)
    assert results["speed/identical"] is True and results["speed/prompts"] == 3
    for k, size in ((2, 1), (3, 1), (3, 3)):
        key = f"heads_{k}_batch_{size}"
        taken = [results[f"speed/accepted_{key}/draft_{j}"] for j in range(1, k)]
        assert taken == sorted(taken, reverse=True) and taken[0] > 0
        passes = 3 * 23 / results[f"speed/tokens_per_forward_{key}"]  # a row's first token comes from its prompt's pass
        spare = passes * (1 + sum(taken) - results[f"speed/tokens_per_forward_{key}"])
        assert -1e-6 < spare < 3 + 1e-6  # at most one token a row is cut off after its last draft
        assert results[f"speed/tokens_per_s_{key}"] > 0 and results[f"speed/speedup_{key}"] > 0
    assert results["speed/tokens_per_forward_heads_3_batch_1"] == results["speed/tokens_per_forward_heads_3_batch_3"]


def test_a_text_that_differs_is_told(trained, monkeypatch, tmp_path, capsys):
    def wrong(model, prompts, *args, num_heads=1, **options):
        done = real(model, prompts, *args, num_heads=num_heads, **options)
        if num_heads == 3:
            done.tokens[0][-1] += 1
        return done

    real = evaluate.generate
    monkeypatch.setattr(evaluate, "generate", wrong)
    words = ("--speed-prompts", 2, "--speed-tokens", 8, "--rounds", 1, "--suites", "speed")
    assert run_here(monkeypatch, "--run-dir", trained, "--out", tmp_path / "e", *words) == 0
    assert results_of(tmp_path / "e")["speed/identical"] is False
    assert "1 of 2 texts with 3 head(s) at batch 2 differ" in capsys.readouterr().out


def test_one_head_is_timed_plain(one_head, monkeypatch, tmp_path, capsys):
    words = ("--speed-prompts", 2, "--speed-tokens", 8, "--rounds", 1)
    assert run_here(monkeypatch, "--run-dir", one_head, "--out", tmp_path / "e", *words) == 0
    assert "one head: nothing drafts" in capsys.readouterr().out
    results = results_of(tmp_path / "e")
    assert results["speed/tokens_per_s_heads_1_batch_2"] > 0 and not any("speedup" in key for key in results)


# ---------------------------------------------------------------------------------------------------------------- programs
PROBLEMS = [
    dict(task_id=n, text=f"Add {n}.", code=f"def add(x):\n    return x + {n}", test_setup_code="",
         test_list=[f"assert add(1) == {1 + n}", f"assert add(-5) == {n - 5}"])
    for n in (2, 3, 4, 5)
]  # fmt: skip


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in PROBLEMS))
    return file


def test_given_programs_are_scored_and_pass_at_k_is_unbiased(problems, monkeypatch, tmp_path, capsys):
    right, wrong = PROBLEMS[0]["code"], "def add(x):\n    return 0"
    texts = {2: [right, wrong, wrong, wrong], 3: [wrong] * 4, 4: [PROBLEMS[2]["code"]] * 4}
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(dict(task_id=t, solution=s)) + "\n" for t, many in texts.items() for s in many))
    words = ("--suites", "mbpp", "--problems", problems, "--solutions", file, "--k", 1, 2, 5, "--out", tmp_path / "e")
    assert run_here(monkeypatch, *words) == 0
    results, said = results_of(tmp_path / "e"), capsys.readouterr().out
    assert results["mbpp/pass@1"] == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert results["mbpp/pass@2"] == pytest.approx((1 - 3 / 6 + 0 + 1) / 3)  # 1 - C(3, 2) / C(4, 2)
    assert "mbpp/pass@5" not in results and "pass@5 left out: 4 program(s)" in said
    assert results["mbpp/passed"] == 5 and results["mbpp/samples"] == 12 and "3 of 4 problems" in said
    assert json.loads((tmp_path / "e" / "programs.json").read_text())["mbpp"]["2"] == [True, False, False, False]


def test_verdicts_count_for_their_problems_alone(problems, monkeypatch, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(dict(task_id=p["task_id"], solution=p["code"])) + "\n" for p in PROBLEMS))
    words = ("--suites", "mbpp", "--problems", problems, "--solutions", file, "--k", 1, "--shots", 0, "--out", tmp_path / "e")
    assert run_here(monkeypatch, *words) == 0
    first = results_of(tmp_path / "e")
    problems.write_text("".join(json.dumps(p | {"test_list": ["assert False"]}) + "\n" for p in PROBLEMS))
    assert run_here(monkeypatch, *words) == 0
    second = results_of(tmp_path / "e")
    assert first["mbpp/passed"] == len(PROBLEMS) and second["mbpp/passed"] == 0
    assert first["suites"]["mbpp"]["problems"] != second["suites"]["mbpp"]["problems"]


def test_interrupted_sampling_goes_on_and_ends_as_if_straight(trained, problems, monkeypatch, tmp_path, capsys):
    words = ["--run-dir", trained, "--suites", "mbpp", "--problems", problems, "--shots", 0, "--n", 4, "--k", 1]
    words += ["--max-new-tokens", 20, "--batch-size", 2]
    assert run_here(monkeypatch, *words, "--out", tmp_path / "a") == 0

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    real, calls = suites.generate, []
    monkeypatch.setattr(suites, "generate", stopping)
    assert run_here(monkeypatch, *words, "--out", tmp_path / "b") == 130
    (file,) = (tmp_path / "b").glob("mbpp-*.jsonl")
    with open(file, "a") as f:
        f.write('{"task_id": 3, "samp')  # as a kill leaves it
    capsys.readouterr()
    assert run_here(monkeypatch, *words, "--out", tmp_path / "b") == 0
    assert "6 of 16 programs are there from before" in capsys.readouterr().out and len(calls) == 4 + 5
    (other,) = (tmp_path / "a").glob("mbpp-*.jsonl")

    def read(file):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        texts = {(r["task_id"], r["sample"]): r["text"] for r in records if "text" in r}
        return texts, {(r["task_id"], r["sample"]): r["passed"] for r in records if "passed" in r}

    assert file.name == other.name and read(file) == read(other) and len(read(file)[1]) == 16
    straight, resumed = (results_of(tmp_path / folder)["mbpp/tokens_per_forward"] for folder in "ab")
    assert resumed == pytest.approx(straight) and straight >= 1
    kept = file.read_bytes()
    assert run_here(monkeypatch, *words, "--out", tmp_path / "b") == 0
    assert len(calls) == 9 and file.read_bytes() == kept  # nothing is written or run again
    assert results_of(tmp_path / "b")["mbpp/tokens_per_forward"] == resumed
    assert run_here(monkeypatch, *words, "--out", tmp_path / "b", "--temperature", 0.5) == 0
    assert len(list((tmp_path / "b").glob("mbpp-*.jsonl"))) == 2  # other settings, other file


def test_more_programs_of_the_same_settings_begin_with_those_there(trained, problems, monkeypatch, tmp_path):
    words = ["--run-dir", trained, "--suites", "mbpp", "--problems", problems, "--shots", 0, "--k", 1, "--limit", 2]
    words += ["--max-new-tokens", 12, "--out", tmp_path / "e"]
    assert run_here(monkeypatch, *words, "--n", 2) == 0
    (file,) = (tmp_path / "e").glob("mbpp-*.jsonl")
    before = file.read_bytes()
    assert run_here(monkeypatch, *words, "--n", 3) == 0
    assert file.read_bytes().startswith(before) and results_of(tmp_path / "e")["mbpp/samples"] == 6


def test_texts_end_before_the_first_stop_string_wherever_tokens_lie(trained):
    model, plain, tokenizer, rows = load(trained)
    prompt = source(77)[:40]
    problem = suites.Problem("a", prompt, ["no such text"], None)
    args = evaluate.Args(suites=["mbpp"], n=1, temperature=0.0, max_new_tokens=60)

    class Kept(suites.Samples):
        def __init__(self):
            self.texts, self.new_tokens, self.row_steps = {}, 0, 0

        def write(self, **record):
            pass

    whole = Kept()
    suites.sample_programs("mbpp", [problem], model, tokenizer, 3, args, whole, lambda text: None)
    text = whole.texts["a", 0]
    begun = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    expected = plain.generate(**begun, max_new_tokens=60, do_sample=False)
    ids = expected[0].tolist()[len(prompt) :]
    assert text == tokenizer.decode(ids[: ids.index(1)] if 1 in ids else ids, skip_special_tokens=True) and len(text) > 30
    for start, end in ((11, 15), (20, 21), (0, 3)):
        problem.stops = ["no such text", text[start:end]]
        cut = Kept()
        suites.sample_programs("mbpp", [problem], model, tokenizer, 3, args, cut, lambda text: None)
        assert cut.texts["a", 0] == text[: text.find(text[start:end])]


def test_a_prompt_that_leaves_no_room_counts_as_failed_and_is_told(trained, problems, monkeypatch, tmp_path, capsys):
    words = ["--run-dir", trained, "--suites", "mbpp", "--problems", problems, "--shots", 0, "--k", 1, "--n", 1]
    assert run_here(monkeypatch, *words, "--max-new-tokens", 500, "--out", tmp_path / "e") == 0
    assert "4 problem(s) count as failed: no room in the model's 512 positions" in capsys.readouterr().out
    assert results_of(tmp_path / "e")["mbpp/pass@1"] == 0


def test_humaneval_needs_no_file(trained, monkeypatch, tmp_path):
    words = ("--suites", "humaneval", "--limit", 2, "--n", 2, "--k", 1, 2, "--max-new-tokens", 4, "--out", tmp_path / "e")
    config = json.loads((trained / "model" / "config.json").read_text()) | {"max_position_embeddings": 2048}
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "model" / "config.json").write_text(json.dumps(config))
    assert run_here(monkeypatch, "--run-dir", tmp_path / "run", *words) == 0
    results = results_of(tmp_path / "e")
    assert results["humaneval/problems"] == 2 and results["humaneval/pass@1"] == results["humaneval/pass@2"] == 0.0
    assert results["humaneval/tokens_per_forward"] >= 1


@pytest.mark.slow
@pytest.mark.skipif(not MBPP.exists(), reason=f"no {MBPP}")
def test_references_pass_by_the_command_line(monkeypatch, tmp_path):
    records = [json.loads(line) for line in MBPP.read_text().splitlines()]
    file = tmp_path / "references.jsonl"
    file.write_text("".join(json.dumps(dict(task_id=r["task_id"], solution=r["code"])) + "\n" for r in records))
    words = ("--suites", "mbpp", "--problems", MBPP, "--solutions", file, "--out", tmp_path / "e")
    assert run_here(monkeypatch, *words) == 0
    assert results_of(tmp_path / "e")["mbpp/passed"] == 974 == results_of(tmp_path / "e")["mbpp/problems"]


# --------------------------------------------------------------------------------------------- results, pictures, comparison
def test_results_name_their_source_and_suites_add_up(trained, monkeypatch, tmp_path):
    out = tmp_path / "e"
    few = ("--run-dir", trained, "--out", out, "--speed-prompts", 2, "--speed-tokens", 4, "--rounds", 1)
    assert run_here(monkeypatch, *few, "--suites", "heldout") == 0
    heldout = results_of(out)
    assert run_here(monkeypatch, *few, "--suites", "speed", "--seed", 3) == 0
    both = results_of(out)
    assert {k: v for k, v in both.items() if k.startswith("heldout/")} == {
        k: v for k, v in heldout.items() if k.startswith("heldout/")
    }
    assert any(k.startswith("speed/") for k in both)
    assert both["suites"]["heldout"]["seed"] == 0 and both["suites"]["speed"]["seed"] == 3
    assert "--suites speed" in both["command"] and "--suites heldout" in both["suites"]["heldout"]["command"]
    assert both["versions"]["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch("[0-9a-f]{40}|None", str(both["commit"]))
    assert all(isinstance(v, int | float) for k, v in both.items() if "/" in k)


def test_results_of_another_model_are_not_mixed_in(trained, one_head, evaluated, monkeypatch, tmp_path, capsys):
    out = tmp_path / "e"
    shutil.copytree(evaluated, out)
    before = (out / "results.json").read_bytes()
    assert run_here(monkeypatch, "--run-dir", one_head, "--out", out, "--suites", "heldout") == 2
    assert "holds the results of other weights" in capsys.readouterr().err and (out / "results.json").read_bytes() == before


def test_any_checkpoint_is_measured_on_any_data(trained, evaluated, python_text, monkeypatch, tmp_path):
    words = ("--data", python_text, "--seq-len", 64, "--suites", "heldout", "--out", tmp_path / "e")
    assert run_here(monkeypatch, "--model", trained / "model", *words) == 0
    a, b = results_of(evaluated), results_of(tmp_path / "e")
    assert all(a[k] == b[k] for k in a if k.startswith("heldout/")) and a["fingerprint"] == b["fingerprint"]


def test_the_newest_finished_run_is_taken(trained, monkeypatch, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "runs" / "old")
    shutil.copytree(trained, tmp_path / "runs" / "new", ignore=shutil.ignore_patterns("model"))
    (tmp_path / "runs" / "new" / "args.json").touch()
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, "--suites", "heldout") == 0
    assert "runs/new is newer and not finished" in capsys.readouterr().out
    assert results_of(tmp_path / "runs" / "old" / "eval")["heldout/targets_head_1"] > 0


def test_mlflow_gets_the_metrics_into_the_record_of_the_run(material, python_text, problems, monkeypatch, tmp_path):  # noqa: F811
    import mlflow

    run_dir = train(material, python_text, tmp_path / "runs" / "m", max_steps=4, tracker="mlflow")
    words = ("--suites", "heldout", "mbpp", "--problems", problems, "--shots", 0, "--n", 1, "--max-new-tokens", 4)
    assert run_here(monkeypatch, "--run-dir", run_dir, *words) == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("wmtp").experiment_id])
    results = results_of(run_dir / "eval")
    assert found.data.metrics["heldout/loss_head_2"] == results["heldout/loss_head_2"]
    assert found.data.metrics["mbpp/pass_at_1"] == results["mbpp/pass@1"]
    assert found.data.metrics["eval/loss_head_1"] == pytest.approx(results["heldout/loss_head_1"], abs=1e-6)
    assert found.info.status == "FINISHED" and found.data.params["lr"] == "0.01"
    assert "report.html" in {f.path for f in client.list_artifacts(found.info.run_id)}


def test_a_weighted_run_shows_each_token_with_its_own_losses(trained, monkeypatch, tmp_path):
    model, plain, tokenizer, rows = load(trained)
    ids = rows.heldout[0]["input_ids"].tolist()
    weight = [None, *np.random.default_rng(0).random(len(ids) - 1).round(3).tolist()]
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "weights.json").write_text(json.dumps([dict(row=0, ids=ids, weight=weight)]))
    (sample,) = evaluate.weight_samples(model, tokenizer, tmp_path / "run", common.Ranks())
    logp = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    for j in range(1, len(ids)):
        assert sample["loss"][0][j] == pytest.approx(-logp[j - 1, ids[j]].item(), abs=1e-5)
    assert sample["loss"][0][0] is None and sample["loss"][2][:3] == [None] * 3 and len(sample["loss"][2]) == len(ids)
    third = model.hidden(torch.tensor([ids]), 3)[2, 0]
    of_third = F.cross_entropy(model.causal_lm.lm_head(third[:-3]), torch.tensor(ids[3:]), reduction="none")
    assert sample["loss"][2][3:] == pytest.approx(of_third.tolist(), abs=1e-5)
    assert "".join(sample["tokens"]) == tokenizer.decode(ids, skip_special_tokens=True) and sample["weight"] == weight
    parts = [dict(ids=[b + 3 for b in "é".encode()], weight=[None, 1.0])]
    (tmp_path / "run" / "weights.json").write_text(json.dumps(parts))
    (of_bytes,) = evaluate.weight_samples(model, tokenizer, tmp_path / "run", common.Ranks())
    assert [report.visible(token) for token in of_bytes["tokens"]] == ["\\xc3", "\\xa9"]
    (tmp_path / "run" / "weights.json").write_text(json.dumps([dict(row=0, ids=ids, weight=weight)]))
    assert run_here(monkeypatch, "--run-dir", tmp_path / "run", "--suites", "heldout") == 0
    page = (tmp_path / "run" / "eval" / "report.html").read_text()
    told = "&#10;".join(f"head {k}: {of_head[7]:.4f} nats" for k, of_head in enumerate(sample["loss"], start=1))
    assert f'title="weight {weight[7]:.4f}&#10;{told}"' in page


def test_runs_are_compared_on_the_same_documents(trained, one_head, monkeypatch, tmp_path, capsys):
    for name, run_dir in (("three", trained), ("one", one_head)):
        shutil.copytree(run_dir, tmp_path / name)
        assert run_here(monkeypatch, "--run-dir", tmp_path / name, "--suites", "heldout") == 0
    capsys.readouterr()
    assert run_here(monkeypatch, "--compare", tmp_path / "three", tmp_path / "one", "--out", tmp_path / "c") == 0
    shown = capsys.readouterr().out
    a, b = (results_of(tmp_path / name / "eval")["heldout/loss_head_1"] for name in ("three", "one"))
    (line,) = [line for line in shown.splitlines() if line.startswith("heldout loss (nats), head 1 ")]
    assert f"{a:.4f}" in line and f"{b - a:+.4f}" in line
    assert list((tmp_path / "c").glob("*.png"))


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "words, told",
    [
        (("--suites", "speling"), ("speling",)),
        (("--run-dir", "nowhere"), ("--run-dir nowhere", "no args.json", "--model")),
        (("--model", "nowhere/at-all", "--out", "e"), ("--model nowhere/at-all",)),
        (("--n", "0"), ("--n 0", "at least 1")),
        (("--top-p", "0"), ("--top-p 0",)),
        (("--temperature", "-1"), ("--temperature -1",)),
        (("--suites", "mbpp", "--temperature", "0"), ("--n 20", "--n 1")),
        (("--solutions", "x.jsonl"), ("--solutions x.jsonl", "--suites")),
        (("--suites", "mbpp", "--solutions", "x.jsonl", "--limit", "2"), ("--limit 2", "--solutions")),
        (("--compare", "a"), ("--compare a", "two")),
        (("--compare", "a", "b"), ("--compare a", "not evaluated")),
        (("--suites", "mbpp", "--problems", "none.jsonl"), ("--problems none.jsonl",)),
        (("--suites", "humaneval", "--sandbox", "none"), ("--sandbox none", "--i-understand-untrusted-code")),
        (("--timeout", "0"), ("--timeout 0",)),
        (("--k", "0"), ("--k 0",)),
        (("--suites",), ("--suites", "one or more")),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, told, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in told), error
    if "speling" not in words:  # tyro draws a box
        assert error.count("\n") == 1 and error.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_without_a_run_it_says_how_to_make_one(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch) == 2
    assert "no run in runs/ yet; python baseline_mtp.py makes one" in capsys.readouterr().err


def test_a_half_written_run_is_refused_with_the_way_on(trained, monkeypatch, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "half", ignore=shutil.ignore_patterns("model"))
    assert run_here(monkeypatch, "--run-dir", tmp_path / "half") == 2
    error = capsys.readouterr().err
    assert "not finished" in error and "of 60 updates" in error and error.count("\n") == 1


def test_one_head_asked_for_speculation_is_refused(one_head, monkeypatch, tmp_path, capsys):
    words = ("--suites", "humaneval", "--decode", "speculative", "--out", tmp_path / "e")
    assert run_here(monkeypatch, "--run-dir", one_head, *words) == 2
    error = capsys.readouterr().err
    assert "one head" in error and "--decode plain" in error and not (tmp_path / "e").exists()


def test_text_that_the_run_may_have_trained_on_is_refused(trained, monkeypatch, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(record | {"heldout_fingerprint": "0123456789abcdef"}))
    assert run_here(monkeypatch, "--run-dir", tmp_path / "run") == 2
    assert "not the held-out text of the run (0123456789abcdef there" in capsys.readouterr().err


def test_other_rows_of_changed_documents_are_refused_too(trained, python_text, monkeypatch, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    words = ("--run-dir", tmp_path / "run", "--suites", "heldout", "--seq-len", 32)
    assert run_here(monkeypatch, *words) == 0
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(record | {"data_fingerprint": "0123456789abcdef"}))
    assert run_here(monkeypatch, *words, "--out", tmp_path / "e") == 2
    assert "not the held-out text of the run (0123456789abcdef there" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_rows_longer_than_the_model_are_refused(trained, python_text, monkeypatch, tmp_path, capsys):
    words = ("--data", python_text, "--seq-len", 513, "--suites", "heldout", "--out", tmp_path / "e")
    assert run_here(monkeypatch, "--model", trained / "model", *words) == 2
    assert "--seq-len 513: the model has positions for 512 tokens" in capsys.readouterr().err and not (tmp_path / "e").exists()


def test_a_run_is_measured_by_its_own_split(trained, monkeypatch, tmp_path, capsys):
    assert run_here(monkeypatch, "--model", trained, "--out", tmp_path / "e") == 2
    assert f"use --run-dir {trained}" in capsys.readouterr().err and not (tmp_path / "e").exists()


def test_files_that_cannot_be_read_are_named(trained, evaluated, monkeypatch, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "e")
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "e" / "results.json").write_text('{"a":')
    (tmp_path / "run" / "args.json").write_text("")
    (tmp_path / "file").write_text("")
    for words, told in (
        (("--run-dir", trained, "--suites", "heldout", "--out", tmp_path / "e"), "results.json cannot be read"),
        (("--compare", evaluated, tmp_path / "e"), "results.json cannot be read"),
        (("--run-dir", tmp_path / "run"), "args.json cannot be read"),
        (("--run-dir", trained, "--suites", "heldout", "--out", tmp_path / "file"), "file: cannot be written"),
        (("--compare", evaluated, evaluated, "--out", tmp_path / "file"), "file: cannot be written"),
    ):
        assert run_here(monkeypatch, *words) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


def test_problems_without_the_columns_are_refused(trained, monkeypatch, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"task_id": 1, "text": "a"}\n')
    assert run_here(monkeypatch, "--run-dir", trained, "--suites", "mbpp", "--problems", file) == 2
    error = capsys.readouterr().err
    assert "record 1 lacks code" in error and error.count("\n") == 1


def test_problems_that_would_be_counted_wrongly_are_refused(problems, monkeypatch, tmp_path, capsys):
    none = dict(input=[], output=[])
    task = dict(name="a", description="d", public_tests=none, private_tests=none, generated_tests=none)
    task["solutions"] = dict(language=[], solution=[])
    file, solutions = tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    solutions.write_text('{"task_id": "a", "solution": "x = 1"}\n')
    for suite, records, told in (
        ("mbpp", [*PROBLEMS, PROBLEMS[1]], f"task {PROBLEMS[1]['task_id']} is there 2 times"),
        ("code_contests", [task], "no problem that can be scored"),
        ("code_contests", [task | {"public_tests": dict(input=["1"], output=["1", "2"])}], "not in the form of code_contests"),
    ):
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert run_here(monkeypatch, "--suites", suite, "--problems", file, "--solutions", solutions, "--shots", 0) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
