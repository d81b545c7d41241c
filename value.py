"""The value function of `critic_wmtp.py`: the module, its file, and how well it tells outcomes and finds faults.

Shapes: B batch, T positions, D width, N held-out rows.
"""

import collections
import copy
import hashlib
import json
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from common import IGNORE, UsageError, first_line
from data import encode, heldout_batches, load_batch
from outcomes import CORRECT, completion_lengths
from runs import area, write_whole


class Evidence(nn.Module):
    """What each token says of the outcome, `[B, T]`: from the trunk's state there, and from embeddings of the last 2, 3, 4 and 6
    tokens by their hash (as in the Byte Latent Transformer, arXiv 2412.09871, section 3.2.1), which a small trunk learns late.
    """

    SPANS, BUCKETS, WIDTH = (2, 3, 4, 6), 2**14, 16

    def __init__(self, width):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 1)
        self.spans = nn.ModuleList([nn.Embedding(self.BUCKETS, self.WIDTH) for _ in self.SPANS])
        self.mix = nn.Linear(self.WIDTH * len(self.SPANS), width)
        for table in self.spans:
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.outer.weight)  # V = 1/2 before it has learnt
        nn.init.zeros_(self.outer.bias)

    def forward(self, x_BT, trunk_BTD):
        embedded, hash_BT = [], torch.zeros_like(x_BT)
        for back in range(max(self.SPANS)):
            hash_BT = (hash_BT * 1_000_003 + F.pad(x_BT, (back, 0))[:, : x_BT.shape[1]] + 1) % (2**31 - 1)
            if back + 1 in self.SPANS:
                embedded.append(self.spans[len(embedded)](hash_BT % self.BUCKETS))
        states_BTD = self.norm(trunk_BTD + self.mix(torch.cat(embedded, -1)))
        return self.outer(F.gelu(self.inner(states_BTD))).float().squeeze(-1)


class Value(nn.Module):
    """Logit of V for every prefix, `[B, T]`, on the output of the policy's trunk or of a copy of that trunk.

    A running sum of evidence, by Bayes' rule: with a token the log odds of the outcome change by the logarithm of how much
    likelier that token is under the one outcome than under the other, given what stands before.
    """

    def __init__(self, policy, separate):
        super().__init__()
        self.trunk = copy.deepcopy(policy.causal_lm.model) if separate else None
        if separate:
            self.trunk.layers, self.trunk.norm = self.trunk.layers[:-1], nn.Identity()
        head = Evidence(policy.causal_lm.config.hidden_size)
        self.heads = nn.ModuleDict({"layers": nn.ModuleList([head])})  # `shard` looks for it here

    @property
    def trunk_layers(self):
        return self.trunk.layers if self.trunk is not None else []

    def forward(self, x_BT, trunk_BTD, prefix_BT):
        if self.trunk is not None:
            trunk_BTD = self.trunk(input_ids=x_BT, use_cache=False).last_hidden_state
        return (self.heads.layers[0](x_BT, trunk_BTD) * prefix_BT).cumsum(1)


class Critic(nn.Module):
    """Policy, value and moving moments of the advantages: all that a checkpoint holds."""

    def __init__(self, policy, args):
        super().__init__()
        self.policy, self.value = policy, Value(policy, args.value == "separate")
        self.moments = nn.Parameter(torch.zeros(3), requires_grad=False)  # sums of decayed weights, means, squared deviations
        self.into_trunk = args.value == "shared" and args.lambda_ < 1  # --lambda 1 leaves the policy to the baseline
        self.trunk_BTD = None
        policy.heads.register_forward_pre_hook(self.keep)

    def keep(self, heads, inputs):
        self.trunk_BTD = inputs[0]  # what the policy's trunk gave, so that V costs no second pass

    def logits(self, batch, run_policy):
        """Logit of V, `[B, T]`; on the policy's trunk it needs its pass of the same tokens just before, or `run_policy`."""
        if run_policy and self.value.trunk is None:
            with torch.no_grad():
                self.policy(batch.x_BT, batch.targets_KBT[:1])
        state_BTD = self.trunk_BTD if self.into_trunk or self.trunk_BTD is None else self.trunk_BTD.detach()
        return self.value(batch.x_BT, state_BTD, prefixes(batch))


def prefixes(batch):
    """True at the last token of every prefix, `[B, T]`."""
    return batch.completion_BT | F.pad(batch.completion_BT[:, 1:], (0, 1))


def pair_loss(logit_BT, batch):
    """Sum over the siblings in rows 2i and 2i+1 of -log sigmoid of the difference of their mean logits, the correct one first.

    Means over all prefixes: those that siblings share cancel, so what counts is V from the first difference on.
    """
    prefix_BT = prefixes(batch)
    mean_B = (logit_BT * prefix_BT).sum(1) / prefix_BT.sum(1).clamp(min=1)
    sign = (batch.reward_B[0::2] - batch.reward_B[1::2]).sign()
    return (F.softplus(-sign * (mean_B[0::2] - mean_B[1::2])) * (sign != 0)).sum()


def save_value(value, file, kind, ranks):
    """Write the head, and the trunk where it has its own, as one safetensors file that is whole or not there."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(value, options=options) if ranks.world_size > 1 else value.state_dict()
    if ranks.rank == 0:
        temporary = file.with_suffix(".tmp")
        save_file({key: v.detach().cpu().contiguous() for key, v in full.items()}, temporary, metadata={"value": kind})
        temporary.replace(file)
    ranks.barrier()


def load_value(value, file, kind):
    """Read what `save_value` wrote, if `file` names any; returns its fingerprint, which a resumed run must find again.

    Raises:
        UsageError: no such file, or not of this kind of value or of this model.
    """
    if not file:
        return {}
    try:
        with safe_open(file, "pt") as opened:
            there = (opened.metadata() or {}).get("value")
        if there != kind:
            raise UsageError(f"--value-head {file}: holds a value of --value {there}, not {kind}")
        value.load_state_dict(load_file(file))
        with open(file, "rb") as opened:
            return {"value_fingerprint": hashlib.file_digest(opened, "sha256").hexdigest()[:16]}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"--value-head {file}: cannot be read into this model ({first_line(error)})") from None


@torch.no_grad()
def judge_value(critic, data, tokenizer, micro_batch_size, ranks, metrics_file, step, name):
    """`judge` on all held-out rows, printed, written and returned as `<name>/..` where there is a figure.

    One plain warning where V knows no more than a constant or the position.
    """
    critic.eval()
    values = []
    for batch in heldout_batches(data, micro_batch_size, 1, ranks):
        with ranks.autocast():
            logit_BT = critic.logits(batch, run_policy=True)
        values.append(ranks.gather(logit_BT.sigmoid()).flatten(0, 1).cpu())
    critic.train()
    found = judge(torch.cat(values)[: len(data.heldout)].double().numpy(), data, tokenizer)
    ends = f"AUC at the end {found['auc']:.3f} (constant 0.500, position alone {found['auc_position']:.3f})"
    ranks.say(f"value     held-out: {ends}, siblings in order {found['pairs']:.3f}")  # nan: none
    if "fault_token" in found:
        parts = (f"in the fault {found['fault_token']:.3f} (chance {found['fault_token_chance']:.3f})",
                 f"on its line {found['fault_line']:.3f} (chance {found['fault_line_chance']:.3f})")  # fmt: skip
        ranks.say(f"value     largest drop {', '.join(parts)}")
    if not found["auc"] > max(0.5, found["auc_position"]):
        ranks.say("warning   V tells the outcome no better than the position or a constant: weights from it are noise")
    metrics = {f"{name}/{key}": figure for key, figure in found.items() if figure == figure}
    metrics_file.write(step, metrics)
    return metrics


@torch.no_grad()
def write_sample(critic, token_weights, data, run_dir, args, ranks):
    """Leave `weights.json`: ids, weights (null: no target) and V (null: no prefix) of up to 3 correct held-out rows."""
    numbers = np.flatnonzero(data.heldout[:]["reward"] > CORRECT)[:3]
    batch = load_batch(data.heldout, numbers, args.num_heads, ranks.device)
    critic.eval()
    with ranks.autocast():
        logit_BT = critic.logits(batch, run_policy=True)
    alone = replace(ranks, rank=0, world_size=1)  # every rank has the same rows
    weight_BT = token_weights(logit_BT, batch, critic.moments.clone(), (args.seed, args.max_steps, 0), args, alone)
    valid_BT, sample = F.pad(batch.targets_KBT[0, :, :-1] != IGNORE, (1, 0)), []
    for i, row in enumerate(numbers.tolist()):
        weight = torch.where(valid_BT[i], weight_BT[i], torch.nan).tolist()
        value = torch.where(prefixes(batch)[i], logit_BT[i].sigmoid(), torch.nan).tolist()
        weight, value = ([None if v != v else v for v in values] for values in (weight, value))
        sample.append({"row": row, "ids": batch.x_BT[i].tolist(), "weight": weight, "value": value})
    if ranks.rank == 0:
        write_whole(run_dir / "weights.json", json.dumps(sample))


# -------------------------------------------------------------------------------------------------------------- judgement
def judge(value_NT, data, tokenizer):
    """How well V of every prefix of the held-out rows tells their outcome, beside predictors that know less.

    `auc`: area under the curve of V after the last token, for correct against wrong records (a constant has 0.5).
    `auc_position`: of the mean reward of the training completions of about this length (20 bins), all that a position tells.
    `pairs`: share of (correct, wrong) siblings whose V at the end is in order, ties half.
    `fault_token`, `fault_line`: of the wrong records whose fault is known, the share where the token at which V drops most lies
    in the fault, or on its lines; `fault_token_chance`, `fault_line_chance`: the same for a token drawn at random.
    """
    columns, records = data.heldout[:], data.heldout_records
    is_target_NT, reward_N = columns["is_target"], columns["reward"]
    correct_N, length_N = reward_N > CORRECT, is_target_NT.sum(1)
    last_N = is_target_NT.shape[1] - 1 - is_target_NT[:, ::-1].argmax(1)
    end_N = value_NT[np.arange(len(last_N)), last_N]
    train_N = completion_lengths(data.train)
    edges = np.unique(np.quantile(train_N, np.linspace(0, 1, 21)[1:-1]))
    bins = np.searchsorted(edges, train_N)
    sums, counts = (np.bincount(bins, weights, len(edges) + 1) for weights in (data.train["reward"][:], None))
    mean_reward = sums / np.maximum(1, counts)
    figures = {"auc": area(end_N, correct_N), "auc_position": area(mean_reward[np.searchsorted(edges, length_N)], correct_N)}
    of = collections.defaultdict(lambda: ([], []))
    for sibling, correct, value in zip(columns["sibling"].tolist(), correct_N, end_N):
        of[sibling][int(correct)].append(value)
    ordered = [(r > w) + (r == w) / 2 for wrong, right in of.values() for r in right for w in wrong]
    figures["pairs"] = float(np.mean(ordered)) if ordered else float("nan")
    found = collections.defaultdict(list)
    for row in np.flatnonzero(~correct_N):
        fault = fault_tokens(records[row], tokenizer, int(length_N[row]))
        if fault is None:
            continue
        places = np.flatnonzero(is_target_NT[row])
        drop = value_NT[row, places] - value_NT[row, places - 1]
        drop[places == 0] = np.inf  # nothing stands before it
        for name, inside in zip(("fault_token", "fault_line"), fault):
            found[name].append(inside[drop.argmin()])
            found[f"{name}_chance"].append(inside.mean())
    return figures | {name: float(np.mean(values)) for name, values in found.items()}


def fault_tokens(record, tokenizer, length):
    """Which of the `length` tokens of a completion lie in its fault, and which on its lines; None if that is not known."""
    start, end, text = record["fault_start"], record["fault_end"], record["completion"]
    if start < 0:
        return None
    line_start, line_end = text.rfind("\n", 0, start) + 1, text.find("\n", end - 1) % (len(text) + 1)
    at = np.arange(len(text))
    try:
        inside = [encode(tokenizer, [text], False, [flags.astype(np.int32)])[0][1].astype(bool)
                  for flags in ((at >= start) & (at < end), (at >= line_start) & (at <= line_end))]  # fmt: skip
    except UsageError:  # a tokenizer that does not tell where its tokens lie
        return None
    return [np.append(flags, np.zeros(max(0, length - len(flags)), bool))[:length] for flags in inside]  # the end of sequence
