"""rho1_wmtp.py: weights against a slow loop, runs against the baseline and a plain loop, bad input.

Shapes: B batch, T positions, K heads, N valid targets, V vocabulary.
"""

import math
import random
import shutil

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import baseline_mtp
import rho1_wmtp
from common import IGNORE, Batch, Ranks, batch_rows, bounded_softmax
from common import load_batch, load_data, load_tokenizer, make_targets, select, weights_of_targets
from conftest import CONFIG, data_args, make_small_model, metrics_of, on_ranks, refused
from conftest import run_main, same_tensors, short_args, slow_bounded, small_texts, weights_of
from conftest import write_lines

LENGTH, KEY = 32, (0, 0, 1)


def rho1_args(**changes):
    return rho1_wmtp.Args(**(dict(ref_model="none") | changes))


def run_rho1(folder, run_dir, **changes):
    values = dict(ref_model=folder / "reference", noise_frac=0.3) | changes
    return run_main(rho1_wmtp, short_args(rho1_wmtp, folder, run_dir, **values))


@pytest.fixture(scope="module")
def rho1(material, tmp_path_factory):
    """The material, other texts, records; runs: a reference (4 heads), a baseline, a selection."""
    folder = tmp_path_factory.mktemp("rho1")
    for name in ("config.json", "text.jsonl"):
        (folder / name).symlink_to(material / name)
    other = write_lines(folder / "other.jsonl", [{"text": t} for t in small_texts(60, seed=1)])
    choose, lines = random.Random(0), "".join(small_texts(20, seed=2)).splitlines()
    cut = [choose.choice(lines)[: choose.randint(1, 16)] for _ in range(120)]
    records = [dict(prompt=prompt, completion=text) for prompt, text in zip(cut[::2], cut[1::2])]
    write_lines(folder / "records.jsonl", records)
    reference = dict(data=other, max_steps=20, seed=1)
    for name, changes in dict(reference=reference, baseline=dict(noise_frac=0.3)).items():
        args = short_args(baseline_mtp, folder, folder / name, **changes)
        assert run_main(baseline_mtp, args) == 0
    selection = dict(mode="token_skip", data=folder / "records.jsonl", noise_frac=0.0)
    assert run_rho1(folder, folder / "selection", **selection) == 0
    return folder


def rows_of(folder, name="text"):
    args = data_args(folder / f"{name}.jsonl", seq_len=LENGTH, noise_frac=0.3)
    return load_data(args, load_tokenizer(None), Ranks())


# --------------------------------------------------------------------------------- the weights
def slow_weights(loss_N, ref_N, args):
    """Weights of the valid targets by the formulas of the paper, in Python's float64."""
    scores, N = [loss - ref for loss, ref in zip(loss_N, ref_N)], len(loss_N)
    if args.mode == "token_skip":
        order = sorted(range(N), key=lambda i: (-scores[i], i))
        kept = set(order[: max(1, N - round(args.skip_ratio * N))])
        u = [N / len(kept) if i in kept else 0.0 for i in range(N)]
    else:
        low, high = [args.temperature or value for value in (0.01, 100)]
        while True:  # halving finds the temperature of --target-ess
            temperature = (low * high) ** 0.5
            powers = [math.exp((score - max(scores)) / temperature) for score in scores]
            u = slow_bounded(powers, args.epsilon, args.max_weight)
            if high / low < 1 + 1e-9:
                break
            share = sum(u) ** 2 / (N * sum(value**2 for value in u))
            low, high = (temperature, high) if share < args.target_ess else (low, temperature)
    return [args.lambda_ + (1 - args.lambda_) * value for value in u]


FREE = dict(epsilon=0.0, max_weight=1e9)  # bounds that bind nothing
VARIANTS = [
    dict(),
    dict(target_ess=0.5, lambda_=0.3, **FREE),
    dict(temperature=0.1, epsilon=0.2, max_weight=1.5),
    dict(mode="token_skip"),
    dict(mode="token_skip", skip_ratio=0.45, lambda_=0.2),
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_and_objective_equal_a_slow_loop(rho1, changes):
    """Records with masked prompts and padding, 4 heads: the weight of token t+k; the objective."""
    args, H = rho1_args(**changes), 4
    batch = load_batch(rows_of(rho1, "records").train, np.arange(7), H, "cpu")
    valid_KBT, generator = batch.targets_KBT != IGNORE, torch.Generator().manual_seed(0)
    loss_KBT = (torch.rand(H, 7, LENGTH, generator=generator) * 4 * valid_KBT).requires_grad_()
    ref_BT = torch.rand(7, LENGTH, generator=generator) * 4
    work = (batch, loss_KBT, ref_BT, args.skip_ratio, KEY, args, Ranks())
    weight_BT, figures = rho1_wmtp.token_weights(*work)
    assert not weight_BT.requires_grad and not figures.requires_grad  # they are constants
    places = list(map(tuple, valid_KBT[0].nonzero().tolist()))
    losses, refs = ([x[b, t].item() for b, t in places] for x in (loss_KBT[0], ref_BT))
    by_place = dict(zip(places, slow_weights(losses, refs, args)))
    for b, t in np.ndindex(7, LENGTH):  # head 1's target at t is token t + 1
        assert weight_BT[b, t].item() == pytest.approx(by_place.get((b, t - 1), 1), abs=2e-5)
    expected = 0.0
    for k, b, t in map(tuple, valid_KBT.nonzero().tolist()):  # head k+1's is head 1's at t+k
        expected += by_place[b, t + k] * loss_KBT[k, b, t].item()
    objective = (weights_of_targets(weight_BT, H) * loss_KBT).sum().item()
    assert objective == pytest.approx(expected, rel=1e-5)
    assert np.mean([*by_place.values()]) == pytest.approx(1, abs=1e-6)


def test_bounds_hold_with_mean_one_whatever_the_scores():
    generator = torch.Generator().manual_seed(0)
    for epsilon, max_weight in ((0.05, 3.0), (0.2, 1.5), (1.0, 2.0), (0.0, 1.0), (0.0, 1e9)):
        for spread in (0.3, 3.0, 30.0):
            score_N = torch.randn(999, generator=generator).sinh() * spread
            weight_N = bounded_softmax(score_N, epsilon, max_weight)
            assert weight_N.double().mean().item() == pytest.approx(1, abs=1e-5)
            assert epsilon <= weight_N.min() and weight_N.max() <= max_weight
            assert (weight_N[score_N.argsort()].diff() >= 0).all()  # a higher score, no less


@pytest.mark.parametrize("ratio", [0, 0.001, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 101])
def test_selection_keeps_the_exact_count_whatever_the_ties(number, ratio):
    """Of equal scores the first stay."""
    for score_N in (torch.randn(number), torch.zeros(number), torch.arange(number) // 3 * 1.0):
        kept_N = select(score_N, ratio)
        count = max(1, number - round(ratio * number)) if number else 0
        order = sorted(range(number), key=lambda i, s=score_N: (-s[i].item(), i))
        assert sorted(kept_N.nonzero()[:, 0].tolist()) == sorted(order[:count])


# ----------------------------------------------------------------------------------- equal runs
NO_SKIPPING = dict(skip_ratio=0.0, mode="token_skip", lambda_=0.3, control="shuffle")


@pytest.mark.parametrize("changes", [dict(lambda_=1.0), NO_SKIPPING], ids=str)
def test_lambda_1_and_no_skipping_are_the_baseline_to_the_last_bit(rho1, tmp_path, changes):
    assert run_rho1(rho1, tmp_path / "run", **changes) == 0
    own = ("rho1/", "weights/on_", "perf/")
    assert metrics_of(tmp_path / "run", own) == metrics_of(rho1 / "baseline")
    has_figures = "rho1/excess_mean" in metrics_of(tmp_path / "run")[0]
    assert has_figures == (changes["lambda_"] < 1)  # at lambda 1 no reference is computed
    assert same_tensors(weights_of(tmp_path / "run"), weights_of(rho1 / "baseline"))


def test_the_whole_run_equals_a_plain_loop(rho1, tmp_path):
    """token_skip with 1 head: a plain model and reference, cross entropy, AdamW of torch.

    The worst documents are left out, then a share of the other tokens that grows to 0.3.
    """
    run = dict(num_heads=1, mode="token_skip", max_steps=3, skip_documents=0.25, skip_ramp=0.5)
    assert run_rho1(rho1, tmp_path / "run", **run) == 0
    left_out_D = reference_of(rho1, batch_size=8, **run)[0].left_out_D
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    reference = transformers.AutoModelForCausalLM.from_pretrained(rho1 / "reference/model")
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [dict(params=others, weight_decay=0.1), dict(params=norms, weight_decay=0.0)]
    optimizer, train, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95)), rows_of(rho1).train, []
    for step, (learning_rate, share) in enumerate([(1.5e-3, 0), (3e-3, 0.2), (3e-3, 0.3)]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        rows = train[batch_rows(len(train), 8, 0, step)]
        x_BT, document_BT = torch.tensor(rows["input_ids"]).long(), torch.tensor(rows["document"])
        valid_BT = (document_BT[:, 1:] == document_BT[:, :-1]) & (document_BT[:, 1:] >= 0)
        valid_BT &= ~torch.isin(document_BT[:, 1:], torch.from_numpy(left_out_D))
        logits = [m(input_ids=x_BT).logits[:, :-1][valid_BT] for m in (model, reference)]
        target_N = x_BT[:, 1:][valid_BT]
        loss_N, ref_N = (F.cross_entropy(x, target_N, reduction="none") for x in logits)
        num_kept = len(loss_N) - round(share * len(loss_N))
        kept = (loss_N - ref_N).argsort(descending=True, stable=True)[:num_kept]
        objective = loss_N[kept].mean()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(objective.item())
    logged = [line["train/loss"] for line in metrics_of(tmp_path / "run")[:3]]
    assert logged == pytest.approx(losses, rel=2e-5) and len(left_out_D)


# ------------------------------------------------------------------------------------ two ranks
SHARES = [(24, 5), (0, 24), (0, 3), (0, 0)]  # places where the targets of each rank may be
TWO_RANKS = [dict(), dict(mode="token_skip"), dict(control="shuffle")]


def weights_on_rank(ranks):
    """Weights and figures of random batches (ties are common): 4 rows, or 2 on each of 2 ranks."""
    results, half = [], 4 // ranks.world_size
    rows = slice(half * ranks.rank, half * (ranks.rank + 1))
    for share in SHARES:
        random = np.random.default_rng(share)
        x_BT, place_BT = random.integers(3, 259, (4, 12)), np.arange(48).reshape(4, 12) % 24
        is_target_BT = (place_BT < np.repeat(share, 2)[:, None]) & (random.random((4, 12)) < 0.8)
        targets_KBT = torch.from_numpy(make_targets(x_BT, x_BT * 0, is_target_BT, 3))[:, rows]
        is_noise_BT = torch.from_numpy(random.random((4, 12)) < 0.3)[rows]
        batch = Batch(np.arange(4)[rows], torch.from_numpy(x_BT)[rows], targets_KBT, is_noise_BT)
        losses = torch.from_numpy(random.integers(0, 8, (4, 4, 12)) / 4).float()[:, rows]
        for changes in TWO_RANKS:
            work = (batch, losses[:3], losses[3], 0.3, KEY, rho1_args(**changes), ranks)
            results.append(rho1_wmtp.token_weights(*work))
    return results


def test_weights_over_two_ranks_equal_those_of_one_batch():
    """Uneven shares, a rank without a target, no target at all."""
    ranks = on_ranks(weights_on_rank)
    for one, two, (weight_BT, figures) in zip(*ranks, weights_on_rank(Ranks()), strict=True):
        assert torch.equal(torch.cat([one[0], two[0]]), weight_BT)
        assert torch.equal(one[1], figures) and torch.equal(two[1], figures)


# ----------------------------------------------------------------------------- reference losses
def reference_of(folder, name="text", ref_model="reference", ranks=None, **changes):
    """The reference of a run, ready, and the run's data."""
    args = rho1_args(seq_len=LENGTH, ref_model=str(folder / ref_model), **changes)
    data = rows_of(folder, name)
    reference = rho1_wmtp.Reference(args, load_tokenizer(None), data, ranks or Ranks())
    reference.prepare(data)
    return reference, data


@pytest.mark.parametrize("name", ["text", "records"])
def test_reference_losses_are_those_of_a_plain_model_at_the_same_token(rho1, name):
    """What stands at t is of token t+1 given tokens 0..t, and NaN where it is no target."""
    reference, rows = reference_of(rho1, name)
    plain = transformers.AutoModelForCausalLM.from_pretrained(rho1 / "reference/model").eval()
    numbers = np.array([0, 3, len(rows.train) - 1])
    batch = load_batch(rows.train, numbers, 4, "cpu")
    stored_BT, checked = reference(batch), 0
    assert stored_BT.shape == (3, LENGTH)
    for b, t in np.ndindex(3, LENGTH - 1):
        row = rows.train[int(numbers[b])]
        valid = row["is_target"][t + 1] and row["document"][t] == row["document"][t + 1]
        checked += bool(valid)
        with torch.no_grad():
            logits_V = plain(input_ids=batch.x_BT[b : b + 1, : t + 1]).logits[0, -1]
        loss = -logits_V.log_softmax(-1)[batch.x_BT[b, t + 1]].item() if valid else math.nan
        assert stored_BT[b, t].item() == pytest.approx(loss, abs=1e-4, nan_ok=True)
    assert checked > 20
    other, _ = reference_of(rho1, name, ref_model="baseline")
    assert not torch.equal(other(batch), stored_BT)  # a file of its own


def losses_on_rank(ranks, folder):
    reference, data = reference_of(folder, ranks=ranks)
    return reference(load_batch(data.train, np.arange(len(data.train)), 1, "cpu"))


def test_reference_losses_over_two_ranks_are_those_of_one(rho1, tmp_path, monkeypatch):
    """Each rank computes a part of the file; in the cache of one rank there is a whole one."""
    one_BT = losses_on_rank(Ranks(), rho1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for two_BT in on_ranks(losses_on_rank, rho1):
        torch.testing.assert_close(two_BT, one_BT, rtol=0, atol=0, equal_nan=True)


def test_only_rows_that_the_run_visits_get_reference_losses(rho1):
    whole, data = reference_of(rho1, max_steps=10**6)
    part, _ = reference_of(rho1, max_steps=2, batch_size=4, seed=3)
    assert part.losses.shape == whole.losses.shape and len(data.train) > 16
    visited = np.concatenate([batch_rows(len(data.train), 4, 3, step) for step in (0, 1)])
    assert set(np.flatnonzero(part.losses[:].any(1))) == set(visited.tolist())
    both = part.losses[visited], whole.losses[visited]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_another_reference_on_resume_is_refused(rho1, tmp_path):
    run = dict(ref_model=tmp_path / "reference", max_steps=1)
    shutil.copytree(rho1 / "reference", tmp_path / "reference")
    assert run_rho1(rho1, tmp_path / "run", **run) == 0
    shutil.rmtree(tmp_path / "run/model")  # as if it had been stopped
    shutil.copytree(rho1 / "baseline/model", tmp_path / "reference/model", dirs_exist_ok=True)
    refused(lambda: run_rho1(rho1, tmp_path / "run", **run), "reference")


# ------------------------------------------------------------------------------- log and sample
def test_figures_are_those_of_a_slow_loop():
    generator = np.random.default_rng(0)
    score, weight = generator.integers(0, 40, 40) / 8, generator.random(40)  # scores are equal
    noise, kept = generator.random(40) < 0.3, weight > 0.5
    rows = torch.tensor(np.stack([score, weight, kept, noise]))
    micro_steps = [rows[:, :15], rows[:, 15:15], rows[:, 15:]]
    args = rho1_args(mode="token_skip")
    pairs = [(n < c) + (n == c) / 2 for n in score[noise] for c in score[~noise]]
    expected = {"rho1/excess_mean": score.mean(), "rho1/kept_frac": kept.mean()}
    expected |= {"rho1/noise_auc": np.mean(pairs)}
    expected["weights/on_noise"] = weight[noise].mean()
    expected["weights/on_clean"] = weight[~noise].mean()
    assert rho1_wmtp.rho1_metrics(micro_steps, args) == pytest.approx(expected)


# ----------------------------------------------------------------------------- what is left out
@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6])
def test_the_share_of_noise_is_found_whatever_the_unit_of_the_losses(share):
    """100,000 losses each: clean ones of a gamma distribution, noise around 4.6 nats."""
    random, N = np.random.default_rng(0), 100_000
    clean_N, other_N = random.gamma(1.0, 1.5, (2, N))
    noise_N = abs(random.normal(4.6, 0.3, N))
    mixed_N = np.where(random.random(N) < share, noise_N, other_N)
    estimate = rho1_wmtp.noise_share(mixed_N, clean_N)
    assert estimate == pytest.approx(share, abs=0.02)
    assert rho1_wmtp.noise_share(np.exp(mixed_N), np.exp(clean_N)) == estimate
    assert rho1_wmtp.noise_share(clean_N, clean_N) == 0


def test_the_strength_of_weights_gives_the_effective_share_that_is_asked_for():
    score_N = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for share in (0.3, 0.7, 0.99):
        args = rho1_args(target_ess=share, **FREE)
        u_N = rho1_wmtp.weights_of_scores(score_N, 0, args).double().numpy()
        assert u_N.sum() ** 2 / (2000 * (u_N**2).sum()) == pytest.approx(share, abs=1e-3)
        assert u_N.mean() == pytest.approx(1, abs=1e-6)
    equal_N = rho1_wmtp.weights_of_scores(score_N, 0, rho1_args(target_ess=1.0))
    assert equal_N.numpy() == pytest.approx(1, abs=1e-4)
    args = rho1_args()
    args.target_ess = 0.3  # less than --max-weight allows: 0.95 / 2.95 of the weights are 3
    share = rho1_wmtp.weights_of_scores(score_N, 0, args).double().square().mean() ** -1
    assert share.item() == pytest.approx(2.95 / (0.95 * 9 + 2 * 0.05**2), abs=1e-3)
    args = rho1_args(target_ess=0.5)  # one token has no other share; NaN stays for the run to see
    assert rho1_wmtp.weights_of_scores(score_N[:1], 0, args) == pytest.approx(1)
    assert rho1_wmtp.weights_of_scores(score_N[:2] * math.nan, 0, args).isnan().all()


def test_documents_of_highest_loss_lose_their_targets_whole(rho1):
    """Against a sort by hand; with a ramp the share of the other tokens grows to its end."""
    share, ramp = 0.25, dict(skip_ramp=0.5, max_steps=4000, mode="token_skip")
    reference, data = reference_of(rho1, skip_documents=share, skip_ratio=0.4, **ramp)
    columns, losses = data.train[:], {}
    for document, loss in zip(columns["document"].ravel(), reference.losses[:].ravel()):
        if not math.isnan(loss):
            losses.setdefault(int(document), []).append(float(loss))
    total, left_out, number = sum(map(len, losses.values())), set(), 0
    for document in sorted(losses, key=lambda d: -np.mean(losses[d])):
        number += len(losses[document])
        left_out |= {document} if number <= share * total else set()
    assert set(reference.left_out_D.tolist()) == left_out and len(left_out) > 3

    batch = load_batch(data.train, np.arange(len(data.train)), 2, "cpu")
    before_KBT = batch.targets_KBT.clone()
    reference.leave_out([batch])
    ratios = [reference.ratio(step) for step in (0, 1000, 2000, 3900)]
    assert ratios == pytest.approx([0, 0.2, 0.4, 0.4])
    is_out_BT = torch.tensor(np.isin(columns["document"], [*left_out]))
    expected_KBT = before_KBT.masked_fill(is_out_BT, IGNORE)
    assert torch.equal(batch.targets_KBT, expected_KBT)
    kept = (expected_KBT[0] != IGNORE).sum() / (before_KBT[0] != IGNORE).sum()
    assert 1 - share <= kept < 1 - share + max(map(len, losses.values())) / total


def test_noise_of_the_run_is_estimated_and_left_out(rho1, tmp_path):
    """--skip-ratio auto: held-out and training losses of the file, and what the run logs."""
    auto = dict(mode="token_skip", skip_ratio="auto")
    reference, data = reference_of(rho1, max_steps=10**6, **auto)
    heldout_NT = reference.stored(data.heldout, np.arange(len(data.heldout)))
    losses = [x[~np.isnan(x)] for x in (reference.losses[:], heldout_NT[:])]
    assert reference.skip_ratio == pytest.approx(rho1_wmtp.noise_share(*losses), abs=1e-3)
    after, _ = reference_of(rho1, max_steps=10**6, skip_documents=0.25, **auto)
    # what documents took is not left out again
    is_out_NT = np.isin(data.train["document"][:], after.left_out_D)
    losses[0] = reference.losses[~np.isnan(reference.losses) & ~is_out_NT]
    assert after.skip_ratio == pytest.approx(rho1_wmtp.noise_share(*losses), abs=1e-3)
    assert run_rho1(rho1, tmp_path / "run", max_steps=1, **auto) == 0
    logged = metrics_of(tmp_path / "run")[0]
    own, _ = reference_of(rho1, max_steps=1, batch_size=8, **auto)  # from the rows of that run
    assert 0 < own.skip_ratio < 1
    assert logged["rho1/kept_frac"] == pytest.approx(1 - own.skip_ratio, abs=0.01)


# ------------------------------------------------------------------------------------ bad input
BAD = [
    (dict(ref_model=""), ["--ref-model", "baseline_mtp.py --data stdlib:b"]),
    (dict(ref_model="{folder}/words"), ["--ref-model", "tokenizer"]),
    (dict(ref_model="{folder}/short"), ["--ref-model", "16 tokens", "--seq-len 32"]),
    (dict(ref_model="{folder}/start", model="{folder}/start"), ["is the start of this run too"]),
    (dict(mode="token_skip", target_ess=0.7), ["--target-ess", "need --mode weighted"]),
    (dict(temperature=0.5, target_ess=0.7), ["--target-ess", "one of the two"]),
    (dict(skip_ratio="auto"), ["--skip-ratio", "--mode token_skip"]),
    (dict(target_ess=0.3), ["--target-ess 0.3", "from 0.345 to 1 with --max-weight 3"]),
]


@pytest.mark.parametrize("changes, words", BAD, ids=[str(changes) for changes, _ in BAD])
def test_bad_input_is_refused_in_one_line(rho1, tmp_path, changes, words):
    """References of other tokens and with fewer positions; a value out of range."""
    changed = dict(short=dict(max_position_embeddings=16), words={})
    for name, change in changed.items():
        transformers.LlamaConfig(**CONFIG | change).save_pretrained(tmp_path / name)
    transformers.ByT5Tokenizer(extra_ids=1).save_pretrained(tmp_path / "words")  # a token more
    make_small_model(tmp_path / "start", 1, "LlamaForCausalLM")
    values = changes.items()
    changes = {k: v.format(folder=tmp_path) if isinstance(v, str) else v for k, v in values}
    refused(lambda: run_rho1(rho1, tmp_path / "run", **changes), *words)
    assert not (tmp_path / "run/args.json").exists()
