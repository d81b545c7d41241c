"""grad_wmtp.py: scores against autograd and finite differences, weights against a slow loop, runs.

Shapes: B batch, T positions, K heads, N valid targets, V vocabulary, D width.
"""

import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import baseline_mtp
import grad_wmtp
from common import IGNORE, Batch, Ranks, add_heads, build_model, load_batch, load_data
from common import load_tokenizer, make_optimizer, make_targets, micro_batches
from conftest import data_args, metrics_of, on_ranks, refused, run_main, same_tensors
from conftest import short_args, small_texts, weights_of, write_lines

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SIZES |= dict(pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.2)
CAPPED = dict(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=1.0)
FAMILIES = {
    "untied": (transformers.LlamaConfig, dict(tie_word_embeddings=False)),
    "tied": (transformers.LlamaConfig, dict(tie_word_embeddings=True)),
    "capped": (transformers.Gemma2Config, dict(tie_word_embeddings=True, **CAPPED)),
}


class Case:
    """A model of 2 heads, a batch of 3 rows, a direction; and losses by plain torch.

    The losses are of an unembedding of their own: of tied embeddings the input side is constant.
    """

    def __init__(self, family, seed=0):
        self.family = family
        torch.manual_seed(0)
        kind, own = FAMILIES[family]
        plain = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | own))
        self.model = add_heads(plain, [plain.model.layers[-1].state_dict()])
        for p in self.model.heads.layers[1].parameters():
            p.data += 0.1 * torch.randn_like(p)
        self.x_BT = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(seed))
        is_target_BT, document_BT = np.ones((3, 13), bool), np.zeros((3, 13))
        is_target_BT[0, :4], document_BT[1, 6:] = False, 1
        targets = make_targets(self.x_BT.numpy(), document_BT, is_target_BT, 2)
        self.targets_KBT = torch.from_numpy(targets)
        self.valid_KBT = self.targets_KBT != IGNORE
        self.num_valid = self.valid_KBT[0].sum().item()
        self.weight_VD = self.model.causal_lm.lm_head.weight.detach().clone().requires_grad_()
        self.direction_VD = torch.randn_like(self.weight_VD)
        self.hidden_KBTD = self.model.hidden(self.x_BT, 2).detach()

    def losses(self, weight_VD):
        logits = F.linear(self.hidden_KBTD.to(weight_VD.dtype), weight_VD)
        cap = self.model.softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        options = dict(ignore_index=IGNORE, reduction="none")
        loss_N = F.cross_entropy(logits.flatten(0, 2), self.targets_KBT.flatten(), **options)
        return loss_N.view(self.targets_KBT.shape)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.weight_VD, retain_graph=True)[0]

    def measured(self, also):
        with torch.no_grad():
            return self.model(self.x_BT, self.targets_KBT, also)[1]


@pytest.fixture(params=FAMILIES)
def case(request):
    return Case(request.param)


# ------------------------------------------------------------------------------------ the scores
@pytest.mark.parametrize("chunk", [None, 16])
def test_scores_and_gradient_are_those_of_autograd(case, chunked, chunk):
    """Untied, tied and soft-capped; all 78 tokens at once, and 16 at a time."""
    chunked(chunk)
    loss_KBT, close = case.losses(case.weight_VD), functools.partial(pytest.approx, rel=1e-5)
    gradient_VD = case.gradient(loss_KBT.sum())
    own_VD, score_KBT, norm_KBT = map(case.measured, ("gradient", case.direction_VD, "norm"))
    assert (own_VD - gradient_VD).abs().max() < 2e-6 * gradient_VD.abs().max()
    total = (gradient_VD * case.direction_VD).sum().item()
    assert score_KBT.sum().item() == close(total)
    assert not score_KBT[~case.valid_KBT].any() and not norm_KBT[~case.valid_KBT].any()
    largest = score_KBT.abs().max()
    for k, b, t in case.valid_KBT.nonzero().tolist():
        token_VD = case.gradient(loss_KBT[k, b, t])
        assert abs((token_VD * case.direction_VD).sum() - score_KBT[k, b, t]) < 2e-6 * largest
        assert norm_KBT[k, b, t].item() == close(token_VD.norm().item())
    losses = [case.model(case.x_BT, case.targets_KBT, also) for also in (None, case.direction_VD)]
    assert torch.equal(losses[0], losses[1][0])
    torch.testing.assert_close(losses[0], loss_KBT, rtol=1e-5, atol=1e-5)


def test_a_batch_that_is_its_own_target_scores_the_squared_norm_of_its_gradient(case):
    gradient_VD = case.measured("gradient") / case.num_valid
    score_BT = grad_wmtp.token_scores(case.measured(gradient_VD))
    mean = score_BT.sum().item() / case.num_valid
    assert mean == pytest.approx(gradient_VD.square().sum().item(), rel=1e-5) and mean > 0


def test_the_score_is_how_much_a_tokens_weight_lowers_the_loss_of_the_target(case):
    """One step of SGD with weight 2 on token j less one with weight 1, in double precision."""
    family, rate = case.family, 1e-4
    clean = Case(family, seed=1)
    score_BT = grad_wmtp.token_scores(case.measured(clean.measured("gradient") / clean.num_valid))
    weight_VD, loss_KBT = case.weight_VD.detach().double(), case.losses(case.weight_VD)
    stepped_VD = weight_VD - rate / case.num_valid * case.gradient(loss_KBT.sum()).double()
    start, largest = clean.losses(stepped_VD).sum() / clean.num_valid, score_BT.abs().max().item()
    for b, j in ((0, 5), (0, 12), (1, 1), (1, 2), (1, 7), (2, 1), (2, 6)):
        heads = [loss_KBT[k - 1, b, j - k] for k in (1, 2) if j >= k]  # all that predict token j
        token_VD = case.gradient(sum(heads)).double()
        more = clean.losses(stepped_VD - rate / case.num_valid * token_VD).sum() / clean.num_valid
        expected = ((start - more) * case.num_valid / rate).item()
        assert score_BT[b, j].item() == pytest.approx(expected, abs=2e-3 * largest)


# ----------------------------------------------------------------------------------- the weights
def grad_args(**changes):
    return grad_wmtp.Args(**(dict(target="none", start=1) | changes))


def some_batch(share, random):
    """4 rows of 12 tokens, 2 documents in each; `share`: up to which place rows hold targets."""
    x_BT, place_BT = random.integers(3, 259, (4, 12)), np.arange(48).reshape(4, 12) % 24
    is_target_BT = (place_BT < np.repeat(share, 2)[:, None]) & (random.random((4, 12)) < 0.9)
    document_BT = (np.arange(12) > 4) + np.zeros((4, 1))
    targets_KBT = torch.from_numpy(make_targets(x_BT, document_BT, is_target_BT, 3))
    is_noise_BT = torch.from_numpy(random.random((4, 12)) < 0.3)
    batch = Batch(np.arange(4), torch.from_numpy(x_BT), targets_KBT, is_noise_BT)
    score_KBT = torch.from_numpy(random.standard_t(3, (3, 4, 12))).float()
    return batch, score_KBT * (targets_KBT != IGNORE)


def slow_weights(batch, score_KBT, moments, args):
    """Weight of every target by its place `(b, j)`, by the formulas, in Python's float64."""
    valid_BT, score_KBT = (batch.targets_KBT[0] != IGNORE).numpy(), score_KBT.double().numpy()
    raw = {}
    for b, j in np.ndindex(4, 12):
        if j > 0 and valid_BT[b, j - 1]:
            raw[b, j] = sum(score_KBT[k - 1, b, j - k] for k in (1, 2, 3) if j >= k)
    low, high = np.quantile(list(raw.values()), [0.02, 0.98])
    cut, score = {place: min(max(s, low), high) for place, s in raw.items()}, {}
    for b, j in raw:  # to both sides as far as tokens are targets: a document's first is none
        near = [cut[b, j]]
        for side in (-1, 1):
            for distance in range(1, args.smooth + 1):
                if (b, j + side * distance) not in raw:
                    break
                near.append(cut[b, j + side * distance])
        score[b, j] = np.mean(near)
    values = np.array(list(score.values()))
    moments[:2] = 0.99 * moments[:2] + 0.01 * np.array([1, values.mean()])
    moments[2] = 0.99 * moments[2] + 0.01 * ((values - moments[1] / moments[0]) ** 2).mean()
    z = (values - moments[1] / moments[0]) / (np.sqrt(moments[2] / moments[0]) + 1e-4)
    u = 1 / (1 + np.exp(-2 * (z + 1)))
    if args.mode == "token_skip":
        order = np.argsort(-z, kind="stable")
        u = np.zeros(len(z))
        u[order[: len(z) - round(0.3 * len(z))]] = 1
    return dict(zip(score, args.lambda_ + (1 - args.lambda_) * u / u.mean()))


VARIANTS = [dict(), dict(smooth=0, lambda_=0.3), dict(smooth=2, mode="token_skip")]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_equal_a_slow_loop_over_several_updates(changes):
    args, moments, slow = grad_args(**changes), torch.zeros(3), np.zeros(3)
    for update in (1, 2, 3):
        batch, score_KBT = some_batch((20, 24), np.random.default_rng(update))
        work = (moments, (0, update, 1), args, Ranks())
        weight_BT, figures = grad_wmtp.token_weights(batch, score_KBT, *work)
        by_place = slow_weights(batch, score_KBT, slow, args)
        for b, j in np.ndindex(4, 12):
            assert weight_BT[b, j].item() == pytest.approx(by_place.get((b, j), 1), abs=1e-4)
        assert figures[2].mean().item() == pytest.approx(1, abs=1e-6)
    before, _ = grad_wmtp.token_weights(batch, score_KBT, moments, (0, 0, 1), args, Ranks())
    assert (before == 1).all()  # update 0 comes before --start


def test_the_gate_gives_the_effective_share_that_is_asked_for():
    score_N = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for share in (0.3, 0.7, 0.99):
        args = grad_args(target_ess=share)
        u_N = grad_wmtp.weights_of_scores(score_N, torch.zeros(3), args).double()
        ess = (u_N.sum() ** 2 / (2000 * u_N.square().sum())).item()
        assert ess == pytest.approx(share, abs=1e-3) and u_N.mean().item() == pytest.approx(1)
        assert (u_N[score_N.argsort()].diff() >= 0).all()


SHARES = [(24, 5), (0, 24), (0, 0)]  # places where the targets of each rank may be
TWO_RANKS = [dict(), dict(mode="token_skip"), dict(control="shuffle")]


def weights_on_rank(ranks):
    """Weights and figures of random batches: 4 rows, or 2 on each of 2 ranks."""
    results, half = [], 4 // ranks.world_size
    rows = slice(half * ranks.rank, half * (ranks.rank + 1))
    for share in SHARES:
        batch, score_KBT = some_batch(share, np.random.default_rng(share))
        parts = (batch.x_BT[rows], batch.targets_KBT[:, rows], batch.is_noise_BT[rows])
        for changes in TWO_RANKS:
            work = (torch.zeros(3), (0, 1, 1), grad_args(**changes), ranks)
            batch = Batch(np.arange(4)[rows], *parts)
            results.append(grad_wmtp.token_weights(batch, score_KBT[:, rows], *work))
    return results


def test_weights_over_two_ranks_equal_those_of_one_batch():
    """A rank without a target, and no target at all."""
    ranks = on_ranks(weights_on_rank)
    for one, two, (weight_BT, figures) in zip(*ranks, weights_on_rank(Ranks()), strict=True):
        assert torch.equal(torch.cat([one[0], two[0]]), weight_BT)
        assert torch.equal(one[1], figures) and torch.equal(two[1], figures)


# -------------------------------------------------------------------------------- the target set
@pytest.fixture(scope="module")
def grad(material, tmp_path_factory):
    """The material; clean texts of the same kind, random characters; a run of the baseline."""
    folder = tmp_path_factory.mktemp("grad")
    for name in ("config.json", "text.jsonl"):
        (folder / name).symlink_to(material / name)
    choose = random.Random(0)
    noise = ["".join(map(chr, choose.choices(range(32, 127), k=400))) for _ in range(60)]
    for name, texts in dict(clean=small_texts(60, seed=1), noise=noise).items():
        write_lines(folder / f"{name}.jsonl", [{"text": text} for text in texts])
    args = short_args(baseline_mtp, folder, folder / "baseline", noise_frac=0.3)
    assert run_main(baseline_mtp, args) == 0
    return folder


def run_grad(folder, run_dir, target="clean.jsonl", **changes):
    values = dict(target=folder / target, target_every=2, start=2, noise_frac=0.3) | changes
    return run_main(grad_wmtp, short_args(grad_wmtp, folder, run_dir, **values))


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_the_direction_is_adams_step_along_the_moving_gradient(grad, micro_batch_size):
    """Two clean batches and a step of AdamW between them, by autograd of mean losses."""
    options = dict(target=grad / "clean.jsonl", target_rows=20, target_every=2, target_ema=0.7)
    args, tokenizer = short_args(grad_wmtp, grad, "", **options), load_tokenizer(None)
    torch.manual_seed(0)
    model, _ = build_model(args.model, 3)
    data = load_data(data_args(args.data), tokenizer, Ranks())
    target = grad_wmtp.Target(args, tokenizer, data, micro_batch_size, Ranks())
    optimizer = make_optimizer(model.train(), args)
    target.prepare(model, optimizer)
    assert len(target.rows) == 20
    weight_VD, mean_VD = model.causal_lm.lm_head.weight, 0
    for step in range(3):
        direction_VD = target.direction(model, step, 3)
        assert weight_VD.grad is None and model.training
        if step != 1:  # a clean batch is due
            order = np.random.default_rng((1, 0)).permutation(20)[4 * step : 4 * step + 8]
            batch = load_batch(target.rows, order, 3, "cpu")
            losses = model(batch.x_BT, batch.targets_KBT)
            loss = losses.sum() / (batch.targets_KBT[0] != IGNORE).sum()
            new_VD = torch.autograd.grad(loss, weight_VD)[0]
            mean_VD = 0.7 * mean_VD + 0.3 * new_VD
        share = 1 - 0.7 ** (1 if step < 2 else 2)
        square_VD = optimizer.state[weight_VD]["exp_avg_sq"] / (1 - 0.95 ** max(1, step))
        expected_VD = mean_VD / share / (square_VD.sqrt() + 1e-8)
        torch.testing.assert_close(direction_VD, expected_VD, rtol=1e-2, atol=1e-4)
        (batch,) = micro_batches(data.train, args, 8, step, 3, Ranks())
        model(batch.x_BT, batch.targets_KBT).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------ whole runs
EQUAL = [dict(lambda_=1.0, control="shuffle"), dict(mode="token_skip", skip_ratio=0.0)]


@pytest.mark.parametrize("changes", EQUAL, ids=str)
def test_lambda_1_and_no_skipping_are_the_baseline_to_the_last_bit(grad, tmp_path, changes):
    """Though clean batches are read and every token is scored."""
    assert run_grad(grad, tmp_path / "run", **changes) == 0
    assert "grad/noise_auc" in metrics_of(tmp_path / "run")[4]
    own = ("grad/", "weights/on_", "perf/")
    assert metrics_of(tmp_path / "run", own) == metrics_of(grad / "baseline")
    assert same_tensors(weights_of(tmp_path / "run"), weights_of(grad / "baseline"))


@pytest.mark.parametrize("target, sign", [("clean.jsonl", 1), ("noise.jsonl", -1)])
def test_noise_weighs_more_only_where_the_target_is_noise(grad, tmp_path, target, sign):
    """Random characters as the target turn the scores around."""
    assert run_grad(grad, tmp_path / "run", target, max_steps=30, start=5, smooth=4) == 0
    lines = metrics_of(tmp_path / "run")[15:30]
    means = [np.mean([line[f"weights/on_{kind}"] for line in lines]) for kind in ("clean", "noise")]
    assert sign * (means[0] - means[1]) > 0.1


def test_the_control_trains_on_the_clean_batches_with_equal_weights(grad, tmp_path):
    """The first update's loss is the mean over its rows and as many clean ones."""
    changes = dict(control="target", target_rows=0, num_heads=1, max_steps=3)
    assert run_grad(grad, tmp_path / "run", **changes) == 0
    lines = metrics_of(tmp_path / "run")
    torch.manual_seed(0)
    model, tokenizer = build_model(str(grad / "config.json"), 1)
    total, count = 0.0, 0
    for name, seed, noise in (("text", 0, 0.3), ("clean", 1, 0.0)):
        rows = load_data(data_args(grad / f"{name}.jsonl", noise_frac=noise), tokenizer, Ranks())
        order = np.random.default_rng((seed, 0)).permutation(len(rows.train))[:8]
        batch = load_batch(rows.train, order, 1, "cpu")
        total += model(batch.x_BT, batch.targets_KBT).sum().item()
        count += (batch.targets_KBT != IGNORE).sum().item()
    assert lines[0]["train/loss"] == pytest.approx(total / count, rel=1e-5)
    assert all(line["weights/max"] == line["weights/mean"] == 1 for line in lines[:3])


# ------------------------------------------------------------------------------------- bad input
BAD = [
    (dict(target=""), ["--target", "grad_wmtp.py --data stdlib:a"]),
    (dict(target="nothing.jsonl"), ["--target nothing.jsonl", "no such file"]),
    (dict(target_ema=1.0), ["--target-ema 1.0", "from 0 to 0.9999"]),
    (dict(start=0), ["--start 0", "from 1"]),
    (dict(mode="token_skip", target_ess=0.7), ["--target-ess: needs --mode weighted"]),
    (dict(skip_ratio=0.5), ["--skip-ratio: needs --mode token_skip"]),
]


@pytest.mark.parametrize("changes, words", BAD, ids=str)
def test_bad_input_is_refused_in_one_line(grad, tmp_path, changes, words):
    values = dict(target=grad / "clean.jsonl") | changes
    args = functools.partial(short_args, grad_wmtp, grad, tmp_path / "run", **values)
    refused(lambda: run_main(grad_wmtp, args()), *words)
    assert not (tmp_path / "run/args.json").exists()
