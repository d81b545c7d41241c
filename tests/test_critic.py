"""critic_wmtp.py: outcomes, weights against slow loops and an exact toy, runs, bad input.

Shapes: B batch, T positions, K heads, N valid targets or rows, D width.
"""

import dataclasses
import itertools
import math
import random

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import baseline_mtp
import critic_wmtp
from common import IGNORE, Batch, Ranks, build_model, imitate_all, load_batch, load_data
from common import load_tokenizer, make_targets, sums
from conftest import data_args, make_small_model, metrics_of, on_ranks, refused, run_main
from conftest import same_tensors, short_args, weights_of, write_lines
from critic_wmtp import judge, pair_loss, partners, prefixes, reward_scores

LENGTH = 32
FREE = dict(epsilon=0.0, max_weight=1e9)  # bounds that bind nothing
FORMS = ["window", "ratio", "advantage"]


def run_critic(folder, run_dir, **changes):
    values = dict(data=folder / "records.jsonl") | changes
    return run_main(critic_wmtp, short_args(critic_wmtp, folder, run_dir, **values))


@pytest.fixture(scope="module")
def critic(material, tmp_path_factory):
    """The material; records with siblings, a right order of words and wrong ones; two runs."""
    folder = tmp_path_factory.mktemp("critic")
    (folder / "config.json").symlink_to(material / "config.json")
    choose, records = random.Random(0), []
    for number in range(60):
        words = choose.choices("ab cd ef gh ij".split(), k=choose.randint(2, 4))
        for reward in (1, 0, 0.25)[: 2 + number % 2]:
            text = " ".join(words if reward == 1 else words[::-1]) + "!" * (reward != 1)
            records.append(dict(prompt=f"{number}:", completion=text, reward=reward))
    file = write_lines(folder / "records.jsonl", records)
    args = short_args(baseline_mtp, folder, folder / "baseline", data=file)
    assert run_main(baseline_mtp, args) == 0
    weighted = dict(value="frozen", pair_coef=0.5, value_batches=1)
    assert run_critic(folder, folder / "weighted", **weighted) == 0
    return folder


def training_of(run_dir):
    """Figures of stage 2 that a baseline writes too."""
    lines = metrics_of(run_dir, ("perf/", "value/", "value_end/", "train/value_loss"))
    return [line for line in lines if line.keys() != {"step"}]


def lines_with(run_dir, key):
    return [line for line in metrics_of(run_dir) if key in line]


def rows_of(name, seq_len=LENGTH):
    return load_data(data_args(name, seq_len=seq_len), load_tokenizer(None), Ranks())


def batch_of(folder, numbers, train_on="all"):
    rows = rows_of(folder / "records.jsonl").records
    rows = imitate_all(rows) if train_on == "all" else rows
    return load_batch(rows, np.asarray(numbers), 3, "cpu")


def valid_of(batch):
    return F.pad(batch.targets_KBT[0, :, :-1] != IGNORE, (1, 0))


# ------------------------------------------------------------------------------------- outcomes
def test_rows_with_their_partners_count_as_the_rows_alone():
    """Two right and three wrong, one of each, no sibling: V stays the share of the correct."""
    columns = dict(sibling=[0, 0, 0, 0, 0, 1, 1, 2], reward=[1.0, 1, 0, 0, 0, 0, 1, 1])
    rows = datasets.Dataset.from_dict(columns).with_format("numpy")
    partner_N, share_N = partners(rows, 2)
    assert partner_N.tolist() == [2, 3, 0, 1, 0, 6, 5, 7]
    counted_N = share_N * (1 + np.bincount(partner_N, minlength=8))
    assert counted_N == pytest.approx(np.ones(8))  # an epoch: every row, with its partner
    assert partners(rows, 1)[1].tolist() == [1] * 8


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_reward_model_scores_each_text_at_its_last_token(tmp_path, num_labels):
    """Against its head on one text after the other, without padding."""
    name = make_small_model(tmp_path, num_labels)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(name)
    prompts, expected = [f"{n} is" for n in range(20)], []
    completions = [" so" * (n % 5 + 1) for n in range(20)]
    for prompt, completion in zip(prompts, completions):
        ids = [byte + 3 for byte in (prompt + completion).encode()] + [1]
        with torch.no_grad():
            logits = plain.score(plain.model(torch.tensor([ids])).last_hidden_state[0, -1])
        reward = logits.sigmoid()[0] if num_labels == 1 else logits.softmax(0)[1]
        expected.append(reward.item())
    assert reward_scores(name, "cpu", prompts, completions) == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------- scores, weights
SCORES = [("window", 0.0), *(("advantage", gae_lambda) for gae_lambda in (0.95, 0.7, 0.0, 1.0))]


@pytest.mark.parametrize("form, gae_lambda", SCORES)
def test_scores_equal_a_slow_loop_at_both_ends_of_records_too(form, gae_lambda):
    """Prompts of 0 to 5 tokens, completions of 2 to 9: windows are cut at both ends."""
    generator, target_BT = np.random.default_rng(0), np.zeros((20, 15), bool)
    for row in target_BT:
        start = generator.integers(0, 6)
        row[max(1, start) : start + generator.integers(2, 10)] = True  # token 0 is no target
    V_BT, R_B = generator.random((20, 15)), generator.random(20)
    value_BT, reward_B, targets_BT = map(torch.from_numpy, (V_BT, R_B, target_BT))
    if form == "window":
        score_BT = critic_wmtp.window_scores(torch.logit(value_BT), targets_BT)
    else:
        score_BT = critic_wmtp.advantages(value_BT, reward_B, targets_BT, gae_lambda)
    for V, R, is_target, scores in zip(V_BT, R_B, target_BT, score_BT.tolist()):
        targets, z = np.flatnonzero(is_target).tolist(), np.log(V / (1 - V))
        first, last = targets[0] - 1, targets[-1]
        if form == "window":
            expected = [z[min(j + 2, last)] - z[max(j - 3, first)] for j in targets]
            expected = np.array(expected) - np.mean(expected)
        else:
            powers = [[(i, gae_lambda ** (i - j)) for i in range(j, last)] for j in targets[:-1]]
            expected = [sum(p * (V[i] - V[i - 1]) for i, p in later) for later in powers]
            expected.append(R - V[last - 1])
        assert [scores[j] for j in targets] == pytest.approx(expected, abs=1e-9)


def args_of(**changes):
    return critic_wmtp.Args(**dict(weights="window", strength=1.0, train_on="all") | changes)


def head_weights(value_BT, batch, moments=None, ranks=None, key=(0, 0, 0), **changes):
    args, logit_BT = args_of(**changes), torch.logit(value_BT)
    moments = torch.zeros(3) if moments is None else moments
    return critic_wmtp.token_weights(batch, logit_BT, moments, key, args, ranks or Ranks())


def token_weights(*arguments, **changes):
    """Of every token the weight that head 1 gives it, `[B, T]`."""
    return F.pad(head_weights(*arguments, **changes)[0, :, :-1], (1, 0), value=1)


VARIANTS = [
    dict(**FREE),
    dict(strength=0.3, epsilon=0.5, lambda_=0.3, train_on="correct"),
    dict(weights="advantage", gae_lambda=0.5),
    dict(weights="ratio", strength=3.0, epsilon=0.2, max_weight=1.5, lambda_=0.2),
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_follow_from_scores_over_several_updates(critic, changes):
    """In NumPy: moving mean and deviation, gate, mean 1 over the targets, mixture; or ratios."""
    args, moments, slow = args_of(**changes), torch.zeros(3), np.zeros(3)
    for update in range(3):
        batch = batch_of(critic, np.arange(12 * update, 12 * update + 12), args.train_on)
        value_BT = torch.rand(batch.x_BT.shape, generator=torch.Generator().manual_seed(update))
        weight_KBT = head_weights(value_BT, batch, moments, **changes).numpy()
        valid_KBT, target_BT = (batch.targets_KBT != IGNORE).numpy(), valid_of(batch)
        if args.weights == "ratio":
            V_BT = value_BT.double().numpy()
            u_KBT = np.stack([np.roll(V_BT, -k, 1) / V_BT for k in (1, 2, 3)]) ** args.strength
            u_KBT = u_KBT.clip(args.epsilon, args.max_weight)
        else:
            numbers = (batch.reward_B, target_BT, args.gae_lambda)
            score_BT = critic_wmtp.advantages(value_BT, *numbers)
            if args.weights == "window":
                score_BT = critic_wmtp.window_scores(torch.logit(value_BT), target_BT)
            score_N = score_BT[target_BT].double().numpy()
            slow[:2] = 0.99 * slow[:2] + 0.01 * np.array([1, score_N.mean()])
            centre = slow[1] / slow[0]
            slow[2] = 0.99 * slow[2] + 0.01 * ((score_N - centre) ** 2).mean()
            deviation = np.sqrt(slow[2] / slow[0]) + 1e-4
            power_BT = args.strength * (score_BT.numpy() - centre) / deviation / 0.7
            gate_BT = np.exp(power_BT).clip(args.epsilon, 1)
            mean = gate_BT[target_BT].mean()
            u_KBT = np.stack([np.roll(gate_BT, -k, 1) / mean for k in (1, 2, 3)])
            assert weight_KBT.max() <= 1 / mean + 1e-5
        expected_KBT = args.lambda_ + (1 - args.lambda_) * u_KBT
        np.testing.assert_allclose(weight_KBT[valid_KBT], expected_KBT[valid_KBT], rtol=1e-4)


def test_the_ratio_makes_every_head_learn_its_distribution_on_correct_records():
    """All 81 texts of 4 out of 3 symbols; V is exact. The minimiser is a weighted count."""
    generator = np.random.default_rng(0)
    x_BT = np.array(list(itertools.product([0], *[range(3)] * 4)))  # after a prompt of one token
    p_B, R_B = generator.dirichlet(np.ones(81)), generator.random(81)

    def expected(values_B, b, t, k=0, token=None):
        """Sum of p times values over the texts that begin as b; k places on with the token."""
        same_B = (x_BT[:, : t + 1] == x_BT[b, : t + 1]).all(1)
        same_B &= True if token is None else x_BT[:, t + k] == token
        return (p_B * values_B)[same_B].sum()

    ones_B, completion_BT = np.ones(81), np.arange(5) > np.zeros((81, 1))
    V_BT = [[expected(R_B, b, t) / expected(ones_B, b, t) for t in range(5)] for b in range(81)]
    targets_KBT = torch.from_numpy(make_targets(x_BT, np.zeros_like(x_BT), completion_BT, 4))
    batch = Batch(None, torch.from_numpy(x_BT), targets_KBT, None, None, None)
    V_BT = torch.tensor(V_BT, dtype=torch.float64)
    weight_KBT = head_weights(V_BT, batch, weights="ratio", **FREE).numpy()
    for k, b, t in (targets_KBT != IGNORE).nonzero().tolist():
        weight_B, head = weight_KBT[k, :, t], k + 1
        mean = expected(weight_B, b, t) / expected(ones_B, b, t)
        assert mean == pytest.approx(1)  # E[u | prefix]
        for token in range(3):
            minimiser = expected(weight_B, b, t, head, token) / expected(weight_B, b, t)
            p_correct = expected(R_B, b, t, head, token) / expected(R_B, b, t)
            assert minimiser == pytest.approx(p_correct, abs=1e-6)
    product_B = weight_KBT[0, :, :4].prod(1)
    assert product_B == pytest.approx((V_BT[:, -1] / V_BT[:, 0]).numpy())


@pytest.mark.parametrize("form", FORMS)
def test_a_fault_gets_the_smallest_weight_and_without_a_change_of_V_all_weigh_1(critic, form):
    batch = dataclasses.replace(batch_of(critic, np.arange(10)), reward_B=torch.zeros(10))
    for place in (1, 3, 6):
        value_BT = torch.full(batch.x_BT.shape, 0.8)
        faults = [valid_of(batch)[b].nonzero()[place, 0].item() for b in range(10)]
        for b, fault in enumerate(faults):
            value_BT[b, fault:] = 0.1
        weight_BT = token_weights(value_BT, batch, weights=form)
        for b, fault in enumerate(faults):
            near = slice(fault - 2, fault + 3)  # a window holds its neighbours' steps
            others = torch.cat([weight_BT[b, : near.start], weight_BT[b, near.stop :]])
            assert weight_BT[b, fault] <= weight_BT[b].min() + 1e-6 < others.min()
    if form != "advantage":  # which knows the outcome, at the last token
        assert (token_weights(torch.full_like(value_BT, 0.3), batch, weights=form) == 1).all()
        other = dataclasses.replace(batch, reward_B=torch.ones(10))
        assert torch.equal(weight_BT, token_weights(value_BT, other, weights=form))


def test_losses_of_the_value_by_hand_and_what_they_leave_out(critic):
    batch = batch_of(critic, np.arange(10))
    generator = torch.Generator().manual_seed(1)
    value_BT, other_BT = torch.rand((2, *batch.x_BT.shape), generator=generator)
    prefix_BT = torch.zeros_like(batch.completion_BT)
    R, means, slow = batch.reward_B.tolist(), [], 0.0
    for b in range(10):
        tokens = batch.completion_BT[b].nonzero()[:, 0].tolist()
        prefix_BT[b, tokens[0] - 1 : tokens[-1] + 1] = True  # end of the prompt to the last token
        V = value_BT[b, tokens[0] - 1 : tokens[-1] + 1].tolist()
        slow -= sum(R[b] * math.log(v) + (1 - R[b]) * math.log(1 - v) for v in V)
        means.append(sum(math.log(v / (1 - v)) for v in V) / len(V))
    assert torch.equal(prefixes(batch), prefix_BT)
    for mixed_BT in (value_BT, torch.where(prefix_BT, value_BT, other_BT)):
        logit_BT = torch.logit(mixed_BT)
        assert critic_wmtp.value_loss(logit_BT, batch).item() == pytest.approx(slow, rel=1e-5)
        margins = [(means[b] - means[b + 1]) * np.sign(R[b] - R[b + 1]) for b in range(0, 10, 2)]
        pairs = sum(math.log(1 + math.exp(-margin)) for margin in margins if margin != 0)
        assert pair_loss(logit_BT, batch).item() == pytest.approx(pairs, rel=1e-5)
    mixed_BT = torch.where(prefix_BT & (batch.reward_B > 0.5)[:, None], value_BT, other_BT)
    right = batch_of(critic, np.arange(10), "correct")
    for form in FORMS:
        weights = [token_weights(v, right, weights=form) for v in (value_BT, mixed_BT)]
        assert torch.equal(*weights)


def test_controls_stay_inside_of_completions(critic):
    batch = batch_of(critic, np.arange(10))
    value_BT = torch.rand(batch.x_BT.shape, generator=torch.Generator().manual_seed(2))
    valid_BT = valid_of(batch)

    def weights(control, step=0):  # of the ratio, whose mean is not 1
        key = (0, step, 0)
        return token_weights(value_BT, batch, weights="ratio", control=control, key=key)

    plain_BT, shuffled_BT, drawn_BT = (weights(c) for c in ("none", "shuffle", "random"))
    assert torch.equal(shuffled_BT, weights("shuffle"))  # by seed and step
    for other_BT in (plain_BT, drawn_BT, weights("shuffle", step=1)):
        assert not torch.equal(shuffled_BT, other_BT)
    for b in range(10):
        a, c = (weight_BT[b][valid_BT[b]].sort().values for weight_BT in (plain_BT, shuffled_BT))
        torch.testing.assert_close(a, c, rtol=1e-5, atol=0)
    assert (drawn_BT[~valid_BT] == 1).all()
    plain, drawn = (weight_BT[valid_BT].mean().item() for weight_BT in (plain_BT, drawn_BT))
    assert drawn == pytest.approx(plain) and abs(plain - 1) > 0.01


def weights_on_rank(ranks, folder):
    """Of three right rows, and three wrong ones without a target: each half on one of two ranks."""
    rows = slice(6 // ranks.world_size * ranks.rank, 6 // ranks.world_size * (ranks.rank + 1))
    reward_N = np.array(rows_of(folder / "records.jsonl").records["reward"][:])
    numbers = [*np.flatnonzero(reward_N == 1)[:3], *np.flatnonzero(reward_N < 0.5)[:3]]
    value_BT = torch.rand((6, LENGTH), generator=torch.Generator().manual_seed(3))[rows]
    batch = batch_of(folder, numbers[rows], "correct")
    return [token_weights(value_BT, batch, ranks=ranks, control=c) for c in ("none", "shuffle")]


def test_weights_over_two_ranks_one_without_targets_equal_those_of_one_batch(critic):
    ranks = on_ranks(weights_on_rank, critic)
    for *parts, whole_BT in zip(*ranks, weights_on_rank(Ranks(), critic), strict=True):
        assert torch.equal(torch.cat(parts), whole_BT)


# --------------------------------------------------------------------------------------- the value
KINDS = ["separate", "frozen"]


def small_critic(folder, kind):
    torch.manual_seed(0)
    model, _ = build_model(str(folder / "config.json"), 3)
    critic = critic_wmtp.Critic(model, args_of(value=kind), Ranks())
    for name, parameter in critic.value.named_parameters():
        if not name.startswith("trunk"):  # as if it had learnt something
            torch.nn.init.normal_(parameter, std=0.3)
    return model, critic


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_where_they_should(critic, kind):
    """The weights are constants for the policy; the value loss moves V and never the policy."""
    batch = batch_of(critic, np.arange(6))
    model, module = small_critic(critic, kind)
    loss_KBT = model(batch.x_BT, batch.targets_KBT)
    logit_BT = module.logits(batch, run_policy=kind == "separate")  # which learns in stage 1 only
    work = (module.moments, (0, 0, 0), args_of(), Ranks())
    weight_KBT = critic_wmtp.token_weights(batch, logit_BT, *work)
    assert logit_BT.requires_grad and not weight_KBT.requires_grad
    critic_wmtp.value_loss(logit_BT, batch).backward(retain_graph=True)
    moved = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    names = {f"value.{name}" for name, _ in module.value.named_parameters()}
    assert {name for name in names if not name.startswith("value.trunk")} <= moved
    assert not any(name.startswith("policy.") for name in moved)
    assert any(n.startswith("value.trunk") for n in moved) == (kind == "separate")
    module.zero_grad()
    (weight_KBT * loss_KBT).sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in module.value.parameters())
    assert model.causal_lm.lm_head.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_logit_is_a_running_sum_of_evidence_on_the_trunk_of_the_policy(critic, kind):
    batch = batch_of(critic, np.arange(6))
    model, module = small_critic(critic, kind)
    decoder = model.causal_lm.model
    states = decoder(input_ids=batch.x_BT, use_cache=False, output_hidden_states=True)
    trunk_BTD = states.hidden_states[len(model.trunk_layers)]
    sums_BT = module.value(batch.x_BT, trunk_BTD, torch.ones_like(batch.x_BT))
    evidence_BT = torch.diff(sums_BT, prepend=torch.zeros(len(sums_BT), 1))
    expected_BT = torch.zeros_like(evidence_BT)
    for b, t in np.ndindex(*expected_BT.shape):  # before the prompt's last token as at that token
        ends = prefixes(batch)[b].nonzero()[:, 0].tolist()
        expected_BT[b, t] = sum(evidence_BT[b, i] for i in ends if i <= max(t, ends[0]))
    logit_BT = module.logits(batch, run_policy=True)
    torch.testing.assert_close(logit_BT, expected_BT, rtol=1e-5, atol=1e-5)
    other = dataclasses.replace(batch, reward_B=1 - batch.reward_B)
    assert torch.equal(module.logits(other, run_policy=True), logit_BT)  # V never sees the outcome


def test_judgement_by_hand():
    """Two pairs of right and wrong. V drops most in the fault of one, and on its line in both."""
    is_target_NT = np.arange(12) // 2 * np.ones((4, 1)) > 0
    is_target_NT[:, 9:] = False  # seven tokens, after a prompt of two
    is_fault_NT = np.zeros((4, 12), bool)
    is_fault_NT[1::2, 3] = True
    columns = dict(is_target=is_target_NT, sibling=[0, 0, 1, 1], reward=[1.0, 0.0, 1.0, 0.0])
    rows = datasets.Dataset.from_dict({**columns, "is_noise": is_fault_NT}).with_format("numpy")
    value_NT = np.full((4, 12), 0.9)
    value_NT[2, 8:] = 0.8
    value_NT[1, 3:9] = 0.7, 0.65, 0.6, 0.55, 0.5, 0.85  # most at the wrong letter
    value_NT[3, 4:] = 0.1  # most at the line feed behind it
    figures = judge(value_NT, rows)
    expected = dict(auc=3 / 4, auc_position=0.5, pairs=1.0)  # 0.8 of a right one is below 0.85
    expected |= dict(fault_token=1 / 2, fault_token_chance=1 / 7)
    assert figures == pytest.approx(expected)


@pytest.mark.parametrize("weights", ["ratio", "window"])
def test_the_strength_gives_the_effective_share_that_is_asked_for(critic, weights):
    batch = batch_of(critic, np.arange(12), "all")
    value_BT = torch.rand(batch.x_BT.shape, generator=torch.Generator().manual_seed(0))
    changes = dict(weights=weights, strength=None, target_ess=0.8, max_weight=1e9, epsilon=0)
    weight_N = head_weights(value_BT, batch, **changes)[0][batch.targets_KBT[0] != IGNORE]
    ess = weight_N.sum() ** 2 / (len(weight_N) * weight_N.square().sum())
    assert ess.item() == pytest.approx(0.8, abs=1e-3)


# ------------------------------------------------------------------------------------ whole runs
RATIO = dict(weights="ratio", value="frozen", control="random", max_weight=1.5)
RUNS = [dict(weights="window"), RATIO]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_lambda_1_is_the_baseline_to_the_last_bit(critic, tmp_path, changes):
    changes = changes | dict(lambda_=1.0)
    assert run_critic(critic, tmp_path / "run", **changes) == 0
    assert training_of(tmp_path / "run") == metrics_of(critic / "baseline")
    assert same_tensors(weights_of(tmp_path / "run"), weights_of(critic / "baseline"))
    assert training_of(critic / "weighted") != metrics_of(critic / "baseline")


def test_stage_1_learns_and_a_saved_value_takes_its_place(critic, tmp_path):
    """Descending letters are right, ascending ones wrong; all are of one length."""
    choose, records, run, again = random.Random(1), [], tmp_path / "run", tmp_path / "again"
    for number in range(150):
        letters = "".join(sorted(choose.sample("abcdefgh", 4)))
        for text, reward in ((letters, 0), (letters[::-1], 1)):
            records.append(dict(prompt=f"{number}:", completion=text, reward=reward))
    options = dict(data=write_lines(tmp_path / "letters.jsonl", records), seq_len=16, batch_size=16)
    options |= dict(value_steps=30, max_steps=2, value_lr=3e-3, value_batches=1, pair_coef=0.0)
    assert run_critic(critic, run, **options) == 0
    [judged], losses = lines_with(run, "value/auc"), lines_with(run, "value/loss")
    assert (judged["step"], judged["value/step"]) == (0, 30)
    assert min(judged["value/auc"], judged["value/pairs"]) > 0.95
    assert judged["value/auc_position"] == 0.5 and len(losses) == 30
    assert losses[0]["value/loss"] == pytest.approx(math.log(2), rel=1e-4)  # V is 1/2 at first
    assert losses[-1]["value/loss"] < 0.6
    options["value_head"] = run / "value_head.safetensors"
    assert run_critic(critic, again, **options) == 0
    assert training_of(again) == training_of(run)
    assert same_tensors(weights_of(again), weights_of(run))
    heads = [load_file(run_dir / "value_head.safetensors") for run_dir in (again, run)]
    assert same_tensors(*heads)
    assert not lines_with(again, "value/loss")


def test_of_every_sum_one_answer_is_right_and_one_wrong_in_one_digit():
    records, loaded = list(sums()), rows_of("sums", 16)
    assert records == list(sums()) and len({record["prompt"] for record in records}) == 10_000
    assert [record["reward"] for record in records] == [1, 0] * 10_000
    for record in records:
        right = f"{eval(record['prompt'][:-1]):03d}"[::-1]
        wrong = [i for i in range(3) if record["completion"][i] != right[i]]
        assert len(wrong) == 1 - record["reward"]
        assert not wrong or (wrong[0], wrong[0] + 1) == (record["fault_start"], record["fault_end"])
    decode, parts = load_tokenizer(None).batch_decode, (loaded.records, loaded.heldout)
    texts = (decode(part["input_ids"][:]) for part in parts)
    train, heldout = ({frozenset(t.partition("=")[0].split("+")) for t in own} for own in texts)
    assert not train & heldout and 1900 < len(loaded.heldout) < 2100


# ------------------------------------------------------------------------------------- bad input
BAD = [
    (dict(data="{folder}/right.jsonl"), ["right and wrong records"]),
    (dict(data="{folder}/text.jsonl"), ["text.jsonl", "right and wrong", "--reward-model"]),
    (dict(lambda_=1.5), ["--lambda 1.5", "from 0 to 1"]),
    (dict(strength=2.0, target_ess=0.7), ["--strength, --target-ess", "one of the two"]),
]


@pytest.mark.parametrize("changes, words", BAD, ids=str)
def test_bad_input_is_refused_in_one_line(critic, tmp_path, changes, words):
    records = [dict(prompt=str(n), completion="b", reward=1) for n in range(60)]
    write_lines(tmp_path / "right.jsonl", records)
    write_lines(tmp_path / "text.jsonl", [dict(text=str(n)) for n in range(60)])
    values = changes.items()
    changes = {k: v.format(folder=tmp_path) if k == "data" else v for k, v in values}
    refused(lambda: run_critic(critic, tmp_path / "run", **changes), *words)
    assert not (tmp_path / "run/args.json").exists()
