"""Training that begins with a model's weights: heads alone, rates, evaluations, held-out files."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from test_run import ROOT, TORCHRUN, at_update, words_of

import baseline_mtp
import common
import evaluate
from conftest import bytes_tokenizer, make_small_model, metrics_of, refused, run_main
from conftest import same_tensors, short_args, weights_of, write_lines

CHANGES = dict(num_heads=3, train="heads", lr=None, save_every=2, keep_last=0, max_steps=4)


@pytest.fixture(scope="module")
def plain(material, tmp_path_factory):
    """Folder of a plain model with random weights."""
    return Path(make_small_model(tmp_path_factory.mktemp("plain"), 1, "LlamaForCausalLM"))


@pytest.fixture(scope="module")
def trained(material, plain, tmp_path_factory):
    """Run folder after four updates of heads 2 and 3 alone."""
    run_dir = tmp_path_factory.mktemp("heads") / "run"
    args = short_args(baseline_mtp, material, run_dir, model=plain, **CHANGES)
    assert run_main(baseline_mtp, args) == 0
    return run_dir


def heldout_of(run_dir):
    return [line for line in metrics_of(run_dir) if "eval/loss_head_1" in line]


def test_heads_alone_train_and_the_plain_model_stays(material, plain, trained):
    before = transformers.AutoModelForCausalLM.from_pretrained(plain).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(trained / "model").state_dict()
    assert same_tensors(before, after)
    first, last = heldout_of(trained)
    assert (first["step"], last["step"]) == (0, 4)
    assert first["eval/loss_head_1"] == last["eval/loss_head_1"]
    assert all(first[f"eval/loss_head_{k}"] > last[f"eval/loss_head_{k}"] for k in (2, 3))
    assert json.loads((trained / "args.json").read_text())["args"]["heads_lr"] == 1e-3


def test_heads_alone_have_gradients_as_when_all_trains(plain, chunked):
    x_BT = torch.arange(3, 33).view(2, 15)
    targets_KBT = x_BT.roll(-1, 1).expand(3, 2, 15)
    gradients = []
    for part, chunk in (("all", None), ("heads", None), ("heads", 16)):
        model = common.load_mtp(str(plain), 3)
        model.set_trained(part)
        chunked(chunk)
        model(x_BT, targets_KBT).sum().backward()
        heads = model.heads.layers[1:].parameters()
        gradients.append([p.grad for p in heads])
        others = [p for p in model.parameters() if not p.requires_grad]
        assert (part == "all") == (not others) and all(p.grad is None for p in others)
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_checkpoints_hold_the_heads_alone_and_resume(material, plain, trained, tmp_path):
    reader = dcp.FileSystemReader(trained / "checkpoints/step_000002")
    names = set(reader.read_metadata().state_dict_metadata)
    assert names and all(".layers.4.layers." in name for name in names)
    assert not any(".layers.4.layers.0." in name for name in names)
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 3, lambda run: signal.raise_signal(signal.SIGTERM))
        args = short_args(baseline_mtp, material, tmp_path / "run", model=plain, **CHANGES)
        assert run_main(baseline_mtp, args) == 0
    assert not (tmp_path / "run/model").exists()
    assert run_main(baseline_mtp, args) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(trained)
    assert same_tensors(weights_of(tmp_path / "run"), weights_of(trained))


def test_evaluate_takes_checkpoints_too(trained):
    """Those of heads alone, over the weights that they began with."""
    evaluate.main(evaluate.Args(run_dir=str(trained), step="all"))
    rows = json.loads((trained / "eval/steps.json").read_text())
    assert list(rows) == ["2", "4"]
    for k in (1, 2, 3):
        expected = heldout_of(trained)[-1][f"eval/loss_head_{k}"]
        early, late = (rows[step][f"heldout/loss_head_{k}"] for step in ("2", "4"))
        assert late == pytest.approx(expected, rel=1e-5) and (early > late) == (k > 1)
    args = evaluate.Args(run_dir=str(trained), step="3")
    refused(lambda: evaluate.main(args), "--step 3", "has 2, 4")


def test_two_ranks_train_the_same_heads(material, plain, trained, tmp_path):
    args = short_args(baseline_mtp, material, tmp_path / "run", model=plain, **CHANGES)
    command = [sys.executable, *TORCHRUN, str(ROOT / "baseline_mtp.py"), *words_of(args)]
    subprocess.run(command, check=True, capture_output=True)
    one, two = weights_of(trained), weights_of(tmp_path / "run")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    plain = ({k: v for k, v in w.items() if not k.startswith("heads.")} for w in (one, two))
    assert same_tensors(*plain)


def test_default_rates_follow_the_weights(material, plain, trained):
    """Of the trunk and of heads 2..H, where they are new and where the model has them."""
    fresh, run = material / "config.json", trained / "model"
    for changes, expected in [
        (dict(model=fresh), (3e-3, 3e-3)),
        (dict(model=fresh, lr=0.1), (0.1, 0.1)),
        (dict(model=plain), (1e-5, 1e-3)),
        (dict(model=plain, lr=0.1, heads_lr=0.2), (0.1, 0.2)),
        (dict(model=run), (1e-5, 1e-5)),
        (dict(model=run, train="heads"), (1e-5, 1e-3)),
    ]:
        args = baseline_mtp.Args(**{k: str(v) if k == "model" else v for k, v in changes.items()})
        assert (args.lr, args.heads_lr) == expected
    model = common.load_mtp(str(plain), 3)
    optimizer = common.make_optimizer(model, args)
    scale = {p: group["scale"] for group in optimizer.param_groups for p in group["params"]}
    heads = {p for p in model.heads.layers[1:].parameters()}
    assert {p for p, factor in scale.items() if factor == pytest.approx(100)} == heads
    assert set(scale) == set(model.parameters())


def test_heads_alone_need_weights_and_two_heads():
    for changes in (dict(), dict(model="a/config.json"), dict(model="x", num_heads=1)):
        refused(lambda c=changes: baseline_mtp.Args(train="heads", **c), "--train heads", "--model")


def test_a_heldout_file_leaves_the_data_whole(material, tmp_path, capsys):
    """Two seeds are measured on the same text, and all of --data is trained on."""
    texts = [json.loads(line) for line in (material / "text.jsonl").read_text().splitlines()]
    file = write_lines(tmp_path / "heldout.jsonl", [texts[0], dict(text="another one")])
    data = []
    for seed in (0, 1):
        args = short_args(baseline_mtp, material, "", heldout_data=file, seed=seed)
        data.append(common.load_data(args, bytes_tokenizer(), common.Ranks()))
    first, second = data
    assert first.heldout_fingerprint == second.heldout_fingerprint
    assert first.train[:]["document"].max() == len(texts) - 1
    assert first.heldout_bytes == len(texts[0]["text"]) + len("another one")
    assert "1 documents of --heldout-data are in --data too" in capsys.readouterr().out


def test_some_heldout_rows_and_a_signal_in_an_evaluation(material, tmp_path, monkeypatch, capsys):
    """The rows are evenly spaced; a stop signal saves the state, and the run goes on from there."""
    options = dict(eval_every=2, max_steps=4, num_heads=2, eval_rows=2, save_every=0)
    args = short_args(baseline_mtp, material, tmp_path / "run", **options)
    load_batch, seen = common.load_batch, []

    def observed(rows, numbers, *more):
        if (numbers < 0).any():  # a held-out batch: two rows of eight
            seen.append(rows[:]["input_ids"])
            if len(seen) == 1:
                signal.raise_signal(signal.SIGTERM)
        return load_batch(rows, numbers, *more)

    monkeypatch.setattr(common, "load_batch", observed)
    assert run_main(baseline_mtp, args) == 0
    assert "stopped   by SIGTERM after update 2 of 4; saved" in capsys.readouterr().out
    assert run_main(baseline_mtp, args) == 0
    assert [line["step"] for line in heldout_of(tmp_path / "run")] == [2, 4]
    data = common.load_data(args, bytes_tokenizer(), common.Ranks())
    ids = data.heldout[:]["input_ids"]
    assert (seen[0] == ids[[0, -1]]).all()
