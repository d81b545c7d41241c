"""Decoding with the heads: against `generate` of transformers, exact distributions, a slow loop.

Shapes: B batch, T positions, K heads, Q tokens of a pass, M drafts, V vocabulary.
"""

from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from test_model import make_model

import common
from common import generate
from conftest import bytes_tokenizer

NEW = 32  # tokens a row
CHAIN = (3 + torch.randperm(94, generator=torch.Generator().manual_seed(4))).tolist()


def chain(start, length):  # every token has one successor
    return [CHAIN[(start + i) % 94] for i in range(length)]


# Of different lengths, and one that is not of the chain.
CHAINS = [chain(3, 11), chain(30, 17), chain(50, 4), chain(80, 1), [5, 5, 9, 7]]


def learn_chain(model, num_heads, steps):
    """Fit trunk and heads to the chain: drafts are often right, but not always."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    random = torch.Generator().manual_seed(5)
    for _ in range(steps):
        starts = torch.randint(94, (16,), generator=random).tolist()
        x_BT = torch.tensor([chain(start, 12) for start in starts])
        targets_KBT = torch.full((num_heads, *x_BT.shape), common.IGNORE)
        for k in range(1, num_heads + 1):
            targets_KBT[k - 1, :, :-k] = x_BT[:, k:]
        optimizer.zero_grad()
        model(x_BT, targets_KBT).mean().backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    return learn_chain(make_model("llama", 4, num_hidden_layers=5), 4, 60)


def plain_greedy(plain, prompt, eos=None):
    """New tokens of one prompt by `transformers`, without the end-of-sequence token."""
    plain.generation_config.eos_token_id = eos
    x_BT = torch.tensor([prompt])
    settings = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    output = plain.generate(x_BT, attention_mask=torch.ones_like(x_BT), **settings)
    text = output[0, len(prompt) :].tolist()
    return text[:-1] if eos is not None and text[-1] == eos else text


@pytest.fixture
def verdicts(monkeypatch):
    """Receives what each call of `verify` returns."""
    inner, seen = common.verify, []

    def watched(*args):
        seen.append(inner(*args))
        return seen[-1]

    monkeypatch.setattr(common, "verify", watched)
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "smollm3"])
def test_greedy_is_the_text_of_transformers(family, tmp_path, verdicts):
    """Without a window, with one, with both kinds of layers, with layers without positions."""
    model = learn_chain(make_model(family, 4, num_hidden_layers=5), 4, 40)
    common.save_model(model, bytes_tokenizer(), tmp_path / "model", common.Ranks())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    eos = plain_greedy(plain, CHAINS[0])[NEW // 2]
    for end in (None, eos):
        expected = [plain_greedy(plain, prompt, end) for prompt in CHAINS]
        assert any(len(text) < NEW for text in expected) == (end is not None)
        for num_heads in (1, 2, 4):
            verdicts.clear()
            done = generate(model, CHAINS, NEW, end, num_heads)
            assert done.tokens == expected
    assert 0 < done.accepted[-1] < done.row_steps
    assert any(len(set(taken_B.tolist())) > 1 for taken_B, _ in verdicts)  # rows of unlike lengths


TINY_V, SAMPLES, START = 6, 4_000, [3, 5, 0, 2]


def exact_texts(model, temperature, top_p, eos):
    """Probability of every text of three tokens (fewer if it ends), by enumeration in float64."""
    texts = {(): 1.0}
    model.heads.active = 1
    for _ in range(3):
        longer = {text: chance for text, chance in texts.items() if eos in text}
        for text in texts.keys() - longer.keys():
            with torch.no_grad():
                logits_V = model.causal_lm(torch.tensor([[*START, *text]])).logits[0, -1]
            share_V = scipy.special.softmax(logits_V.double().numpy() / temperature)
            order = np.argsort(-share_V)
            num_kept = 1 + np.count_nonzero(share_V[order].cumsum() < top_p)
            kept = order[:num_kept].tolist()
            for token in kept:
                longer[*text, token] = texts[text] * share_V[token] / share_V[kept].sum()
        texts = longer
    return texts


SETTINGS = [  # gemma2 caps its logits: greedy decoding cannot tell, as their order stays
    ("llama", 1, 0.7, 0.8, None), ("llama", 2, 0.7, 0.8, 4), ("llama", 3, 1.0, 1.0, None),
    ("llama", 3, 1.5, 0.95, 4), ("gemma2", 3, 0.7, 1.0, None),
]  # fmt: skip


@pytest.mark.parametrize("family, num_heads, temperature, top_p, eos", SETTINGS)
def test_texts_are_distributed_as_by_plain_sampling(family, num_heads, temperature, top_p, eos):
    """Six tokens and heads that disagree: drafts are taken and refused often."""
    changes = dict(initializer_range=0.1) if family == "llama" else {}
    model = make_model(family, 3, vocab_size=TINY_V, num_hidden_layers=4, **changes).eval()
    exact, seeds = exact_texts(model, temperature, top_p, eos), range(SAMPLES)
    done = generate(model, [START] * SAMPLES, 3, eos, num_heads, temperature, top_p, seeds)
    counts = Counter(tuple(t) if len(t) == 3 else (*t, eos) for t in done.tokens)
    assert set(counts) <= set(exact)
    frequent = [text for text, chance in exact.items() if SAMPLES * chance >= 5]
    pairs = [(counts[text], SAMPLES * exact[text]) for text in frequent]
    if len(exact) > len(frequent):  # all rare texts are one class
        pairs.append(SAMPLES - np.sum(pairs, 0))
    assert scipy.stats.chisquare(*zip(*pairs)).pvalue > 0.01  # one seed, fixed: no flicker
    if num_heads > 1:
        assert 0.1 < done.accepted[0] / done.row_steps < 0.9


@pytest.mark.parametrize("num_heads", [1, 4])
def test_a_row_is_the_same_in_any_batch(trained, num_heads):
    def texts(prompts, seeds):
        return generate(trained, prompts, NEW, 9, num_heads, 0.8, 0.95, seeds).tokens

    seeds = [7, 1, 7, 3, 12]
    single = [texts([prompt], [seed])[0] for prompt, seed in zip(CHAINS, seeds)]
    assert texts(CHAINS, seeds) == single
    assert texts(CHAINS[::-1], seeds[::-1]) == single[::-1]
    assert texts(CHAINS, [seed + 1 for seed in seeds]) != single


def test_finished_rows_leave_the_batch(trained, verdicts):
    limits = [3, 28, 9, 9, 1]
    full = [generate(trained, [prompt], NEW, None).tokens[0] for prompt in CHAINS]
    verdicts.clear()

    def finished(text):
        row = next(r for r, other in enumerate(full) if other[: len(text)] == text)
        return len(text) >= limits[row]

    done = generate(trained, CHAINS, NEW, None, num_heads=4, finished=finished)
    for text, other, limit in zip(done.tokens, full, limits):
        assert text == other[: len(text)] and limit <= len(text) < limit + 4
    sizes = [len(taken_B) for taken_B, _ in verdicts]
    assert sizes[0] == 5 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3
    assert sum(sizes[1:]) == done.row_steps  # a row that left is in no later pass


@torch.no_grad()
def blockwise(model, prompt, num_heads):
    """Blockwise parallel decoding of one row: every step reads the whole text again, no cache."""

    def best(text, heads):
        model.heads.active = heads
        decoder = model.causal_lm.model
        states_KTD = decoder(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state
        return model.causal_lm.lm_head(states_KTD).argmax(-1)[:, -1].tolist()

    steps, accepted, end = 0, [0] * (num_heads - 1), len(prompt) + NEW
    following, *drafts = best(prompt, num_heads)
    text = [*prompt, following]
    while len(text) < end:
        steps += 1
        for number, draft in enumerate(drafts):
            if best(text, 1)[0] != draft:
                break
            text.append(draft)
            accepted[number] += len(text) <= end
        following, *drafts = best(text, num_heads)
        text = [*text, following]
    return text[len(prompt) : end], steps, accepted


def test_counters_are_those_of_a_slow_loop(trained):
    slow = [blockwise(trained, prompt, 4) for prompt in CHAINS]
    texts, steps, accepted = zip(*slow)
    done = generate(trained, CHAINS, NEW, None, 4)
    assert done.tokens == list(texts)
    assert (done.row_steps, done.new_tokens) == (sum(steps), len(CHAINS) * (NEW - 1))
    assert done.accepted.tolist() == np.sum(accepted, 0).tolist()
    assert done.forwards == 1 + max(steps)
    assert done.accepted[-1] > 0
