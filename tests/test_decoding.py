"""Decoding with the heads: against transformers' own `generate`, exact distributions by enumeration, a loop without cache.

Shapes: B batch, T positions, K heads, Q tokens of a pass, M drafts, V vocabulary.
"""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from test_model import FAMILIES, bytes_tokenizer, make_model, refused, tokens

import common
import decoding
from decoding import generate

NEW = 32  # tokens a row
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (3, 9, 5, 14, 1)]


CHAIN = (3 + torch.randperm(94, generator=torch.Generator().manual_seed(4))).tolist()  # every token has its successor


def chain(start, length):
    return [CHAIN[(start + i) % 94] for i in range(length)]


def learn_chain(model, num_heads, steps):
    """Fit trunk and heads to texts that follow the chain: drafts are often right, but not always, and no token comes twice."""
    optimizer, starts = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), torch.Generator().manual_seed(5)
    for _ in range(steps):
        x_BT = torch.tensor([chain(start, 12) for start in torch.randint(94, (16,), generator=starts).tolist()])
        targets_KBT = torch.full((num_heads, *x_BT.shape), common.IGNORE)
        for k in range(1, num_heads + 1):
            targets_KBT[k - 1, :, :-k] = x_BT[:, k:]
        optimizer.zero_grad()
        model(x_BT, targets_KBT).mean().backward()
        optimizer.step()
    return model.eval()


def chains():
    """Prompts of different lengths from the chain, and one that is not of it."""
    return [chain(3, 11), chain(30, 17), chain(50, 4), chain(80, 1), [5, 5, 9, 7]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A family with random weights and after training: the model, its plain form as transformers loads it, prompts."""
    made = {}
    for kind in ("random", "trained"):
        model = make_model(request.param, 4, num_hidden_layers=5)
        model = learn_chain(model, 4, 40) if kind == "trained" else model.eval()
        folder = tmp_path_factory.mktemp(request.param) / "model"
        common.save_model(model, bytes_tokenizer(), folder, common.Ranks())
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        made[kind] = SimpleNamespace(model=model, plain=plain, prompts=chains() if kind == "trained" else PROMPTS)
    return made


@pytest.fixture(scope="module")
def trained():
    return learn_chain(make_model("llama", 4, num_hidden_layers=5), 4, 60)


def plain_greedy(plain, prompt, eos=None, count=NEW):
    """New tokens of one prompt by `transformers`, without the end-of-sequence token."""
    plain.generation_config.eos_token_id = eos
    x_BT = torch.tensor([prompt])
    settings = dict(attention_mask=torch.ones_like(x_BT), max_new_tokens=count, do_sample=False, pad_token_id=0)
    made = plain.generate(x_BT, **settings)[0, len(prompt) :].tolist()
    return made[:-1] if eos is not None and made[-1] == eos else made


def watch(monkeypatch, owner, name):
    """A list that receives what each call of `owner.name` returns; the function itself stays."""
    inner, seen = getattr(owner, name), []

    def outer(*args, **kwargs):
        seen.append(inner(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(owner, name, outer)
    return seen


# ------------------------------------------------------------------------------------------------------ greedy, all families
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_greedy_is_the_text_of_transformers(case, kind, monkeypatch):
    model, plain, prompts = case[kind].model, case[kind].plain, case[kind].prompts
    expected = [plain_greedy(plain, prompt) for prompt in prompts]
    assert all(len(text) == NEW for text in expected)
    for num_heads in (1, 2, 4):
        verdicts = watch(monkeypatch, decoding, "verify")
        done = generate(model, prompts, NEW, None, num_heads)
        assert done.tokens == expected
        if kind == "trained" and num_heads > 1:
            assert min(done.accepted) > 0, done
        if kind == "trained" and num_heads == 4:  # rows of one pass went different ways
            assert done.accepted[-1] < done.row_steps and any(len(set(taken_B.tolist())) > 1 for taken_B, _ in verdicts), done
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_greedy_ends_where_transformers_ends(case, kind):
    model, plain, prompts = case[kind].model, case[kind].plain, case[kind].prompts
    text = plain_greedy(plain, prompts[0])
    eos = text[3] if kind == "random" else text[NEW // 2]
    expected = [plain_greedy(plain, prompt, eos) for prompt in prompts]
    assert any(len(t) < NEW for t in expected)
    for num_heads in (1, 2, 4):
        assert generate(model, prompts, NEW, eos, num_heads).tokens == expected


# ------------------------------------------------------------------------------------------------------------------ sampling
TINY_V, SAMPLES, START = 6, 4_000, [3, 5, 0, 2]


@pytest.fixture(scope="module")
def tiny():
    """Six tokens and three heads that disagree: drafts are taken and refused often."""
    return make_model("llama", 3, vocab_size=TINY_V, num_hidden_layers=4, initializer_range=0.1).eval()


def exact_texts(model, temperature, top_p, eos):
    """Probability of every text of three tokens (fewer if it ends), from the plain model by enumeration."""
    texts = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in texts.items():
            if eos in text:
                longer[text] = chance
                continue
            model.heads.active = 1
            with torch.no_grad():
                logits = model.causal_lm(torch.tensor([[*START, *text]])).logits[0, -1].double().numpy() / temperature
            share = np.exp(logits - logits.max())
            share, total = share / share.sum(), 0.0
            kept = {}
            for token in sorted(range(TINY_V), key=lambda v: -share[v]):
                if total < top_p:
                    kept[token] = share[token]
                total += share[token]
            for token, part in kept.items():
                longer[*text, token] = chance * part / sum(kept.values())
        texts = longer
    assert math.isclose(sum(texts.values()), 1.0, rel_tol=1e-9)
    return texts


def p_value(model, num_heads, temperature, top_p, eos):
    """Chi-square test of `SAMPLES` sampled texts against the exact ones; rare texts (fewer than 5 expected) are one class."""
    exact = exact_texts(model, temperature, top_p, eos)
    done = generate(model, [START] * SAMPLES, 3, eos, num_heads, temperature, top_p, seeds=range(SAMPLES))
    counts = Counter(tuple(t) if len(t) == 3 else (*t, eos) for t in done.tokens)
    if not set(counts) <= set(exact):
        return 0.0, done
    rare = {text for text, chance in exact.items() if SAMPLES * chance < 5}
    classes = [(counts[text], SAMPLES * chance) for text, chance in exact.items() if text not in rare]
    classes.append((sum(counts[text] for text in rare), SAMPLES * sum(exact[text] for text in rare)))
    classes = [(seen, expected) for seen, expected in classes if expected > 0]
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in classes)
    degrees = len(classes) - 1
    return torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()).item(), done


@pytest.mark.parametrize(
    ("num_heads", "temperature", "top_p", "eos"),
    [(1, 0.7, 0.8, None), (2, 0.7, 0.8, 4), (3, 1.0, 1.0, None), (3, 0.7, 0.8, None), (3, 1.5, 0.95, 4)],
)
def test_sampled_texts_have_the_distribution_of_plain_sampling(tiny, num_heads, temperature, top_p, eos):
    p, done = p_value(tiny, num_heads, temperature, top_p, eos)
    assert p > 0.01, (p, done.accepted)  # one seed, fixed: it does not flicker
    if num_heads > 1:
        assert 0.1 < done.accepted[0] / done.row_steps < 0.9  # both branches of accept-and-resample were at work


def test_sampling_caps_the_logits():
    """Greedy decoding cannot tell: capping keeps the order of the logits."""
    model = make_model("gemma2", 3, vocab_size=TINY_V, num_hidden_layers=4).eval()
    assert model.softcap == 1.0
    assert p_value(model, 3, 0.7, 1.0, None)[0] > 0.01


def verify_always(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, uniform_BQ):
    target_BV = decoding.nucleus(logits_BQV[:, -1], temperature, top_p)
    return torch.full((len(draft_BM),), draft_BM.shape[1]), decoding.draw(target_BV, uniform_BQ[:, -1])


def verify_without_residual(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, uniform_BQ):
    taken_B, _ = VERIFY(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, uniform_BQ)
    target_BQV = decoding.nucleus(logits_BQV, temperature, top_p)
    return taken_B, decoding.draw(target_BQV[torch.arange(len(taken_B)), taken_B], uniform_BQ[:, -1])  # p, not max(p - q, 0)


VERIFY = decoding.verify


@pytest.mark.parametrize("broken", [verify_always, verify_without_residual])
def test_the_chi_square_test_sees_a_broken_rule(tiny, broken, monkeypatch):
    monkeypatch.setattr(decoding, "verify", broken)
    assert p_value(tiny, 3, 1.0, 1.0, None)[0] < 1e-6


def test_nucleus_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    for top_p, expected in ((1.0, [0.5, 0.25, 0.15, 0.1]), (0.7, [2 / 3, 1 / 3, 0, 0]), (0.3, [1, 0, 0, 0])):
        torch.testing.assert_close(decoding.nucleus(logits, 1.0, top_p), torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(decoding.nucleus(logits, 0.5, 1.0), torch.tensor([100, 25, 9, 4]) / 138)


# ----------------------------------------------------------------------------------------------------------- rows of a batch
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("num_heads", [1, 4])
def test_a_row_is_the_same_alone(trained, num_heads, temperature):
    prompts, seeds = chains(), [7, 1, 7, 3, 12]
    settings = dict(num_heads=num_heads, temperature=temperature, top_p=0.95)
    together = generate(trained, prompts, NEW, 9, seeds=seeds, **settings).tokens
    alone = [generate(trained, [p], NEW, 9, seeds=[s], **settings).tokens[0] for p, s in zip(prompts, seeds)]
    assert together == alone
    assert generate(trained, prompts[::-1], NEW, 9, seeds=seeds[::-1], **settings).tokens == alone[::-1]
    if temperature:
        other = generate(trained, prompts, NEW, 9, seeds=[s + 1 for s in seeds], **settings).tokens
        assert other != alone


def test_ends_inside_accepted_drafts(trained, monkeypatch):
    prompt = chains()[1]
    text = generate(trained, [prompt], 16, None).tokens[0]
    verdicts, inside = watch(monkeypatch, decoding, "verify"), 0
    for count in range(17):
        done = generate(trained, [prompt], count, None, num_heads=4)
        assert done.tokens == [text[:count]]
        made = [1 + taken_B.item() for taken_B, _ in verdicts]
        inside += sum(made) > count > 0  # the last pass made more than was wanted
        assert len(made) == done.forwards and sum(made[:-1]) < max(1, count)
        verdicts.clear()
    assert inside >= 3
    inside = 0
    for prompt, place in itertools.product(chains(), range(16)):
        text = generate(trained, [prompt], 16, None).tokens[0]
        verdicts.clear()
        eos = text[place]
        if eos in text[:place]:
            continue
        done = generate(trained, [prompt], 16, eos, num_heads=4)
        assert done.tokens == [text[:place]]
        made = [1 + taken_B.item() for taken_B, _ in verdicts]
        inside += sum(made[:-1]) <= place < sum(made) - 1  # a draft, not the token after the drafts
        verdicts.clear()
    assert inside >= 2


def test_finished_rows_leave_the_batch(trained, monkeypatch):
    limits, seen = [3, 28, 9, 9, 1], {}
    prompts = chains()
    alone = [generate(trained, [p], NEW, None).tokens[0] for p in prompts]
    verdicts = watch(monkeypatch, decoding, "verify")

    def finished(made):
        row = next(r for r, text in enumerate(alone) if text[: len(made)] == made)
        seen[row] = len(made)
        return len(made) >= limits[row]

    done = generate(trained, prompts, NEW, None, num_heads=4, finished=finished)
    for row, made in enumerate(done.tokens):
        assert made == alone[row][: len(made)] and limits[row] <= len(made) < limits[row] + 4 and seen[row] == len(made)
    sizes = [len(taken_B) for taken_B, _ in verdicts]
    assert sizes[0] == 5 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3
    assert sum(sizes[1:]) == done.row_steps  # a row that left is in no later pass


def test_refuses(trained):
    refused(lambda: generate(trained, [[3, 4], []], 4, None), "empty prompt")
    refused(lambda: generate(trained, [[3]], 4, None, num_heads=5), numbers=(5, 4))
    refused(lambda: generate(trained, [[3]], 4, None, num_heads=0), numbers=(0, 4))
    assert generate(trained, [], 4, None).tokens == []


# ------------------------------------------------------------------------------------------------------------------ counters
@torch.no_grad()
def blockwise(model, prompt, count, num_heads):
    """Blockwise parallel decoding of one row from its text alone: every step reads the whole text again."""

    def best(text, heads):
        model.heads.active = heads
        states_KTD = model.causal_lm.model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state
        return model.causal_lm.lm_head(states_KTD).argmax(-1).tolist()

    text, new, steps, accepted = list(prompt), 0, 0, [0] * (num_heads - 1)
    following, *drafts = (head[-1] for head in best(text, num_heads))
    text.append(following)
    while len(text) - len(prompt) < count:
        steps, right, before = steps + 1, 0, len(text)
        for draft in drafts:
            if best(text, 1)[0][-1] != draft:
                break
            text.append(draft)
            accepted[right] += len(text) <= len(prompt) + count
            right += 1
        following, *drafts = (head[-1] for head in best(text, num_heads))
        text.append(following)
        text = text[: len(prompt) + count]
        new += len(text) - before
    return text[len(prompt) :], steps, new, accepted


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_counters_are_those_of_a_slow_loop(trained, num_heads):
    prompts = chains()
    slow = [blockwise(trained, prompt, NEW, num_heads) for prompt in prompts]
    texts, steps, new, accepted = zip(*slow)
    done = generate(trained, prompts, NEW, None, num_heads)
    assert done.tokens == list(texts)
    assert (done.row_steps, done.new_tokens) == (sum(steps), sum(new))
    assert done.accepted.tolist() == np.sum(accepted, 0).tolist()
    assert done.tokens_per_forward == sum(new) / sum(steps)
    assert done.forwards == 1 + max(steps)
    if num_heads == 1:
        assert done.tokens_per_forward == 1
    if num_heads == 4:
        assert all(a >= b for a, b in itertools.pairwise(done.accepted)) and done.accepted[-1] > 0
