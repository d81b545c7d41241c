"""The training command itself: equivalences, resume, files, tracking, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import baseline_mtp
import common
import data
import runs

ROOT = Path(__file__).parents[1]
CONFIG = dict(
    model_type="llama", vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    bos_token_id=None, initializer_range=0.1,
)  # fmt: skip


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A small model configuration and a small text data set, and a cache of their own."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    random = np.random.default_rng(0)
    words = ["def", "return", "for", "in", "if", "x", "y", "total", "(", ")", ":", "+", "=", "0", "1"]
    texts = [" ".join(random.choice(words, random.integers(20, 120))) + "\n" for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return folder


def flags(material, folder, **changes):
    """Command line of a short run on the small material."""
    values = dict(
        run_dir=folder, model=material / "config.json", data=material / "text.jsonl", seq_len=32, batch_size=8, lr=3e-3,
        warmup_steps=2, max_steps=10, mtp_schedule="constant", tracker="none", device="cpu", dtype="fp32", save_every=4,
    )  # fmt: skip
    values |= changes
    return [str(w) for k, v in values.items() for w in (f"--{k.replace('_', '-')}", v)]


def run_here(monkeypatch, *words):
    """Run the script's entry point in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["baseline_mtp.py", *map(str, words)])
    try:
        common.run_script(baseline_mtp.main, baseline_mtp.Args, "test")
    except SystemExit as stop:
        return stop.code
    return 0


def run_apart(words, launcher=(), **options):
    """Run the script as a user does, in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(ROOT / "baseline_mtp.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **options)


def metrics_of(run_dir, without="perf/"):
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(without)} for line in lines]


def losses_of(run_dir, key="train/loss"):
    return np.array([line[key] for line in metrics_of(run_dir) if key in line])


def weights_of(run_dir):
    model = Path(run_dir) / "model"
    return load_file(model / "model.safetensors") | load_file(model / common.HEADS_FILE)


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="session")
def straight(material, tmp_path_factory):
    """A run from start to end, in a process of its own."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = run_apart(flags(material, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir, done


# ---------------------------------------------------------------------------------------------------------- equivalences
@pytest.mark.slow  # test_faults.py kills too
def test_killed_and_resumed_equals_straight(material, straight, tmp_path):
    run_dir = tmp_path / "run"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = flags(material, run_dir, max_steps=10)
    process = subprocess.Popen([sys.executable, str(ROOT / "baseline_mtp.py"), *words], env=env, stdout=subprocess.DEVNULL)
    metrics = run_dir / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 9):  # the save of step 8 waits for that of step 4
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "model").exists(), "the run ended before it could be killed"
    resumed = run_apart(words)
    assert resumed.returncode == 0, resumed.stderr
    assert "resume    from" in resumed.stdout
    assert_same_weights(weights_of(run_dir), weights_of(straight[0]))
    assert metrics_of(run_dir) == metrics_of(straight[0])


def test_resume_within_a_curriculum_keeps_heads_that_never_trained(material, monkeypatch, tmp_path):
    """At the checkpoint of step 2, heads 3 and 4 have had no gradient yet."""
    words = dict(mtp_schedule="forward", max_steps=8, save_every=2, keep_last=0)
    assert run_here(monkeypatch, *flags(material, tmp_path / "a", **words)) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/model")
    for step in (4, 6, 8):
        shutil.rmtree(tmp_path / f"b/checkpoints/step_{step:06d}")
    assert run_here(monkeypatch, *flags(material, tmp_path / "b", **words)) == 0
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert_same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_accumulation_equals_one_large_batch(material, straight, monkeypatch, tmp_path):
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", micro_batch_size=2)) == 0
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(straight[0]), rtol=1e-5)
    for k in range(1, 5):
        key = f"train/loss_head_{k}"
        np.testing.assert_allclose(losses_of(tmp_path / "run", key), losses_of(straight[0], key), rtol=1e-5)


@pytest.mark.parametrize("recompute", ["heads", "all"])
def test_recomputing_activations_changes_nothing(material, straight, monkeypatch, tmp_path, recompute):
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", recompute=recompute)) == 0
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(straight[0]), rtol=1e-6)


def test_two_ranks_equal_one(material, straight, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_apart(flags(material, tmp_path / "run", micro_batch_size=2), launcher)
    assert done.returncode == 0, done.stderr
    for key in ("train/loss", "train/loss_head_4", "train/grad_norm", "eval/loss_head_4", "eval/acc_head_1", "weights/mean"):
        np.testing.assert_allclose(losses_of(tmp_path / "run", key), losses_of(straight[0], key), rtol=1e-5, err_msg=key)
    one = weights_of(straight[0])
    for key, value in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(value, one[key], rtol=1e-3, atol=1e-4)


def test_one_head_is_plain_next_token_training(material, monkeypatch, tmp_path):
    """Against a training loop that knows nothing of heads, on a plain transformers model."""
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", num_heads=1)) == 0
    args = baseline_mtp.Args(lr=3e-3, warmup_steps=2, max_steps=10)
    torch.manual_seed(args.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [dict(params=decayed, weight_decay=0.1), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    tokens = data.load_data(str(material / "text.jsonl"), common.load_tokenizer(None), 32, 0, 0.0, common.Ranks())
    losses = []
    for step in range(10):
        warm = (step + 1) / 2 if step < 2 else 0.5 * (1 + np.cos(np.pi * (step - 2) / 8))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * warm
        rows = tokens.train[data.batch_rows(len(tokens.train), 8, 0, step)]
        x, document = torch.tensor(rows["input_ids"]).long(), torch.tensor(rows["document"])
        labels = x[:, 1:].masked_fill((document[:, 1:] != document[:, :-1]) | (document[:, 1:] < 0), -100)
        logits = model(input_ids=x).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses, rtol=2e-5)


# ------------------------------------------------------------------------------------------------------- files and figures
def test_run_directory_and_metrics(material, straight):
    run_dir, done = straight
    record = json.loads((run_dir / "args.json").read_text())
    assert record["args"]["batch_size"] == 8 and record["versions"]["torch"] and record["script"] == "baseline_mtp"
    lines = metrics_of(run_dir, without="never")
    assert [line["step"] for line in lines] == [*range(1, 11), 10]
    heads = [f"loss_head_{k}" for k in range(1, 5)]
    expected = {"step", "train/loss", "train/grad_norm", "train/lr", "weights/mean", "weights/max", "weights/ess_frac"}
    assert set(lines[0]) == expected | {f"train/{h}" for h in heads} | {"perf/tokens_per_s"}
    accuracies = {f"eval/acc_head_{k}" for k in range(1, 5)}
    assert set(lines[-1]) == {"step", "eval/bits_per_byte"} | {f"eval/{h}" for h in heads} | accuracies
    for line in lines[:-1]:
        assert line["weights/mean"] == line["weights/max"] == 1
        assert line["weights/ess_frac"] == pytest.approx(1)
        # head k has fewer valid targets than head 1, and all are divided by N of head 1
        assert 0.8 * sum(line[f"train/{h}"] for h in heads) < line["train/loss"] < sum(line[f"train/{h}"] for h in heads)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_000008", "step_000010"]
    for word in ("bits per byte", "zlib level 9", "order-0 entropy", "next      python"):
        assert word in done.stdout


def test_heldout_figures_equal_a_plain_model_on_the_same_rows(material, straight):
    run_dir, _ = straight
    model = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "model")
    held = data.load_data(str(material / "text.jsonl"), common.load_tokenizer(None), 32, 0, 0.0, common.Ranks())
    rows = held.heldout[:]
    x, document = torch.tensor(rows["input_ids"]).long(), torch.tensor(rows["document"])
    valid = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    with torch.no_grad():
        logits = model(input_ids=x).logits[:, :-1]
    loss = F.cross_entropy(logits[valid], x[:, 1:][valid]).item()
    final = metrics_of(run_dir)[-1]
    assert final["eval/loss_head_1"] == pytest.approx(loss, rel=1e-5)
    accuracy = (logits[valid].argmax(-1) == x[:, 1:][valid]).float().mean().item()
    assert final["eval/acc_head_1"] == pytest.approx(accuracy, abs=1e-6)
    bits = loss / np.log(2) * held.heldout_tokens / held.heldout_bytes
    assert final["eval/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("schedule, counts", [("forward", [1, 1, 2, 2, 3, 3, 4, 4]), ("reverse", [4, 4, 3, 3, 2, 2, 1, 1])])
def test_curriculum_trains_the_heads_it_names(material, monkeypatch, tmp_path, schedule, counts):
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", mtp_schedule=schedule, max_steps=8)) == 0
    lines = [line for line in metrics_of(tmp_path / "run") if "train/loss" in line]
    assert [sum(k.startswith("train/loss_head") for k in line) for line in lines] == counts


def test_a_finished_run_started_again_does_nothing(material, straight, monkeypatch, capsys):
    run_dir, _ = straight
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    assert run_here(monkeypatch, *flags(material, run_dir)) == 0
    assert "finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_a_checkpoint_without_its_marker_does_not_count(material, straight, monkeypatch, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(straight[0], run_dir)
    shutil.rmtree(run_dir / "model")
    (run_dir / "checkpoints/step_000010/meta.json").unlink()
    assert run_here(monkeypatch, *flags(material, run_dir)) == 0
    assert "step_000008" in capsys.readouterr().out
    assert_same_weights(weights_of(run_dir), weights_of(straight[0]))


def test_a_checkpoint_of_another_run_is_refused(material, monkeypatch, tmp_path, capsys):
    shared = dict(checkpoint_dir=tmp_path / "shared", max_steps=4)
    assert run_here(monkeypatch, *flags(material, tmp_path / "a/run", **shared)) == 0
    first = {p: p.read_bytes() for p in (tmp_path / "shared").rglob("*") if p.is_file()}
    assert run_here(monkeypatch, *flags(material, tmp_path / "b/run", **shared, seed=1)) == 2
    assert "other arguments or data" in capsys.readouterr().err
    assert run_here(monkeypatch, *flags(material, tmp_path / "c", **shared, seed=1)) == 0
    assert len(losses_of(tmp_path / "c")) == 4
    assert all(p.read_bytes() == content for p, content in first.items())


def test_a_resumed_run_keeps_the_type_of_its_products(material, monkeypatch, tmp_path, capsys):
    run_dir, words = tmp_path / "run", dict(dtype="auto", max_steps=4, save_every=2, keep_last=0)
    assert run_here(monkeypatch, *flags(material, run_dir, **words)) == 0
    chosen = json.loads((run_dir / "args.json").read_text())["products"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[chosen]
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(run_dir / "checkpoints/step_000004")
    record = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(record | {"products": other}))
    capsys.readouterr()
    assert run_here(monkeypatch, *flags(material, run_dir, **words)) == 0
    assert f"products in {other}, as the run was started" in capsys.readouterr().out


def test_keep_last_counts_whole_checkpoints_alone(material, straight, monkeypatch, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight[0], run_dir)
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(run_dir / "checkpoints/step_000010")
    (run_dir / "checkpoints/step_000999").mkdir()
    assert run_here(monkeypatch, *flags(material, run_dir, keep_last=1)) == 0
    assert (run_dir / "checkpoints/step_000010/meta.json").exists()
    assert not (run_dir / "checkpoints/step_000008").exists() and (run_dir / "checkpoints/step_000999").exists()


def test_records_with_empty_prompts_are_trained_and_reported(material, monkeypatch, tmp_path, capsys):
    records = "".join(json.dumps({"prompt": "", "completion": f"x = {i}\n"}) + "\n" for i in range(60))
    (tmp_path / "records.jsonl").write_text(records)
    words = flags(material, tmp_path / "run", data=tmp_path / "records.jsonl", max_steps=2)
    assert run_here(monkeypatch, *words) == 0
    assert "next      python" in capsys.readouterr().out


def test_the_next_command_is_the_control_of_this_run(material, straight):
    line = next(line for line in straight[1].stdout.splitlines() if line.startswith("next"))
    for word in ("--num-heads 1", f"--data {material / 'text.jsonl'}", "--max-steps 10", "--dtype fp32"):
        assert word in line
    assert "--run-dir" not in line and "--seed" not in line


def test_a_loss_that_is_not_finite_stops_before_the_weights(material, monkeypatch, tmp_path, capsys):
    run_dir = tmp_path / "run"
    words = flags(material, run_dir, lr=1e15, warmup_steps=0, grad_clip=0, save_every=1, keep_last=0)
    assert run_here(monkeypatch, *words) == 1
    stopped = capsys.readouterr().out.splitlines()[-1]
    steps = len(losses_of(run_dir))
    assert f"update {steps + 1}:" in stopped and ("loss of head" in stopped or "gradient" in stopped)
    last = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert last.name == f"step_{steps:06d}" and (last / "meta.json").exists()
    assert not (run_dir / "model").exists()


def test_optimizer_owns_every_parameter_once_and_decays_matrices_alone():
    model, _ = common.build_model("tiny", 4)
    optimizer = runs.make_optimizer(model, 1e-3, 0.1)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_bf16_products_follow_fp32(material, straight, monkeypatch, tmp_path):
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", dtype="bf16", max_steps=4)) == 0
    np.testing.assert_allclose(losses_of(tmp_path / "run")[:3], losses_of(straight[0])[:3], rtol=0.02)


# --------------------------------------------------------------------------------------------------------------- tracking
def test_mlflow_holds_parameters_metrics_and_files(material, monkeypatch, tmp_path):
    assert run_here(monkeypatch, *flags(material, tmp_path / "runs/one", tracker="mlflow")) == 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("wmtp").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["batch_size"] == "8" and run.data.tags["seed"] == "0"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [m.value for m in sorted(history, key=lambda m: m.step)] == list(losses_of(tmp_path / "runs/one"))
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"args.json", "metrics.jsonl"}


def test_a_run_that_stops_is_marked_failed_with_its_last_points(material, monkeypatch, tmp_path):
    words = dict(tracker="mlflow", lr=1e15, warmup_steps=0, grad_clip=0)
    assert run_here(monkeypatch, *flags(material, tmp_path / "runs/one", **words)) == 1
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("wmtp").experiment_id])
    assert run.info.status == "FAILED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == len(losses_of(tmp_path / "runs/one")) > 0


def test_wandb_works_offline(material, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", tracker="wandb")) == 0
    written = capsys.readouterr()
    assert "failed" not in written.err and "wandb sync" in written.out
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


def test_a_failing_tracker_never_stops_training(material, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", tracker="mlflow")) == 0
    assert capsys.readouterr().err.count("tracker   mlflow failed") == 1
    assert len(losses_of(tmp_path / "run")) == 10


# -------------------------------------------------------------------------------------------------------------- bad input
BAD = [
    (dict(data="stdlbi"), ["--data stdlbi", "stdlib, mbpp"]),
    (dict(data="nowhere/none.jsonl"), ["--data nowhere/none.jsonl"]),
    (dict(data="{folder}/columns.jsonl"), ["--data", "columns a, b", "prompt and completion"]),
    (dict(batch_size=10_000), ["--batch-size 10000", "rows", "--seq-len 32"]),
    (dict(batch_size=10, micro_batch_size=4), ["--batch-size 10", "--batch-size 8 or 12"]),
    (dict(num_heads=0), ["--num-heads 0", "at least 1"]),
    (dict(num_heads=6), ["--num-heads 6", "5 layers"]),
    (dict(max_steps=0), ["--max-steps 0", "at least 1"]),
    (dict(grad_clip=-1), ["--grad-clip -1.0", "at least 0"]),
    (dict(lr="nan"), ["--lr nan", "at least 0"]),
    (dict(seed=-1), ["--seed -1", "at least 0"]),
    (dict(checkpoint_dir="{folder}/text.jsonl"), ["--checkpoint-dir", "cannot be written"]),
    (dict(seq_len=256), ["--seq-len 256", "128"]),
    (dict(noise_frac=1.5), ["--noise-frac 1.5", "from 0 to 1"]),
    (dict(model="{folder}/small/config.json"), ["--model", "has 100 entries", "259"]),
    (dict(model="{folder}/large/config.json"), ["--model", "has 9000 entries", "259"]),
    (dict(model="nowhere"), ["--model nowhere"]),
    (dict(run_dir="{folder}/text.jsonl/run"), ["--run-dir", "cannot be written"]),
    (dict(run_dir="{folder}"), ["--run-dir", "not empty"]),
    (dict(device="cuda"), ["--device cuda"]),
]


@pytest.mark.parametrize("changes, words", BAD, ids=[" ".join(f"{k}={v}" for k, v in c.items()) for c, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(material, monkeypatch, tmp_path, capsys, changes, words):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (material / "columns.jsonl").write_text('{"a": "1", "b": "2"}\n' * 4)
    for name, size in (("small", 100), ("large", 9000)):
        (material / name).mkdir(exist_ok=True)
        (material / name / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": size}))
    before = sorted(p for p in material.rglob("*") if "cache" not in p.parts)
    changes = {k: v.format(folder=material) if isinstance(v, str) else v for k, v in changes.items()}
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()
    assert sorted(p for p in material.rglob("*") if "cache" not in p.parts) == before


def test_a_run_directory_with_other_arguments_or_data_is_refused(material, straight, monkeypatch, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(straight[0], run_dir)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    assert run_here(monkeypatch, *flags(material, run_dir, lr=1e-3)) == 2
    assert "lr 0.003 there, 0.001 here" in capsys.readouterr().err
    shutil.rmtree(run_dir / "model")
    record = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(record | {"data_fingerprint": "other"}))
    assert run_here(monkeypatch, *flags(material, run_dir)) == 2
    assert "other" in capsys.readouterr().err
    assert all(p.read_bytes() == b for p, b in before.items() if p.exists() and p.name != "args.json")


def test_the_command_line_reports_bad_input_in_one_line(material, tmp_path):
    done = run_apart(flags(material, tmp_path / "run", num_heads=0))
    assert done.returncode == 2 and done.stderr.strip().splitlines() == ["error: --num-heads 0: at least 1"]


def test_help_is_the_manual():
    done = run_apart(["--help"])
    assert done.returncode == 0
    order = """run-dir seed tracker device model num-heads mtp-schedule data seq-len noise-frac batch-size micro-batch-size lr
        warmup-steps max-steps weight-decay grad-clip dtype compile recompute eval-every save-every keep-last
        checkpoint-dir""".split()
    manual = done.stdout[done.stdout.index("─ options ─") :]
    assert re.findall(r"^│ --([a-z-]+)", manual, re.MULTILINE) == order


# ---------------------------------------------------------------------------------------------------------- README's recipes
def test_cluster_recipes_are_sound_and_call_the_script_with_flags_it_has(tmp_path):
    """The Slurm script is valid bash, the manifest valid YAML of a TrainJob; the training flags in both are this script's."""
    import tyro
    import yaml

    blocks = dict(re.findall(r"```(bash|yaml)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    (tmp_path / "slurm.sh").write_text(blocks["bash"])
    assert subprocess.run(["bash", "-n", tmp_path / "slurm.sh"]).returncode == 0
    job = yaml.safe_load(blocks["yaml"])
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["trainer"]["numNodes"] == 2
    for text in (blocks["bash"], job["spec"]["trainer"]["args"][0]):
        words = re.search(r"torchrun (.*?)&", text.replace("\\\n", " "), re.DOTALL)[1].split()
        here = words.index("baseline_mtp.py")
        parsed = tyro.cli(baseline_mtp.Args, args=[w for w in words[here + 1 :] if w != '"$@"'])
        assert parsed.checkpoint_dir == "s3://bucket/wmtp"
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words[: here + 1])
        assert launch.max_restarts == 3 and launch.rdzv_backend == "c10d"
