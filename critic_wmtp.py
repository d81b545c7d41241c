"""Critic for multi-token prediction: a value head finds the tokens that decide, and weighs them.

Stage 1 learns V[t], the probability that a completion which begins with tokens 0..t turns out
correct, from records with an outcome R. Stage 2 follows by itself. It trains the heads (2404.19737)
on the correct records (or on all), with less weight on tokens at which V falls:

    BCE      = -R log V[t] - (1 - R) log(1 - V[t])      stage 1, mean over prefixes; and pairs
    s[j]     = z[j+2] - z[j-3], less its mean over the record     --weights window; z = log odds V
    s[j]     = sum_l gae_lambda^l (V[j+l] - V[j+l-1])             --weights advantage (1506.02438)
    u[j]     = clip(exp(strength s' / 0.7), epsilon, 1) / mean    a gate: never above 1 / mean
    u[t,k]   = clip((V[t+k] / V[t])^strength, epsilon, max_weight)     --weights ratio
    w        = lambda + (1 - lambda) u
    L        = 1/N * sum_t sum_k  m[t,k] * w[t+k] * CE[t,k]    stage 2; BCE for a frozen V

By Bayes' rule p(x | prefix, correct) = p(x | prefix) V(prefix, x) / V(prefix). So with `ratio`, on
all records and at strength 1, each head's minimiser is its distribution on correct ones. Head k has
not seen the tokens between: here alone a token has a weight for each head. E[u | prefix] = 1.
--target-ess finds the strength that gives this effective share; then u of ratio has mean 1 too.

    symbol   variable       meaning
    V[t]     logit_BT       before the sigmoid; of the prefix that ends with token t
    R        reward_B       outcome, 0 to 1; above 0.5 the record is correct
    s'       score_N        s less its mean, over its deviation, both moving over updates
    CE[t,k]  loss_KBT       cross entropy (nats) of head k at position t for the token k places on
    m[t,k]   targets_KBT    IGNORE where m = 0; with --train-on correct so are wrong records
    w        weight_KBT     weight of token j, whichever head predicts it; of ratio w[t,k]
    lambda   --lambda       1 is baseline_mtp.py to the last bit on the same records, 0 u alone
    N        num_valid      valid targets of head 1 in the update, over all ranks and micro-steps

Commands:
  laptop      python critic_wmtp.py
  eight GPUs  torchrun --nproc-per-node 8 critic_wmtp.py --model Qwen/Qwen2.5-7B --data my.jsonl ...
"""

import collections
import copy
import functools
import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from common import CORRECT, IGNORE, Run, Sums, UsageError, active_heads, batch_rows, build_model
from common import check_ranges, check_run_args, clip_gradients, control_weights, count_targets
from common import describe, errors_as, full_state, heldout_batches, imitate_all, learning_rate
from common import load_batch, load_data, make_optimizer, micro_batch_rows, micro_batches
from common import run_script, set_gradient_sync, setup_ranks, shard, weights_of_ess
from common import weights_of_targets, whiten

# Shapes: B sequences, T positions, K heads, D width, R ranks, N targets of all ranks, or rows.
GATE_TEMPERATURE = 0.7  # deviations of the score by which u falls to 1/e


@dataclass
class Args:
    # Run
    run_dir: str = ""  # folder of the run; empty: runs/<script>-s<seed>-<hash>
    seed: int = 0  # fixes initial weights, order of the data, held-out documents and noise
    tracker: Literal["mlflow", "wandb", "none"] = "mlflow"
    """mlflow: a SQLite file beside the run folders. wandb: offline where no key is set."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else the CPU

    # Model
    model: str = "tiny"  # tiny, a config.json, a Hugging Face model (folder or hub name), or a run
    num_heads: int = 4  # heads H: how many next tokens are predicted at once; 1 is plain training
    mtp_schedule: Literal["constant", "forward", "reverse"] = "constant"
    """Heads trained: all; 1, 2, .. H in equal parts of the run; or H, .. 2, 1 (2505.22757)."""
    train: Literal["all", "heads"] = "all"
    """heads: heads 2..H alone; trunk and head 1 of a --model with weights stay as they are."""

    # Data
    data: str = "stdlib-bugs"  # or a file, folder or hub name with prompt, completion, reward
    heldout_data: str = ""  # held-out documents, named as --data; empty: a part of --data
    seq_len: int = 256  # tokens a row
    noise_frac: float = 0.0  # share of the training text replaced by random characters
    noise_by: Literal["line", "byte", "document"] = "line"  # lines, characters, whole documents

    # Optimisation
    batch_size: int = 4  # rows an update, over all ranks and micro-steps
    micro_batch_size: int = 0  # rows a rank runs through the model at once; 0: batch size / ranks
    lr: float | None = None
    """Peak learning rate of AdamW; None: 3e-3 from scratch, 1e-5 for a model with weights."""
    heads_lr: float | None = None
    """That of heads 2..H; None: 1e-3 where they are added to a model with weights, else --lr."""
    warmup_steps: int = 40  # updates of linear warm-up; a cosine to zero follows
    max_steps: int = 1750  # updates in all
    weight_decay: float = 0.1  # decay of matrices; vectors have none
    grad_clip: float = 1.0  # largest norm of the gradient; 0: off
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the products; auto: bf16 on a GPU that has it, else fp32. Master weights are fp32."""
    compile: bool = False  # run the model through torch.compile
    recompute: Literal["none", "heads", "all"] = "none"
    """Layers that run again in the backward: less memory, more time."""

    # Evaluation and checkpoints
    eval_every: int = 0  # updates between evaluations on the held-out documents; 0: only at the end
    eval_rows: int = 0  # held-out rows in an evaluation, evenly spaced; 0: all
    save_every: int = 500  # updates between checkpoints; 0: only at the end
    keep_last: int = 2  # checkpoints to keep; 0: all
    checkpoint_dir: str = ""  # folder or URL of checkpoints; empty: checkpoints/ in the run folder

    # Algorithm specific arguments
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.0  # share of equal weights, 0 to 1
    weights: Literal["ratio", "window", "advantage"] = "ratio"  # of V; by log odds; by GAE
    strength: float | None = None  # exponent of u; None: 8 for the ratio, 1 for the others; 0: none
    target_ess: float | None = None  # effective share of tokens of u, in the place of --strength
    epsilon: float = 0.05  # least u, before the division by the mean
    max_weight: float = 3.0  # largest u of the ratio
    gae_lambda: float = 0.95  # of the advantage; 0: a token's own step of V; 1: of all that follow
    value: Literal["separate", "frozen"] = "separate"  # trunk under V: a copy, or the policy's
    value_steps: int = 500  # updates of stage 1
    value_batches: int = 2  # batches of --batch-size rows in an update of stage 1
    value_lr: float = 1e-3  # peak learning rate of stage 1; 0: --lr
    value_coef: float = 0.1  # share in stage 2 of the loss of a frozen V, with --train-on all
    pair_coef: float = 1.0  # share in stage 1 of the loss of pairs of both outcomes; 0: no pairs
    value_head: str = ""  # file value_head.safetensors of another run, instead of stage 1
    reward_model: str = ""  # Hugging Face sequence classifier that scores records without a reward
    train_on: Literal["correct", "all"] = "correct"  # records to imitate; V learns from all
    control: Literal["none", "shuffle", "random"] = "none"  # u permuted in a record, drawn anew

    def __post_init__(self):
        check_run_args(self)
        if None not in (self.strength, self.target_ess):
            raise UsageError("--strength, --target-ess: give one of the two")
        if self.strength is None and self.target_ess is None:
            self.strength = 8.0 if self.weights == "ratio" else 1.0
        check_ranges(self, lambda_=(0, 1), epsilon=(0, 1), gae_lambda=(0, 1), max_weight=(1, 1e9))
        check_ranges(self, target_ess=(0.001, 1))
        names = "strength value_steps value_lr value_coef pair_coef"
        check_ranges(self, value_batches=(1, 1e9), **dict.fromkeys(names.split(), (0, 1e9)))


# ------------------------------------------------------------------------------------- algorithm
def value_loss(logit_BT, batch, share_B=1):
    """Sum of the cross entropy (nats) of V and outcome over all prefixes of all completions."""
    reward_BT = batch.reward_B[:, None].expand_as(logit_BT)
    loss_BT = F.binary_cross_entropy_with_logits(logit_BT, reward_BT, reduction="none")
    return ((loss_BT * prefixes(batch)).sum(1) * share_B).sum()


def pair_loss(logit_BT, batch):
    """Sum over the siblings in rows 2i and 2i+1 of -log sigmoid(mean logit right - wrong).

    Prefixes that both have cancel in the means: V counts from the first difference on.
    """
    prefix_BT = prefixes(batch)
    mean_B = (logit_BT * prefix_BT).sum(1) / prefix_BT.sum(1).clamp(min=1)
    sign = (batch.reward_B[0::2] - batch.reward_B[1::2]).sign()
    return (F.softplus(-sign * (mean_B[0::2] - mean_B[1::2])) * (sign != 0)).sum()


def prefixes(batch):
    """True at the last token of every prefix, the empty and the whole completion too, `[B, T]`."""
    return batch.completion_BT | F.pad(batch.completion_BT[:, 1:], (0, 1))


def window_scores(logit_BT, target_BT, reach=2):
    """`z[j+2] - z[j-3]` of every target j, less its mean over the record, `[B, T]`.

    The steps of z at the token and at `reach` to each side, as far as the completion goes.
    """
    step_BT = torch.diff(logit_BT, prepend=logit_BT[:, :1]) * target_BT
    window_BT = F.pad(step_BT, (reach, reach)).unfold(1, 2 * reach + 1, 1).sum(-1)
    count_B = target_BT.sum(1).clamp(min=1)
    return window_BT - ((window_BT * target_BT).sum(1) / count_B)[:, None]


def advantages(value_BT, reward_B, target_BT, gae_lambda):
    """GAE (1506.02438, eq. 16, gamma 1) of every target, `[B, T]`.

    The outcome's step, `R - V[T-1]`, is the advantage of the last token and enters no other.
    """
    delta_BT = torch.diff(value_BT, prepend=value_BT[:, :1])
    is_last_BT = target_BT & ~F.pad(target_BT[:, 1:], (0, 1))
    position_T = torch.arange(value_BT.shape[1], device=value_BT.device)
    distance_TT = (position_T[:, None] - position_T).clamp(min=0)  # from column to row
    share_TT = (gae_lambda ** distance_TT.to(value_BT.dtype)).tril()
    advantage_BT = (delta_BT * (target_BT & ~is_last_BT)) @ share_TT
    outcome_BT = reward_B[:, None] - F.pad(value_BT[:, :-1], (1, 0))
    return torch.where(is_last_BT, outcome_BT, advantage_BT)


@torch.no_grad()
def token_weights(batch, logit_BT, moments, key, args, ranks):
    """Weight of every head's targets, `[K, B, T]`; a token's own but for the ratio."""
    valid_KBT = batch.targets_KBT != IGNORE
    if args.weights == "ratio":
        log_value_BT, weights = F.logsigmoid(logit_BT), []
        for k, valid_BT in enumerate(valid_KBT, start=1):
            score_BT = F.pad(log_value_BT[:, k:], (0, k)) - log_value_BT
            weights.append(weigh(score_BT, valid_BT, moments, (*key, k), args, ranks))
        return torch.stack(weights)
    target_BT = F.pad(valid_KBT[0, :, :-1], (1, 0))
    if args.weights == "window":
        score_BT = window_scores(logit_BT, target_BT)
    else:
        value_BT = logit_BT.sigmoid()
        score_BT = advantages(value_BT, batch.reward_B, target_BT, args.gae_lambda)
    weight_BT = weigh(score_BT, target_BT, moments, key, args, ranks)
    return weights_of_targets(weight_BT, len(valid_KBT))


def weigh(score_BT, valid_BT, moments, key, args, ranks):
    """Weights by score where `valid_BT`, else 1, `[B, T]`; the same on any number of ranks."""
    gathered_R2BT = ranks.gather(torch.stack([score_BT, valid_BT.float()]))
    score_RBT, valid_RBT = gathered_R2BT[:, 0], gathered_R2BT[:, 1] > 0
    score_N, row_N = score_RBT[valid_RBT], valid_RBT.flatten(0, 1).nonzero()[:, 0]
    most = args.max_weight if args.weights == "ratio" else 1  # no outlier takes from the others
    if args.weights != "ratio":
        score_N = whiten(score_N, moments) / GATE_TEMPERATURE

    def power(strength):
        return (strength * score_N).exp().clamp(args.epsilon, most)

    u_N = weights_of_ess(power, args.target_ess) if args.target_ess else power(args.strength)
    if args.target_ess or args.weights != "ratio":
        u_N = u_N / u_N.mean()
    u_N = control_weights(u_N, args.control, key, row_N)
    weight_RBT = torch.ones_like(score_RBT)
    weight_RBT[valid_RBT] = 1 + (1 - args.lambda_) * (u_N - 1)  # lambda + (1 - lambda) u
    return weight_RBT[ranks.rank]


# ----------------------------------------------------------------------------------------- value
class Value(nn.Module):
    """Logit of V for every prefix, `[B, T]`: a running sum of evidence.

    By Bayes' rule a token adds the logarithm of how much likelier it is under the one outcome. It
    is read from the trunk and from hashes of the last 2 to 6 tokens (2412.09871, section 3.2.1).
    """

    SPANS, BUCKETS, WIDTH = (2, 3, 4, 6), 2**14, 16

    def __init__(self, policy, separate):
        super().__init__()
        self.trunk, width = None, policy.causal_lm.config.hidden_size
        if separate:
            self.trunk = copy.deepcopy(policy.causal_lm.model).requires_grad_(True)
            self.trunk.layers, self.trunk.norm = self.trunk.layers[:-1], nn.Identity()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)
        self.outer = nn.Linear(width, 1)
        self.spans = nn.ModuleList([nn.Embedding(self.BUCKETS, self.WIDTH) for _ in self.SPANS])
        self.mix = nn.Linear(self.WIDTH * len(self.SPANS), width)
        for table in self.spans:
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.outer.weight)  # V is 1/2 at the start
        nn.init.zeros_(self.outer.bias)

    @property
    def layers(self):
        return self.trunk.layers if self.trunk is not None else []

    def forward(self, x_BT, trunk_BTD, prefix_BT):
        if self.trunk is not None:
            trunk_BTD = self.trunk(input_ids=x_BT, use_cache=False).last_hidden_state
        embedded, hash_BT = [], torch.zeros_like(x_BT)
        for back in range(max(self.SPANS)):
            earlier_BT = F.pad(x_BT, (back, 0))[:, : x_BT.shape[1]]
            hash_BT = (hash_BT * 1_000_003 + earlier_BT + 1) % (2**31 - 1)
            if back + 1 in self.SPANS:
                embedded.append(self.spans[len(embedded)](hash_BT % self.BUCKETS))
        states_BTD = self.norm(trunk_BTD + self.mix(torch.cat(embedded, -1)))
        evidence_BT = self.outer(F.gelu(self.inner(states_BTD))).float().squeeze(-1)
        logit_BT = (evidence_BT * prefix_BT).cumsum(1)
        first_B1 = prefix_BT.int().argmax(1, keepdim=True)  # inside the prompt V is that of its end
        is_before_BT = torch.arange(x_BT.shape[1], device=x_BT.device) < first_B1
        return torch.where(is_before_BT, logit_BT.gather(1, first_B1), logit_BT)


class Critic(nn.Module):
    """Policy, value (`--value-head` is read) and moving moments of the scores."""

    def __init__(self, policy, args, ranks):
        super().__init__()
        self.policy, self.value = policy, Value(policy, args.value == "separate")
        # Decayed sums of ones, of the scores' means, and of their squared deviations:
        self.moments = nn.Parameter(torch.zeros(3, device=ranks.device), requires_grad=True)
        self.is_used, self.value_coef = args.lambda_ < 1, 0.0
        if args.value == "frozen" and args.train_on == "all" and self.is_used:
            self.value_coef = args.value_coef  # V follows the trunk through stage 2
        self.trunk_BTD, self.ranks, self.fingerprint = None, ranks, ""
        if args.value_head:
            with errors_as(f"--value-head {args.value_head}: no --value {args.value} of this run"):
                self.value.load_state_dict(load_file(args.value_head))
            self.fingerprint = hashlib.sha256(Path(args.value_head).read_bytes()).hexdigest()
        policy.heads.register_forward_pre_hook(self.keep)
        shard(self.value.to(ranks.device), ranks)

    def keep(self, heads, inputs):
        self.trunk_BTD = inputs[0].detach()  # the trunk's output in the policy's last pass

    def logits(self, batch, run_policy=False):
        """Logit of V, `[B, T]`; without `run_policy` the policy's last pass was of this batch."""
        if not (run_policy or self.is_used):
            return torch.zeros(batch.x_BT.shape, device=batch.x_BT.device)
        has_gradient = torch.is_grad_enabled() and (run_policy or self.value_coef > 0)
        with self.ranks.autocast(), torch.set_grad_enabled(has_gradient):
            if run_policy and self.value.trunk is None:
                with torch.no_grad():
                    self.policy(batch.x_BT, batch.targets_KBT[:1])
            return self.value(batch.x_BT, self.trunk_BTD, prefixes(batch))

    def metrics(self, sums, grad_clip):
        """Figures of V where it trains in stage 2; its gradient is clipped by itself."""
        if self.value_coef == 0:
            return {}
        loss = sums.total["auxiliary"] / self.value_coef
        norm = clip_gradients(self.value, grad_clip)
        return {"train/value_loss": loss, "train/value_grad_norm": norm}

    def save(self, file):
        """Write V, with its trunk where it has its own, as one safetensors file."""
        full = full_state(self.value)
        if self.ranks.rank == 0:
            save_file({key: value.contiguous() for key, value in full.items()}, file)


# --------------------------------------------------------------------------------------- stage 1
def train_value(critic, optimizer, data, run, micro_batch_size, args, ranks):
    """Train V, with steps and checkpoints of its own, then judge it on the held-out rows."""
    run = run.stage("value", 0 if args.value_head or args.lambda_ == 1 else args.value_steps)
    plan = replace(args, max_steps=max(1, run.num_steps), lr=args.value_lr or args.lr)
    rows, copies = args.batch_size * args.value_batches, 2 if args.pair_coef else 1
    partner_N, share_N = partners(data.records, copies)
    start = run.resume(model=critic, optimizer=optimizer)
    critic.train()
    for step in range(start, run.num_steps + 1):
        if run.should_save(step):
            run.save(step, model=critic, optimizer=optimizer)
        if step == run.num_steps:
            break
        torch.manual_seed(hash((args.seed, 2**32 + step, ranks.rank)))
        lr = learning_rate(step, plan)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Rows in another order than in stage 2, each followed by its partner
        row_N = batch_rows(len(data.records), rows, 2**32 + args.seed, step)
        row_N = np.stack([row_N, partner_N[row_N]], 1)[:, :copies].reshape(-1)
        row_RN = row_N.reshape(-1, ranks.world_size, micro_batch_size * copies)
        batches = [load_batch(data.records, n, 1, ranks.device) for n in row_RN[:, ranks.rank]]
        shares = [torch.from_numpy(share_N[b.rows_B]).to(ranks.device) for b in batches]
        counts = [(prefixes(b).sum(1) * share).sum() for b, share in zip(batches, shares)]
        num_prefixes = ranks.sum(sum(counts))
        total = 0.0
        for number, (batch, share_B) in enumerate(zip(batches, shares), start=1):
            set_gradient_sync(critic, number == len(batches))
            logit_BT = critic.logits(batch, run_policy=True)
            pairs = pair_loss(logit_BT, batch) / rows if args.pair_coef else 0
            loss = value_loss(logit_BT, batch, share_B) / num_prefixes + args.pair_coef * pairs
            loss.backward()
            total += loss.detach()
        grad_norm = clip_gradients(critic.value, args.grad_clip)
        metrics = {"value/loss": ranks.sum(total).item(), "value/lr": lr}
        run.require_finite(step, {**metrics, "value/grad_norm": grad_norm})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step + 1, metrics)
    run.checkpoints.wait()
    if run.num_steps or args.value_head:
        run.log(step, judge_value(critic, data, micro_batch_size, ranks))
        critic.save(run.folder / "value_head.safetensors")


def partners(rows, copies):
    """For every row a sibling of the other outcome (else itself), and its share in the loss.

    With shares all rows count alike, though each comes with a partner (`copies` 2).
    """
    partner_N = np.arange(len(rows))
    for wrong, right in siblings(rows):
        for numbers, others in ((wrong, right), (right, wrong)):
            partner_N[numbers] = np.resize(others or numbers, len(numbers))  # in turn
    drawn_N = 1 + np.bincount(partner_N, minlength=len(partner_N)) * (copies - 1)
    return partner_N, (1 / drawn_N).astype(np.float32)


def siblings(rows):
    """Numbers of the wrong and of the right rows of each task: pairs of two lists."""
    tasks = collections.defaultdict(lambda: ([], []))
    for number, (sibling, reward) in enumerate(zip(rows["sibling"][:], rows["reward"][:])):
        tasks[int(sibling)][int(reward > CORRECT)].append(number)
    return tasks.values()


def load_records(args, tokenizer, ranks):
    """`load_data` of records with both outcomes; `--reward-model` scores those without a reward."""
    score = functools.partial(reward_scores, args.reward_model, ranks.device)
    data = load_data(args, tokenizer, ranks, score if args.reward_model else None)
    parts = [part for part in (data.records, data.heldout) if "reward" in part.column_names]
    outcomes = [len(np.unique(part["reward"][:] > CORRECT)) for part in parts]
    if min(outcomes, default=1) < 2:
        needed = "right and wrong records: a column reward (0 to 1), or a --reward-model"
        raise UsageError(f"--data {args.data}: V needs {needed}")
    if args.train_on == "all":
        data.train = imitate_all(data.records)
    return data


def reward_scores(name, device, prompts, completions):
    """Rewards from 0 to 1 of a Hugging Face sequence classifier, `[N]`.

    One output is a logit: sigmoid. Of two the second is the correct class: softmax. Of a text that
    is too long the end is read. A `UsageError` names a model that is no trained classifier.
    """
    flag, auto = f"--reward-model {name}", transformers.AutoModelForSequenceClassification
    with errors_as(f"{flag}: no sequence classifier"):
        model, info = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left")
    config, longest = model.config, getattr(model.config, "max_position_embeddings", None)
    if info["missing_keys"] or info["mismatched_keys"] or config.num_labels > 2:
        raise UsageError(f"{flag}: {config.num_labels} outputs; needs a trained one of 1 or 2")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    options = dict(top_k=None, batch_size=16, truncation=longest is not None, max_length=longest)
    options.update(model=model, tokenizer=tokenizer, device=device)
    classify = transformers.pipeline("text-classification", **options)
    texts = [p + c for p, c in zip(prompts, completions)]
    scores = [{score["label"]: score["score"] for score in own} for own in classify(texts)]
    return np.array([own[config.id2label[config.num_labels - 1]] for own in scores])


# ------------------------------------------------------------------------------------- judgement
@torch.no_grad()
def judge_value(critic, data, micro_batch_size, ranks):
    """`judge` on all held-out rows, printed and returned as `value/..`."""
    critic.eval()
    values = []
    for batch in heldout_batches(data.heldout, micro_batch_size, 1, ranks):
        value_BT = critic.logits(batch, run_policy=True).sigmoid()
        values.append(ranks.gather(value_BT).flatten(0, 1).cpu())
    figures = judge(torch.cat(values)[: len(data.heldout)].double().numpy(), data.heldout)
    ranks.print("value     held-out: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    if not figures["auc"] > max(0.5, figures["auc_position"]):
        ranks.print("warning   V predicts the outcome no better than the length: weights are noise")
    return {f"value/{key}": figure for key, figure in figures.items()}


def judge(value_NT, rows):
    """How well V of the prefixes of held-out rows, `[N, T]`, tells their outcome.

    `auc`: of V after the last token; `auc_position`: of the length, up or down. `pairs`: share of
    (correct, wrong) siblings that V orders right, ties half. `fault_token`: share of the wrong
    records whose largest drop of V lies in the fault; `.._chance`: of a random token.
    """
    columns = rows[:]
    is_target_NT, is_correct_N = columns["is_target"], columns["reward"] > CORRECT
    last_N = is_target_NT.shape[1] - 1 - is_target_NT[:, ::-1].argmax(1)
    end_N = value_NT[np.arange(len(last_N)), last_N]
    auc, by_length = (roc_auc_score(is_correct_N, x) for x in (end_N, is_target_NT.sum(1)))
    figures = dict(auc=float(auc), auc_position=float(max(by_length, 1 - by_length)))
    pairs = [(end_N[r], end_N[w]) for wrong, right in siblings(rows) for r in right for w in wrong]
    if pairs:
        figures["pairs"] = float(np.mean([(r > w) + (r == w) / 2 for r, w in pairs]))
    hits = []
    for row in np.flatnonzero(~is_correct_N):
        positions = 1 + np.flatnonzero(is_target_NT[row, 1:])  # no prefix before the first token
        is_fault = columns["is_noise"][row, positions]
        if is_fault.any():
            drop = value_NT[row, positions] - value_NT[row, positions - 1]
            hits.append((is_fault[drop.argmin()], is_fault.mean()))
    if hits:
        figures["fault_token"], figures["fault_token_chance"] = np.mean(hits, 0).tolist()
    return figures


# ------------------------------------------------------------------------------------------ main
def main(args):
    # Setup: the run folder comes first, so that a finished run says so at once
    ranks = setup_ranks(args.device, args.dtype)
    micro_batch_size = micro_batch_rows(args, ranks)
    run = Run(args, __file__, ranks)
    if run.finished:
        return

    # Model and data: every rank draws the same initial weights
    torch.manual_seed(args.seed)
    model, tokenizer = build_model(args.model, args.num_heads, args.seq_len, args.recompute)
    model.set_trained(args.train)
    critic = Critic(model, args, ranks)  # ALGO LOGIC: V is drawn after the policy
    data = load_records(args, tokenizer, ranks)
    describe(args, model, data, micro_batch_size, ranks)
    run.record(data, value_fingerprint=critic.fingerprint)
    model = shard(model.to(ranks.device), ranks)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(critic, args)

    # Loop: save, evaluate, update. It comes round once more than there are updates
    start = run.resume(model=critic, optimizer=optimizer)
    if start == 0:  # ALGO LOGIC: stage 1
        train_value(critic, optimizer, data, run, micro_batch_size, args, ranks)
    model.train()
    for step in range(start, args.max_steps + 1):
        if run.should_save(step):
            run.save(step, model=critic, optimizer=optimizer)  # after a stop signal it ends here
        if run.should_evaluate(step):
            heldout = run.evaluate(step, model, data, micro_batch_size)
        if step == args.max_steps:
            break

        # One update: targets are counted over all ranks and micro-steps before the first backward
        began = time.perf_counter()
        torch.manual_seed(hash((args.seed, step, ranks.rank)))  # dropout: no generator to save
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        num_heads = active_heads(args.mtp_schedule, step, args.max_steps, args.num_heads)
        batches = micro_batches(data.train, args, micro_batch_size, step, num_heads, ranks)
        num_prefixes = ranks.sum(sum(prefixes(batch).sum() for batch in batches))
        count_K = ranks.sum(count_targets(batches))
        num_valid = count_K[0].clamp(min=1)
        sums = Sums(ranks)
        for number, batch in enumerate(batches, start=1):
            set_gradient_sync(critic, number == len(batches))
            with ranks.autocast():
                loss_KBT = model(batch.x_BT, batch.targets_KBT)

            # ALGO LOGIC: V on the trunk's output of this pass; its changes give the weights
            logit_BT, key = critic.logits(batch), (args.seed, step, number)
            weight_KBT = token_weights(batch, logit_BT, critic.moments, key, args, ranks)
            weight_KBT = weight_KBT * weights_of_targets(batch.weight_BT, num_heads)
            auxiliary = critic.value_coef * value_loss(logit_BT, batch) / num_prefixes

            objective = (weight_KBT * loss_KBT).sum() / num_valid
            (objective + auxiliary).backward()
            sums.add(batch, loss_KBT, weight_KBT, objective=objective, auxiliary=auxiliary)
        grad_norm = clip_gradients(model, args.grad_clip)

        # Metrics of the update, exact over all ranks and micro-steps
        metrics = sums.metrics(count_K)
        metrics["train/grad_norm"] = grad_norm
        metrics["train/lr"] = lr
        metrics.update(critic.metrics(sums, args.grad_clip))
        run.require_finite(step, metrics)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        metrics["perf/tokens_per_s"] = args.batch_size * args.seq_len / seconds
        run.log(step + 1, metrics)
        if step + 1 == args.max_steps:
            run.write_weights(batch, F.pad(weight_KBT[0, :, :-1], (1, 0)))

    # End: the model as others read it, and the held-out figures
    run.finish(model, tokenizer, data, heldout)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
