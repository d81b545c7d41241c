"""rho1_wmtp.py: weights against a slow loop, the baseline, a plain model; file of reference losses; runs, ranks, bad input."""

import dataclasses
import difflib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import tyro

import baseline_mtp
import common
import data
import reference as reference_file
import rho1_wmtp
from common import IGNORE
from test_run import CONFIG

ROOT = Path(__file__).parents[1]
LENGTH = 32


def flags(material, folder, **changes):
    """Command line of a short run on the small material."""
    values = dict(
        run_dir=folder, model=material / "config.json", data=material / "text.jsonl", seq_len=LENGTH, batch_size=8, lr=3e-3,
        warmup_steps=2, max_steps=6, mtp_schedule="constant", tracker="none", device="cpu", dtype="fp32", save_every=2,
        noise_frac=0.3,
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


def metrics_of(run_dir, without=("perf/",)):
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(without)} for line in lines]


def args_of(**changes):
    return rho1_wmtp.Args(**(dict(ref_model="none", mode="weighted") | changes))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A small configuration, texts and records, references (of 1 and of 4 heads), a baseline run, a cache of their own."""
    folder = tmp_path_factory.mktemp("rho1")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    words = "def return for in if x y total ( ) : + = 0 1".split()
    choose = random.Random(0)
    line = lambda: " ".join(choose.choices(words, k=5)) + "\n"  # noqa: E731
    texts = ["".join(line() for _ in range(choose.randint(3, 12))) for _ in range(60)]
    other = ["".join(line() for _ in range(choose.randint(3, 12))) for _ in range(60)]
    for name, some in (("text", texts), ("other", other)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some))
    records = [{"prompt": line()[: choose.randint(1, 12)], "completion": line()[: choose.randint(1, 14)]} for _ in range(60)]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    clean = dict(data=folder / "other.jsonl", noise_frac=0.0, max_steps=30, seed=1)
    assert run(baseline_mtp, flags(folder, folder / "reference", num_heads=1, **clean)) == 0
    assert run(baseline_mtp, flags(folder, folder / "reference4", **clean)) == 0
    assert run(baseline_mtp, flags(folder, folder / "baseline")) == 0
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def rho1(material, folder, **changes):
    return run(rho1_wmtp, flags(material, folder, **{"ref_model": material / "reference", "mode": "weighted"} | changes))


def rows_of(material, name="text", noise_frac=0.3):
    tokenizer = common.load_tokenizer(None)
    return data.load_data(str(material / f"{name}.jsonl"), tokenizer, LENGTH, 0, noise_frac, common.Ranks())


def batch_of(material, numbers, num_heads, name="records"):
    return data.load_batch(rows_of(material, name).train, np.asarray(numbers), num_heads, "cpu")


# ------------------------------------------------------------------------------------------------------------- the weights
def slow_weights(loss_N, ref_N, args):
    """Weights of the valid targets by the formulas of DESIGN and of the paper, in Python's own float64."""
    score = []
    for loss, ref in zip(loss_N, ref_N):
        s = {"excess": loss - ref, "abs": abs(loss - ref), "reference": -ref, "loss": loss}[args.score]
        score.append(0.0 if abs(s) < args.min_excess else s)
    N = len(score)
    if args.mode == "token_skip":
        order = sorted(range(N), key=lambda i: (-score[i], i))
        kept = set(order[: max(1, N - round(args.skip_ratio * N))])
        u = [N / len(kept) if i in kept else 0.0 for i in range(N)]
    else:
        exponents = [math.exp((s - max(score)) / args.temperature) for s in score]
        u = [min(max(N * e / sum(exponents), args.epsilon), args.max_weight) for e in exponents]
        u = [N * value / sum(u) for value in u]
    return [args.lambda_ + (1 - args.lambda_) * value for value in u]


VARIANTS = [
    dict(), dict(lambda_=0.0), dict(temperature=0.1, epsilon=0.2, max_weight=1.5), dict(score="abs"), dict(score="reference"),
    dict(score="loss"), dict(min_excess=0.5), dict(mode="token_skip"), dict(mode="token_skip", skip_ratio=0.45, lambda_=0.2),
    dict(mode="token_skip", score="abs", min_excess=0.8), dict(score_heads="each"), dict(score_heads="each", mode="token_skip"),
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_and_objective_equal_a_slow_loop(material, changes):
    """Records with masked prompts and padding, 4 heads: the weight of token t+k, and the whole objective, term by term."""
    args, H = args_of(**changes), 4
    batch = batch_of(material, range(7), H)
    K = H if args.score_heads == "each" else 1
    generator = torch.Generator().manual_seed(0)
    loss_KBT, ref_KBT = (torch.rand(k, 7, LENGTH, generator=generator) * 4 for k in (H, K))
    valid = batch.targets_KBT != IGNORE
    loss_KBT *= valid
    weight_KBT, _ = rho1_wmtp.target_weights(loss_KBT, ref_KBT, batch, (0, 0, 1), args, common.Ranks())
    places = [[(b, t) for b in range(7) for t in range(LENGTH) if valid[k, b, t]] for k in range(H)]
    slow = []  # of each head that is scored: weight by place
    for k in range(K):
        of = [[x[k, b, t].item() for b, t in places[k]] for x in (loss_KBT, ref_KBT)]
        slow.append(dict(zip(places[k], slow_weights(*of, args))))
    expected = 0.0
    for k in range(H):
        assert places[k], "a head without a target tests nothing"
        for b, t in places[k]:
            w = slow[k][b, t] if K == H else slow[0][b, t + k]  # head 1 predicts token t+k+1 (k from 0) at t+k
            assert weight_KBT[k, b, t].item() == pytest.approx(w, abs=2e-5), (k, b, t)
            expected += w * loss_KBT[k, b, t].item() / len(places[0])
    assert ((weight_KBT * loss_KBT).sum() / len(places[0])).item() == pytest.approx(expected, rel=1e-5)
    mean = weight_KBT[0][valid[0]].double().mean().item()
    assert mean == pytest.approx(1, abs=1e-6)


def test_no_gradient_goes_through_the_weights(material):
    batch = batch_of(material, range(4), 4)
    loss_KBT = torch.rand(4, 4, LENGTH, requires_grad=True)
    ref_KBT = torch.rand(4, 4, LENGTH)
    for changes in VARIANTS:
        args = args_of(**changes)
        K = 4 if args.score_heads == "each" else 1
        weight_KBT, told = rho1_wmtp.target_weights(loss_KBT, ref_KBT[:K], batch, (0, 0, 1), args, common.Ranks())
        assert not weight_KBT.requires_grad and not told.requires_grad
        (grad,) = torch.autograd.grad((weight_KBT * loss_KBT).sum(), loss_KBT)
        assert torch.equal(grad, weight_KBT)


@pytest.mark.parametrize("changes", [dict(), dict(mode="token_skip"), dict(score="reference"), dict(score="loss")], ids=str)
def test_a_constant_added_to_all_scores_changes_nothing(changes):
    args, generator = args_of(**changes), torch.Generator().manual_seed(0)
    loss_N, ref_N = torch.rand(2, 500, generator=generator) * 4
    score_N = (rho1_wmtp.token_scores(loss_N, ref_N, args) * 64).round() / 64  # ties too; and sums without rounding
    for shift in (-3.0, 0.5, 64.0):
        before, after = (rho1_wmtp.weights_of_scores(s, (0,), args) for s in (score_N, score_N + shift))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", [0, 0.001, 0.25, 0.3, 0.4, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 10, 101])
def test_selection_keeps_the_exact_count_whatever_the_ties(number, ratio):
    generator = torch.Generator().manual_seed(number)
    for score_N in (torch.rand(number, generator=generator), torch.zeros(number), torch.arange(number) // 3 * 1.0):
        kept_N = rho1_wmtp.select(score_N, ratio)
        assert kept_N.sum() == (max(1, number - round(ratio * number)) if number else 0)
        for i in range(number):
            for j in range(number):
                if kept_N[i] and not kept_N[j]:
                    assert score_N[i] > score_N[j] or (score_N[i] == score_N[j] and i < j)


def test_the_control_shuffle_permutes_and_random_draws_by_seed_and_step():
    score_N = torch.randn(400, generator=torch.Generator().manual_seed(0))
    for mode in ("weighted", "token_skip"):
        plain, shuffled, again, later, drawn = (
            rho1_wmtp.weights_of_scores(score_N, key, args_of(mode=mode, control=control))
            for control, key in (
                ("none", (0, 5, 1)), ("shuffle", (0, 5, 1)), ("shuffle", (0, 5, 1)), ("shuffle", (0, 6, 1)), ("random", (0, 5, 1))
            )
        )  # fmt: skip
        assert torch.equal(shuffled.sort().values, plain.sort().values) and not torch.equal(shuffled, plain)
        assert torch.equal(shuffled, again) and not torch.equal(shuffled, later)
        assert drawn.mean().item() == pytest.approx(1, abs=1e-5)
        distinct = plain.unique()
        if mode == "token_skip":
            distinct = distinct[distinct > 0]
        scales = (
            drawn[drawn > 0][:, None] / distinct
        )  # one factor, which makes the mean 1, takes each to a weight of the plain ones
        factor = scales[0][(scales[0] - 1).abs() < 0.2]
        assert any(((scales / f - 1).abs().amin(1) < 1e-4).all() for f in factor)
        correlation = np.corrcoef(shuffled.numpy(), plain.numpy())[0, 1]
        assert abs(correlation) < 0.2


def test_noise_auc_equals_all_pairs():
    generator = torch.Generator().manual_seed(0)
    for levels in (3, 1000):
        score = torch.randint(0, levels, (200,), generator=generator).double()
        noise = (torch.rand(200, generator=generator) < 0.3).double()
        pairs = [1.0 if n < c else 0.5 if n == c else 0.0 for n in score[noise > 0].tolist() for c in score[noise == 0].tolist()]
        assert rho1_wmtp.noise_auc(score, noise) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


# -------------------------------------------------------------------------------------------------------------- equal runs
def test_only_the_algorithm_differs_from_the_baseline():
    """The docstring, imports, tail of Args and weight functions aside, every other line is the baseline's or is marked."""
    one, other = ((ROOT / f"{m.__name__}.py").read_text().splitlines() for m in (baseline_mtp, rho1_wmtp))
    gone, new, where = [], [], None
    for line in difflib.ndiff(one, other):
        text = line[2:]
        if text.startswith(("@dataclass", "    # Algorithm specific", "# -----")) and not line.startswith("?"):
            where = text
        if where and "# Algorithm specific" in where:
            continue
        if where and where.endswith(" main") or (where or "").startswith("@dataclass"):
            if line.startswith("- "):
                gone.append(text.strip())
            elif line.startswith("+ ") and text.strip():
                new.append(text)
    assert new and all("# ALGO LOGIC: " in line or line.endswith("# ALGO LOGIC") for line in new), new
    assert len(gone) == 2 and all(line.startswith(("weight_BT = ", "weight_KBT = ")) for line in gone), gone
    functions = [re.search(rf"^def {n}\(.*?(?=\n\n\n)", "\n".join(s), re.S | re.M)[0] for s in (one, other)
                 for n in ("weights_of_targets", "learning_rate")]  # fmt: skip
    assert functions[:2] == functions[2:]


@pytest.mark.parametrize("changes", [
    {"lambda": 1}, {"lambda": 1, "mode": "token_skip"}, {"lambda": 1, "control": "random"},
    {"skip_ratio": 0, "mode": "token_skip"}, {"skip_ratio": 0, "mode": "token_skip", "lambda": 0.3, "control": "shuffle"},
], ids=str)  # fmt: skip
def test_full_regularisation_and_no_skipping_are_the_baseline_to_the_last_bit(material, tmp_path, changes):
    assert rho1(material, tmp_path / "run", **changes) == 0
    own = ("rho1/", "weights/on_", "perf/")
    assert metrics_of(tmp_path / "run", own) == metrics_of(material / "baseline")
    assert "rho1/excess_mean" in metrics_of(tmp_path / "run")[0]
    weights = [common.load_file(f / "model/model.safetensors") for f in (tmp_path / "run", material / "baseline")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[1])


def test_a_reference_equal_to_the_model_gives_equal_weights(material, tmp_path):
    for name, changes in (("stored", {}), ("online", {"ref_online": True})):
        words = dict(model=material / "reference", max_steps=1) | changes
        assert rho1(material, tmp_path / name, **words, **{"lambda": 0}) == 0
        line = metrics_of(tmp_path / name)[0]
        assert abs(line["rho1/excess_mean"]) < 1e-6
        assert line["weights/max"] == pytest.approx(1, abs=2e-5) and line["weights/ess_frac"] == pytest.approx(1, abs=1e-6)


def test_losses_from_the_file_and_online_give_the_same_run(material, tmp_path):
    assert rho1(material, tmp_path / "file", micro_batch_size=4) == 0
    assert rho1(material, tmp_path / "online", micro_batch_size=4, ref_online=True) == 0
    for a, b in zip(metrics_of(tmp_path / "file"), metrics_of(tmp_path / "online")):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_the_whole_run_equals_a_plain_loop(material, tmp_path):
    """First update of token_skip with 1 head: a plain model, a plain reference, cross entropy and SGD-free AdamW of torch."""
    assert rho1(material, tmp_path / "run", num_heads=1, mode="token_skip", max_steps=3) == 0
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    reference = transformers.AutoModelForCausalLM.from_pretrained(material / "reference/model")
    decayed, plain = ([p for n, p in model.named_parameters() if ("norm" in n) == norm] for norm in (False, True))
    groups = [dict(params=decayed, weight_decay=0.1), dict(params=plain, weight_decay=0.0)]
    optimizer, train, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95)), rows_of(material).train, []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * ((step + 1) / 2 if step < 2 else 1)
        rows = train[data.batch_rows(len(train), 8, 0, step)]
        x, document = torch.tensor(rows["input_ids"]).long(), torch.tensor(rows["document"])
        same = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
        logits, target = model(input_ids=x).logits[:, :-1][same], x[:, 1:][same]
        loss = F.cross_entropy(logits, target, reduction="none")
        with torch.no_grad():
            excess = loss - F.cross_entropy(reference(input_ids=x).logits[:, :-1][same], target, reduction="none")
        kept = excess.argsort(descending=True, stable=True)[: len(loss) - round(0.3 * len(loss))]
        objective = loss[kept].mean()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(objective.item())
    assert [line["train/loss"] for line in metrics_of(tmp_path / "run")[:3]] == pytest.approx(losses, rel=2e-5)


@pytest.fixture(scope="module")
def straight(material):
    """Runs on one rank from start to end that the others must equal: settings, and the folder of each."""
    settings = {
        "weighted": dict(micro_batch_size=0),
        "selection": dict(mode="token_skip", control="shuffle", data=material / "records.jsonl", noise_frac=0.0),
        "each": dict(score_heads="each", ref_model=material / "reference4", mtp_schedule="forward"),
    }
    for name, changes in settings.items():
        assert rho1(material, material / f"straight {name}", **changes) == 0
    return settings


@pytest.mark.slow  # three processes
def test_killed_and_resumed_equals_straight(material, tmp_path):
    """Killed within the updates; the run that goes on has the figures, weights and sample of the straight one, bit for bit.

    Both start at once, without a file of reference losses, and so make it together.
    """

    def start(name):
        command = [
            sys.executable,
            str(ROOT / "rho1_wmtp.py"),
            *flags(material, tmp_path / name, ref_model=material / "reference"),
        ]
        return subprocess.Popen(command, env=environment(material), stdout=subprocess.PIPE, text=True)

    for file in (material / "cache/wmtp").glob("*.f32"):
        file.unlink()
    straight, killed = start("straight"), start("killed")
    metrics, deadline = tmp_path / "killed/metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):  # the save of step 4 waits for that of step 2
        assert killed.poll() is None and time.time() < deadline
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed/model").exists(), "the run ended before it could be killed"
    resumed = start("killed")
    assert "resume    from" in resumed.communicate(timeout=120)[0] and resumed.returncode == 0
    straight.communicate(timeout=120)
    assert straight.returncode == 0
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "straight")
    a, b = (tmp_path / name for name in ("killed", "straight"))
    assert (a / "weights.json").read_bytes() == (b / "weights.json").read_bytes()
    for file in ("model.safetensors", common.HEADS_FILE):
        one, other = (common.load_file(run_dir / "model" / file) for run_dir in (a, b))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def environment(material):
    words = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return os.environ | words | {"HF_DATASETS_CACHE": str(material / "cache")}


# ------------------------------------------------------------------------------------------------------------- two ranks
CASES = {  # valid targets of the two ranks; 1,000 stands for all there are
    "uneven": (1000, 5), "none on one": (0, 1000), "one target in all": (0, 1), "none at all": (0, 0), "even": (1000, 1000),
}  # fmt: skip


def case_of(name, rank):
    """Losses, reference losses, batch of a rank; equal scores are common."""
    random, H = np.random.default_rng((sorted(CASES).index(name), rank)), 3
    x_BT = random.integers(3, 259, (2, 12))
    is_target = (np.arange(24) < CASES[name][rank]).reshape(2, 12) & (random.random((2, 12)) < 0.8)
    if CASES[name][rank] == 1:
        is_target[0, 1] = True
    targets_KBT = torch.from_numpy(data.make_targets(x_BT, np.zeros((2, 12), int), is_target, H))
    batch = data.Batch(np.arange(2), torch.from_numpy(x_BT), targets_KBT, torch.from_numpy(random.random((2, 12)) < 0.3))
    loss_KBT, ref_KBT = (torch.from_numpy(random.integers(0, 8, (H, 2, 12)) / 4).float() for _ in range(2))
    return loss_KBT, ref_KBT, batch


def on_two_ranks(material, straight, ports):
    """What each of two processes does: the cases, then the runs, each in a process group of its own."""
    os.environ["MASTER_PORT"] = ports.pop()
    ranks, found = common.setup_ranks("cpu", "fp32"), {}
    for name in CASES:
        for changes in VARIANTS:
            args = args_of(**changes)
            loss_KBT, ref_KBT, batch = case_of(name, ranks.rank)
            ref_KBT = ref_KBT if args.score_heads == "each" else ref_KBT[:1]
            weight_KBT, told = rho1_wmtp.target_weights(loss_KBT, ref_KBT, batch, (0, 0, 1), args, ranks)
            found[name, str(changes)] = weight_KBT, told
    torch.save(found, material / f"cases.{ranks.rank}")
    torch.distributed.destroy_process_group()
    for name, changes in straight.items():
        os.environ["MASTER_PORT"] = ports.pop()
        assert rho1(material, material / f"two {name}", **changes | {"micro_batch_size": 2}) == 0


@pytest.fixture(scope="module")
def two_ranks(material, straight):
    for file in (material / "cache/wmtp").glob("*.f32"):  # so that two ranks make it
        file.rename(file.with_suffix(".kept"))
    (material / "straight.json").write_text(json.dumps(straight, default=str))
    sockets = [socket.create_server(("localhost", 0)) for _ in range(1 + len(straight))]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    command, processes = [sys.executable, __file__, str(material), *ports], []
    for rank in "01":
        env = environment(material) | dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost")
        with open(material / f"printed.{rank}", "w") as out:
            processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], [(material / f"printed.{rank}").read_text()[-3000:] for rank in "01"]
    return material


def test_two_ranks_make_the_file_of_one(two_ranks):
    kept = list((two_ranks / "cache/wmtp").glob("*.kept"))
    compared = [f for f in kept if f.with_suffix(".f32").exists()]
    assert len(compared) >= 4 and not list((two_ranks / "cache/wmtp").glob("*.part"))
    for file in compared:
        a, b = (np.fromfile(f, np.float32) for f in (file, file.with_suffix(".f32")))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["weighted", "selection", "each"])
def test_two_ranks_equal_one(two_ranks, name):
    """Also with accumulation: 2 micro-steps of 2 rows on 2 ranks, and of 4 rows on one."""
    changes = json.loads((two_ranks / "straight.json").read_text())[name]
    assert rho1(two_ranks, two_ranks / f"one {name}", **changes | {"micro_batch_size": 4}) == 0
    a, b = metrics_of(two_ranks / f"one {name}"), metrics_of(two_ranks / f"two {name}")
    assert len(a) == len(b) == 7
    for one, other in zip(a, b):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_weights_over_ranks_equal_those_of_one_batch(two_ranks, name):
    found = [torch.load(two_ranks / f"cases.{rank}") for rank in (0, 1)]
    parts = [case_of(name, rank) for rank in (0, 1)]
    loss_KBT, ref_KBT = (torch.cat([p[i] for p in parts], 1) for i in (0, 1))
    b0, b1 = (p[2] for p in parts)
    batch = data.Batch(np.arange(4), *(torch.cat([getattr(b, f) for b in (b0, b1)], d)
                                       for f, d in (("x_BT", 0), ("targets_KBT", 1), ("is_noise_BT", 0))))  # fmt: skip
    valid = batch.targets_KBT[0] != IGNORE
    for changes in VARIANTS:
        args = args_of(**changes)
        ref = ref_KBT if args.score_heads == "each" else ref_KBT[:1]
        weight_KBT, told = rho1_wmtp.target_weights(loss_KBT, ref, batch, (0, 0, 1), args, common.Ranks())
        both = torch.cat([f[name, str(changes)][0] for f in found], 1)
        assert torch.equal(both, weight_KBT)
        assert all(torch.equal(f[name, str(changes)][1], told) for f in found)
        if args.mode == "token_skip":
            number = int(valid.sum())
            kept = int((both[0][valid] > both[0][valid].min()).sum()) if number > 1 else number
            assert kept == (max(1, number - round(args.skip_ratio * number)) if number else 0)


# ------------------------------------------------------------------------------------------------------- reference losses
def reference_of(material, name="text", ref_model="reference", say=None, **changes):
    args = args_of(seq_len=LENGTH, **changes)
    args.ref_model = str(material / ref_model)
    model, tokenizer = common.build_model(str(material / "config.json"), args.num_heads)
    ranks, rows = common.Ranks(), rows_of(material, name)
    return rho1_wmtp.Reference(args, model, tokenizer, rows, ranks), rows


@pytest.mark.parametrize("name", ["text", "records"])
def test_reference_losses_are_those_of_a_plain_model_at_the_same_token(material, name):
    """Row by row and token by token: what stands at t is of token t+1 given tokens 0..t, and 0 where it is no target."""
    reference, rows = reference_of(material, name)
    reference.prepare(rows)
    plain = transformers.AutoModelForCausalLM.from_pretrained(material / "reference/model").eval()
    numbers = np.array([0, 3, len(rows.train) - 1])
    batch = data.load_batch(rows.train, numbers, 4, "cpu")
    found = reference(batch)
    assert found.shape == (1, 3, LENGTH)
    checked = 0
    for b, number in enumerate(numbers):
        row = rows.train[int(number)]
        ids, document, is_target = (np.asarray(row[c]) for c in ("input_ids", "document", "is_target"))
        for t in range(LENGTH - 1):
            if is_target[t + 1] and document[t] == document[t + 1]:
                with torch.no_grad():
                    logits = plain(input_ids=torch.tensor(ids[None, : t + 1]).long()).logits[0, -1]
                assert found[0, b, t].item() == pytest.approx(-logits.log_softmax(-1)[ids[t + 1]].item(), abs=1e-4)
                checked += 1
            else:
                assert found[0, b, t] == 0
    assert checked > 20
    online, _ = reference_of(material, name, ref_online=True)
    online.prepare(rows)
    torch.testing.assert_close(online(batch)[:, :, :-1], found[:, :, :-1], rtol=1e-5, atol=1e-5)


def test_reference_losses_of_each_head_are_those_of_its_heads(material):
    reference, rows = reference_of(material, ref_model="reference4", score_heads="each")
    reference.prepare(rows)
    batch = data.load_batch(rows.train, np.array([5, 1]), 4, "cpu")
    with torch.no_grad():
        expected = common.load_mtp(str(material / "reference4"))(batch.x_BT, batch.targets_KBT)
    assert expected[3].sum() > 0
    torch.testing.assert_close(reference(batch)[:, :, :-1], expected[:, :, :-1], rtol=1e-5, atol=1e-5)
    batch = data.load_batch(rows.train, np.array([5, 1]), 2, "cpu")  # a curriculum trains fewer
    torch.testing.assert_close(reference(batch)[:, :, :-1], expected[:2, :, :-1], rtol=1e-5, atol=1e-5)


def test_the_file_is_whole_or_not_there_and_goes_on_after_a_kill(material, monkeypatch):
    """Stopped in its third block; what was made stays, the rest follows, and the file is what a straight run makes."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", material / "killed cache")
    folder, calls = material / "killed cache/wmtp", []
    make, size = reference_file.load_batch, 8192 // LENGTH
    monkeypatch.setattr(reference_file.math, "ceil", lambda x, ceil=math.ceil: ceil(x * size / 32))  # blocks of 32 rows

    def stops(rows, numbers, *rest):
        calls.append(list(numbers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(rows, numbers, *rest)

    monkeypatch.setattr(reference_file, "load_batch", stops)
    reference, rows = reference_of(material)
    with pytest.raises(KeyboardInterrupt):
        reference.prepare(rows)
    assert len(list(folder.glob("*.part"))) == 1 and not list(folder.glob("*.f32"))
    reference, rows = reference_of(material)
    reference.prepare(rows)
    number = sum(len(c) for c in calls[:2] + calls[3:-1])
    assert number == len(rows.train) and calls[3] == calls[2]  # every training row once, and the one that was stopped again
    assert len(list(folder.glob("*.f32"))) == 2 and not list(folder.glob("*.part"))
    made = np.array(reference.losses["train"])
    shutil.rmtree(folder)
    straight, rows = reference_of(material)
    straight.prepare(rows)
    assert np.array_equal(made, straight.losses["train"])
    before = len(calls)
    again, rows = reference_of(material)
    again.prepare(rows)
    assert len(calls) == before and again.model is None  # nothing is made twice, and the model is not even read


def test_the_file_belongs_to_reference_rows_and_type(material, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names = []
    for changes in (dict(), dict(name="other"), dict(ref_model="baseline"), dict(ref_model="reference4", score_heads="each")):
        reference, rows = reference_of(material, **changes)
        reference.prepare(rows)
        names.append({f.name for f in (tmp_path / "wmtp").glob("*.f32")})
    assert [len(n) for n in names] == [2, 4, 6, 8]  # training rows and held-out sample
    for file in (tmp_path / "wmtp").glob("*.f32"):
        os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(common.UsageError, match="remove that file"):
        reference.prepare(rows)


def test_another_reference_on_resume_is_refused(material, tmp_path, capsys):
    shutil.copytree(material / "reference", tmp_path / "reference")
    assert rho1(material, tmp_path / "run", ref_model=tmp_path / "reference") == 0
    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "reference/model")
    shutil.copytree(material / "reference4/model", tmp_path / "reference/model")
    assert rho1(material, tmp_path / "run", ref_model=tmp_path / "reference") == 2
    assert "reference_fingerprint" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- log and sample
def test_figures_are_those_of_a_slow_loop():
    args = args_of(skip_ratio=0.25)
    random = np.random.default_rng(0)
    loss, ref = random.random((2, 40)) * 4
    noise, weight = random.random(40) < 0.3, random.random(40)
    kept = weight > 0.5
    told = torch.tensor(np.stack([loss - ref, weight, kept, loss, ref, noise]))
    found = rho1_wmtp.rho1_metrics([told[:, :15], told[:, 15:15], told[:, 15:]], args)
    best = [set(sorted(range(40), key=lambda i, s=s: (-s[i], i))[:30]) for s in (loss - ref, -ref)]
    expected = {
        "rho1/excess_mean": (loss - ref).mean(), "rho1/kept_frac": kept.mean(), "weights/on_noise": weight[noise].mean(),
        "weights/on_clean": weight[~noise].mean(), "rho1/overlap_untrained": len(best[0] & best[1]) / 30,
    }  # fmt: skip
    pairs = [n < c for n in (loss - ref)[noise] for c in (loss - ref)[~noise]]
    assert found == pytest.approx(expected | {"rho1/noise_auc": sum(pairs) / len(pairs)})


def test_logged_figures_of_a_run(material, straight):
    lines = metrics_of(material / "straight weighted")
    for line in lines[:-1]:
        assert line["weights/mean"] == pytest.approx(1, abs=1e-5) and line["rho1/kept_frac"] == 1
        assert 0 < line["weights/ess_frac"] < 1 and 0 < line["rho1/overlap_untrained"] <= 1
        assert {"weights/on_noise", "weights/on_clean", "rho1/noise_auc", "rho1/excess_mean"} <= line.keys()
    lines = metrics_of(material / "straight selection")
    assert not any("noise" in key for line in lines for key in line)
    for line in lines[:-1]:
        assert line["rho1/kept_frac"] == pytest.approx(0.7, abs=0.02)
        assert line["weights/max"] == pytest.approx(1 / line["rho1/kept_frac"], rel=1e-5)
        assert line["weights/ess_frac"] == pytest.approx(line["rho1/kept_frac"], rel=1e-5)


def test_the_sample_holds_weights_of_heldout_tokens_of_the_final_model(material, straight):
    sample, rows = json.loads((material / "straight weighted/weights.json").read_text()), rows_of(material)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(material / f / "model") for f in ("straight weighted", "reference")
    ]
    x, document = (torch.tensor(rows.heldout[:3][c]).long() for c in ("input_ids", "document"))
    valid = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    with torch.no_grad():
        losses = [-m(input_ids=x).logits[:, :-1].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0][valid] for m in models]
    expected = iter(slow_weights(losses[0].tolist(), losses[1].tolist(), args_of()))
    assert len(sample) == 3 and [row["row"] for row in sample] == [0, 1, 2]
    for b, row in enumerate(sample):
        assert row["ids"] == x[b].tolist() and len(row["weight"]) == LENGTH and row["weight"][0] is None
        for j in range(1, LENGTH):
            if valid[b, j - 1]:
                assert row["weight"][j] == pytest.approx(next(expected), abs=1e-4)
            else:
                assert row["weight"][j] is None


# --------------------------------------------------------------------------------------------------- built-in data, halves
def test_halves_of_the_built_in_data_share_no_file_and_the_same_heldout_text(material):
    """A reference trained on stdlib:b has seen nothing that a run on stdlib:a trains on or is judged by, whatever the seeds."""
    tokenizer, texts = common.load_tokenizer(None), {}
    for name, seed in (("stdlib:a", 3), ("stdlib:b", 7)):
        rows = data.load_data(name, tokenizer, 256, seed, 0.0, common.Ranks())
        for part in ("train", "heldout"):
            columns = getattr(rows, part)[:]
            ids = columns["input_ids"][columns["is_target"]].astype(np.uint8) - tokenizer.offset
            ids[columns["input_ids"][columns["is_target"]] == tokenizer.eos_token_id] = 0
            texts[name, part] = ids.tobytes().split(b"\0")[:-1]
        texts[name, "print"] = rows.heldout_fingerprint
    assert texts["stdlib:a", "print"] == texts["stdlib:b", "print"]
    a, b, held = (set(texts[key]) for key in (("stdlib:a", "train"), ("stdlib:b", "train"), ("stdlib:a", "heldout")))
    assert held == set(texts["stdlib:b", "heldout"]) and len(held) > 10
    assert not a & b and not (a | b) & held
    every = {t.encode("utf-8", "replace") for t in data._stdlib()}
    assert a | b | held == every
    sizes = [sum(map(len, part)) for part in (a, b)]
    assert 0.4 < sizes[0] / sum(sizes) < 0.6


def test_a_reference_that_may_have_seen_the_heldout_text_is_said(material, tmp_path, capsys):
    assert rho1(material, tmp_path / "a", max_steps=1) == 0
    assert "may have been trained on what is held out" in capsys.readouterr().out  # other.jsonl, another held-out part
    assert rho1(material, tmp_path / "b", max_steps=1, ref_model=material / "baseline") == 0
    printed = capsys.readouterr().out
    assert "may have been" not in printed and "trained on the very documents of this run" in printed


# -------------------------------------------------------------------------------------------------------------- bad input
BAD = [
    (dict(ref_model=""), ["--ref-model", "baseline_mtp.py --data stdlib:b", "rho1_wmtp.py --data stdlib:a"]),
    (dict(ref_model="nowhere/none"), ["--ref-model nowhere/none"]),
    (dict(ref_model="{folder}"), ["--ref-model", "no weights"]),
    (dict(ref_model="{folder}/wide"), ["--ref-model", "300 entries", "259"]),
    (dict(ref_model="{folder}/words"), ["--ref-model", "tokenizer"]),
    (dict(model="{folder}/words", ref_model="{folder}/merged"), ["--ref-model", "tokenizer", "--model"]),
    (dict(ref_model="{folder}/short"), ["--ref-model", "16 tokens", "--seq-len is 32"]),
    (dict(score_heads="each"), ["--score-heads each", "1 head", "--num-heads is 4"]),
    (dict(skip_ratio=1), ["--skip-ratio 1.0", "below 1"]),
    (dict(skip_ratio=-0.1), ["--skip-ratio -0.1"]),
    (dict(skip_ratio="nan"), ["--skip-ratio nan"]),
    (dict(temperature=0), ["--temperature 0.0"]),
    ({"lambda": 1.5}, ["--lambda 1.5", "from 0 to 1"]),
    (dict(max_weight=0.5), ["--max-weight 0.5"]),
    (dict(epsilon=-1), ["--epsilon -1.0"]),
    (dict(min_excess=-1), ["--min-excess -1.0"]),
]


@pytest.mark.parametrize("changes, words", BAD, ids=[str(c) for c, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(material, tmp_path, capsys, changes, words):
    if not (material / "merged").exists():
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        for name, change in (
            ("wide", dict(vocab_size=300)),
            ("short", dict(max_position_embeddings=16)),
            ("words", {}),
            ("merged", {}),
        ):
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG | change)).save_pretrained(material / name)
        tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2} | {chr(i): i for i in range(3, 259)}, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(material / "words")
        tokenizer.normalizer = normalizers.Replace("x", "y")  # the same vocabulary, other tokens of the same text
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(material / "merged")
    changes = {k: v.format(folder=material) if isinstance(v, str) else v for k, v in changes.items()}
    assert rho1(material, tmp_path / "run", **changes) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_the_arguments_end_with_the_algorithm():
    shared, own = ([field.name for field in dataclasses.fields(m.Args)] for m in (baseline_mtp, rho1_wmtp))
    assert own[: len(shared)] == shared
    flags = "lambda_ temperature epsilon max_weight ref_model mode skip_ratio score score_heads min_excess control ref_online"
    assert own[len(shared) :] == flags.split()
    parsed = [tyro.cli(rho1_wmtp.Args, args=["--ref-model", "x", *words]).lambda_
              for words in (["--mode", "weighted"], [], ["--lambda", "0.2"])]  # fmt: skip
    assert parsed == [0.3, 0, 0.2]  # what token_skip leaves out, it leaves out entirely


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    on_two_ranks(folder, json.loads((folder / "straight.json").read_text()), sys.argv[2:])
