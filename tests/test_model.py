"""The model and its loss against plain transformers models and a plain float64 pass.

Shapes: B batch, T positions, K heads, V vocabulary, D width, N tokens.
"""

import collections
import functools
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from test_data import FAST

from common import HEADS_FILE, IGNORE, Ranks, active_heads, build_model, from_config
from common import load_mtp, save_model
from conftest import bytes_tokenizer, refused

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
SIZES.update(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SIZES.update(pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=False)
SIZES.update(initializer_range=0.2)  # ten times the usual: logits are spread and a wrong one shows
TIED = dict(tie_word_embeddings=True)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
# Of 5 layers with 3 heads, head 1 is layer 3: sliding attention in gemma2, full in gemma3.
# In SmolLM3 every fourth layer is without rotary positions, the one that head 2 would have been.
CAPPED = dict(**GEMMA, **TIED, final_logit_softcapping=1.0, num_hidden_layers=5)
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-tied": (transformers.LlamaConfig, TIED),
    "qwen2-tied": (transformers.Qwen2Config, TIED),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=8)),
    "mistral": (transformers.MistralConfig, dict(sliding_window=4)),
    "gemma2": (transformers.Gemma2Config, CAPPED),  # tied
    "gemma3": (transformers.Gemma3TextConfig, dict(**GEMMA, sliding_window_pattern=2)),
    "olmo2": (transformers.Olmo2Config, {}),
    "smollm3": (transformers.SmolLM3Config, dict(num_hidden_layers=5)),
}


def make_config(family, **changes):
    config_class, own = FAMILIES[family]
    return config_class(**(SIZES | own | changes))


def make_model(family, num_heads, **changes):
    """Norms and biases would start as ones and zeros, all alike: each gets its own."""
    torch.manual_seed(0)
    model = from_config(make_config(family, **changes), num_heads)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model


def make_targets(num_heads):
    """Random targets, a fifth ignored, the last k of head k ignored, row 1 without any."""
    random = torch.Generator().manual_seed(2)
    targets_KBT = torch.randint(0, 97, (num_heads, 3, 13), generator=random)
    targets_KBT[torch.rand(targets_KBT.shape, generator=random) < 0.2] = IGNORE
    for k in range(num_heads):
        targets_KBT[k, :, 12 - k :] = IGNORE
    targets_KBT[:, 1] = IGNORE
    return targets_KBT


X_BT = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(1))
TARGETS_KBT = make_targets(3)
read_plain = transformers.AutoModelForCausalLM.from_pretrained


def random_weights(targets_KBT):
    return torch.rand(targets_KBT.shape, generator=torch.Generator().manual_seed(3)) * 2


def head_logits(model, x_BT, num_heads):
    """Logits of heads 1..num_heads, `[K, B, T, V]`, through the model's own unembedding."""
    logits = model.causal_lm.lm_head(model.hidden(x_BT, num_heads))
    cap = model.causal_lm.config.to_dict().get("final_logit_softcapping")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def far(a, b):
    """Distance of `a` from `b` over the norm of `b`."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


# --------------------------------------------------------------------------- saved and read again
@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A family with 3 heads, saved as a run saves it; what it computed before."""
    run_dir, model = tmp_path_factory.mktemp("saved"), make_model(request.param, 3)
    save_model(model, bytes_tokenizer(), run_dir / "model", Ranks())
    with torch.no_grad():
        hidden, logits = model.hidden(X_BT, 3), head_logits(model, X_BT, 3)
    return SimpleNamespace(run_dir=run_dir, hidden=hidden, logits=logits)


def test_plain_transformers_reads_trunk_and_head_1(saved):
    plain, loading = read_plain(saved.run_dir / "model", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loading[kind]
    with torch.no_grad():
        logits_BTV = plain.eval()(X_BT).logits
    assert saved.logits.std() > 0.3  # otherwise any model would do
    assert (logits_BTV - saved.logits[0]).abs().max() < 1e-5
    assert (logits_BTV - saved.logits[1]).abs().max() > 0.1  # and no other head is meant


def test_reload_gives_every_head_exactly(saved):
    with torch.no_grad():
        assert torch.equal(load_mtp(saved.run_dir).hidden(X_BT, 3), saved.hidden)
    assert len(load_mtp(saved.run_dir / "model", 3).heads.layers) == 3
    tensors = load_file(saved.run_dir / "model" / HEADS_FILE)
    assert {name.split(".")[1] for name in tensors} == {"2", "3"}
    two, three = (tensors[f"heads.{k}.mlp.up_proj.weight"] for k in (2, 3))
    assert not torch.equal(two, three)  # each head starts from its own draw


def test_heads_added_to_a_pretrained_model_are_copies_of_its_last_layer(saved, tmp_path):
    leave_heads = shutil.ignore_patterns(HEADS_FILE)
    shutil.copytree(saved.run_dir / "model", tmp_path / "plain", ignore=leave_heads)
    model = load_mtp(tmp_path / "plain", num_heads=4)
    with torch.no_grad():
        logits_BTV = read_plain(tmp_path / "plain")(X_BT).logits
        hidden_KBTD = model.hidden(X_BT, 4)
        assert (head_logits(model, X_BT, 1)[0] - logits_BTV).abs().max() < 1e-5
    assert torch.equal(hidden_KBTD, hidden_KBTD[:1].expand(4, -1, -1, -1))
    addresses = [p.data_ptr() for layer in model.heads.layers for p in layer.parameters()]
    assert len(set(addresses)) == len(addresses)  # copies, not the same tensors
    refused(lambda: load_mtp(saved.run_dir, 4), "--num-heads 4", "has 3 heads")


# ---------------------------------------------------------------------------------- tokenizers
TEXT = "def f(x):\n    return x + 1  # caf\u00e9 \u65e5\n"


@pytest.mark.parametrize("kind", ["bytes", "own"])
@pytest.mark.parametrize("family", ["Mistral", "Olmo2", "Phi3", "Granite", "Qwen2"])
def test_tokenizer_that_was_saved_is_read_whatever_the_family(tmp_path, family, kind):
    """transformers goes by the family: an error, or for Qwen2 other tokens."""
    sizes = SIZES | dict(vocab_size=340, num_key_value_heads=4)
    getattr(transformers, f"{family}Config")(**sizes).save_pretrained(tmp_path)
    expected = [byte + 3 for byte in TEXT.encode()]
    if kind == "own":
        FAST.save_pretrained(tmp_path)
        expected = FAST.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    model, tokenizer = build_model(str(tmp_path / "config.json"), 2)
    save_model(model, tokenizer, tmp_path / "run" / "model", Ranks())
    for other in (tokenizer, build_model(str(tmp_path / "run"), 2)[1]):
        assert other(TEXT, add_special_tokens=False)["input_ids"] == expected
        assert other.eos_token_id == 1


# ------------------------------------------------------------------------------------ the loss
def plain_with_head(model, config, number):
    """A plain float64 model whose last layer is head `number` (from 0), and `model`'s names."""
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    last, state, names = config.num_hidden_layers - 1, {}, {}
    for name, value in model.state_dict().items():
        own = name.removeprefix("causal_lm.")
        of_head = re.fullmatch(rf"model\.layers\.{last}\.layers\.(\d+)\.(.+)", own)
        if of_head and int(of_head[1]) != number:
            continue
        own = f"model.layers.{last}.{of_head[2]}" if of_head else own
        state[own], names[own] = value.double(), name
    plain.load_state_dict(state)
    return plain, names


def oracle(model, targets_KBT, weight_KBT):
    """Losses `[K, B, T]`, stacked logits and gradients by name, of plain float64 models.

    (transformers takes norms in fp32 in a float64 model too: an error of 1e-7.)
    """
    config = model.causal_lm.config
    logits, losses, gradients = [], [], {}
    for number, (targets_BT, weight_BT) in enumerate(zip(targets_KBT, weight_KBT)):
        plain, names = plain_with_head(model, config, number)
        logits_BTV = plain(X_BT, use_cache=False).logits
        log_p_BTV = logits_BTV.log_softmax(-1)
        chosen_BT = log_p_BTV.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
        loss_BT = torch.where(targets_BT == IGNORE, 0.0, -chosen_BT)
        (weight_BT * loss_BT).sum().backward()
        logits.append(logits_BTV.detach())
        losses.append(loss_BT.detach())
        for own, p in plain.named_parameters():
            gradients[names[own]] = gradients.get(names[own], 0) + p.grad
    return torch.stack(losses), torch.stack(logits), gradients


def check_loss(model, num_heads):
    """Loss of every target and gradient of every parameter, some of the weights being zero."""
    targets_KBT = make_targets(num_heads)
    weight_KBT = random_weights(targets_KBT)
    weight_KBT[weight_KBT < 0.6] = 0.0
    expected_KBT, logits_KBTV, gradients = oracle(model, targets_KBT, weight_KBT.double())
    assert logits_KBTV.std() > 0.3
    loss_KBT = model(X_BT, targets_KBT)
    assert loss_KBT.dtype == torch.float32 and (loss_KBT[targets_KBT == IGNORE] == 0).all()
    assert ((loss_KBT - expected_KBT).abs() <= 1e-5 * expected_KBT.abs().clamp(min=1)).all()
    (weight_KBT * loss_KBT).sum().backward()
    assert dict(model.named_parameters()).keys() == gradients.keys()
    for name, p in model.named_parameters():
        assert gradients[name].norm() > 1e-6, name  # one of nothing agrees with anything
        assert far(p.grad, gradients[name]) < 1e-5, name


VARIANTS = [*((family, 3, 16) for family in FAMILIES), ("gemma2", 3, 5), ("gemma2", 3, 256)]
VARIANTS += [("llama-tied", 1, 16), ("llama-tied", 8, 16), ("llama", 3, 256)]


@pytest.mark.parametrize("family, num_heads, chunk", VARIANTS)
def test_losses_and_gradients_against_float64(family, num_heads, chunk, chunked):
    chunked(chunk)
    changes = {} if num_heads == 3 else dict(num_hidden_layers=8)  # of 8 heads: without a trunk
    check_loss(make_model(family, num_heads, **changes), num_heads)


def test_fewer_active_heads_are_the_first_ones():
    model = make_model("gemma2", 3)
    with torch.no_grad():
        full_KBT = model(X_BT, TARGETS_KBT)
    loss_KBT = model(X_BT, TARGETS_KBT[:2])
    torch.testing.assert_close(loss_KBT, full_KBT[:2], rtol=1e-5, atol=1e-5)
    loss_KBT.sum().backward()
    assert all(p.grad is None for p in model.heads.layers[2].parameters())
    assert all(p.grad.norm() > 0 for p in model.heads.layers[1].parameters())
    with torch.no_grad():
        assert torch.equal(model(X_BT, TARGETS_KBT), full_KBT)  # and all of them come back


def test_figures_beside_the_loss(chunked):
    """Where the most likely token is the target, and the entropy, from the same logits."""
    chunked(16)
    model, targets_KBT = make_model("gemma2", 3), TARGETS_KBT.clone()
    logits_KBTV = oracle(model, targets_KBT, targets_KBT * 0)[1]
    best_KBT, is_valid_KBT = logits_KBTV.argmax(-1), targets_KBT != IGNORE
    even_KBT = (torch.arange(117).view(3, 3, 13) % 2 == 0) & is_valid_KBT
    targets_KBT[even_KBT] = best_KBT[even_KBT]
    entropy_KBT = torch.distributions.Categorical(logits=logits_KBTV).entropy() * is_valid_KBT
    for _ in range(2):
        loss_KBT, correct_KBT = model(X_BT, targets_KBT, "correct")
        other_KBT, own_KBT = model(X_BT, targets_KBT, "entropy")
        assert torch.equal(loss_KBT, model(X_BT, targets_KBT)) and torch.equal(loss_KBT, other_KBT)
        assert torch.equal(correct_KBT.bool(), best_KBT == targets_KBT)
        torch.testing.assert_close(own_KBT, entropy_KBT.float(), rtol=1e-4, atol=1e-4)
        assert not (correct_KBT.requires_grad or own_KBT.requires_grad)
        chunked(4096)  # then all logits in one
    assert 5 < correct_KBT.sum() < is_valid_KBT.sum()


def test_no_valid_target_at_all_gives_zero_loss_and_gradient(chunked):
    chunked(16)
    model = make_model("llama", 3)
    loss_KBT = model(X_BT, torch.full_like(TARGETS_KBT, IGNORE))
    loss_KBT.sum().backward()
    assert (loss_KBT == 0).all() and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_rounds_the_products_and_nothing_else(family, chunked):
    """Against stacked logits of the same autocast (a cap is bf16 there: looser), plain autograd."""
    chunked(16)
    model, other = make_model(family, 3), make_model(family, 3)
    with Ranks(dtype=torch.bfloat16).autocast():
        loss_KBT = model(X_BT, TARGETS_KBT)
        logits_NV = head_logits(other, X_BT, 3).float().flatten(0, 2)
    how = dict(ignore_index=IGNORE, reduction="none")
    expected_KBT = F.cross_entropy(logits_NV, TARGETS_KBT.flatten(), **how).view_as(loss_KBT)
    assert loss_KBT.dtype == torch.float32
    assert (loss_KBT - expected_KBT).abs().max() < (1e-5 if family == "llama" else 2e-2)
    for losses in (loss_KBT, expected_KBT):
        (random_weights(TARGETS_KBT) * losses).sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.grad.dtype == torch.float32 and far(p.grad, q.grad) < 3e-2, name


def test_recompute_runs_the_layers_it_names_twice_and_gives_equal_gradients(tmp_path):
    make_config("gemma2", vocab_size=259 + 1023).save_pretrained(tmp_path)  # padded
    gradients = []
    for recompute, trunk_runs, head_runs in (("none", 1, 1), ("heads", 1, 2), ("all", 2, 2)):
        torch.manual_seed(0)
        model, _ = build_model(str(tmp_path / "config.json"), 2, recompute=recompute)
        layers = [*model.trunk_layers, *model.heads.layers]
        runs = collections.Counter()
        for layer in layers:  # the attention inside: recompute may wrap the layer
            layer.self_attn.register_forward_pre_hook(lambda m, _, runs=runs: runs.update([m]))
        model.train()
        model(X_BT, TARGETS_KBT[:2]).sum().backward()
        expected = [trunk_runs] * len(model.trunk_layers) + [head_runs] * 2
        assert [runs[layer.self_attn] for layer in layers] == expected
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other))


# ------------------------------------------------------------------------------------ refusals
FOREIGN = {
    "family cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "GPT2": lambda: transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4),
    "family phi": lambda: transformers.PhiConfig(**SIZES),  # its lm_head has a bias
}


@pytest.mark.parametrize("words", FOREIGN)
def test_family_that_cannot_be_supported_is_refused_by_name(tmp_path, words):
    """From its configuration, and pretrained."""
    transformers.AutoModelForCausalLM.from_config(FOREIGN[words]()).save_pretrained(tmp_path)
    for name in (tmp_path / "config.json", tmp_path):
        refused(functools.partial(build_model, str(name), 2), "--model", words)


FILE = "config.json"
REFUSED = [  # --model, changes to the llama in FILE (its tokenizer: bytes, 259), arguments, words
    (FILE, dict(vocab_size=258), (2,), ("--model", "vocabulary has 258", "tokenizer 259")),
    (FILE, {}, (5,), ("--num-heads 5", "at most 4")),
    (FILE, {}, (2, 65), ("--seq-len 65", "64 positions")),
    (FILE, dict(model_type="no_such_family"), (2,), ("--model", "config.json: not a model")),
    ("nothing", {}, (2,), ("--model", "nothing: not a model")),
]


@pytest.mark.parametrize("name, changes, arguments, words", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, name, changes, arguments, words):
    config = make_config("llama", vocab_size=259).to_dict()
    (tmp_path / FILE).write_text(json.dumps(config | changes))
    refused(lambda: build_model(str(tmp_path / name), *arguments), *words)


@pytest.mark.parametrize("file", ["model.safetensors", HEADS_FILE])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, file):
    save_model(make_model("llama", 2), bytes_tokenizer(), tmp_path / "model", Ranks())
    path = tmp_path / "model" / file
    tensors = load_file(path)
    name = [name for name in tensors if name.endswith("up_proj.weight")][-1]
    tensors[name][3, 5] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    refused(lambda: load_mtp(tmp_path), "--model", name, "infinite")


# ---------------------------------------------------------------------------------- curriculum
def test_active_heads_worked_by_hand():
    def counts(schedule, max_steps, num_heads):
        return [active_heads(schedule, step, max_steps, num_heads) for step in range(max_steps)]

    assert counts("constant", 3, 4) == [4, 4, 4]
    assert counts("forward", 8, 4) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert counts("reverse", 8, 4) == [4, 4, 3, 3, 2, 2, 1, 1]
    assert counts("forward", 5, 2) == [1, 1, 1, 2, 2]
    assert counts("forward", 2, 8) == [1, 5]  # fewer updates than heads
