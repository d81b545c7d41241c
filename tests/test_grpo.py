"""grpo_wmtp.py: rollouts against the training forward, losses by hand, exact toys, whole runs.

Shapes: B batch, T positions, K heads, G completions of a group, N completions, V vocabulary.
"""

import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_decoding import CHAINS, NEW, learn_chain
from test_model import make_model
from test_run import ROOT, TORCHRUN, kill, same_run

import baseline_mtp
import common
import grpo_wmtp
from common import IGNORE, Ranks, generate, load_data, load_mtp, unsharded
from conftest import bytes_tokenizer, data_args, metrics_of, on_ranks, refused, run_main
from conftest import same_tensors, short_args, weights_of, write_lines
from grpo_wmtp import Sampler, Samples, advantages, divergence, expression_value
from grpo_wmtp import gains, prefix_values, reward, token_weights

TEXTS = ["ab", "abba", "b", "babab"]  # what the start writes; the first is right
FLAGS = dict(seq_len=12, num_heads=3, batch_size=16, group_size=8, max_steps=4, lr=1e-3)


@pytest.fixture(scope="module")
def start(material, tmp_path_factory):
    """Folder with `start`, a run that writes the four texts alike often, and `right.jsonl`."""
    folder = tmp_path_factory.mktemp("grpo")
    prompts = [f"{number}:" for number in range(120)]
    right = [dict(prompt=prompt, completion=TEXTS[0]) for prompt in prompts]
    every = [dict(prompt=prompt, completion=text) for prompt in prompts for text in TEXTS]
    write_lines(folder / "right.jsonl", right)
    data = write_lines(folder / "all.jsonl", every)
    changes = dict(data=data, seq_len=12, num_heads=3, batch_size=32, max_steps=120, lr=1e-2)
    args = short_args(baseline_mtp, material, folder / "start", **changes)
    assert run_main(baseline_mtp, args) == 0
    return folder


def args_of(start, run_dir="", **changes):
    values = FLAGS | dict(model=start / "start", data=start / "right.jsonl") | changes
    return short_args(grpo_wmtp, start, run_dir, **values)


def run_grpo(start, run_dir, **changes):
    return run_main(grpo_wmtp, args_of(start, run_dir, **changes))


def sampler_of(start, micro_batch_size=16, ranks=None, **changes):
    args, tokenizer, ranks = args_of(start, **changes), bytes_tokenizer(), ranks or Ranks()
    data = load_data(data_args(args.data, seq_len=12), tokenizer, Ranks())
    return Sampler(load_mtp(args.model, 3), tokenizer, data, micro_batch_size, args, ranks)


def algorithm(**changes):
    """Arguments of the pure functions."""
    values = dict(lambda_=0.0, clip=0.2, clip_high=0.28, head_loss="policy", head_coef=1.0)
    return SimpleNamespace(**{**values, **changes})


def updates_of(run_dir):
    return [line for line in metrics_of(run_dir) if "grpo/reward_mean" in line]


# ------------------------------------------------------------------------------------- rollouts
def texts_of_a_shard(ranks, model):
    """Twice texts of other lengths on each rank, from a model whose every layer is sharded."""
    common.SMALL_LAYER = 0
    model, texts = common.shard(model, ranks), []
    for _ in range(2):
        with unsharded(model):
            prompts = CHAINS[2 * ranks.rank : 2 * ranks.rank + 2]
            done = generate(model, prompts, NEW // (1 + ranks.rank), None, 3, 1.0)
        texts.append((done.tokens, done.forwards))
    return texts, {type(p).__name__ for p in model.parameters()}


def test_a_sharded_model_generates_what_the_whole_one_does():
    """Two ranks that take other numbers of passes; afterwards every parameter is sharded again."""
    model = learn_chain(make_model("llama", 3, num_hidden_layers=4), 3, 40)
    seen = on_ranks(texts_of_a_shard, model)
    for rank, (texts, kinds) in enumerate(seen):
        done = generate(model, CHAINS[2 * rank : 2 * rank + 2], NEW // (1 + rank), None, 3, 1.0)
        assert texts == [(done.tokens, done.forwards)] * 2 and kinds == {"DTensor"}
    assert seen[0][0][0][1] != seen[1][0][0][1]


def test_the_decoder_saw_each_sampled_token_as_the_training_forward_does(start, monkeypatch):
    """Drafts on, prompts and completions of several lengths; most of them end, some do not."""
    sampler, inner, seen = sampler_of(start, max_new_tokens=5), common.verify, {}
    going = list(range(16))  # rows that are still in the batch

    def watched(logits_BQV, draft_BM, *others):
        taken_B, next_B = inner(logits_BQV, draft_BM, *others)
        log_p_BQV = logits_BQV.log_softmax(-1)
        for place, row in enumerate(list(going)):
            taken, own = int(taken_B[place]), seen.setdefault(row, [])
            new = [*draft_BM[place, :taken].tolist(), int(next_B[place])]
            for q, token in enumerate(new[: 5 - len(own)]):
                own.append((token, log_p_BQV[place, q, token].item()))
                if token == 1 or len(own) == 5:
                    going.remove(row)
                    break
        return taken_B, next_B

    monkeypatch.setattr(common, "verify", watched)
    samples = sampler.rollout(step=0)
    (batch,) = sampler.batches(samples, 0, 3)
    with torch.no_grad():
        loss_KBT = sampler.model(batch.x_BT, batch.targets_KBT)
    for row, tokens in enumerate(samples.tokens):
        assert [token for token, _ in seen[row]] == tokens
        valid_T = batch.targets_KBT[0, row] != IGNORE
        assert batch.targets_KBT[0, row, valid_T].tolist() == tokens
        log_p = torch.tensor([log_p for _, log_p in seen[row]])
        torch.testing.assert_close(log_p, -loss_KBT[0, row, valid_T], rtol=0, atol=1e-4)
    assert {tokens[-1] == 1 for tokens in samples.tokens} == {True, False}  # 1: end of sequence
    assert samples.row_steps < samples.new_tokens  # drafts were taken


def test_completions_do_not_depend_on_ranks_or_micro_batches(start):
    whole = sampler_of(start).rollout(step=3)
    ranks = [Ranks(rank, 2) for rank in (0, 1)]
    parts = [sampler_of(start, 4, ranks=own).rollout(step=3) for own in ranks]
    for name in ("prompts", "tokens", "rewards"):
        assert getattr(parts[0], name) + getattr(parts[1], name) == getattr(whole, name)
    assert len(set(map(tuple, whole.prompts))) == 2 and 0 < sum(whole.rewards) < 16
    assert sampler_of(start).rollout(step=4).tokens != whole.tokens


def test_drafts_change_neither_greedy_texts_nor_the_mean_reward(start):
    rewards = []
    for temperature, number in ((0, 50), (1, 800)):
        samplers = [sampler_of(start, 400, decode=decode) for decode in ("heads", "plain")]
        numbers, seeds = np.arange(number) % 100, [(7, n) for n in range(number)]
        drawn = [s.draw(s.data.train, numbers, seeds, temperature) for s in samplers]
        rewards.append([np.array(own.rewards) for own in drawn])
        assert (drawn[0].tokens == drawn[1].tokens) == (temperature == 0)
        assert drawn[0].row_steps < drawn[1].row_steps
    deviation = math.hypot(*(own.std() for own in rewards[1])) / math.sqrt(800)
    assert abs(rewards[1][0].mean() - rewards[1][1].mean()) < 3 * deviation


# ------------------------------------------------------------------------------ weights by hand
def test_advantages_by_hand():
    one, unit = advantages(np.array([1.0, 0, 0, 1]), "group")
    assert one == pytest.approx([1, -1, -1, 1], rel=1e-3) and unit == pytest.approx(0.5001)
    reward_G = np.array([0.2, 0.9, 0.4])
    plain, unit = advantages(reward_G, "none")
    assert plain == pytest.approx([-0.3, 0.4, -0.1]) and unit == 1
    assert advantages(np.full(7, 0.1), "group")[0].tolist() == [0] * 7  # their mean is not 0.1


def test_values_of_prefixes_by_hand():
    """The changes of V sum to R less its mean; unlike completions have it at the first token."""
    tokens_G, reward_G = [[1, 2, 3], [1, 2, 4, 5], [1, 7], [6]], np.array([1.0, 0, 0.5, 0])
    values = prefix_values(tokens_G, reward_G)
    assert values[0] == [0.375, 0.5, 0.5, 1] and values[1] == [0.375, 0.5, 0.5, 0, 0]
    assert values[2] == [0.375, 0.5, 0.5] and values[3] == [0.375, 0]
    assert prefix_values([[1, 2], [1, 2]], np.array([0.5, 0.5])) == [[0.5] * 3] * 2


@pytest.mark.parametrize("credit", ["completion", "tree"])
def test_weights_of_every_head_equal_a_slow_loop(start, credit):
    """Of a tree: A and the changes of V at all tokens that the head's prediction covers."""
    sampler = sampler_of(start, credit=credit, lambda_=0.25)
    samples = sampler.rollout(step=0)
    (batch,) = sampler.batches(samples, 0, 3)
    weight_KBT = token_weights(batch, sampler.args)
    expected_KBT = torch.zeros_like(weight_KBT)
    for n, (prompt, tokens) in enumerate(zip(samples.prompts, samples.tokens)):
        group = range(n // 8 * 8, n // 8 * 8 + 8)
        reward_G = np.array([samples.rewards[g] for g in group])
        unit = reward_G.std() + 1e-4
        V = []
        for end in range(len(tokens) + 1):
            same = [samples.tokens[g][:end] == tokens[:end] for g in group]
            V.append(reward_G[same].mean())
        for k, j in itertools.product((1, 2, 3), range(len(tokens))):
            covered = range(max(0, j - k + 1), j + 1) if credit == "tree" else []
            change = sum(V[i + 1] - V[i] for i in covered)
            weight = (samples.rewards[n] - reward_G.mean() + change) / unit
            t = len(prompt) + j - k  # of head k, before the completion too
            expected_KBT[k - 1, n, t] = 0.25 + 0.75 * weight
    torch.testing.assert_close(weight_KBT, expected_KBT, rtol=1e-4, atol=1e-5)
    assert 0 < sum(samples.rewards) < 16


# ------------------------------------------------------------------------------- losses, exactly
def test_the_gradient_is_that_of_the_expected_reward_on_an_enumerable_toy():
    """All pairs of texts of 2 out of 4 tokens are groups, weighed by their probability.

    A pair's mean holds half of a completion's own reward: so half of the gradient is expected.
    """
    model = make_model("llama", 1, vocab_size=4, num_hidden_layers=1, initializer_range=0.5)
    texts = [list(text) for text in itertools.product(range(4), repeat=2)]
    R_N = np.random.default_rng(0).random(16)
    logits_BTV = model.causal_lm(torch.tensor([[3, *text] for text in texts])).logits
    log_p_BTV, y_N2 = logits_BTV[:, :2].log_softmax(-1), torch.tensor(texts)
    p_N = log_p_BTV.gather(-1, y_N2[..., None]).sum((1, 2)).exp()
    (p_N * torch.from_numpy(R_N)).sum().backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    pairs = list(itertools.product(range(16), repeat=2))
    rows = [n for pair in pairs for n in pair]
    samples = Samples([[3]] * 512, [texts[n] for n in rows], R_N[rows].tolist())
    args = algorithm(group_size=2, scale="none", credit="completion", control="none")
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    fields = dict(args=args, tokenizer=tokenizer, ranks=Ranks(), micro_batch_size=512)
    (batch,) = Sampler.batches(SimpleNamespace(**fields), samples, 0, 1)
    chance_B = p_N.detach()[torch.tensor(pairs)].prod(1).repeat_interleave(2)
    for lambda_, factor in ((0.0, 0.5), (1.0, 0.0)):  # of two completions; of equal weights
        args.lambda_ = lambda_
        loss_KBT = model(batch.x_BT, batch.targets_KBT)
        weight_KBT = token_weights(batch, args)
        gain_KBT, _ = gains(loss_KBT, loss_KBT.detach(), weight_KBT, args)
        assert torch.equal(gain_KBT, weight_KBT)  # the ratio is 1 in the first pass
        ((gain_KBT[0].sum(1) * chance_B).sum() / 2).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, factor * exact[name], rtol=1e-3, atol=1e-5)
        model.zero_grad()
    assert max(grad.abs().max() for grad in exact.values()) > 1e-2


def test_positive_weights_have_the_gradient_of_the_weighted_loss_in_the_first_pass():
    generator = torch.Generator().manual_seed(0)
    loss_KBT, weight_KBT = torch.rand((2, 3, 4, 5), generator=generator)
    loss_KBT.requires_grad_()
    gain_KBT, stopped_KBT = gains(loss_KBT, loss_KBT.detach(), weight_KBT, algorithm())
    (-gain_KBT.sum()).backward()
    assert torch.equal(loss_KBT.grad, weight_KBT) and not stopped_KBT.any()


def test_the_clip_stops_the_gradient():
    """Past the bound on the side that the weight drives to; not before it, nor on the other."""
    cases = [(0.26, 1, True), (0.23, 1, False), (-0.5, 1, False)]  # log(1.28) = 0.247
    cases += [(-0.24, -1, True), (-0.21, -1, False), (0.5, -1, False)]  # log(0.8) = -0.223
    for log_ratio, weight, stops in cases:
        loss_KBT = torch.ones((1, 1, 1), requires_grad=True)
        old_KBT, weight_KBT = loss_KBT.detach() + log_ratio, torch.full((1, 1, 1), float(weight))
        gain_KBT, stopped_KBT = gains(loss_KBT, old_KBT, weight_KBT, algorithm())
        gain_KBT.sum().backward()
        assert (loss_KBT.grad.item() == 0) == bool(stopped_KBT) == stops


def test_the_divergence_of_all_tokens_is_the_exact_one():
    logits_2V = torch.randn((2, 5), generator=torch.Generator().manual_seed(0), dtype=torch.double)
    logits_2V.requires_grad_()
    loss_V, ref_V = -logits_2V.log_softmax(-1)
    kl_V = divergence(loss_V, ref_V)
    exact = (loss_V.neg().exp() * (ref_V - loss_V)).sum()
    torch.testing.assert_close((loss_V.neg().exp() * kl_V).sum(), exact)
    assert (kl_V > 0).all()
    same_V = divergence(loss_V, loss_V.detach())
    same_V.sum().backward()
    assert not same_V.any() and not logits_2V.grad.any()


def test_a_negative_weight_of_a_drafting_head_is_bounded():
    """Head 2 takes -w p: 0 at both ends. Head 1, off its own samples, would go on for ever."""
    largest = []
    for head in (0, 1):
        logits_V, weight_KBT = torch.zeros(4, requires_grad=True), torch.zeros(2, 1, 1)
        weight_KBT[head] = -1.0
        for _ in range(500):
            loss_KBT = -logits_V.log_softmax(-1)[0].expand(2, 1, 1)
            gain_KBT, _ = gains(loss_KBT, loss_KBT.detach(), weight_KBT, algorithm())
            (grad_V,) = torch.autograd.grad(-gain_KBT.sum(), logits_V)
            p = logits_V.detach().softmax(0)[0].item()
            if head == 1:
                assert -1 <= gain_KBT.sum().item() <= 0
                assert grad_V[0].item() == pytest.approx(p * (1 - p), abs=1e-6)
            logits_V.data -= grad_V
        largest.append(logits_V.abs().max().item())
    assert largest[1] < 10 and largest[0] > 100


def test_imitating_heads_send_nothing_to_trunk_and_unembedding():
    model = make_model("llama", 3)
    model.heads.detached = True
    x_BT = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    targets_KBT = torch.stack([F.pad(x_BT[:, k:], (0, k), value=IGNORE) for k in (1, 2, 3)])
    loss_KBT, weight_KBT = model(x_BT, targets_KBT), torch.full((3, 2, 9), -2.0)
    args = algorithm(head_loss="imitate", head_coef=0.1)
    gain_KBT, _ = gains(loss_KBT, loss_KBT.detach(), weight_KBT, args)
    assert torch.equal(gain_KBT[1:], -0.1 * loss_KBT[1:])  # of all samples, whatever their reward
    gain_KBT[1:].sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    heads = {f"causal_lm.model.layers.1.layers.{k}.mlp.up_proj.weight" for k in (1, 2)}
    assert heads <= moved and all(re.search(r"layers\.[12]\.|model\.norm", name) for name in moved)
    model.heads.detached = False
    torch.testing.assert_close(model(x_BT, targets_KBT), loss_KBT)


def test_rewards():
    assert expression_value("2*(3-10)") == -14 and expression_value(" -7 ") == -7
    for text in ("", "1+", "095", "a", "f(1)", "1.5", "True", "2**9", "1;2", "(" * 300, "1\0"):
        assert expression_value(text) is None, text
    assert [reward("7*8=", text, "", "expressions") for text in ("56", "7*8", "65")] == [1, 1, 0]
    assert [reward("37+58=", text, "590", "answer") for text in ("590", "59", "095")] == [1, 0, 0]


# ------------------------------------------------------------------------------------ whole runs
def test_a_reward_raises_itself_and_without_information_it_stays(start, tmp_path):
    """Permuted rewards leave it where the start was, and so do equal weights."""
    flags, rewards = dict(batch_size=64, max_steps=25), {}
    changes = dict(plain={}, tree=dict(credit="tree"), shuffle=dict(control="shuffle"))
    for name, change in (changes | dict(equal=dict(lambda_=1.0))).items():
        assert run_grpo(start, tmp_path / name, **flags, **change) == 0
        lines = updates_of(tmp_path / name)
        rewards[name] = [line["grpo/reward_mean"] for line in lines]
        assert len(lines) == 25 and abs(lines[0]["grpo/kl"]) < 1e-6 < lines[-1]["grpo/kl"]
        assert lines[0]["grpo/tokens_per_forward"] > 1 and 0 < lines[0]["grpo/mixed_groups"] <= 1
    first = np.mean([own[0] for own in rewards.values()])
    assert min(np.mean(rewards[name][-5:]) for name in ("plain", "tree")) > 0.9 > 2 * first
    for name in ("shuffle", "equal"):
        deviation = math.sqrt(first * (1 - first) / (64 * 10)) + 0.03
        assert abs(np.mean(rewards[name][-10:]) - first) < 4 * deviation
    assert metrics_of(tmp_path / "plain")[-1]["eval/accuracy"] == 1


def test_groups_without_spread_do_not_move_the_policy(start, tmp_path, capsys):
    """No text is right: with beta 0 no step is taken, on momentum or decay neither."""
    data = write_lines(
        tmp_path / "none.jsonl", [dict(prompt=f"{n}:", completion="x") for n in range(60)]
    )
    assert run_grpo(start, tmp_path / "run", data=data, beta=0.0) == 0
    assert "sampled reward of 0.00; below 0.3 runs did not learn" in capsys.readouterr().out
    assert same_tensors(weights_of(tmp_path / "run"), weights_of(start / "start"))
    for line in updates_of(tmp_path / "run"):
        assert line["grpo/skipped"] == 1 and line["train/grad_norm"] == 0 and "grpo/kl" not in line


def test_killed_and_resumed_equals_straight(start, tmp_path):
    """With two updates a batch, tree credit, and accumulation."""
    changes = dict(updates_per_batch=2, credit="tree", micro_batch_size=8, save_every=2)
    assert run_grpo(start, tmp_path / "straight", **changes) == 0
    args = args_of(start, tmp_path / "killed", **changes)
    kill(grpo_wmtp, args, after=3)
    assert run_main(grpo_wmtp, args) == 0
    assert same_run(tmp_path / "killed", tmp_path / "straight")
    lines = updates_of(tmp_path / "straight")
    assert max(line["grpo/clip_frac"] for line in lines) > 0  # in the second update of a batch


def run_on_a_rank(cases):
    """What each rank of the torchrun below does."""
    dist.init_process_group = functools.cache(dist.init_process_group)  # once for all runs
    common.SMALL_LAYER = 0  # every layer is sharded by itself
    for values in cases:
        assert run_main(grpo_wmtp, grpo_wmtp.Args(**values)) == 0
    dist.destroy_process_group()


def test_two_ranks_and_accumulation_train_as_one(start, tmp_path):
    cases = [("policy", dict(credit="tree")), ("imitate", dict(head_loss="imitate", beta=0.0))]
    options = dict(micro_batch_size=4, max_steps=3)
    two = [vars(args_of(start, tmp_path / f"two {n}", **options, **own)) for n, own in cases]
    command = [sys.executable, *TORCHRUN, __file__, json.dumps(two)]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, own in cases:
        one, two = tmp_path / name, tmp_path / f"two {name}"
        assert run_grpo(start, one, max_steps=3, **own) == 0
        for expected, line in zip(metrics_of(one), metrics_of(two), strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for key, value in weights_of(one).items():
            torch.testing.assert_close(weights_of(two)[key], value, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------- bad input
BAD = [
    (dict(model="tiny"), ["--model tiny", "--train-on all", "grpo_wmtp.py --model runs/start"]),
    (dict(group_size=1), ["--group-size 1", "from 2"]),
    (dict(batch_size=12), ["--batch-size 12", "no multiple of 8"]),
    (dict(noise_frac=0.3), ["--noise-frac 0.3"]),
    (dict(max_new_tokens=120), ["--max-new-tokens 120", "--seq-len 12", "128 positions"]),
    (dict(train="heads", head_loss="none"), ["--train heads", "--head-loss none"]),
    (dict(data="text.jsonl"), ["text.jsonl", "needs prompt and completion"]),
    (dict(data="weighted.jsonl"), ["weighted.jsonl", "weights"]),
]


@pytest.mark.parametrize("changes, words", BAD, ids=[words[0] for _, words in BAD])
def test_bad_input_is_refused_in_one_line(material, start, tmp_path, changes, words):
    rows = [dict(prompt=f"{n}+1=", completion="2", weight=n) for n in range(40)]
    write_lines(tmp_path / "weighted.jsonl", rows)
    if "data" in changes:
        folder = material if changes["data"] == "text.jsonl" else tmp_path
        changes = dict(data=folder / changes["data"])
    refused(lambda: run_grpo(start, tmp_path / "run", **changes), *words)


if __name__ == "__main__":
    run_on_a_rank(json.loads(sys.argv[1]))
