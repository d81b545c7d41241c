"""Decoding with the model's own heads: heads 2..H draft, the next forward verifies at head 1 and drafts again.

Blockwise parallel decoding (Stern et al. 2018, arXiv 1811.03115) as in Gloeckle et al. 2024 (arXiv 2404.19737, sec. 3.2):
one pass of trunk and heads over [last token, drafts] a step. Greedy text equals plain greedy text; sampled text has the
distribution of plain sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).

Shapes: B rows, Q tokens of this pass, K heads, V vocabulary, D width.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from common import UsageError


@dataclasses.dataclass
class Generated:
    """What `generate` returns."""

    tokens: list  # of each prompt, its new tokens, without end-of-sequence token
    forwards: int = 0  # passes of the model over the batch, prompts included
    row_steps: int = 0  # passes counted once for each row that was in it, prompts excluded
    new_tokens: int = 0  # made in those passes
    accepted: np.ndarray = None  # of each draft position, how often the draft there was taken, `[K-1]`

    @property
    def tokens_per_forward(self):
        """Mean number of new tokens a row gets from a pass; 1 for plain decoding."""
        return self.new_tokens / max(1, self.row_steps)


class RowCache(Cache):
    """Keys and values of every layer where slot = position, so each row has its own length and nothing is ever cropped.

    What lies beyond a row's length is a draft that was not taken; it is masked, and written over by the next pass.
    """

    def __init__(self, capacity):
        super().__init__(layers=[])
        self.capacity, self.kept = capacity, {}
        self.position_BQ, self.end, self.same = None, 0, True

    def at(self, position_BQ):
        """The next pass writes to these slots."""
        self.position_BQ, self.end = position_BQ, int(position_BQ.max()) + 1
        self.same = bool((position_BQ[:, 0] == position_BQ[0, 0]).all())

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if layer_idx not in self.kept:
            shape = (keys.shape[0], keys.shape[1], self.capacity)
            self.kept[layer_idx] = [keys.new_zeros(*shape, keys.shape[-1]), values.new_zeros(*shape, values.shape[-1])]
        out = []
        for kept, new in zip(self.kept[layer_idx], (keys, values)):
            if self.same:
                kept[:, :, self.end - new.shape[2] : self.end] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                kept[rows, :, self.position_BQ] = new.transpose(1, 2)
            out.append(kept[:, :, : self.end])
        return tuple(out)

    def keep_rows(self, rows):
        self.kept = {number: [tensor[rows] for tensor in pair] for number, pair in self.kept.items()}

    def get_seq_length(self, layer_idx=0):
        return int(self.position_BQ.min())


def attention_masks(config, position_BQ, end, dtype):
    """Additive masks `[B, 1, Q, end]`: a token sees the slots up to its own, within the window where its layer has one.

    A dict by kind of layer where the family has several kinds; else one tensor.
    """
    slots = torch.arange(end, device=position_BQ.device)
    seen = slots <= position_BQ[:, None, :, None]
    window = getattr(config, "sliding_window", None)
    near = seen & (slots > position_BQ[:, None, :, None] - window) if window else seen

    def additive(allowed):
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)

    kinds = getattr(config, "layer_types", None)
    if kinds and len(set(kinds) | {"full_attention"}) > 1:
        return {"full_attention": additive(seen), "sliding_attention": additive(near)}
    return additive(near if window and getattr(config, "use_sliding_window", True) else seen)


def nucleus(logits, temperature, top_p):
    """Probabilities after temperature and nucleus truncation (Holtzman et al. 2020, arXiv 1904.09751); fp32.

    The nucleus is the smallest set of most likely tokens whose probabilities reach `top_p`.
    """
    probabilities = F.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        ordered, places = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered.masked_fill(outside, 0.0))
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(weights, uniform):
    """Token drawn in proportion to `weights` `[..., V]` by inverse transform of `uniform` `[...]` in [0, 1)."""
    steps = weights.double().cumsum(-1)
    return torch.searchsorted(steps, uniform[..., None].double() * steps[..., -1:], right=True)[..., 0]


class _Decoder:
    def __init__(self, model, num_heads, capacity, temperature, top_p):
        self.model, self.num_heads, self.temperature, self.top_p = model, num_heads, temperature, top_p
        self.cache, self.dtype = RowCache(capacity), model.causal_lm.dtype

    def states(self, x_BQ, start_B):
        """Normed states of all heads in use, `[K, B, Q, D]`, for tokens at positions `start_B` and on."""
        position_BQ = start_B[:, None] + torch.arange(x_BQ.shape[1], device=x_BQ.device)
        self.cache.at(position_BQ)
        decoder = self.model.causal_lm.model
        self.model.heads.active = self.num_heads
        mask = attention_masks(decoder.config, position_BQ, self.cache.end, self.dtype)
        out = decoder(input_ids=x_BQ, attention_mask=mask, position_ids=position_BQ, past_key_values=self.cache, use_cache=True)
        return out.last_hidden_state.view(self.num_heads, *x_BQ.shape, -1)

    def logits(self, states):
        logits = F.linear(states, self.model.causal_lm.lm_head.weight).float()
        cap = self.model.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def propose(self, states_KBD, uniform_B):
        """Drafts of heads 2..K from the states at each row's last taken position, `[B, K-1]`, and their distributions."""
        logits = self.logits(states_KBD[1:]).transpose(0, 1)
        if self.temperature == 0:
            return logits.argmax(-1), None
        proposal = nucleus(logits, self.temperature, self.top_p)
        return draw(proposal, uniform_B), proposal


def verify(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, uniform_BQ):
    """How many drafts each row takes, `[B]`, and the token that follows them, `[B]`.

    Greedy (temperature 0): drafts are taken while they are head 1's most likely token, which then follows them. Sampling:
    draft d is taken with probability min(1, p(d) / q(d)); the first one refused is replaced by a draw from max(p - q, 0);
    after the last one a token is drawn from p (arXiv 2211.17192, algorithm 1).

    Args:
        logits_BQV: head 1 at the last token and at each of the M = Q - 1 drafts.
        uniform_BQ: in [0, 1), one for each decision: M acceptances and one draw.
    """
    rows = torch.arange(len(logits_BQV), device=logits_BQV.device)
    if temperature == 0:
        best_BQ = logits_BQV.argmax(-1)
        taken_B = (draft_BM == best_BQ[:, :-1]).long().cumprod(1).sum(1)
        return taken_B, best_BQ[rows, taken_B]
    target_BQV = nucleus(logits_BQV, temperature, top_p)
    if draft_BM.shape[1] == 0:
        return torch.zeros_like(rows), draw(target_BQV[:, 0], uniform_BQ[:, 0])
    wanted = target_BQV[:, :-1].gather(-1, draft_BM[..., None])[..., 0]
    proposed = proposal_BMV.gather(-1, draft_BM[..., None])[..., 0]
    taken_B = (uniform_BQ[:, :-1] * proposed < wanted).long().cumprod(1).sum(1)
    p_BV = target_BQV[rows, taken_B]
    q_BV = F.pad(proposal_BMV, (0, 0, 0, 1))[rows, taken_B]  # after the last draft nothing was proposed
    rest_BV = (p_BV - q_BV).clamp(min=0)
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)  # p = q to rounding: never refused
    return taken_B, draw(rest_BV, uniform_BQ[:, -1])


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, eos, num_heads=1, temperature=0.0, top_p=1.0, seeds=None, finished=None):
    """Complete prompts with head 1; heads 2..num_heads draft (1: plain decoding).

    Args:
        model: an `MTPModel` in evaluation mode.
        prompts: lists of token ids, none empty; lengths may differ.
        max_new_tokens: of each row.
        eos: token id that ends a row, or None.
        temperature: 0: greedy. top_p: 1: no truncation.
        seeds: of each row's random numbers, so that a row's text does not depend on the rows beside it; None: 0, 1, ..
        finished: called with a row's new tokens after every pass; True ends the row.

    Raises:
        UsageError: an empty prompt; more heads than the model has.
    """
    if not 1 <= num_heads <= len(model.heads.layers):
        raise UsageError(f"decoding with {num_heads} heads: the model has {len(model.heads.layers)}")
    if not all(prompts):
        raise UsageError("decoding: an empty prompt; give at least one token")
    device, drafts = model.causal_lm.lm_head.weight.device, num_heads - 1
    result = Generated([[] for _ in prompts], accepted=np.zeros(drafts, np.int64))
    length_B = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(length_B.max())
    decoder = _Decoder(model, num_heads, longest + max_new_tokens + drafts, temperature, top_p)
    randoms = [np.random.default_rng(s) for s in (range(len(prompts)) if seeds is None else seeds)]
    numbers = list(range(len(prompts)))  # which prompt each row of the batch is of

    def uniforms(count):
        if temperature == 0:
            return torch.zeros(len(numbers), count, device=device)
        return torch.tensor(np.stack([randoms[n].random(count) for n in numbers]), device=device)

    x_BQ = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        x_BQ[row, : len(prompt)] = torch.tensor(prompt)
    states_KBQD = decoder.states(x_BQ, torch.zeros_like(length_B))
    result.forwards += 1
    at_B = length_B - 1
    draft_BM, proposal_BMV = torch.zeros(len(prompts), 0, dtype=torch.long, device=device), None
    while True:
        rows = torch.arange(len(numbers), device=device)
        first = result.forwards == 1  # the prompt's pass: only its last position says what follows
        span_BQD = states_KBQD[0][rows, at_B][:, None] if first else states_KBQD[0]
        uniform = uniforms(span_BQD.shape[1] + drafts)
        logits_BQV = decoder.logits(span_BQD)
        taken_B, next_B = verify(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, uniform[:, : span_BQD.shape[1]])
        at_B = at_B if first else taken_B
        taken, follows, drafted = taken_B.tolist(), next_B.tolist(), draft_BM.tolist()
        gone = []
        for row, number in enumerate(numbers):
            new, mine = [*drafted[row][: taken[row]], follows[row]], result.tokens[number]
            ended = eos is not None and eos in new
            new = (new[: new.index(eos)] if ended else new)[: max_new_tokens - len(mine)]
            mine += new
            if not first:
                result.row_steps += 1
                result.new_tokens += len(new) + ended
                result.accepted[: taken[row]] += 1
            if ended or len(mine) >= max_new_tokens or (finished and finished(mine)):
                gone.append(row)
        if len(gone) == len(numbers):
            return result
        states_KBD = states_KBQD[:, rows, at_B]
        draft_BM, proposal_BMV = decoder.propose(states_KBD, uniform[:, uniform.shape[1] - drafts :])
        length_B = length_B + taken_B + 1
        if gone:
            keep = torch.tensor([row for row in range(len(numbers)) if row not in set(gone)], device=device)
            numbers = [numbers[row] for row in keep.tolist()]
            decoder.cache.keep_rows(keep)
            length_B, next_B, draft_BM = length_B[keep], next_B[keep], draft_BM[keep]
            proposal_BMV = None if proposal_BMV is None else proposal_BMV[keep]
        states_KBQD = decoder.states(torch.cat([next_B[:, None], draft_BM], 1), length_B - 1)
        result.forwards += 1
