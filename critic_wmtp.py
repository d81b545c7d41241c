"""Critic for multi-token prediction: a value head finds the tokens that decide, and their advantages weigh the loss.

Stage 1 learns V[t], the probability that a completion which begins with tokens 0..t turns out correct, from records with an
outcome R. Stage 2 starts by itself and trains the heads (Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737) with more
weight on the tokens after which V has risen (advantage-weighted regression, https://arxiv.org/abs/1910.00177):

    BCE      = -R log V[t] - (1 - R) log(1 - V[t])               stage 1, mean over every prefix of every completion
    delta[t] = gamma V[t] - V[t-1];  at the last token R - V[t-1]    token t is the action taken at t-1
    A[t]     = sum_l (gamma gae_lambda)^l delta[t+l]               GAE, https://arxiv.org/abs/1506.02438, eq. 16
    s        = (A - mean) / deviation                              both moving over updates, of the targets of head 1
    u        = N softmax(s / temperature), clipped, mean 1         exp(s / temperature) up to a factor
    w        = lambda + (1 - lambda) u
    L        = 1/N * sum_t sum_k  m[t,k] * w[t+k] * CE[t,k]        stage 2, plus --value-coef times BCE

    symbol   variable       meaning
    V[t]     logit_BT       before the sigmoid; of the prefix that ends with token t
    R        reward_B       outcome, 0 to 1; above 0.5 the record is correct
    A, s, u  advantage_N .. of the valid targets of head 1 in a micro-step, over all ranks together
    CE[t,k]  loss_KBT       cross entropy (nats) of head k at position t for the token k places on; 0 where m = 0
    m[t,k]   targets_KBT    IGNORE where m = 0: prompt, padding, past the end of the row, and wrong records (--train-on correct)
    w[j]     weight_BT      weight of token j, whichever head predicts it; mean 1 over the valid targets of head 1
    lambda   --lambda       1 is baseline_mtp.py to the last bit, 0 the bare algorithm
    N        num_valid      valid targets of head 1 in the update, over all ranks and accumulation steps

Deviations: the data are given, not sampled from the policy; advantages are whitened, weights clipped. V itself is in value.py.

Commands:
  laptop      python critic_wmtp.py
  one GPU     python critic_wmtp.py --model Qwen/Qwen2.5-0.5B --data my.jsonl --seq-len 1024 --batch-size 32 --lr 1e-5 ...
  eight GPUs  torchrun --nproc-per-node 8 critic_wmtp.py --model Qwen/Qwen2.5-7B --data my.jsonl --reward-model my-judge ...
"""

import functools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import manual  # noqa: F401 -- first: answers --help without torch
import numpy as np
import torch
import torch.nn.functional as F
import tyro

from common import IGNORE, UsageError, active_heads, build_model, clip_gradients, rank_share, run_script, save_model
from common import set_gradient_sync, setup_ranks, shard
from checkpoints import Checkpoints
from data import batch_rows, batch_sizes, heldout_batches, load_batch, load_data, micro_batches
from outcomes import check_outcomes, partners
from runs import MetricsFile, Progress, StopSignal, Tracker, command_line, end_run, evaluate_heldout, make_optimizer, open_run
from runs import record_run, report
from value import Critic, judge_value, load_value, pair_loss, prefixes, save_value, write_sample

# Shapes: B sequences, T positions, K heads, D width, R ranks, N valid targets of head 1 in a micro-step, over all ranks.


@dataclass
class Args:
    # Run
    run_dir: str = ""
    """Folder of the run; empty: runs/<script>-s<seed>-<hash of the arguments>. Start again to resume."""
    seed: int = 0
    """Fixes initial weights, order of the data, held-out documents and noise."""
    tracker: Literal["mlflow", "wandb", "none"] = "mlflow"
    """mlflow: a SQLite file beside the run folders. wandb: offline where no key is set."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, then Metal, then the CPU."""

    # Model
    model: str = "tiny"
    """tiny or a config.json (from scratch), a Hugging Face or Meta checkpoint (folder or hub name), or a run folder."""
    num_heads: int = 4
    """Heads H: how many next tokens are predicted at once. 1 is plain next-token training."""
    mtp_schedule: Literal["constant", "forward", "reverse"] = "forward"
    """Heads trained: all; 1, 2, .. H in equal parts of the run; or H, .. 2, 1 (arXiv 2505.22757)."""

    # Data
    data: str = "stdlib-bugs"  # ALGO LOGIC: records with outcomes
    """stdlib-bugs; a file, URL or hub name with prompt, completion and reward, or in the layout of ConDefects or CodeContests."""
    seq_len: int = 256
    """Tokens a row."""
    noise_frac: float = 0.0
    """Share of the training lines replaced by random characters, from 0 to 1; held-out text stays clean."""

    # Optimisation
    batch_size: int = 4
    """Rows an update, over all ranks and accumulation steps."""
    micro_batch_size: int = 0
    """Rows a rank runs through the model at once; 0: batch size / ranks, no accumulation."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 40
    """Updates of linear warm-up; a cosine to zero follows."""
    max_steps: int = 1750
    """Updates in all."""
    weight_decay: float = 0.1
    """Decay of matrices; vectors have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: off."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the products; auto: bf16 where the device is faster in it. Master weights are fp32."""
    compile: bool = False
    """Run the model through torch.compile."""
    recompute: Literal["none", "heads", "all"] = "none"
    """Layers that keep no activations and run again in the backward: less memory, more time."""

    # Evaluation and checkpoints
    eval_every: int = 0
    """Updates between evaluations on the held-out documents; 0: at the end alone."""
    save_every: int = 500
    """Updates between checkpoints; 0: at the end alone."""
    keep_last: int = 2
    """Checkpoints to keep; 0: all."""
    checkpoint_dir: str = ""
    """Folder for checkpoints, in a subfolder named as the run's; empty: checkpoints/ in the run folder."""

    # Algorithm specific arguments
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.3
    """Strength of regularisation toward equal weights, 0 to 1."""
    temperature: float = 0.7
    """Of the softmax of the whitened advantages; small: few tokens take all the weight."""
    epsilon: float = 0.05
    """Least weight, before regularisation."""
    max_weight: float = 3.0
    """Largest weight, before regularisation."""
    gamma: float = 1.0
    """Discount of the value of the next prefix."""
    gae_lambda: float = 0.95
    """0: credit by the next value alone. 1: by the outcome, less the value before the token."""
    value: Literal["separate", "frozen", "shared"] = "separate"
    """V stands on a copy of the trunk; on the policy's, without gradient; or on it with gradient and without stage 1."""
    value_steps: int = 500
    """Updates of stage 1."""
    value_batches: int = 2
    """Batches of --batch-size rows in an update of stage 1: small ones teach V nothing."""
    value_lr: float = 1e-3
    """Peak learning rate of stage 1; 0: that of --lr."""
    value_coef: float = 0.1
    """Share of the value loss in stage 2, which keeps V fitted while the trunk moves; separate stays as it is."""
    pair_coef: float = 1.0
    """Share in stage 1 of the loss of pairs; then every row comes with a sibling of the other outcome beside it. 0: alone."""
    value_head: str = ""
    """File value_head.safetensors of another run: no stage 1."""
    reward_model: str = ""
    """Hugging Face sequence classifier that scores the records without reward."""
    train_on: Literal["correct", "all"] = "correct"
    """Records whose tokens are targets; wrong ones train V in either case."""
    condition_on_outcome: bool = False
    """Every prompt begins with a line that says the outcome; needs --lambda 1 --train-on all, has no V."""
    control: Literal["none", "shuffle", "random"] = "none"
    """Weights that know nothing: permuted inside of each completion, or drawn from all with replacement."""

    def __post_init__(self):
        at_least_0 = ("seed", "lr", "weight_decay", "grad_clip", "warmup_steps", "eval_every", "save_every", "keep_last")
        for name, least in (dict.fromkeys(at_least_0, 0) | {"max_steps": 1}).items():
            if not least <= getattr(self, name) < 2**63:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}, below 2^63")
        limits = dict.fromkeys(("lambda_", "epsilon", "gamma", "gae_lambda"), (0, 1))
        limits |= dict(temperature=(1e-6, 1e6), value_batches=(1, 1e9))
        limits |= dict.fromkeys(("value_steps", "value_lr", "value_coef", "pair_coef"), (0, 1e9)) | dict(max_weight=(1, 1e9))
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"--{name.rstrip('_').replace('_', '-')} {getattr(self, name)}: from {least:g} to {most:g}")
        if self.condition_on_outcome and (self.lambda_ < 1 or self.train_on == "correct"):
            raise UsageError("--condition-on-outcome: it would tell V the outcome, so use no weights: --lambda 1 --train-on all")
        if self.value == "shared" and self.value_coef == 0 and self.lambda_ < 1:
            raise UsageError("--value-coef 0: --value shared learns by it alone; above 0")


# ------------------------------------------------------------------------------------------------------------- algorithm
def value_loss(logit_BT, batch, share_B=1):
    """Sum over all prefixes of all completions, the empty and the whole ones too, of the cross entropy of V and outcome, nats."""
    loss_BT = F.binary_cross_entropy_with_logits(logit_BT, batch.reward_B[:, None].expand_as(logit_BT), reduction="none")
    return ((loss_BT * prefixes(batch)).sum(1) * share_B).sum()


def advantages(value_BT, reward_B, completion_BT, gamma, gae_lambda):
    """GAE (1506.02438, eq. 16) of every token of the completions, `[B, T]`; 0 elsewhere and at position 0, never a target."""
    last_BT = completion_BT & ~F.pad(completion_BT[:, 1:], (0, 1))
    delta_BT = torch.where(last_BT, reward_B[:, None], gamma * value_BT)
    delta_BT[:, 1:] -= value_BT[:, :-1]
    action_BT = completion_BT & (torch.arange(value_BT.shape[1], device=value_BT.device) > 0)
    delta_BT = delta_BT * action_BT
    advantage_BT, shift = delta_BT, 1
    while shift < value_BT.shape[1]:  # after each turn the sum runs over twice as many tokens
        advantage_BT = advantage_BT + (gamma * gae_lambda) ** shift * F.pad(advantage_BT[:, shift:], (0, shift))
        shift *= 2
    return advantage_BT * action_BT


def whiten(advantage_N, moments, decay=0.99):
    """Scores: advantages less their moving mean, over their moving deviation; `moments` takes this micro-step in first."""
    if len(advantage_N) > 0:
        moments[:2] = decay * moments[:2] + (1 - decay) * torch.stack([torch.ones_like(moments[0]), advantage_N.mean()])
        moments[2] = decay * moments[2] + (1 - decay) * (advantage_N - moments[1] / moments[0]).square().mean()
    return (advantage_N - moments[1] / moments[0]) / ((moments[2] / moments[0]).sqrt() + 1e-4)


def weights_of_scores(score_N, row_N, key, args):
    """Weights u of the valid targets of a micro-step, mean 1: a softmax, clipped; or a control."""
    u_N = (torch.softmax(score_N / args.temperature, 0) * len(score_N)).clamp(args.epsilon, args.max_weight)
    if args.control != "none" and len(u_N) > 0:
        random, N = np.random.default_rng(key), len(u_N)
        drawn = np.lexsort((random.random(N), row_N.cpu())) if args.control == "shuffle" else random.integers(0, N, N)
        u_N = u_N[torch.from_numpy(drawn).to(u_N.device)]
    return u_N / u_N.mean()


@torch.no_grad()
def token_weights(logit_BT, batch, moments, key, args, ranks):
    """Weight of every token of this rank, `[B, T]`, from V and among the targets of all ranks; 1 where head 1 has none."""
    advantage_BT = advantages(logit_BT.sigmoid(), batch.reward_B, batch.completion_BT, args.gamma, args.gae_lambda)
    valid_BT = F.pad(batch.targets_KBT[0, :, :-1] != IGNORE, (1, 0))
    advantage_RBT, valid_RBT = ranks.gather(torch.stack([advantage_BT, valid_BT.float()])).unbind(1)
    valid_RBT, weight_RBT = valid_RBT > 0, torch.ones_like(advantage_RBT)
    row_N = valid_RBT.flatten(0, 1).nonzero()[:, 0]
    u_N = weights_of_scores(whiten(advantage_RBT[valid_RBT], moments), row_N, key, args)
    weight_RBT[valid_RBT] = 1 + (1 - args.lambda_) * (u_N - 1)  # lambda + (1 - lambda) u, and exactly 1 where u is
    return weight_RBT[ranks.rank]


def weights_of_targets(weight_BT, num_heads):
    """`weight_KBT[k-1, b, t] = weight_BT[b, t+k]`: a token has one weight, whichever head predicts it; 0 past the row."""
    weight_KBT = weight_BT.new_zeros(num_heads, *weight_BT.shape)
    for k in range(1, num_heads + 1):
        weight_KBT[k - 1, :, :-k] = weight_BT[:, k:]
    return weight_KBT


def learning_rate(step, args):
    """Linear warm-up to the peak, then a cosine to zero; `step` counts updates from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    part = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * part))


# --------------------------------------------------------------------------------------------------------------- stage 1
def train_value(critic, optimizer, data, tokenizer, run, folder, run_dir, micro_batch_size, args, ranks):
    """Train V with checkpoints of its own, as `main` trains the policy; returns the size of metrics.jsonl and how good V is."""
    checkpoints = Checkpoints(f"{folder}/value", run, args.keep_last, ranks)
    start, size = checkpoints.load(critic, optimizer)
    metrics_file = MetricsFile(run_dir / "metrics.jsonl", size, ranks)
    num_steps = 0 if args.value == "shared" or args.value_head or args.condition_on_outcome else args.value_steps
    progress, signals, stopping = Progress(start, num_steps, ranks), StopSignal(), False
    copies, rows = 2 if args.pair_coef else 1, args.batch_size * args.value_batches
    partner_N, share_N = partners(data.train, copies)
    plan = replace(args, max_steps=max(1, num_steps), lr=args.value_lr or args.lr)
    ranks.patience(minutes=10)
    critic.train()
    for step in range(start, num_steps + 1):
        if step > start and (step == num_steps or stopping or (args.save_every and step % args.save_every == 0)):
            checkpoints.save(step, critic, optimizer, metrics_file.saved())
        if stopping:  # after the last update too: stage 2 is still to come
            saved = checkpoints.wait()
            kept = "saved; the same command goes on" if saved else "not saved"
            progress.say(f"stopped   {signals.name or 'another rank'} after update {step} of {num_steps} of stage 1, {kept}")
            end_run(run_dir, ranks)
            raise SystemExit(0 if saved else 1)
        if step == num_steps:
            break
        torch.manual_seed(hash((args.seed, -1 - step, ranks.rank)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        numbers = batch_rows(len(data.train), rows, 2**32 + args.seed, step)  # in another order than in stage 2
        numbers = np.stack([numbers, partner_N[numbers]], 1)[:, :copies].reshape(-1, ranks.world_size, micro_batch_size * copies)
        batches = [load_batch(data.train, part, 1, ranks.device) for part in numbers[:, ranks.rank]]
        shares = [torch.from_numpy(share_N[batch.rows_B]).to(ranks.device) for batch in batches]
        num_prefixes = ranks.gather(sum((prefixes(batch).sum(1) * share).sum() for batch, share in zip(batches, shares))).sum()
        total = 0.0
        for number, (batch, share_B) in enumerate(zip(batches, shares), start=1):
            set_gradient_sync(critic.value, number == len(batches))
            with ranks.autocast():
                logit_BT = critic.logits(batch, run_policy=True)
            pairs = pair_loss(logit_BT, batch) / rows if args.pair_coef else 0
            loss = value_loss(logit_BT, batch, share_B) / num_prefixes + args.pair_coef * pairs
            loss.backward()
            total += loss.detach()
        grad_norm = clip_gradients(critic.value, args.grad_clip)
        total, stopping = ranks.gather(torch.stack([total, total.new_full((), bool(signals.name))])).sum(0).tolist()
        if not math.isfinite(total + grad_norm):
            checkpoints.wait()
            ranks.say(f"stopped   update {step + 1} of stage 1: loss or gradient not finite; nothing was stepped")
            raise SystemExit(1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics_file.write(step + 1, {"value/loss": total, "value/lr": optimizer.param_groups[0]["lr"]})
        progress.show(step + 1, f"value loss {total:.4f}")
    progress.bar.close()
    checkpoints.wait()
    signals.restore()
    judged = {}
    if num_steps or args.value_head:
        judged = judge_value(critic, data, tokenizer, micro_batch_size, ranks, metrics_file, num_steps, "value")
        save_value(critic.value, run_dir / "value_head.safetensors", args.value, ranks)
    return metrics_file.size(), judged


# ------------------------------------------------------------------------------------------------------------------ main
def main(args):
    # Setup: the run folder first, so that a finished run says so at once
    script = Path(__file__).stem
    ranks = setup_ranks(args.device, args.dtype)
    micro_batch_size, accumulation = batch_sizes(args.batch_size, args.micro_batch_size, ranks.world_size)
    run_dir, finished = open_run(args, script, ranks)
    if finished:
        return ranks.say(f"finished  {run_dir} holds a finished run of these arguments; nothing to do")

    # Model and data: the same initial weights on every rank
    torch.manual_seed(args.seed)
    model, tokenizer = build_model(args.model, args.num_heads, args.seq_len, args.recompute)
    critic = Critic(model, args)  # ALGO LOGIC: V, drawn after the policy
    outcomes = (args.reward_model, args.condition_on_outcome)  # ALGO LOGIC
    data = load_data(args.data, tokenizer, args.seq_len, args.seed, args.noise_frac, ranks, *outcomes)  # ALGO LOGIC
    check_outcomes(data, args.data)  # ALGO LOGIC: refused, if it must be, before anything is written
    if len(data.train) < args.batch_size:
        held = f"{len(data.train)} rows of --seq-len {args.seq_len} tokens"
        raise UsageError(f"--batch-size {args.batch_size}: --data {args.data} has {held} for training, fewer than one batch")
    given = load_value(critic.value, args.value_head, args.value)  # ALGO LOGIC: likewise; and a resumed run goes on with it
    run = record_run(run_dir, args, script, data, ranks) | given  # ALGO LOGIC
    parameters = sum(p.numel() for p in model.parameters())
    model = shard(model.to(ranks.device), ranks)
    shard(critic.to(ranks.device).value, ranks)  # ALGO LOGIC: beside it, with a forward of its own
    if args.compile:
        model.compile()
    optimizer = make_optimizer(critic, args.lr, args.weight_decay)  # ALGO LOGIC: policy and value
    tokens = args.batch_size * args.seq_len
    ranks.say(f"model     {args.model}, {parameters / 1e6:.2f} M parameters, {args.num_heads} head(s)")
    ranks.say(f"memory    {rank_share(critic, optimizer, ranks)}")  # ALGO LOGIC
    ranks.say(f"data      {args.data}, {len(data.train):,} rows of {args.seq_len} tokens, {len(data.heldout):,} held out")
    ranks.say(f"batch     {args.batch_size} rows = {ranks.world_size} rank(s) x {micro_batch_size} x {accumulation} accumulation")
    ranks.say(f"run       {args.max_steps:,} updates, {args.max_steps * args.batch_size / len(data.train):.2f} epochs")

    # Resume: a killed run goes on where its last checkpoint was taken, and ends as if it had never stopped
    folder = f"{args.checkpoint_dir}/{run_dir.name}" if args.checkpoint_dir else run_dir / "checkpoints"
    checkpoints = Checkpoints(folder, run, args.keep_last, ranks)
    start, size = checkpoints.load(critic, optimizer)  # ALGO LOGIC
    stage_1 = (critic, optimizer, data, tokenizer, run, folder, run_dir, micro_batch_size, args, ranks)  # ALGO LOGIC
    size, judged = train_value(*stage_1) if start == 0 else (size, {})  # ALGO LOGIC: it has checkpoints of its own
    metrics_file = MetricsFile(run_dir / "metrics.jsonl", size, ranks)
    tracker = Tracker(args.tracker, run_dir, args, ranks)
    tracker.log(start, judged)  # ALGO LOGIC
    progress = Progress(start, args.max_steps, ranks)
    signals, stopping = StopSignal(), False

    # Loop: it comes round once more than there are updates, so that nothing of it has to be written again at the end
    value_coef = args.value_coef * (args.value != "separate" and not args.condition_on_outcome)  # ALGO LOGIC: tags tell R
    ranks.patience(minutes=10)  # the ranks go in step
    model.train()
    for step in range(start, args.max_steps + 1):
        last = step == args.max_steps
        due = args.save_every and step % args.save_every == 0
        if step > start and (last or stopping or due):  # first, as evaluation may fail
            checkpoints.save(step, critic, optimizer, metrics_file.saved())  # ALGO LOGIC
            tracker.send()
        if stopping and not last:
            saved = checkpoints.wait()
            kept, place = ("saved", "there") if saved else ("not saved", "the one before")
            how = f"{kept}; the same command goes on from {place}"
            progress.say(f"stopped   {signals.name or 'another rank'} after update {step} of {args.max_steps}, {how}")
            tracker.finish([run_dir / "args.json", run_dir / "metrics.jsonl"], status="KILLED")
            end_run(run_dir, ranks)
            raise SystemExit(0 if saved else 1)
        if step > 0 and (last or (args.eval_every and step % args.eval_every == 0)):
            batches = heldout_batches(data, micro_batch_size, args.num_heads, ranks)
            heldout = evaluate_heldout(model, batches, data, args.num_heads, ranks)
            metrics_file.write(step, heldout)
            tracker.log(step, heldout)
            losses = " ".join(f"{heldout[f'eval/loss_head_{k + 1}']:.3f}" for k in range(args.num_heads))
            progress.say(f"held-out after {step} updates | heads {losses} | {heldout['eval/bits_per_byte']:.3f} bits per byte")
        if last:
            break

        # One update: targets are counted over all ranks and micro-steps before the first backward
        began = time.perf_counter()
        torch.manual_seed(hash((args.seed, step, ranks.rank)))  # dropout, where a model has it: no generator to save
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        num_heads = active_heads(args.mtp_schedule, step, args.max_steps, args.num_heads)
        take = functools.partial(micro_batches, train_on=args.train_on)  # ALGO LOGIC: wrong records have no targets, or all have
        batches = take(data.train, args.batch_size, micro_batch_size, args.seed, step, num_heads, ranks)  # ALGO LOGIC
        num_prefixes = ranks.gather(sum(prefixes(batch).sum() for batch in batches)).sum()  # ALGO LOGIC
        count_K = ranks.gather(sum((batch.targets_KBT != IGNORE).sum((1, 2)) for batch in batches)).sum(0)
        num_valid = count_K[0].clamp(min=1)
        sums = []
        for number, batch in enumerate(batches, start=1):
            set_gradient_sync(model, number == len(batches))
            set_gradient_sync(critic.value, number == len(batches))  # ALGO LOGIC
            with ranks.autocast():
                loss_KBT = model(batch.x_BT, batch.targets_KBT)
                with torch.set_grad_enabled(value_coef > 0):  # ALGO LOGIC
                    logit_BT = critic.logits(batch, run_policy=False)  # ALGO LOGIC: on the trunk's output of the line above
            weight_BT = token_weights(logit_BT, batch, critic.moments, (args.seed, step, number), args, ranks)  # ALGO LOGIC
            weight_KBT = weights_of_targets(weight_BT, num_heads)
            objective = (weight_KBT * loss_KBT).sum() / num_valid
            auxiliary = value_coef * value_loss(logit_BT, batch) / num_prefixes  # ALGO LOGIC
            (objective + auxiliary).backward()  # ALGO LOGIC
            weights = weight_KBT[0] * (batch.targets_KBT[0] != IGNORE)
            stop = objective.new_full((), bool(signals.name))  # goes round with the figures: all ranks stop at the same update
            figures = [stop, objective, weights.sum(), weights.square().sum(), weights.max(), *loss_KBT.sum((1, 2))]
            sums.append(torch.stack([*figures, auxiliary]).detach())  # ALGO LOGIC
        grad_norm = clip_gradients(model, args.grad_clip)
        grad_norms = grad_norm, clip_gradients(critic.value, args.grad_clip)  # ALGO LOGIC: apart, V must not scale the policy's

        # Figures of the update, exact over all ranks and micro-steps; what is not finite never reaches the weights
        gathered = ranks.gather(torch.stack(sums)).cpu().double()  # [ranks, accumulation, 5 + K]
        stopping, objective, weight, weight_squared, _, *loss_K, auxiliary = gathered.sum((0, 1)).tolist()  # ALGO LOGIC
        loss_K = [loss / max(1, count) for loss, count in zip(loss_K, count_K.tolist())]
        if not all(map(math.isfinite, (*loss_K, objective, *grad_norms))):  # ALGO LOGIC
            broken = [f"loss of head {k}" for k, loss in enumerate(loss_K, start=1) if not math.isfinite(loss)] or ["gradient"]
            checkpoints.wait()
            ranks.say(f"stopped   update {step + 1}: {', '.join(broken)} not finite; nothing was stepped, checkpoints are whole")
            tracker.finish([run_dir / "args.json", run_dir / "metrics.jsonl"], status="FAILED")
            raise SystemExit(1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds, valid = time.perf_counter() - began, max(1, count_K[0].item())
        ess_frac = weight**2 / max(weight_squared, 1e-12) / valid
        metrics = {"train/loss": objective} | {f"train/loss_head_{k}": loss for k, loss in enumerate(loss_K, 1) if count_K[k - 1]}
        metrics |= {"weights/mean": weight / valid, "weights/max": gathered[..., 4].max().item(), "weights/ess_frac": ess_frac}
        metrics = metrics if count_K[0] else {}  # no target, no figure
        metrics |= {"train/grad_norm": grad_norm, "train/lr": learning_rate(step, args), "perf/tokens_per_s": tokens / seconds}
        metrics |= {"train/value_loss": auxiliary / value_coef} if value_coef > 0 else {}  # ALGO LOGIC
        metrics_file.write(step + 1, metrics)
        tracker.log(step + 1, metrics)
        heads = " ".join(f"{loss:.3f}" for loss in loss_K)
        figures = f"loss {objective:.4f} | heads {heads} | ess {ess_frac:.2f} | gnorm {grad_norm:.2f}"
        progress.show(step + 1, f"{figures} | {tokens / seconds:,.0f} tok/s")
    progress.bar.close()

    # End: the model as others read it, then what was reached and where it lies
    ranks.patience(minutes=120)  # rank 0 reports alone
    signals.restore()
    checkpoints.wait()
    if value_coef > 0:  # ALGO LOGIC: V after stage 2
        judged = judge_value(critic, data, tokenizer, micro_batch_size, ranks, metrics_file, step, "value_end")  # ALGO LOGIC
        tracker.log(step, judged)  # ALGO LOGIC
        save_value(critic.value, run_dir / "value_head.safetensors", args.value, ranks)  # ALGO LOGIC
    write_sample(critic, token_weights, data, run_dir, args, ranks)  # ALGO LOGIC: what the weights look like
    save_model(model, tokenizer, run_dir / "model", ranks)
    shown_by = tracker.finish([run_dir / "args.json", run_dir / "metrics.jsonl"])
    other = command_line(script, args, num_heads=1 if args.num_heads > 1 else 4)
    report(run_dir, args, data, heldout, shown_by, other, ranks)
    end_run(run_dir, ranks)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
