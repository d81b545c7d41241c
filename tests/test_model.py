"""The model of common.py against plain transformers models, a plain float64 pass, and Meta's own code written out.

Shapes: B batch, T positions, K heads, V vocabulary, D width, N tokens.
"""

import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import common
from common import IGNORE, UsageError, active_heads

transformers.utils.logging.disable_progress_bar()


SIZES = dict(  # weights ten times the usual size, so that logits are spread and a wrong one shows
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
FAMILIES = {  # head 1 is layer 2 (of 2), but layer 3 (of 3) where there are 5: full attention in gemma3, sliding in gemma2
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=8)),
    "mistral": (transformers.MistralConfig, dict(sliding_window=4)),
    "gemma2": (transformers.Gemma2Config, GEMMA | dict(final_logit_softcapping=1.0, num_hidden_layers=5)),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA | dict(sliding_window_pattern=2)),
    "olmo2": (transformers.Olmo2Config, {}),
}
VARIANTS = [(family, tied) for family in FAMILIES for tied in (False, True)]
NAMES = [f"{family}-{'tied' if tied else 'untied'}" for family, tied in VARIANTS]
each_variant = pytest.mark.parametrize(("family", "tied"), VARIANTS, ids=NAMES)


def make_config(family, tied=False, **changes):
    config_class, own = FAMILIES[family]
    return config_class(**(SIZES | own | changes), tie_word_embeddings=tied)


def randomise_vectors(model):
    """Norms and biases start as ones and zeros, all alike: make each its own."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def make_model(family, num_heads, tied=False, seed=0, **changes):
    torch.manual_seed(seed)
    return randomise_vectors(common.from_config(make_config(family, tied, **changes), num_heads))


def make_plain(family, tied=False, seed=0, **changes):
    torch.manual_seed(seed)
    config = make_config(family, tied, **changes)
    return randomise_vectors(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def tokens(batch, length, vocab_size=97, seed=1):
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def bytes_tokenizer():
    return transformers.ByT5Tokenizer(extra_ids=0)


def head_logits(model, x_BT, num_heads):
    """Logits of heads 1..num_heads, `[K, B, T, V]`, through the model's own unembedding."""
    logits_KBTV = model.causal_lm.lm_head(model.hidden(x_BT, num_heads))
    return logits_KBTV if model.softcap is None else model.softcap * torch.tanh(logits_KBTV / model.softcap)


def refused(call, *words, numbers=(), path=None):
    """`call` is refused in one line that holds every word and number, the path itself not counted."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    message = message.replace(str(path), "PATH")
    for word in words:
        assert word in message, message
    for number in numbers:
        assert re.search(rf"\b{number}\b", message), message


# ----------------------------------------------------------------------------------------- 1, 2: families, export, reload
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every family with 3 heads, tied and untied, saved as a run saves it; what the model said before."""
    folder, cases = tmp_path_factory.mktemp("saved"), {}
    x_BT = tokens(2, 13)
    for name, (family, tied) in zip(NAMES, VARIANTS):
        model = make_model(family, 3, tied)
        run_dir = folder / name
        run_dir.mkdir()
        common.save_model(model, bytes_tokenizer(), run_dir / "model", common.Ranks())
        with torch.no_grad():
            hidden_KBTD, logits_KBTV = model.hidden(x_BT, 3), head_logits(model, x_BT, 3)
        cases[name] = SimpleNamespace(run_dir=run_dir, model=model, hidden_KBTD=hidden_KBTD, logits_KBTV=logits_KBTV)
    return SimpleNamespace(folder=folder, x_BT=x_BT, cases=cases)


READER = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
x_BT, results = torch.load("x.pt"), {}
for folder in sorted(Path(".").glob("*/model")):
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in told[kind]]
    with torch.no_grad():
        logits_BTV = model(x_BT).logits
    results[folder.parent.name] = dict(logits_BTV=logits_BTV, wrong=wrong, layers=len(model.model.layers))
torch.save(dict(results=results, path=sys.path, modules=sorted(sys.modules)), "read.pt")
"""


@pytest.fixture(scope="module")
def read_elsewhere(saved):
    """What a process that never heard of this project reads from the saved folders."""
    torch.save(saved.x_BT, saved.folder / "x.pt")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [sys.executable, "-I", "-c", READER]
    done = subprocess.run(command, cwd=saved.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = torch.load(saved.folder / "read.pt")
    project = Path(common.__file__).resolve().parent
    assert project not in [Path(p).resolve() for p in read["path"]]
    assert "common" not in read["modules"]
    return read["results"]


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_in_a_fresh_process_reads_head_1(saved, read_elsewhere, name):
    case, read = saved.cases[name], read_elsewhere[name]
    assert read["wrong"] == []
    assert read["layers"] == len(case.model.trunk_layers) + 1
    assert case.logits_KBTV.std() > 0.3  # otherwise any model would do
    assert (read["logits_BTV"] - case.logits_KBTV[0]).abs().max() < 1e-5
    assert (read["logits_BTV"] - case.logits_KBTV[1]).abs().max() > 0.1  # and no other head is meant


def test_softcap_bites_in_the_fixture(saved):
    case = saved.cases["gemma2-untied"]
    uncapped_KBTV = case.model.causal_lm.lm_head(case.hidden_KBTD)
    assert (uncapped_KBTV - case.logits_KBTV).abs().max() > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_reload_gives_every_head_exactly(saved, name):
    case = saved.cases[name]
    for path in (case.run_dir, case.run_dir / "model"):
        for num_heads in (None, 3):
            model = common.load_mtp(path, num_heads)
            assert len(model.heads.layers) == 3
            with torch.no_grad():
                assert torch.equal(model.hidden(saved.x_BT, 3), case.hidden_KBTD)
                assert torch.equal(head_logits(model, saved.x_BT, 3), case.logits_KBTV)
        for key, value in model.state_dict().items():
            assert torch.equal(value, case.model.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_heads_file_holds_heads_2_to_h_alone(saved, name):
    tensors = load_file(saved.cases[name].run_dir / "model" / common.HEADS_FILE)
    assert {key.split(".")[1] for key in tensors} == {"2", "3"}
    assert all(key.startswith("heads.") for key in tensors)


def test_reload_of_a_family_whose_layers_differ_by_number(tmp_path):
    config = transformers.SmolLM3Config(**(SIZES | dict(num_hidden_layers=5)))  # every fourth layer is without rotary
    assert config.no_rope_layers == [1, 1, 1, 0, 1]
    torch.manual_seed(0)
    model, x_BT = common.from_config(config, 3), tokens(2, 13)
    common.save_model(model, bytes_tokenizer(), tmp_path / "model", common.Ranks())
    again = common.load_mtp(tmp_path)
    with torch.no_grad():
        assert (again.hidden(x_BT, 3) - model.hidden(x_BT, 3)).abs().amax((1, 2, 3)).tolist() == [0, 0, 0]


def test_wrong_number_of_heads_is_refused_with_both_numbers(saved, tmp_path):
    four = make_model("llama", 4, num_hidden_layers=5)
    common.save_model(four, bytes_tokenizer(), tmp_path / "run" / "model", common.Ranks())
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        for add_heads in (False, True):
            refused(lambda p=path, a=add_heads: common.load_mtp(p, 3, add_heads=a), "--num-heads 3", numbers=(3, 4), path=path)
    make_plain("llama").save_pretrained(tmp_path / "plain")
    refused(lambda: common.load_mtp(tmp_path / "plain", 3), "--num-heads 3", numbers=(3, 1), path=tmp_path / "plain")
    assert len(common.load_mtp(tmp_path / "plain").heads.layers) == 1


def test_one_head_is_saved_without_a_heads_file_and_read_again(tmp_path):
    model, x_BT = make_model("qwen3", 1), tokens(2, 9)
    common.save_model(model, bytes_tokenizer(), tmp_path / "model", common.Ranks())
    assert not (tmp_path / "model" / common.HEADS_FILE).exists()
    again = common.load_mtp(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.hidden(x_BT, 1), model.hidden(x_BT, 1))


@each_variant
def test_heads_added_to_a_pretrained_model_leave_next_token_loss_untouched(tmp_path, family, tied):
    plain, x_BT = make_plain(family, tied), tokens(2, 14)
    plain.save_pretrained(tmp_path)
    model = common.load_mtp(tmp_path, num_heads=4, add_heads=True)
    x_BT, targets_BT = x_BT[:, :-1], x_BT[:, 1:]
    with torch.no_grad():
        logits_BTV = plain(x_BT).logits
        expected_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
        loss_KBT = model(x_BT, targets_BT.expand(4, -1, -1))
        hidden_KBTD = model.hidden(x_BT, 4)
    assert expected_BT.std() > 0.2
    # The same products in another number of rows at once: exact on the machine this was written on, rounding elsewhere.
    assert (loss_KBT[0] - expected_BT).abs().max() < 1e-6 * expected_BT.max()
    for k in range(1, 4):
        assert torch.equal(hidden_KBTD[k], hidden_KBTD[0])
    addresses = [p.data_ptr() for layer in model.heads.layers for p in layer.parameters()]
    assert len(set(addresses)) == len(addresses)  # copies, not the same tensors


# ---------------------------------------------------------------------------------------------------------- 3: the loss
def make_targets(num_heads, batch, length, seed=2):
    """Random targets, a fifth ignored, the last k of head k ignored, row 1 without any."""
    generator = torch.Generator().manual_seed(seed)
    targets_KBT = torch.randint(0, 97, (num_heads, batch, length), generator=generator)
    targets_KBT[torch.rand(targets_KBT.shape, generator=generator) < 0.2] = IGNORE
    for k in range(num_heads):
        targets_KBT[k, :, max(0, length - k - 1) :] = IGNORE
    targets_KBT[:, 1] = IGNORE
    return targets_KBT


def plain_with_head(model, config, number):
    """A plain transformers model in float64 whose last layer is head `number` (from 0), and its names for `model`'s."""
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    last, state, names = config.num_hidden_layers - 1, {}, {}
    for name, value in model.state_dict().items():
        own = name.removeprefix("causal_lm.")
        found = re.fullmatch(rf"model\.layers\.{last}\.layers\.(\d+)\.(.+)", own)
        if found and int(found[1]) != number:
            continue
        own = f"model.layers.{last}.{found[2]}" if found else own
        state[own], names[own] = value.double(), name
    plain.load_state_dict(state)
    return plain, names


def oracle(model, config, x_BT, targets_KBT, weight_KBT):
    """Losses `[K, B, T]`, logits `[K, B, T, V]` and gradients by name: one plain float64 model a head, logits stacked.

    (transformers takes norms in fp32 in a float64 model too: an error of 1e-7, far below what is asked here.)
    """
    logits, gradients = [], {}
    for number, (targets_BT, weight_BT) in enumerate(zip(targets_KBT, weight_KBT)):
        plain, names = plain_with_head(model, config, number)
        logits_BTV = plain(x_BT, use_cache=False).logits
        chosen_BT = logits_BTV.log_softmax(-1).gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
        (weight_BT * (targets_BT != IGNORE) * -chosen_BT).sum().backward()
        logits.append(logits_BTV.detach())
        for own, p in plain.named_parameters():
            gradients[names[own]] = gradients.get(names[own], 0) + p.grad
    logits_KBTV = torch.stack(logits)
    chosen_KBT = logits_KBTV.log_softmax(-1).gather(-1, targets_KBT.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets_KBT == IGNORE, 0.0, -chosen_KBT), logits_KBTV, gradients


def far(a, b):
    """Distance of `a` from `b` over the norm of `b`."""
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def check_loss(model, config, x_BT, targets_KBT, zeros=0.0):
    generator = torch.Generator().manual_seed(3)
    weight_KBT = torch.rand(targets_KBT.shape, generator=generator) * 2
    weight_KBT[torch.rand(targets_KBT.shape, generator=generator) < zeros] = 0.0
    expected_KBT, logits_KBTV, gradients = oracle(model, config, x_BT, targets_KBT, weight_KBT.double())
    assert logits_KBTV.std() > 0.3
    loss_KBT = model(x_BT, targets_KBT)
    assert loss_KBT.dtype == torch.float32 and loss_KBT.shape == targets_KBT.shape
    assert (loss_KBT[targets_KBT == IGNORE] == 0).all()
    assert ((loss_KBT - expected_KBT).abs() <= 1e-5 * expected_KBT.abs().clamp(min=1)).all()
    (weight_KBT * loss_KBT).sum().backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == gradients.keys()
    for name, p in parameters.items():
        assert gradients[name].norm() > 1e-6, name  # a gradient of nothing would agree with anything
        assert far(p.grad, gradients[name]) < 1e-5, name
    return weight_KBT


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("num_heads", "tile"), [(1, (10, 64)), (2, (5, 7)), (4, (256, 256)), (8, (11, 33))])
def test_losses_and_gradients_against_float64(num_heads, tile, tied):
    model = make_model("llama", num_heads, tied, num_hidden_layers=8)  # 8 heads of 8 layers: no trunk is left
    model.tile = tile
    config = make_config("llama", tied, num_hidden_layers=8 - num_heads + 1)
    check_loss(model, config, tokens(3, 13), make_targets(num_heads, 3, 13))


@each_variant
def test_losses_and_gradients_of_every_family_against_float64(family, tied):
    model = make_model(family, 3, tied)
    model.tile = 16, 20  # of 117 tokens
    kept = make_config(family).num_hidden_layers - 2
    check_loss(model, make_config(family, tied, num_hidden_layers=kept), tokens(3, 13), make_targets(3, 3, 13))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_without_target_or_weight_are_in_no_product(family, monkeypatch):
    model, targets_KBT, sizes, real = make_model(family, 3), make_targets(3, 3, 13), [], common.TokenLosses.logits

    def counted(hidden_ND, weight_VD, *rest):
        sizes.append(len(hidden_ND) * len(weight_VD))
        return real(hidden_ND, weight_VD, *rest)

    monkeypatch.setattr(common.TokenLosses, "logits", counted)
    model.tile = 10, 20
    kept = make_config(family).num_hidden_layers - 2
    weight_KBT = check_loss(model, make_config(family, num_hidden_layers=kept), tokens(3, 13), targets_KBT, zeros=0.4)
    valid = (targets_KBT != IGNORE).sum().item()
    used = ((targets_KBT != IGNORE) & (weight_KBT > 0)).sum().item()
    assert 0.4 * valid < used < 0.8 * valid < 0.7 * targets_KBT.numel()
    assert sum(sizes) == 97 * (valid + used) and max(sizes) <= 200


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fewer_active_heads_are_the_first_ones(family):
    model, x_BT, targets_KBT = make_model(family, 3), tokens(3, 9), make_targets(3, 3, 9)
    with torch.no_grad():
        full_KBT = model(x_BT, targets_KBT)
    loss_KBT = model(x_BT, targets_KBT[:2])
    assert torch.allclose(loss_KBT, full_KBT[:2], rtol=1e-5, atol=1e-5)
    loss_KBT.sum().backward()
    assert all(p.grad is None for p in model.heads.layers[2].parameters())
    assert all(p.grad.norm() > 0 for p in model.heads.layers[1].parameters())
    with torch.no_grad():
        assert torch.equal(model(x_BT, targets_KBT), full_KBT)  # and all of them come back


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tile", [(10, 9), (256, 256)])
def test_with_correct_says_where_the_most_likely_token_is_the_target(family, tile):
    model, x_BT = make_model(family, 3), tokens(3, 7)
    model.tile = tile
    config = make_config(family, num_hidden_layers=make_config(family).num_hidden_layers - 2)
    targets_KBT = make_targets(3, 3, 7)
    _, logits_KBTV, _ = oracle(model, config, x_BT, targets_KBT, torch.ones(targets_KBT.shape))
    best_KBT = logits_KBTV.argmax(-1)
    even_KBT = (torch.arange(63).view(3, 3, 7) % 2 == 0) & (targets_KBT != IGNORE)
    targets_KBT[even_KBT] = best_KBT[even_KBT]
    with torch.no_grad():
        loss_KBT, correct_KBT = model(x_BT, targets_KBT, with_correct=True)
        assert torch.equal(loss_KBT, model(x_BT, targets_KBT))
    assert torch.equal(correct_KBT.bool(), best_KBT == targets_KBT)
    assert 5 < correct_KBT.sum() < (targets_KBT != IGNORE).sum()


def test_no_valid_target_at_all_gives_zero_loss_and_gradient():
    model, x_BT = make_model("llama", 2), tokens(2, 5)
    loss_KBT = model(x_BT, torch.full((2, 2, 5), IGNORE))
    loss_KBT.sum().backward()
    assert (loss_KBT == 0).all()
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_rounds_the_products_and_nothing_else(family):
    x_BT, targets_KBT = tokens(3, 13), make_targets(3, 3, 13)
    weight_KBT = torch.rand(targets_KBT.shape, generator=torch.Generator().manual_seed(3)) * 2
    half = common.Ranks(dtype=torch.bfloat16)
    model, other = make_model(family, 3), make_model(family, 3)
    model.tile = 16, 20
    with half.autocast():
        loss_KBT = model(x_BT, targets_KBT)
        logits_KBTV = head_logits(other, x_BT, 3)  # soft-capped in bf16 where there is a cap: looser below
    logits_NV, targets_N = logits_KBTV.float().flatten(0, 2), targets_KBT.flatten()
    expected_KBT = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="none").view_as(loss_KBT)
    assert loss_KBT.dtype == torch.float32
    assert (loss_KBT - expected_KBT).abs().max() < (1e-5 if model.softcap is None else 2e-2)
    (weight_KBT * loss_KBT).sum().backward()
    (weight_KBT * expected_KBT).sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.grad.dtype == torch.float32 and far(p.grad, q.grad.double()) < 3e-2, name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputed_heads_give_the_same_gradients(family):
    gradients = []
    for recompute in (False, True):
        model = make_model(family, 3)
        model.heads.recompute = recompute
        model.train()
        model(tokens(3, 9), make_targets(3, 3, 9)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_recompute_runs_the_layers_it_names_twice_and_changes_nothing_else(tmp_path):
    make_config("llama", vocab_size=259).save_pretrained(tmp_path)
    x_BT, targets_KBT = tokens(3, 9), make_targets(2, 3, 9)
    gradients = {}
    for recompute, (trunk_runs, head_runs) in {"none": (1, 1), "heads": (1, 2), "all": (2, 2)}.items():
        torch.manual_seed(0)
        model, _ = common.build_model(str(tmp_path / "config.json"), 2, recompute=recompute)
        model.train()
        runs = []
        for kind, layers in (("trunk", model.trunk_layers), ("head", model.heads.layers)):
            for layer in layers:  # the attention inside, as what checkpoints a layer may wrap its hooks
                layer.self_attn.register_forward_pre_hook(lambda *_, k=kind, to=runs: to.append(k))
        model(x_BT, targets_KBT).sum().backward()
        assert runs.count("trunk") == trunk_runs * len(model.trunk_layers)
        assert runs.count("head") == head_runs * 2
        gradients[recompute] = [p.grad for p in model.parameters()]
        with torch.no_grad():
            hidden_KBTD = model.eval().hidden(x_BT, 2)
            common.save_model(model, bytes_tokenizer(), tmp_path / recompute / "model", common.Ranks())
            assert torch.equal(common.load_mtp(tmp_path / recompute, 2).hidden(x_BT, 2), hidden_KBTD)
    for kind in ("heads", "all"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients[kind]))


def test_agrees_with_linear_cross_entropy_of_torch():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy (2.13 has)")
    x_BT, targets_KBT = tokens(3, 7), make_targets(3, 3, 7)
    weight_KBT = torch.rand(targets_KBT.shape, generator=torch.Generator().manual_seed(3))
    model = make_model("llama", 3)
    model.tile = 10, 20
    loss_KBT = model(x_BT, targets_KBT)
    (weight_KBT * loss_KBT).sum().backward()
    other = make_model("llama", 3)
    hidden_ND = other.hidden(x_BT, 3).reshape(-1, 32)
    expected_N = F.linear_cross_entropy(hidden_ND, other.causal_lm.lm_head.weight, targets_KBT.flatten(), reduction="none")
    (weight_KBT.flatten() * expected_N).sum().backward()
    assert torch.allclose(loss_KBT.flatten(), expected_N, rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert far(p.grad, q.grad.double()) < 1e-5, name


# --------------------------------------------------------------------------------------------------------- 4: refusals
FOREIGN = {
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "t5": lambda: transformers.T5Config(vocab_size=97, d_model=32, num_layers=2, num_heads=4, d_ff=32, d_kv=8),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=1
    ),
}


@pytest.mark.parametrize("family", FOREIGN)
def test_family_that_cannot_be_supported_is_refused_by_name(tmp_path, family):
    FOREIGN[family]().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    refused(lambda: common.build_model(str(file), 2), "--model", f"family {family}", path=file)


@pytest.mark.parametrize("family", ["cohere", "granite", "gpt2", "phi"])
def test_pretrained_model_that_cannot_be_supported_is_refused_by_name(tmp_path, family):
    transformers.AutoModelForCausalLM.from_config(FOREIGN[family]()).save_pretrained(tmp_path)
    refused(lambda: common.build_model(str(tmp_path), 2), "--model", f"family {family}", path=tmp_path)


def write_config(folder, **changes):
    make_config("llama", **changes).save_pretrained(folder)
    return str(folder / "config.json")


@pytest.mark.parametrize("rows", [97, 258, 259 + 1024])
def test_vocabulary_that_does_not_fit_the_tokenizer_is_refused(tmp_path, rows):
    name = write_config(tmp_path, vocab_size=rows)  # no tokenizer there: bytes, 259 tokens
    refused(lambda: common.build_model(name, 2), "--model", numbers=(rows, 259), path=name)


@pytest.mark.parametrize("rows", [259, 259 + 1023])
def test_vocabulary_padded_a_little_is_accepted(tmp_path, rows):
    model, tokenizer = common.build_model(write_config(tmp_path, vocab_size=rows), 2)
    assert model.causal_lm.lm_head.weight.shape == (rows, 32) and len(tokenizer) == 259


def test_vocabulary_of_a_folder_whose_tokenizer_knows_more_is_refused(tmp_path):
    make_plain("llama", vocab_size=300).save_pretrained(tmp_path)
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(50)])
    tokenizer.save_pretrained(tmp_path)
    refused(lambda: common.build_model(str(tmp_path), 2), "--model", numbers=(300, 309), path=tmp_path)


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    name = write_config(tmp_path, vocab_size=259)
    refused(lambda: common.build_model(name, 0), "--num-heads 0", numbers=(1,))
    refused(lambda: common.build_model(name, -1), "--num-heads -1", numbers=(1,))
    refused(lambda: common.build_model(name, 5), "--num-heads 5", numbers=(4,), path=name)
    layers = common.TINY["num_hidden_layers"]
    refused(lambda: common.build_model("tiny", layers + 1), f"--num-heads {layers + 1}", numbers=(layers,))
    refused(lambda: common.build_model(name, 2, 65), "--seq-len 65", numbers=(64,), path=name)
    model, _ = common.build_model(name, 4, 64)
    assert len(model.heads.layers) == 4 and len(model.trunk_layers) == 0


@pytest.mark.parametrize("number_of_heads", [1, 2, 4])
def test_from_scratch_every_number_of_heads_has_the_same_parameters(number_of_heads):
    plain = make_plain("llama")
    model = make_model("llama", number_of_heads)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert len(model.trunk_layers) + len(model.heads.layers) == 4


def test_path_that_does_not_exist_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "nothing.json", "nothing/config.json", "empty"):
        refused(lambda n=str(tmp_path / name): common.build_model(n, 2), "--model", name)


BROKEN = {
    "not json": '{"model_type": "llama",',
    "no family": "{}",
    "unknown family": '{"model_type": "no_such_family"}',
    "wrong type": '{"model_type": "llama", "hidden_size": "wide"}',
    "impossible sizes": '{"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}',
}


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_broken_config_is_refused(tmp_path, text, form):
    (tmp_path / "config.json").write_text(text)
    name = str(tmp_path / "config.json" if form == "file" else tmp_path)
    refused(lambda: common.build_model(name, 2), f"--model {name}")


# ------------------------------------------------------------------------------------------------ 5: Meta's checkpoints
def write_meta(folder, params, dtype=torch.float32, seed=0):
    """`consolidated.pth` and `params.json` with random weights; returns the tensors."""
    torch.manual_seed(seed)
    width, vocab_size, wide = params["dim"], params["vocab_size"], 48
    keys = width // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    tensors = {"tok_embeddings.weight": torch.randn(vocab_size, width), "output.weight": torch.randn(vocab_size, width) * 0.3}
    tensors |= {"norm.weight": 1 + 0.2 * torch.randn(width), "rope.freqs": torch.randn(4)}
    kept = params["n_layers"] - params["n_future_tokens"] + 1
    for prefix in [f"layers.{n}" for n in range(kept)] + [f"extra_heads.{n}" for n in range(params["n_future_tokens"] - 1)]:
        shapes = {"attention.wq": (width, width), "attention.wk": (keys, width), "attention.wv": (keys, width)}
        shapes |= {"attention.wo": (width, width), "feed_forward.w1": (wide, width), "feed_forward.w2": (width, wide)}
        shapes |= {"feed_forward.w3": (wide, width)}
        tensors |= {f"{prefix}.{name}.weight": 0.2 * torch.randn(shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}.{name}.weight": 1 + 0.2 * torch.randn(width) for name in ("attention_norm", "ffn_norm")}
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(tensors, folder / "consolidated.pth")
    return tensors


def meta_logits(tensors, params, x_BT):
    """Logits of all heads, `[K, B, T, V]`, as the original LLaMA code makes them, in float64."""
    w = {name: value.double() for name, value in tensors.items()}
    num_q, num_kv = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    size, length = params["dim"] // num_q, x_BT.shape[1]
    frequency = params.get("rope_theta", 10000.0) ** -(torch.arange(0, size, 2).double() / size)
    angle = torch.outer(torch.arange(length).double(), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]

    def norm(h_BTD, weight_D):
        return h_BTD * torch.rsqrt(h_BTD.square().mean(-1, keepdim=True) + params["norm_eps"]) * weight_D

    def rotate(q_BTHS):
        pairs = torch.view_as_complex(q_BTHS.reshape(*q_BTHS.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def block(h_BTD, prefix):
        batch = h_BTD.shape[0]
        a_BTD = norm(h_BTD, w[f"{prefix}.attention_norm.weight"])
        q, k, v = (
            (a_BTD @ w[f"{prefix}.attention.w{letter}.weight"].T).view(batch, length, number, size)
            for letter, number in (("q", num_q), ("k", num_kv), ("v", num_kv))
        )
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(num_q // num_kv, dim=2) for t in (k, v))
        scores = torch.einsum("bqhs,bkhs->bhqk", q, k) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed = torch.einsum("bhqk,bkhs->bqhs", scores.softmax(-1), v).flatten(2)
        h_BTD = h_BTD + mixed @ w[f"{prefix}.attention.wo.weight"].T
        a_BTD = norm(h_BTD, w[f"{prefix}.ffn_norm.weight"])
        w1, w2, w3 = (w[f"{prefix}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        return h_BTD + (F.silu(a_BTD @ w1.T) * (a_BTD @ w3.T)) @ w2.T

    h_BTD = w["tok_embeddings.weight"][x_BT]
    trunk = params["n_layers"] - params["n_future_tokens"]
    for number in range(trunk):
        h_BTD = block(h_BTD, f"layers.{number}")
    heads = [f"layers.{trunk}"] + [f"extra_heads.{n}" for n in range(params["n_future_tokens"] - 1)]
    return torch.stack([norm(block(h_BTD, head), w["norm.weight"]) @ w["output.weight"].T for head in heads])


META = dict(dim=32, n_layers=5, n_heads=4, n_future_tokens=3, norm_eps=1e-5, vocab_size=97, multiple_of=16)
META_CASES = {
    "as released": (META, torch.float32),
    "grouped queries": (META | dict(n_kv_heads=2, rope_theta=500.0, norm_eps=1e-2), torch.bfloat16),
    "one head": (META | dict(n_future_tokens=1, n_layers=3), torch.float32),
}


@pytest.mark.parametrize(("params", "dtype"), META_CASES.values(), ids=META_CASES.keys())
def test_meta_checkpoint_gives_the_logits_of_every_head(tmp_path, params, dtype):
    tensors, x_BT, held = write_meta(tmp_path / "meta", params, dtype), tokens(2, 11), params["n_future_tokens"]
    assert any(name.startswith("extra_heads.1.") for name in tensors) == (held == 3)
    assert any(name.startswith("layers.3.") for name in tensors) is False
    expected_KBTV = meta_logits(tensors, params, x_BT)
    assert expected_KBTV.std() > 0.3
    model = common.load_mtp(tmp_path / "meta")
    assert len(model.heads.layers) == held
    with torch.no_grad():
        logits_KBTV = head_logits(model, x_BT, held)
    assert (logits_KBTV - expected_KBTV).abs().max() < 1e-5
    common.save_model(model, bytes_tokenizer(), tmp_path / "model", common.Ranks())
    with torch.no_grad():
        assert torch.equal(head_logits(common.load_mtp(tmp_path, held), x_BT, held), logits_KBTV)


def test_meta_checkpoint_with_another_number_of_heads_is_refused(tmp_path):
    write_meta(tmp_path, META)
    for asked in (1, 2, 4):
        for add_heads in (False, True):
            call = lambda n=asked, a=add_heads: common.load_mtp(tmp_path, n, add_heads=a)  # noqa: E731
            refused(call, f"--num-heads {asked}", numbers=(asked, 3), path=tmp_path)
    assert len(common.load_mtp(tmp_path, 3).heads.layers) == 3


class Marker:
    """Unpickling makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_meta_checkpoint_cannot_run_code(tmp_path):
    tensors = write_meta(tmp_path, META)
    torch.save(tensors | {"evil": Marker(tmp_path / "marker")}, tmp_path / "consolidated.pth")
    with pytest.raises((pickle.UnpicklingError, UsageError)):
        common.load_mtp(tmp_path, 3)
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "consolidated.pth", weights_only=False)["evil"].close()
    assert (tmp_path / "marker").exists()  # the trap was armed


# ------------------------------------------------------------------------------------------------------ 6: curriculum
def test_active_heads_worked_by_hand():
    def counts(schedule, max_steps, num_heads):
        return [active_heads(schedule, step, max_steps, num_heads) for step in range(max_steps)]

    assert counts("constant", 3, 4) == [4, 4, 4]
    assert counts("forward", 8, 4) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert counts("reverse", 8, 4) == [4, 4, 3, 3, 2, 2, 1, 1]
    assert counts("forward", 5, 2) == [1, 1, 1, 2, 2]
    assert counts("reverse", 5, 2) == [2, 2, 2, 1, 1]
    assert counts("forward", 10, 4) == [1, 1, 1, 2, 2, 3, 3, 3, 4, 4]
    for schedule in ("constant", "forward", "reverse"):
        assert counts(schedule, 4, 1) == [1, 1, 1, 1]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("max_steps", [1, 2, 7, 8, 100, 2000])
def test_active_heads_are_in_range_and_in_equal_parts(num_heads, max_steps):
    forward, reverse, constant = (
        [active_heads(schedule, step, max_steps, num_heads) for step in range(max_steps)]
        for schedule in ("forward", "reverse", "constant")
    )
    assert constant == [num_heads] * max_steps
    assert forward == sorted(forward) and reverse == sorted(reverse, reverse=True)
    assert forward[0] == 1 and reverse[0] == num_heads
    for counts in (forward, reverse):
        assert all(1 <= count <= num_heads for count in counts)
        updates = [counts.count(k) for k in range(1, num_heads + 1)]
        assert sum(updates) == max_steps and max(updates) - min(updates) <= 1
    if max_steps >= num_heads:
        assert forward[-1] == num_heads and reverse[-1] == 1


# ------------------------------------------------------------------------------------------------ 7: key-value cache
def cache_slots(layer):
    return {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_owns_its_cache_slot(tmp_path, family):
    plain = make_plain(family)
    plain.save_pretrained(tmp_path)
    for model in (make_model(family, 3), common.load_mtp(tmp_path, 3, add_heads=True)):
        layers = [*model.trunk_layers, *model.heads.layers]
        assert [cache_slots(layer) for layer in layers] == [{number} for number in range(len(layers))]
        assert model.causal_lm.config.num_hidden_layers == len(model.trunk_layers) + 1


@pytest.mark.parametrize("name", NAMES)
def test_generate_with_head_1_is_that_of_the_exported_model(saved, name):
    case = saved.cases[name]
    plain = transformers.AutoModelForCausalLM.from_pretrained(case.run_dir / "model").eval()
    model = copy.deepcopy(case.model)
    assert model.hidden(saved.x_BT, 3).shape[0] == 3  # all heads ran before
    model.heads.active = 1
    prompt_BT = tokens(2, 6, seed=5)
    how = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    ours, theirs = (
        m.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), use_cache=True, **how) for m in (model.causal_lm, plain)
    )
    assert ours.sequences.shape == (2, 18)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert (torch.stack(ours.logits) - torch.stack(theirs.logits)).abs().max() < 1e-5
    with torch.no_grad():  # and the cache changed nothing: one pass over the whole sequence says the same
        whole_BTV = head_logits(model, ours.sequences, 1)[0, :, 5:-1]
    assert (torch.stack(ours.logits, 1) - whole_BTV).abs().max() < 1e-4
