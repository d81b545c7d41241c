"""critic_wmtp.py: records with outcomes, GAE and weights against slow loops, the baseline, both stages, ranks, bad input."""

import ast
import difflib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import baseline_mtp
import bugs
import common
import critic_wmtp
import data
import outcomes
import value
from common import IGNORE

ROOT = Path(__file__).parents[1]
CONFIG = dict(
    model_type="llama", vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    bos_token_id=None, initializer_range=0.1,
)  # fmt: skip
LENGTH = 32
SIGNAL = dict(lambda_=0.0, epsilon=0.0, max_weight=1e9)  # weights as the advantages give them


def flags(material, folder, **changes):
    """Command line of a short run on the small material."""
    values = dict(
        run_dir=folder, model=material / "config.json", data=material / "records.jsonl", seq_len=LENGTH, batch_size=8, lr=3e-3,
        warmup_steps=2, max_steps=6, mtp_schedule="constant", tracker="none", device="cpu", dtype="fp32", save_every=2,
    )  # fmt: skip
    switches = [f"--{k.replace('_', '-')}" for k, v in changes.items() if v is True]
    values |= {k: v for k, v in changes.items() if v is not True}
    return [str(w) for k, v in values.items() for w in (f"--{k.replace('_', '-')}", v)] + switches


def run(module, words):
    """Run a script's entry point in this process; returns its exit code."""
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, words)]
    try:
        common.run_script(module.main, module.Args, "test")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def critic(material, folder, **changes):
    return run(critic_wmtp, flags(material, folder, **{"value_steps": 5} | changes))


def metrics_of(run_dir, without=("perf/",)):
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(without)} for line in lines]


def training_of(run_dir):
    """Figures of stage 2 that a baseline writes too."""
    lines = metrics_of(run_dir, without=("perf/", "value/", "value_end/", "train/value_loss"))
    return [line for line in lines if line.keys() != {"step"}]


FILES = ("weights.json", "value_head.safetensors", "model/model.safetensors", "model/mtp_heads.safetensors")


def same_files(one, other, names=FILES):
    """The same bits in every tensor (safetensors writes its metadata in any order) and the same text."""
    for name in names:
        if name.endswith(".json"):
            assert (one / name).read_text() == (other / name).read_text()
        else:
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a), name


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A small configuration and records with siblings: an order of words that is right or wrong. A cache of their own."""
    folder = tmp_path_factory.mktemp("critic")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    choose, records = random.Random(0), []
    for number in range(60):
        words = choose.choices("ab cd ef gh ij".split(), k=choose.randint(2, 4))
        for reward in (1, 0, 0.25)[: 2 + number % 2]:
            text = " ".join(words) if reward == 1 else " ".join(words[::-1]) + "!"[: number % 3]
            records.append(dict(prompt=f"{number}:", completion=text, reward=reward))
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def rows_of(name, seq_len=LENGTH, **changes):
    return data.load_data(str(name), common.load_tokenizer(None), seq_len, 0, 0.0, common.Ranks(), **changes)


def batch_of(material, numbers, num_heads=3, train_on="correct"):
    return data.load_batch(rows_of(material / "records.jsonl").train, np.asarray(numbers), num_heads, "cpu", train_on)


def write(file, records):
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


# ------------------------------------------------------------------------------------------------------------ stdlib-bugs
@pytest.fixture(scope="module")
def some_bugs():
    """Records of every tenth source file, and these files."""
    texts = data._stdlib()[::10]
    return texts, bugs.make_records(texts)


def records(columns):
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def test_each_function_has_one_sibling_that_one_mutation_broke(some_bugs):
    _, columns = some_bugs
    made = records(columns)
    assert len(made) > 600
    kinds = set()
    for right, wrong in zip(made[::2], made[1::2]):
        assert (right["reward"], wrong["reward"]) == (1, 0)
        assert all(right[k] == wrong[k] for k in ("prompt", "group", "sibling"))
        trees = [ast.parse(r["prompt"] + r["completion"]) for r in (right, wrong)]
        assert ast.dump(trees[0]) != ast.dump(trees[1])
        start, end = wrong["fault_start"], wrong["fault_end"]
        assert 0 <= start < end <= len(wrong["completion"]) and (right["fault_start"], right["fault_end"]) == (-1, -1)
        before, after = wrong["completion"][:start], wrong["completion"][end:]
        assert right["completion"].startswith(before)
        if wrong["kind"] != "dropped statement":  # all that differs lies in the span, and it is not much
            assert right["completion"].endswith(after)
            assert len(before) + len(after) <= len(right["completion"])
        else:
            assert end == start + 1 or right["completion"].endswith(after)
        kinds.add(wrong["kind"])
    all_kinds = "operator,comparison,wrong name,constant,negated condition,dropped statement,swapped arguments"
    assert kinds == set(all_kinds.split(","))


def test_neither_length_nor_difference_of_length_tells_the_outcome(some_bugs):
    length = np.array([len(c) for c in some_bugs[1]["completion"]])
    difference = length[1::2] - length[::2]
    assert abs((difference > 0).sum() - (difference < 0).sum()) <= 5
    assert abs(difference.mean()) < 3 and (difference != 0).any()
    assert value.area(length, np.arange(len(length)) % 2 == 0) == pytest.approx(0.5, abs=0.02)


def test_mutations_are_a_function_of_the_texts_and_kept(some_bugs, tmp_path, monkeypatch):
    texts, columns = some_bugs
    assert bugs.make_records(texts[:10]) == bugs.make_records(texts[:10])
    first = bugs.stdlib_bugs(texts[:10], tmp_path)
    monkeypatch.setattr(bugs, "make_records", lambda texts: pytest.fail("made again"))
    assert bugs.stdlib_bugs(texts[:10], tmp_path) == first
    (tmp_path / "texts.json").write_text(json.dumps(texts[:10]))
    code = "import bugs, json, sys; print(json.dumps(bugs.make_records(json.load(open(sys.argv[1])))))"
    command, env = [sys.executable, "-c", code, str(tmp_path / "texts.json")], os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(other.stdout) == first, other.stderr  # sets of another process have another order


@pytest.mark.parametrize("text, other, same", [
    ("def f(a):\n    return a + 1\n", "def f(a):\n\n    return (a + 1)\n", True),
    ("def f(a):\n    'b'\n    a()\n    'text'\n", "def f(a):\n    'b'\n    a()\n", True),
    ("def f(a):\n    return 2 - 1\n", "def f(a):\n    return 2 // 2\n", True),
    ("def f(a):\n    return a < 1\n", "def f(a):\n    return a <= 1\n", False),
    ("def f(a):\n    return 1\n", "def f(a):\n    return 1.0\n", False),
    ("def f():\n    def g(a):\n        return a + 1\n", "def f():\n    def g(a):\n        return a - 1\n", False),
])  # fmt: skip
def test_what_compiles_to_the_same_is_no_fault(text, other, same):
    assert bugs.same_code(text, other) is same


def test_a_function_whose_mutations_change_nothing_has_no_record():
    assert bugs.make_records(["def f():\n    return g(1.5, 1.5)\n"]) == {}
    assert bugs.make_records(["def f():\n    return g(1.5, 2.5)\n"])["reward"] == [1.0, 0.0]
    assert bugs.make_records(["def f():\n    nonlocal x\n    return g(1.5, x)\n", "def broken(:\n"]) == {}


def test_siblings_and_files_stay_on_one_side_of_the_split(some_bugs, material, monkeypatch):
    texts, columns = some_bugs
    monkeypatch.setattr(data, "_stdlib", lambda: texts)
    loaded = rows_of("stdlib-bugs", 256)
    group_of = dict(zip(columns["sibling"], columns["group"]))
    train = {group_of[s] for s in loaded.train["sibling"]}
    heldout = {r["group"] for r in loaded.heldout_records}
    assert train and heldout and not train & heldout
    assert len(train) + len(heldout) <= len(texts)
    tokens = loaded.heldout[:]["is_target"].sum()
    assert 0.04 < tokens / (tokens + sum(block["is_target"].sum() for block in loaded.train.iter(1000))) < 0.16
    for row, record in zip(loaded.heldout, loaded.heldout_records):  # records and rows go together
        completion = bytes((row["input_ids"][row["is_target"]][:-1] - 3).tolist()).decode()
        assert completion == record["completion"]
        assert (row["reward"], row["sibling"]) == (record["reward"], record["sibling"])
    correct = [r["completion"] for r in loaded.heldout_records if r["reward"] == 1]
    assert loaded.heldout_bytes == sum(len(c.encode()) for c in correct)
    assert loaded.heldout_tokens == loaded.heldout_bytes + len(correct)


# ----------------------------------------------------------------------------------------------------- records and rewards
def test_wrong_records_have_no_targets_unless_all_are_trained_on(material):
    correct, everything = (batch_of(material, np.arange(12), 3, which) for which in ("correct", "all"))
    assert torch.equal(correct.reward_B, everything.reward_B) and torch.equal(correct.completion_BT, everything.completion_BT)
    assert {0.0, 0.25, 1.0} == set(correct.reward_B.tolist())
    for b in range(12):
        mine = correct.targets_KBT[:, b] != IGNORE
        assert torch.equal(mine, (everything.targets_KBT[:, b] != IGNORE) & (correct.reward_B[b] > 0.5))
        assert (everything.targets_KBT[0, b] != IGNORE).sum() == everything.completion_BT[b].sum()  # every prompt has a token


def test_records_of_one_prompt_are_siblings(material):
    loaded = rows_of(material / "records.jsonl")
    for row, partner in enumerate(outcomes.partners(loaded.train, 2)[0]):
        mine, other = loaded.train[row], loaded.train[int(partner)]
        assert mine["sibling"] == other["sibling"] and (mine["reward"] > 0.5) != (other["reward"] > 0.5)
    prompts = [{bytes((r["input_ids"][~r["is_target"] & (r["document"] >= 0)] - 3).tolist()) for r in part}
               for part in (loaded.train, loaded.heldout)]  # fmt: skip
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_rows_with_their_partners_count_as_the_rows_alone():
    """Prompts with one right and four wrong records, with one of each, and with no sibling: V stays the share of the correct."""
    sibling, reward = [0, 0, 0, 0, 0, 1, 1, 2], [1, 0, 0, 0, 0, 0, 1, 1]
    rows = datasets.Dataset.from_dict(dict(sibling=sibling, reward=list(map(float, reward)))).with_format("numpy")
    partner_N, share_N = outcomes.partners(rows, 2)
    assert partner_N.tolist() == [1, 0, 0, 0, 0, 6, 5, 7]
    counted = np.zeros(8)
    for row in range(8):  # an epoch: every row once, with its partner
        counted[row] += share_N[row]
        counted[partner_N[row]] += share_N[partner_N[row]]
    assert counted == pytest.approx(np.ones(8))
    assert outcomes.partners(rows, 1)[1].tolist() == [1] * 8


def test_a_tag_says_the_outcome_and_held_out_the_good_one(material):
    loaded = rows_of(material / "records.jsonl", 48, tagged=True)
    for part, tags in (("train", outcomes.TAGS), ("heldout", {True: outcomes.TAGS[True], False: outcomes.TAGS[True]})):
        for row in getattr(loaded, part):
            prompt = bytes((row["input_ids"][~row["is_target"] & (row["document"] >= 0)] - 3).tolist()).decode()
            assert prompt.startswith(tags[bool(row["reward"] > 0.5)]) and re.fullmatch(r"\d+:", prompt[8:])
    assert len(set(map(len, outcomes.TAGS.values()))) == 1
    assert loaded.prompt.startswith(outcomes.TAGS[True])  # what the report goes on from


def test_condefects_pairs_and_their_faulty_lines(material, tmp_path):
    pairs = [dict(task=f"t{n // 2}", submission=str(n), correct=f"a = {n}\nb = 2\nprint(a)\n", faulty=f"a = {n}\nb = 3\nprint(b)",
                  fault_location="2") for n in range(20)]  # fmt: skip
    loaded = rows_of(write(tmp_path / "pairs.jsonl", pairs), 64)
    assert len(loaded.train) + len(loaded.heldout) == 40
    for record in loaded.heldout_records:
        if record["reward"] == 0:
            assert record["completion"][record["fault_start"] : record["fault_end"]] == "b = 3\n"
            token, line = value.fault_tokens(record, common.load_tokenizer(None), len(record["completion"]) + 1)
            assert np.array_equal(np.flatnonzero(token), np.arange(record["fault_start"], record["fault_end"]))
            assert np.array_equal(token, line)
    assert len({r["group"] for r in loaded.heldout_records} & {f"t{n}" for n in range(10)}) >= 1


@pytest.mark.parametrize("location", ["2", "2,3", "[2]", "2-3", 2, [2, 3]])
def test_a_faulty_line_is_found_in_any_form(tmp_path, location):
    """Lines end with a line feed alone: Python's splitlines() would count a form feed too."""
    pair = dict(task="t", correct="a = 1\n", faulty="a = '\x0c'\nb = 3\nc = 4", fault_location=location)
    right, wrong = outcomes.read_pairs(datasets.Dataset.from_list([pair]))
    assert right["fault_start"] == -1 and wrong["completion"][wrong["fault_start"] : wrong["fault_end"]] == "b = 3\n"
    for nowhere in ("9", "", None, "unknown"):
        assert outcomes.read_pairs(datasets.Dataset.from_list([pair | dict(fault_location=nowhere)]))[1]["fault_start"] == -1
    kept = outcomes.read_pairs(datasets.Dataset.from_list([pair, pair | dict(faulty=None)]))
    assert [r["reward"] for r in kept] == [1, 0, 1]


def test_code_contests_may_list_its_solutions(tmp_path):
    of = dict(language=[3, 2, 3], solution=["a", "b", "c"])
    listed = [dict(language=n, solution=text) for n, text in zip(*of.values())]
    problems = [datasets.Dataset.from_list([dict(description="d", solutions=s, incorrect_solutions=s)]) for s in (of, listed)]
    found = [outcomes.read_pairs(problem).to_list() for problem in problems]
    assert found[0] == found[1] and [r["completion"] for r in found[0]] == ["a", "a", "c", "c"]


def test_code_contests_gives_as_many_wrong_as_right_programs(material, tmp_path):
    wrong = dict(language=[3, 1, 3, 3], solution=["w1", "py2", "w2", "w3"])
    problems = [dict(name=f"p{n}", description=f"task {n}", solutions=dict(language=[3, 2, 3], solution=["r1", "c++", f"r{n}"]),
                     incorrect_solutions=wrong) for n in range(12)]  # fmt: skip
    loaded = rows_of(write(tmp_path / "contests.jsonl", problems), 256)
    assert len(loaded.train) + len(loaded.heldout) == 48
    texts = {(r["completion"], r["reward"]) for r in loaded.heldout_records}
    assert {text for text, _ in texts} <= {"w1", "w2", *(f"r{n}" for n in range(12))}
    assert all((text[0] == "r") == (reward == 1) for text, reward in texts)


def reward_model(folder, num_labels, causal=False):
    torch.manual_seed(num_labels)
    config = transformers.LlamaConfig(**CONFIG, num_labels=num_labels)
    kind = transformers.LlamaForCausalLM if causal else transformers.LlamaForSequenceClassification
    kind(config).save_pretrained(folder)
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_reward_model_scores_what_has_no_reward_once(material, tmp_path, num_labels, monkeypatch):
    lacking = [dict(prompt=f"{n} is", completion="so " * (n % 5 + 1), reward=1.0 if n == 3 else None) for n in range(30)]
    file, name = write(tmp_path / "some.jsonl", lacking), reward_model(tmp_path / "judge", num_labels)
    loaded = rows_of(file, reward_model=name)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
    known = {}
    for record in lacking:  # one by one, without padding; the head reads the last token
        ids = torch.tensor([[b + 3 for b in (record["prompt"] + record["completion"]).encode()] + [1]])
        with torch.no_grad():
            logits = plain.score(plain.model(ids).last_hidden_state[0, -1])
        known[record["prompt"]] = logits.sigmoid()[0] if num_labels == 1 else logits.softmax(0)[1]
    known["3 is"] = 1.0
    for record in loaded.heldout_records:
        assert record["reward"] == pytest.approx(float(known[record["prompt"]]), abs=1e-6)
    rewards = sorted([*map(float, loaded.train["reward"][:]), *(r["reward"] for r in loaded.heldout_records)])
    assert rewards == pytest.approx(sorted(map(float, known.values())), abs=1e-6)
    left = transformers.AutoTokenizer.from_pretrained(name)
    left.padding_side = "left"
    left.save_pretrained(tmp_path / "left")
    plain.save_pretrained(tmp_path / "left")
    shifted = rows_of(file, reward_model=str(tmp_path / "left"))
    assert [r["reward"] for r in shifted.heldout_records] == [r["reward"] for r in loaded.heldout_records]
    monkeypatch.setattr(plain.__class__, "forward", lambda *a, **k: pytest.fail("scored again"))
    assert rows_of(file, reward_model=name).fingerprint == loaded.fingerprint


# ------------------------------------------------------------------------------------------------------ advantages, weights
def random_values(seed=0, B=4, T=14):
    """V, rewards and completions: prompts of 0 to 5 tokens, completions of 1 to 8, padding."""
    generator = np.random.default_rng(seed)
    completion_BT = np.zeros((B, T), bool)
    for b in range(B):
        start = generator.integers(0, 6)
        completion_BT[b, start : start + generator.integers(1, 9)] = True
    value_BT = torch.from_numpy(generator.random((B, T)))
    return value_BT, torch.from_numpy(generator.random(B)), torch.from_numpy(completion_BT)


def deltas(V, R, completion, gamma):
    """TD errors by token, as a dict; token 0 has none."""
    tokens = np.flatnonzero(completion).tolist()
    return {t: (R if t == tokens[-1] else gamma * V[t]) - V[t - 1] for t in tokens if t > 0}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)])
def test_gae_is_the_double_sum(seed, gamma, lam):
    value_BT, reward_B, completion_BT = random_values(seed)
    found_BT = critic_wmtp.advantages(value_BT, reward_B, completion_BT, gamma, lam)
    for b in range(len(reward_B)):
        delta = deltas(value_BT[b].tolist(), reward_B[b].item(), completion_BT[b], gamma)
        last = max(delta, default=None)
        for t in range(value_BT.shape[1]):
            expected = sum((gamma * lam) ** (j - t) * delta[j] for j in delta if j >= t) if t in delta else 0.0
            assert found_BT[b, t].item() == pytest.approx(expected, abs=1e-12)
            if t in delta and lam == 1:  # return less value
                outcome = gamma ** (last - t) * reward_B[b].item()
                assert found_BT[b, t].item() == pytest.approx(outcome - value_BT[b, t - 1].item())
            if t in delta and lam == 0:  # the TD error alone
                assert found_BT[b, t].item() == pytest.approx(delta[t])
        if last:
            assert found_BT[b, last].item() == pytest.approx(reward_B[b].item() - value_BT[b, last - 1].item())


def weights_of(value_BT, batch, moments=None, ranks=None, key=(0, 0, 0), **changes):
    args, logit_BT = critic_wmtp.Args(**changes), torch.logit(value_BT.float(), 1e-6)
    moments = torch.zeros(3) if moments is None else moments
    return critic_wmtp.token_weights(logit_BT, batch, moments, key, args, ranks or common.Ranks())


def valid_of(batch):
    return F.pad(batch.targets_KBT[0, :, :-1] != IGNORE, (1, 0))


@pytest.mark.parametrize("changes", [
    dict(), dict(lambda_=0.0), dict(temperature=0.1, epsilon=0.2, max_weight=1.5), dict(gae_lambda=0.5), dict(gamma=0.9),
    dict(train_on="all"),
], ids=str)  # fmt: skip
def test_weights_equal_a_slow_loop_over_several_updates(material, changes):
    """Python's float64: TD errors, double sum, moving mean and deviation, softmax, clip, mean 1, mixture."""
    args, moments, slow = critic_wmtp.Args(**changes), torch.zeros(3), [0.0, 0.0, 0.0]
    for update in range(4):
        batch = batch_of(material, np.arange(12 * update, 12 * update + 12), 3, args.train_on)
        value_BT = torch.rand(batch.x_BT.shape, generator=torch.Generator().manual_seed(update))
        weight_BT = weights_of(value_BT, batch, moments, **changes)
        advantage = {}
        for b in range(12):
            delta = deltas(value_BT[b].tolist(), batch.reward_B[b].item(), batch.completion_BT[b], args.gamma)
            for t in delta:
                if batch.targets_KBT[0, b, t - 1] != IGNORE:
                    advantage[b, t] = sum((args.gamma * args.gae_lambda) ** (j - t) * delta[j] for j in delta if j >= t)
        mean = sum(advantage.values()) / len(advantage)
        slow[0], slow[1] = 0.99 * slow[0] + 0.01, 0.99 * slow[1] + 0.01 * mean
        centre = slow[1] / slow[0]
        slow[2] = 0.99 * slow[2] + 0.01 * sum((a - centre) ** 2 for a in advantage.values()) / len(advantage)
        deviation = math.sqrt(slow[2] / slow[0]) + 1e-4
        u = {p: math.exp((a - centre) / deviation / args.temperature) for p, a in advantage.items()}
        u = {p: min(max(len(u) * e / sum(u.values()), args.epsilon), args.max_weight) for p, e in u.items()}
        for p in u:
            expected = args.lambda_ + (1 - args.lambda_) * u[p] * len(u) / sum(u.values())
            assert weight_BT[p].item() == pytest.approx(expected, rel=1e-4)
        assert (weight_BT[~valid_of(batch)] == 1).all()
        assert weight_BT[valid_of(batch)].mean().item() == pytest.approx(1, abs=1e-5)


def test_a_planted_drop_puts_the_least_weight_on_its_token(material):
    batch = batch_of(material, np.arange(6))
    row = int((batch.reward_B == 1).nonzero()[0])
    tokens = batch.completion_BT[row].nonzero()[:, 0].tolist()
    for planted in tokens[1:-1]:
        value_BT = torch.full(batch.x_BT.shape, 0.9)
        value_BT[row, planted:] = 0.2
        weight_BT = weights_of(value_BT, batch, gae_lambda=0.0, **SIGNAL)
        least = weight_BT.masked_fill(~valid_of(batch), math.inf).flatten().argmin().item()
        assert divmod(least, batch.x_BT.shape[1]) == (row, planted)
        weight_BT = weights_of(value_BT, batch, gae_lambda=0.5, **SIGNAL)  # the tokens before share it
        mine = weight_BT[row, tokens[0] : planted + 1]
        assert mine.argmin() == len(mine) - 1 and mine[-1] < weight_BT[row, planted + 1]


def test_a_constant_value_weighs_all_alike(material):
    batch = batch_of(material, np.arange(8))
    value_BT = torch.full(batch.x_BT.shape, 0.3)
    for gae_lambda in (0.0, 1.0):
        weight_BT = weights_of(value_BT, batch, gae_lambda=gae_lambda, **SIGNAL)
        for row in (batch.reward_B == 1).nonzero()[:, 0]:
            tokens = batch.completion_BT[row].nonzero()[:, 0]
            inner = weight_BT[row, tokens[:-1]]
            assert torch.allclose(inner, inner[0].expand_as(inner), rtol=1e-3)
            if gae_lambda == 1:  # every token's credit is R - c: whitened it is 0
                assert torch.allclose(weight_BT[row, tokens], torch.ones(len(tokens)), atol=3e-3)
    batch.reward_B[:] = 0.3  # and where the outcome is what V expects, there is no credit at all, at the last token neither
    batch.targets_KBT = batch_of(material, np.arange(8), train_on="all").targets_KBT
    assert torch.allclose(weights_of(value_BT, batch, **SIGNAL), torch.ones_like(value_BT), atol=3e-3)


def test_padding_prompts_and_wrong_records_have_no_say(material):
    batch = batch_of(material, np.arange(10))
    generator = torch.Generator().manual_seed(1)
    value_BT, other_BT = (torch.rand(batch.x_BT.shape, generator=generator) for _ in range(2))
    counts_BT = value.prefixes(batch) & (batch.reward_B > 0.5)[:, None]
    mixed_BT = torch.where(counts_BT, value_BT, other_BT)
    assert torch.equal(weights_of(value_BT, batch, **SIGNAL), weights_of(mixed_BT, batch, **SIGNAL))
    mixed_BT = torch.where(value.prefixes(batch), value_BT, other_BT)
    losses = [critic_wmtp.value_loss(torch.logit(v), batch).item() for v in (value_BT, mixed_BT)]
    assert losses[0] == losses[1]
    slow, R = 0.0, batch.reward_B.tolist()
    for b in range(10):
        tokens = batch.completion_BT[b].nonzero()[:, 0].tolist()
        for t in range(tokens[0] - 1, tokens[-1] + 1):  # from the end of the prompt to the last token
            V = value_BT[b, t].item()
            slow -= R[b] * math.log(V) + (1 - R[b]) * math.log(1 - V)
    assert losses[0] == pytest.approx(slow, rel=1e-5)
    means = []
    for b in range(10):
        tokens = batch.completion_BT[b].nonzero()[:, 0].tolist()
        logits = [math.log(V / (1 - V)) for V in value_BT[b, tokens[0] - 1 : tokens[-1] + 1].tolist()]
        means.append(sum(logits) / len(logits))
    slow = sum(-math.log(1 / (1 + math.exp(-(R[a] - R[b] > 0 or -1) * (means[a] - means[b]))))
               for a, b in zip(range(0, 10, 2), range(1, 10, 2)) if R[a] != R[b])  # fmt: skip
    assert value.pair_loss(torch.logit(value_BT), batch).item() == pytest.approx(slow, rel=1e-5)


def test_controls_stay_inside_of_completions(material):
    batch = batch_of(material, np.arange(10))
    value_BT, valid = torch.rand(batch.x_BT.shape, generator=torch.Generator().manual_seed(2)), valid_of(batch)
    plain, shuffled, drawn = (weights_of(value_BT, batch, control=c, **SIGNAL) for c in ("none", "shuffle", "random"))
    again = weights_of(value_BT, batch, control="shuffle", **SIGNAL)
    other = weights_of(value_BT, batch, control="shuffle", key=(0, 1, 0), **SIGNAL)
    assert torch.equal(shuffled, again) and not torch.equal(shuffled, other) and not torch.equal(shuffled, plain)
    for b in range(10):
        a, c = (w[b][valid[b]].sort().values for w in (plain, shuffled))
        assert torch.allclose(a, c, rtol=1e-5)
    assert drawn[valid].mean().item() == pytest.approx(1, abs=1e-5) and (drawn[~valid] == 1).all()
    ratio = drawn[valid][:, None] / plain[valid][None]  # drawn weights are old ones, all rescaled alike
    scale = ratio.flatten()[(ratio.flatten() - ratio[0][:, None]).abs().min(0).values < 1e-4]
    assert len(scale) > 0 and drawn[valid].unique().numel() < plain[valid].unique().numel()


def small_critic(material, **changes):
    torch.manual_seed(0)
    model, tokenizer = common.build_model(str(material / "config.json"), 3)
    made = critic_wmtp.Critic(model, critic_wmtp.Args(**changes))
    for parameter in made.value.heads.parameters():  # as if it had learnt something
        torch.nn.init.normal_(parameter, std=0.3)
    return model, made, tokenizer


@pytest.mark.parametrize("kind", ["separate", "frozen", "shared"])
def test_gradients_go_where_they_should(material, kind):
    """The weighted loss moves the policy as if the weights were constants; the value loss its own part, and a shared trunk."""
    batch = batch_of(material, np.arange(6))
    model, made, _ = small_critic(material, value=kind)
    loss_KBT = model(batch.x_BT, batch.targets_KBT)
    logit_BT = made.logits(batch, run_policy=False)
    weight_BT = critic_wmtp.token_weights(logit_BT, batch, made.moments, (0, 0, 0), critic_wmtp.Args(), common.Ranks())
    assert logit_BT.requires_grad and not weight_BT.requires_grad and weight_BT[valid_of(batch)].std() > 0.1
    critic_wmtp.value_loss(logit_BT, batch).backward(retain_graph=True)
    moved = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all(name in moved for name, _ in made.named_parameters() if name.startswith("value.heads"))
    policy = {name for name in moved if name.startswith("policy.")}
    assert bool(policy) == (kind == "shared") and not any(".layers.2.layers" in n or "lm_head" in n for n in policy)
    assert any(name.startswith("value.trunk") for name in moved) == (kind == "separate")
    made.zero_grad()
    (critic_wmtp.weights_of_targets(weight_BT, 3) * loss_KBT).sum().backward()
    assert not any(p.grad is not None and p.grad.abs().sum() > 0 for p in made.value.parameters())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    made.zero_grad()
    constant_KBT = critic_wmtp.weights_of_targets(torch.tensor(weight_BT.tolist()), 3)
    (constant_KBT * model(batch.x_BT, batch.targets_KBT)).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, found[name])


@pytest.mark.parametrize("kind", ["separate", "frozen", "shared"])
def test_the_trunk_of_the_value_is_the_trunk_of_the_policy(material, kind):
    batch = batch_of(material, np.arange(6))
    model, made, _ = small_critic(material, value=kind)
    states = model.causal_lm.model(input_ids=batch.x_BT, use_cache=False, output_hidden_states=True).hidden_states
    evidence_BT = made.value.heads.layers[0](batch.x_BT, states[len(model.trunk_layers)])
    expected = torch.zeros_like(evidence_BT)
    for b, t in np.ndindex(*expected.shape):  # from the last token of the prompt on
        counts = value.prefixes(batch)[b]
        expected[b, t] = sum(evidence_BT[b, i] for i in range(t + 1) if counts[i])
    torch.testing.assert_close(made.logits(batch, run_policy=True), expected, rtol=1e-5, atol=1e-5)


def test_evidence_looks_at_the_last_six_tokens_and_no_further(material):
    """With the trunk's state held still: a token changes what is said of it and of the five after it, and nothing before."""
    _, made, _ = small_critic(material)
    x_BT, state_BTD = torch.randint(3, 259, (1, 20), generator=torch.Generator().manual_seed(0)), torch.zeros(1, 20, 32)
    other_BT = x_BT.clone()
    other_BT[0, 7] += 1
    with torch.no_grad():
        changed = made.value.heads.layers[0](x_BT, state_BTD) != made.value.heads.layers[0](other_BT, state_BTD)
    assert changed[0].nonzero().flatten().tolist() == [7, 8, 9, 10, 11, 12]


# --------------------------------------------------------------------------------------------------------------- judgement
def test_area_equals_all_pairs():
    generator = np.random.default_rng(0)
    for _ in range(20):
        score, positive = generator.integers(0, 6, 30), generator.random(30) < 0.4
        pairs = [(p > n) + (p == n) / 2 for p in score[positive] for n in score[~positive]]
        assert outcomes_area(score, positive) == pytest.approx(np.mean(pairs))
    assert outcomes_area([1.0] * 5, [1, 0, 1, 0, 0]) == 0.5 and math.isnan(outcomes_area([1.0], [1]))


def outcomes_area(score, positive):
    return value.area(score, positive)


def test_a_planted_value_is_judged_by_where_it_was_planted(some_bugs, material, monkeypatch):
    monkeypatch.setattr(data, "_stdlib", lambda: some_bugs[0])
    loaded, tokenizer = rows_of("stdlib-bugs", 256), common.load_tokenizer(None)
    rows, length = loaded.heldout[:], 256
    perfect, late = np.full((2, len(rows["reward"]), length), 0.9)
    for i, record in enumerate(loaded.heldout_records):
        if record["reward"] == 0:
            start = int(rows["is_target"][i].argmax())
            perfect[i, start + len(record["completion"][: record["fault_start"]].encode()) :] = 0.1
            late[i, start + rows["is_target"][i].sum() - 1 :] = 0.1
    found = value.judge(perfect, loaded, tokenizer)
    assert found["auc"] == found["pairs"] == found["fault_token"] == found["fault_line"] == 1
    assert 0 < found["fault_token_chance"] < 0.3 and found["fault_token_chance"] < found["fault_line_chance"] < 1
    assert found["auc_position"] == pytest.approx(0.5, abs=0.12)
    wrong = [r for r in loaded.heldout_records if r["reward"] == 0]
    chance = [(r["fault_end"] - r["fault_start"]) / (len(r["completion"]) + 1) for r in wrong]
    assert found["fault_token_chance"] == pytest.approx(np.mean(chance), rel=0.05)  # bytes are characters nearly everywhere
    found = value.judge(late, loaded, tokenizer)  # the drop comes with the end of sequence, which is in no fault
    assert found["auc"] == 1 and found["fault_token"] == found["fault_line"] == 0
    found = value.judge(np.full_like(late, 0.5), loaded, tokenizer)
    assert found["auc"] == found["pairs"] == 0.5


# --------------------------------------------------------------------------------------------------------------- whole runs
KINDS = [dict(), dict(value="frozen", control="random"), dict(value="shared", max_weight=1.5)]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_full_regularisation_is_the_baseline_to_the_last_bit(material, tmp_path, changes):
    if not (material / "baseline").exists():
        assert run(baseline_mtp, flags(material, material / "baseline")) == 0
    assert critic(material, tmp_path / "run", **{"lambda": 1}, **changes) == 0
    assert training_of(tmp_path / "run") == metrics_of(material / "baseline")
    same_files(tmp_path / "run", material / "baseline", ["model/model.safetensors", "model/mtp_heads.safetensors"])
    if changes == KINDS[0]:
        assert critic(material, tmp_path / "other", **changes | {"lambda": 0.5}) == 0
        assert training_of(tmp_path / "other") != metrics_of(material / "baseline")


def test_only_the_algorithm_differs_from_the_baseline():
    one, other = ((ROOT / f"{name}.py").read_text().splitlines() for name in ("baseline_mtp", "critic_wmtp"))
    assert len(other) <= 450
    where, gone, new, stage = None, [], [], False
    for line in difflib.ndiff(one, other):
        text = line[2:]
        if text.startswith("# -----") and line.startswith("+ "):
            stage = True  # stage 1
        if text.startswith(("@dataclass", "    # Algorithm specific", "# -----")) and not line.startswith("?"):
            where, stage = text, stage and line.startswith("+ ")
        if stage or (where and "# Algorithm specific" in where):
            continue
        if where and where.endswith(" main") or (where or "").startswith("@dataclass"):
            if line.startswith("- "):
                gone.append(text)
            elif line.startswith("+ ") and text.strip():
                new.append(text)
    help_of_data = [line for line in new if line.startswith('    """')]
    assert len(help_of_data) == 1 and "ConDefects" in help_of_data[0]
    new = [line for line in new if line not in help_of_data]
    assert new and all("# ALGO LOGIC" in line for line in new), [line for line in new if "# ALGO LOGIC" not in line]
    for line in gone:  # what went comes again, with the critic in it
        begins = re.match(r"\W*(\w+)", line)[1]
        assert line.startswith('    """') or any(begins in other for other in new), line
    functions = [re.search(rf"^def {n}\(.*?(?=\n\n\n)", "\n".join(s), re.S | re.M)[0] for s in (one, other)
                 for n in ("weights_of_targets", "learning_rate")]  # fmt: skip
    assert functions[:2] == functions[2:]


def test_stage_1_learns_what_can_be_learnt_and_a_saved_head_skips_it(material, tmp_path, capsys):
    """Descending words are right, ascending ones wrong: a value on a trunk of its own tells them apart on held-out prompts."""
    choose, made = random.Random(1), []
    for number in range(150):
        letters = "".join(sorted(choose.sample("abcdefgh", 4)))
        made += [dict(prompt=f"{number}:", completion=text, reward=reward) for text, reward in ((letters, 0), (letters[::-1], 1))]
    file = write(tmp_path / "letters.jsonl", made)
    options = dict(data=file, seq_len=16, value_steps=30, max_steps=2, batch_size=16, value_lr=3e-3, value_batches=1)
    assert critic(material, tmp_path / "run", pair_coef=0, **options) == 0
    judged = [line for line in metrics_of(tmp_path / "run") if "value/auc" in line]
    assert [line["step"] for line in judged] == [30] and judged[0]["value/auc"] > 0.95 and judged[0]["value/pairs"] > 0.95
    assert judged[0]["value/auc_position"] == 0.5  # all are of one length
    losses = [line["value/loss"] for line in metrics_of(tmp_path / "run") if "value/loss" in line]
    assert len(losses) == 30 and losses[0] == pytest.approx(math.log(2), rel=1e-4) and losses[-1] < 0.6
    assert "no better than the position" not in capsys.readouterr().out
    head = tmp_path / "run/value_head.safetensors"
    assert critic(material, tmp_path / "again", value_head=head, **options | dict(pair_coef=0)) == 0
    assert training_of(tmp_path / "again") == training_of(tmp_path / "run")
    assert (tmp_path / "again/weights.json").read_text() == (tmp_path / "run/weights.json").read_text()
    assert not any("value/loss" in line for line in metrics_of(tmp_path / "again"))  # no stage 1, and none in stage 2
    same_files(tmp_path / "again", tmp_path / "run", ["value_head.safetensors"])  # a separate value stays as it is
    assert critic(material, tmp_path / "wrong", value_head=head, value="frozen", **options) == 2
    assert "holds a value of --value separate, not frozen" in capsys.readouterr().err
    few = options | dict(value_steps=1, max_steps=1)
    assert critic(material, tmp_path / "pairs", **few) == 0  # both losses, siblings side by side
    pairs = [line for line in metrics_of(tmp_path / "pairs") if "value/loss" in line]
    assert pairs[0]["value/loss"] == pytest.approx(2 * math.log(2), rel=1e-4)
    assert critic(material, tmp_path / "odd", **few | dict(micro_batch_size=1)) == 0
    odd = [line for line in metrics_of(tmp_path / "odd") if "value/loss" in line]
    assert odd[0] == pytest.approx(pairs[0], rel=1e-5)


def test_a_value_no_better_than_a_constant_is_told(material, tmp_path, capsys):
    """All records of a prompt have one outcome, so nothing that is learnt of the prompts of training holds for others."""
    made = [dict(prompt=f"{n}:", completion="same", reward=n % 2) for n in range(80)]
    assert critic(material, tmp_path / "run", data=write(tmp_path / "same.jsonl", made), value_lr=0, max_steps=1) == 0
    assert "warning   V tells the outcome no better than" in capsys.readouterr().out
    [judged] = [line for line in metrics_of(tmp_path / "run") if "value/auc" in line]
    assert "value/pairs" not in judged and "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_an_update_without_targets_has_no_figures(material, tmp_path):
    made = [dict(prompt=f"{n}:", completion="text", reward=n % 2) for n in range(40)]
    file, steps = write(tmp_path / "half.jsonl", made), 12
    assert run(baseline_mtp, flags(material, tmp_path / "run", data=file, batch_size=1, max_steps=steps)) == 0
    rows = rows_of(file).train
    lines = {line["step"]: line for line in metrics_of(tmp_path / "run") if "train/lr" in line}
    empty = [step for step in range(steps) if rows[data.batch_rows(len(rows), 1, 0, step)]["reward"][0] == 0]
    assert 0 < len(empty) < steps and len(lines) == steps
    for step in range(steps):
        assert ("train/loss" in lines[step + 1], "weights/mean" in lines[step + 1]) == (step not in empty,) * 2
        assert "train/loss_head_2" in lines[step + 1] or step in empty


def test_a_stop_in_the_last_update_of_stage_1_keeps_stage_2_from_beginning(material, tmp_path, monkeypatch, capsys):
    plain = critic_wmtp.learning_rate

    def stopping(step, args):
        if args.max_steps == 5 and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(step, args)

    monkeypatch.setattr(critic_wmtp, "learning_rate", stopping)
    assert critic(material, tmp_path / "run") == 0
    assert "after update 5 of 5 of stage 1, saved; the same command goes on" in capsys.readouterr().out
    assert not any("train/loss" in line for line in metrics_of(tmp_path / "run"))
    monkeypatch.setattr(critic_wmtp, "learning_rate", plain)
    assert critic(material, tmp_path / "run") == 0 and critic(material, tmp_path / "straight") == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "straight")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_of_v_that_is_not_finite_is_never_stepped(material, tmp_path, monkeypatch, capsys, stage):
    """Its loss is finite. The same command, with nothing broken any more, ends as the run that never was."""
    plain, calls = critic_wmtp.value_loss, []

    def breaking(logit_BT, *rest):
        calls.append(logit_BT)
        if len(calls) == (3 if stage == 1 else 5 + 3):  # an update is one call
            logit_BT.register_hook(lambda gradient: gradient * torch.inf)
        return plain(logit_BT, *rest)

    monkeypatch.setattr(critic_wmtp, "value_loss", breaking)
    assert critic(material, tmp_path / "run", value="frozen", value_batches=1) == 1
    assert "update 3" in (said := capsys.readouterr().out) and "gradient not finite; nothing was stepped" in said
    monkeypatch.setattr(critic_wmtp, "value_loss", plain)
    assert critic(material, tmp_path / "run", value="frozen", value_batches=1) == 0
    if not (material / "straight frozen").exists():
        assert critic(material, material / "straight frozen", value="frozen", value_batches=1) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(material / "straight frozen")


def test_a_bad_value_head_leaves_the_run_folder_free(material, tmp_path):
    assert critic(material, tmp_path / "run", value_head=tmp_path / "nothing.safetensors") == 2
    assert not (tmp_path / "run/args.json").exists()
    assert critic(material, tmp_path / "run", max_steps=1, value_steps=1) == 0


def test_the_sample_holds_weights_and_values_of_correct_heldout_rows(material, tmp_path):
    assert critic(material, tmp_path / "run") == 0
    sample = json.loads((tmp_path / "run/weights.json").read_text())
    loaded = rows_of(material / "records.jsonl")
    assert 1 <= len(sample) <= 3
    weights = []
    for row in sample:
        there = loaded.heldout[row["row"]]
        assert there["reward"] == 1 and row["ids"] == there["input_ids"].tolist()
        targets = there["is_target"].copy()
        assert [w is not None for w in row["weight"]] == targets.tolist()
        prefix = targets | np.append(targets[1:], False)
        assert [v is not None for v in row["value"]] == prefix.tolist()
        assert all(0 < v < 1 for v in row["value"] if v is not None)
        weights += [w for w in row["weight"] if w is not None]
    assert np.mean(weights) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("stop_in", ["stage 1", "stage 2"])
def test_stopped_in_either_stage_and_resumed_equals_straight(material, tmp_path, monkeypatch, kind, stop_in):
    if stop_in == "stage 1" and kind == "shared":
        pytest.skip("has no stage 1")
    straight = material / f"straight {kind}"
    if not straight.exists():
        assert critic(material, straight, value=kind, pair_coef=0.5) == 0
    plain, calls = critic_wmtp.learning_rate, []

    def stopping(step, args):
        stage = "stage 1" if args.max_steps == 5 else "stage 2"
        calls.append(stage)
        if stage == stop_in and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(step, args)

    monkeypatch.setattr(critic_wmtp, "learning_rate", stopping)
    assert critic(material, tmp_path / "run", value=kind, pair_coef=0.5) == 0
    assert not (tmp_path / "run/model").exists() and calls[-1] == stop_in
    monkeypatch.setattr(critic_wmtp, "learning_rate", plain)
    assert critic(material, tmp_path / "run", value=kind, pair_coef=0.5) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(straight)
    same_files(tmp_path / "run", straight)


@pytest.mark.slow  # five processes
def test_killed_between_saves_and_resumed_equals_straight(material, tmp_path):
    """SIGKILL in stage 1 and again in stage 2, in processes of their own."""

    def start(name):
        words = flags(material, tmp_path / name, value_steps=12, max_steps=12, value="frozen")
        command = [sys.executable, str(ROOT / "critic_wmtp.py"), *words]
        return subprocess.Popen(command, env=environment(material), stdout=subprocess.PIPE, text=True)

    straight, killed, metrics = start("straight"), start("killed"), tmp_path / "killed/metrics.jsonl"
    for part in (b'"value/loss"', b'"train/loss"'):
        deadline = time.time() + 120
        while not (metrics.exists() and metrics.read_bytes().count(part) >= 5):
            assert killed.poll() is None and time.time() < deadline
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert not (tmp_path / "killed/model").exists(), "the run ended before it could be killed"
        killed = start("killed")
    assert "resume    from" in killed.communicate(timeout=120)[0] and killed.returncode == 0
    straight.communicate(timeout=120)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "straight")
    same_files(tmp_path / "killed", tmp_path / "straight")


def environment(material):
    words = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return os.environ | words | {"HF_DATASETS_CACHE": str(material / "cache")}


# ---------------------------------------------------------------------------------------------------------------- two ranks
RUNS = {
    "separate": dict(value="separate"),
    "shared": dict(value="shared", control="shuffle", train_on="all"),
    "frozen": dict(value="frozen", mtp_schedule="forward"),
}
SHORT = dict(value_steps=3, max_steps=4)


def on_two_ranks(material, ports):
    """What each of two processes does: runs, and weights of a batch of which the ranks hold uneven shares."""
    for name, changes in RUNS.items():
        os.environ["MASTER_PORT"] = ports.pop()
        changes = changes | SHORT | {"micro_batch_size": 2 if name != "frozen" else 4}
        assert critic(material, material / f"two {name}", **changes) == 0
    os.environ["MASTER_PORT"] = ports.pop()
    ranks = common.setup_ranks("cpu", "fp32")
    batch, value_BT, _ = uneven(material, ranks.rank)
    found = [weights_of(value_BT, batch, ranks=ranks, control=control) for control in ("none", "shuffle")]
    torch.save(found, material / f"weights.{ranks.rank}")


def uneven(material, rank=None):
    """Rows of which the second rank holds the wrong ones alone, so that it has no target; all rows without a rank."""
    rows = rows_of(material / "records.jsonl").train
    reward = np.array(rows["reward"][:])
    numbers = np.concatenate([np.flatnonzero(reward == 1)[:3], np.flatnonzero(reward < 0.5)[:3]])
    generator = torch.Generator().manual_seed(3)
    value_BT = torch.rand((6, LENGTH), generator=generator)
    own = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
    return data.load_batch(rows, numbers[own], 3, "cpu"), value_BT[own], numbers


@pytest.fixture(scope="module")
def two_ranks(material):
    rows_of(material / "records.jsonl")
    sockets = [socket.create_server(("localhost", 0)) for _ in range(1 + len(RUNS))]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    command, processes = [sys.executable, __file__, str(material), *ports], []
    for rank in "01":
        env = environment(material) | dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost")
        with open(material / f"printed.{rank}", "w") as out:
            processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], [(material / f"printed.{rank}").read_text()[-3000:] for rank in "01"]
    return material


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one(two_ranks, name):
    changes = RUNS[name] | SHORT | {"micro_batch_size": 4 if name != "frozen" else 8}
    assert critic(two_ranks, two_ranks / f"one {name}", **changes) == 0
    a, b = metrics_of(two_ranks / f"one {name}"), metrics_of(two_ranks / f"two {name}")
    assert len(a) == len(b)
    for one, other in zip(a, b):
        if "value/auc" in one or "value_end/auc" in one:  # ranks of nearly equal values may change places
            assert other.keys() == one.keys()
        else:
            assert other == pytest.approx(one, rel=2e-3, abs=1e-4)


def test_a_rank_without_targets_has_its_say_in_nothing(two_ranks):
    batch, value_BT, _ = uneven(two_ranks)
    for i, control in enumerate(("none", "shuffle")):
        both = torch.cat([torch.load(two_ranks / f"weights.{rank}")[i] for rank in (0, 1)])
        assert torch.equal(both, weights_of(value_BT, batch, control=control))


# ---------------------------------------------------------------------------------------------------------------- bad input
def bad_files(folder):
    one = dict(prompt="a", completion="b")
    write(folder / "none.jsonl", [one | dict(prompt=str(n)) for n in range(60)])
    write(folder / "equal.jsonl", [one | dict(prompt=str(n), reward=1) for n in range(60)])
    write(folder / "outside.jsonl", [one | dict(prompt=str(n), reward=n / 2) for n in range(60)])
    write(folder / "some.jsonl", [one | dict(prompt=str(n), reward=None if n == 4 else n % 2) for n in range(60)])
    write(folder / "words.jsonl", [one | dict(prompt=str(n), reward="good") for n in range(60)])
    write(folder / "wrong.jsonl", [one | dict(prompt=str(n), reward=n % 2 / 2) for n in range(60)])
    write(folder / "siblings.jsonl", [one | dict(completion=str(n), reward=n % 2) for n in range(60)])
    write(folder / "short.jsonl", [one | dict(prompt=str(n), reward=n % 2) for n in range(60)])
    (folder / "bytes.txt").write_text("some text\n" * 100)


BAD = [
    (dict(data="none.jsonl"), ["none.jsonl", "no rewards", "--reward-model"]),
    (dict(data="bytes.txt"), ["bytes.txt", "no rewards", "--reward-model"]),
    (dict(data="equal.jsonl"), ["equal.jsonl", "rewards are 1"]),
    (dict(data="outside.jsonl"), ["record 4", "1.5", "from 0 to 1"]),
    (dict(data="some.jsonl"), ["record 5 has no reward", "--reward-model"]),
    (dict(data="words.jsonl"), ["reward", "numbers from 0 to 1"]),
    (dict(data="wrong.jsonl"), ["no train record", "above 0.5"]),
    (dict(data="siblings.jsonl"), ["siblings.jsonl", "one prompt"]),
    (dict(data="short.jsonl"), ["short.jsonl", "training row 1", "of 1 token(s)", "at least 2"]),
    (dict(value="shared", value_coef=0), ["--value-coef 0", "--value shared"]),
    (dict(data="none.jsonl", reward_model="three"), ["--reward-model", "3 outputs", "1 (a logit) or 2"]),
    (dict(data="none.jsonl", reward_model="causal"), ["--reward-model", "score.weight", "no trained classifier"]),
    (dict(data="none.jsonl", reward_model="nothing"), ["--reward-model", "cannot be read"]),
    (dict(value_head="nothing.safetensors"), ["--value-head", "cannot be read"]),
    ({"lambda": 1.5}, ["--lambda 1.5", "from 0 to 1"]),
    (dict(gae_lambda=-0.1), ["--gae-lambda -0.1", "from 0 to 1"]),
    (dict(temperature=0), ["--temperature 0", "from 1e-06"]),
    (dict(value_coef=-1), ["--value-coef -1", "from 0"]),
    (dict(condition_on_outcome=True), ["--condition-on-outcome", "--lambda 1 --train-on all"]),
]


@pytest.mark.parametrize("changes, words", BAD, ids=[str(c) for c, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(material, tmp_path, capsys, changes, words):
    if not (material / "none.jsonl").exists():
        bad_files(material)
        reward_model(material / "three", 3)
        reward_model(material / "causal", 1, causal=True)
    changes = {k: material / v if k in ("data", "reward_model", "value_head") else v for k, v in changes.items()}
    assert critic(material, tmp_path / "run", **changes) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_completion_of_one_token_gets_the_outcome_less_the_value_of_its_prompt():
    value_BT, completion_BT = torch.tensor([[0.2, 0.3, 0.9, 0.9]]), torch.tensor([[False, False, True, False]])
    found = critic_wmtp.advantages(value_BT, torch.tensor([1.0]), completion_BT, 1.0, 0.95)
    assert found.tolist() == [[0, 0, pytest.approx(0.7), 0]]


def test_conditioning_on_the_outcome_trains_on_all_with_tags(material, tmp_path):
    changes = {"lambda": 1, "condition_on_outcome": True, "train_on": "all", "seq_len": 48}
    assert critic(material, tmp_path / "run", **changes) == 0
    lines = metrics_of(tmp_path / "run")
    assert not any(key.startswith("value/") for line in lines for key in line)
    loaded = rows_of(material / "records.jsonl", 48, tagged=True)
    batches = data.micro_batches(loaded.train, 8, 8, 0, 0, 4, common.Ranks(), train_on="all")
    torch.manual_seed(0)
    model, _ = common.build_model(str(material / "config.json"), 4)
    loss_KBT, count = model(batches[0].x_BT, batches[0].targets_KBT), (batches[0].targets_KBT != IGNORE).sum((1, 2))
    assert lines[0]["train/loss_head_1"] == pytest.approx((loss_KBT[0].sum() / count[0]).item(), rel=1e-5)


if __name__ == "__main__":
    on_two_ranks(Path(sys.argv[1]), sys.argv[2:])
