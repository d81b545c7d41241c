"""The benchmarks fit their ceiling and start; runs share a process; Meta's layout converts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import SHORT_RUN, metrics_of, same_tensors, weights_of

from common import Ranks, load_data, load_mtp

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import tools  # noqa: E402

SCRIPTS = sorted(file.name for file in FOLDER.glob("*.py") if file.name != "tools.py")


def run(*words):
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True)


def test_benchmarks_fit_their_ceiling():
    assert sum(len(file.read_text().splitlines()) for file in FOLDER.rglob("*.py")) <= 1600


@pytest.mark.slow
def test_every_benchmark_explains_itself():
    for name in SCRIPTS:
        done = run(FOLDER / name, "--help")
        assert done.returncode == 0 and f"python benchmarks/{name}" in done.stdout, done.stderr


def test_a_run_after_another_in_a_process_equals_one_in_its_own_process(material, tmp_path):
    flags = dict(SHORT_RUN, model=material / "config.json", data=material / "text.jsonl")
    flags.pop("value_steps")
    other = dict(flags, seed=1, target=flags["data"], start=1, run_dir=tmp_path / "other")
    tools.train("grad_wmtp.py", other, tmp_path / "other.txt")
    flags |= dict(run_dir=tmp_path / "run", noise_frac=0.3)
    tools.train("baseline_mtp.py", flags, tmp_path / "run.txt")
    words = tools.as_flags(dict(flags, run_dir=tmp_path / "own"))
    done = run(FOLDER.parent / "baseline_mtp.py", *words)
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "own")
    assert same_tensors(weights_of(tmp_path / "run"), weights_of(tmp_path / "own"))


@pytest.mark.slow
def test_files_of_bugs_hold_the_records_of_the_preset_in_order(tmp_path):
    """Every script sees the rows that the critic imitates with `--train-on all`."""
    import compare

    compare.write_bugs(tmp_path)
    args = SimpleNamespace(out=tmp_path, shift=["", ""], noise_frac=0.3)
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    preset = load_data(tools.data_args("stdlib-bugs"), tokenizer, Ranks())
    for arm in ("critic", "equal", "oracle", "correct"):
        flags = compare.data_of(args, "bugs", arm)
        data = load_data(tools.data_args(**flags), tokenizer, Ranks())
        expected = preset.train if arm == "correct" else preset.records
        for column in ("input_ids", "is_target", "is_noise"):
            assert np.array_equal(data.records[:][column], expected[:][column])
        assert data.heldout_fingerprint == preset.heldout_fingerprint


def test_meta_layout_gives_the_logits_of_every_head(tmp_path):
    """Against plain Llama models of trunk and one head, with rotary pairs put back by hand."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    sizes |= dict(tie_word_embeddings=False, max_position_embeddings=64, rms_norm_eps=1e-3)
    plain = [transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)) for _ in range(2)]
    first, second = (model.state_dict() for model in plain)
    for name in second.keys() - {n for n in second if n.startswith("model.layers.2.")}:
        second[name] = first[name]  # the same trunk; the last layer is the other head
    plain[1].load_state_dict(second)
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk"}
    names |= {"self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"}
    names |= {"mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm"}
    names |= {"post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    tensors = {f"{new}.weight": first[f"{old}.weight"] for old, new in outer.items()}
    layers = {f"layers.{n}": (first, n) for n in range(3)} | {"extra_heads.0": (second, 2)}
    for prefix, (state, number) in layers.items():
        for old, new in names.items():
            value = state[f"model.layers.{number}.{old}.weight"]
            if new in ("attention.wq", "attention.wk"):  # row i of a half -> row 2i or 2i+1
                order = [half * 4 + i for i in range(4) for half in range(2)]
                value = torch.cat([head[order] for head in value.split(8)])
            tensors[f"{prefix}.{new}.weight"] = value.clone()
    torch.save(tensors, tmp_path / "consolidated.pth")
    params = dict(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, n_future_tokens=2, norm_eps=1e-3)
    (tmp_path / "params.json").write_text(json.dumps(params))
    done = run(FOLDER / "convert_meta.py", tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    model, x_BT = load_mtp(tmp_path / "out", 2).eval(), torch.randint(3, 259, (2, 11))
    with torch.no_grad():
        logits_KBTV = model.causal_lm.lm_head(model.hidden(x_BT, 2))
        expected_KBTV = torch.stack([one.eval()(x_BT).logits for one in plain])
    assert expected_KBTV.std() > 0.3 and not torch.equal(*expected_KBTV)
    torch.testing.assert_close(logits_KBTV, expected_KBTV)
