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

from common import TokenLosses, UsageError


@dataclasses.dataclass
class Generated:
    """What `generate` returns."""

    tokens: list  # of each prompt, its new tokens, without end-of-sequence token
    forwards: int = 0  # passes of the model over the batch, prompts included
    row_steps: int = 0  # passes counted once for each row that was in it, prompts excluded
    new_tokens: int = 0  # made in those passes
    accepted: np.ndarray = None  # of each draft position, how often head 1 agreed, past the row's end too, `[K-1]`

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
        self.capacity, self.kept, self.position_BQ, self.start, self.end = capacity, {}, None, 0, 0

    def at(self, position_BQ, start, end):
        """The next pass writes to slots `position_BQ`; start: least of them, end: one past the last."""
        self.position_BQ, self.start, self.end, self.places = position_BQ, start, end, {}

    def update(self, keys, values, layer_idx, *args, **kwargs):
        batch, heads = keys.shape[:2]
        if layer_idx not in self.kept:
            self.kept[layer_idx] = [new.new_zeros(batch, heads, self.capacity, new.shape[-1]) for new in (keys, values)]
        same = self.end - self.start == keys.shape[2]  # all rows write to the same slots
        if not same and heads not in self.places:
            first_BH = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1) * self.capacity
            self.places[heads] = (first_BH + self.position_BQ[:, None]).flatten()
        out = []
        for kept, new in zip(self.kept[layer_idx], (keys, values)):
            if same:
                kept[:, :, self.start : self.end] = new
            else:
                kept.view(-1, new.shape[-1]).index_copy_(0, self.places[heads], new.reshape(-1, new.shape[-1]))
            out.append(kept[:, :, : self.end])
        return tuple(out)

    def keep_rows(self, rows):
        self.kept = {number: [tensor[rows] for tensor in pair] for number, pair in self.kept.items()}

    def get_seq_length(self, layer_idx=0):
        return self.start


class Masks:
    """Additive attention masks: a token sees the slots up to its own, within the window where its layer has one."""

    def __init__(self, config, capacity, dtype, device):
        kinds, self.window = getattr(config, "layer_types", None) or [], getattr(config, "sliding_window", None)
        self.by_kind = bool(set(kinds) - {"full_attention"})  # several kinds of layers: the decoder takes a dict of masks
        self.sliding = self.by_kind or (self.window and getattr(config, "use_sliding_window", True))
        self.slots = torch.arange(capacity, device=device)
        self.values = torch.tensor([torch.finfo(dtype).min, 0.0], dtype=dtype, device=device)

    def at(self, position_BQ, end):
        """Masks `[B, 1, Q, end]` of tokens at these positions; a dict by kind of layer where the family has several."""
        slots, position = self.slots[:end], position_BQ[:, None, :, None]
        seen, (lowest, zero) = slots <= position, self.values
        full = near = torch.where(seen, zero, lowest)
        if self.sliding and self.window and end > self.window:
            near = torch.where(seen & (slots > position - self.window), zero, lowest)
        return {"full_attention": full, "sliding_attention": near} if self.by_kind else near


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
        weight = model.causal_lm.lm_head.weight
        self.cache, self.decoder = RowCache(capacity), model.causal_lm.model
        self.masks = Masks(self.decoder.config, capacity, weight.dtype, weight.device)

    def states(self, x_BQ, start_B, least, most):
        """Normed states of all heads in use, `[K, B, Q, D]`, for tokens at positions `start_B` (least, most of them) and on."""
        end = most + x_BQ.shape[1]
        position_BQ = start_B[:, None] + self.masks.slots[: x_BQ.shape[1]]
        self.cache.at(position_BQ, least, end)
        mask = self.masks.at(position_BQ[:1] if least == most else position_BQ, end)
        self.model.heads.active = self.num_heads
        out = self.decoder(
            input_ids=x_BQ, attention_mask=mask, position_ids=position_BQ, past_key_values=self.cache, use_cache=True
        )
        return out.last_hidden_state.view(self.num_heads, *x_BQ.shape, -1)

    def logits(self, states):
        return TokenLosses.logits(states, self.model.causal_lm.lm_head.weight, self.model.softcap)

    def propose(self, states_MBD, uniform_BM):
        """Drafts `[B, K-1]` of heads 2..K from their states at each row's last taken position, and the drafts' distributions."""
        logits = self.logits(states_MBD).transpose(0, 1)
        if self.temperature == 0:
            return logits.argmax(-1), None
        proposal = nucleus(logits, self.temperature, self.top_p)
        return draw(proposal, uniform_BM), proposal


def verify(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, uniform_BQ):
    """How many drafts each row takes, `[B]`, and the token that follows them, `[B]`.

    Greedy (temperature 0): drafts are taken while they are head 1's most likely token, which then follows them. Sampling:
    draft d is taken with probability min(1, p(d) / q(d)); the first one refused is replaced by a draw from max(p - q, 0);
    after the last one a token is drawn from p (arXiv 2211.17192, algorithm 1).

    Args:
        logits_BQV: head 1 at the last token and at each of the M = Q - 1 drafts.
        uniform_BQ: in [0, 1), one for each decision: M acceptances and one draw; greedy decoding needs none.
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
    if not prompts:
        return result
    lengths = [len(p) for p in prompts]  # of each row in the batch, what the model has read; on the device: length_B
    decoder = _Decoder(model, num_heads, max(lengths) + max_new_tokens + drafts, temperature, top_p)
    randoms = [np.random.default_rng(s) for s in (range(len(prompts)) if seeds is None else seeds)]
    numbers = list(range(len(prompts)))  # which prompt each row of the batch is of

    x_BQ = torch.tensor([[*p, *[0] * (max(lengths) - len(p))] for p in prompts], device=device)
    length_B = torch.tensor(lengths, device=device)
    rows = torch.arange(len(prompts), device=device)
    states_KBQD = decoder.states(x_BQ, torch.zeros_like(length_B), 0, 0)[:, rows, length_B - 1][:, :, None]
    result.forwards += 1
    draft_BM, proposal_BMV = x_BQ[:, :0], None
    while True:
        first, uniform_BQ, uniform_BM = result.forwards == 1, None, None
        if temperature > 0:
            size = states_KBQD.shape[2]
            uniform = torch.tensor(np.stack([randoms[n].random(size + drafts) for n in numbers]), device=device)
            uniform_BQ, uniform_BM = uniform[:, :size], uniform[:, size:]
        taken_B, next_B = verify(decoder.logits(states_KBQD[0]), draft_BM, proposal_BMV, temperature, top_p, uniform_BQ)
        taken, *made = torch.cat([taken_B[None], draft_BM.t(), next_B[None]]).tolist()  # the one transfer of a step
        kept = []
        for row, number in enumerate(numbers):
            new, mine = [*(draft[row] for draft in made[: taken[row]]), made[-1][row]], result.tokens[number]
            new = new[: max_new_tokens - len(mine)]
            ended = eos is not None and eos in new
            new = new[: new.index(eos)] if ended else new
            mine += new
            lengths[row] += taken[row] + 1
            if not first:
                result.row_steps += 1
                result.new_tokens += len(new) + ended
                result.accepted[: min(taken[row], len(new) + ended)] += 1  # what is cut off was not taken
            if not (ended or len(mine) >= max_new_tokens or (finished and finished(mine))):
                kept.append(row)
        if not kept:
            return result
        length_B = length_B + taken_B + 1
        x_BQ = next_B[:, None]
        if drafts:
            states_MBD = states_KBQD[1:, rows, taken_B]
            draft_BM, proposal_BMV = decoder.propose(states_MBD, uniform_BM)
            x_BQ = torch.cat([x_BQ, draft_BM], 1)
        if len(kept) < len(numbers):
            keep = torch.tensor(kept, device=device)
            numbers, lengths = [numbers[row] for row in kept], [lengths[row] for row in kept]
            decoder.cache.keep_rows(keep)
            length_B, x_BQ, draft_BM, rows = length_B[keep], x_BQ[keep], draft_BM[keep], rows[: len(kept)]
            proposal_BMV = None if proposal_BMV is None else proposal_BMV[keep]
        states_KBQD = decoder.states(x_BQ, length_B - 1, min(lengths) - 1, max(lengths) - 1)
        result.forwards += 1
