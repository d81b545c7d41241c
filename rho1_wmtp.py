"""Rho-1 for multi-token prediction: weights from a reference model, high where the loss exceeds the reference's.

Selective language modeling (Lin et al. 2024, https://arxiv.org/abs/2404.07965) scores each token by its excess loss over a
reference model that was trained on clean text (eq. 3), and trains on the tokens of highest score: what can be learnt and is
not yet known. Noise has a high loss under both models, and what is known a low one, so both score low. Here the score also
gives graded weights, and a token has one weight, whichever of the H heads predicts it (Gloeckle et al. 2024,
https://arxiv.org/abs/2404.19737):

    s[j] = CE_1[j] - CE_ref[j]                                     eq. 3: same token, same prefix, no gradient
    u    = N softmax(s / temperature), clipped, mean 1             --mode weighted
    u[j] = 1/(1 - ratio) if s[j] is among the highest, else 0      --mode token_skip, eq. 4 and 5
    w    = lambda + (1 - lambda) u
    L    = 1/N * sum_t sum_k  m[t,k] * w[t+k] * CE[t,k]

    symbol   variable       meaning
    CE[t,k]  loss_KBT       cross entropy (nats) of head k at position t for the token k places on; 0 where m = 0
    CE_ref   ref_KBT        the same of the reference (K = 1 unless --score-heads each)
    s, u     score_N, u_N   of the valid targets of a micro-step, over all ranks together
    m[t,k]   targets_KBT    IGNORE where m = 0: prompt, padding, past the end of the row or of the document
    w[j]     weight_KBT     weight of token j, whichever head predicts it; mean 1 over the valid targets of head 1
    lambda   --lambda       1 is baseline_mtp.py to the last bit, 0 the bare algorithm
    ratio    --skip-ratio   share left out by token_skip: 0.3 in the paper's 7B runs, 0.4 in its 1B runs
    N        num_valid      valid targets of head 1 in the update, over all ranks and accumulation steps

Deviations from the paper:
  1. --mode weighted keeps every token, with graded weights; the paper's selection, token_skip, is the default.
  2. The score is head 1's: a next-token reference sees x[<t+k] and head k x[<=t] alone, so their losses differ by more than
     noise. --score-heads each gives head k its own excess over head k of a reference that has as many heads.
  3. Reference losses are computed once for a data set and kept in a file; --ref-online computes them in the step.

Commands (the reference must have seen neither the held-out nor, where noise is the question, the training documents):
  laptop      python baseline_mtp.py --data stdlib:b --num-heads 1 --run-dir runs/reference
              python rho1_wmtp.py --data stdlib:a --noise-frac 0.3 --ref-model runs/reference
  graded      python rho1_wmtp.py --data stdlib:a --noise-frac 0.3 --ref-model runs/reference --mode weighted
  one GPU     python rho1_wmtp.py --model Qwen/Qwen2.5-0.5B --ref-model my-finetuned-qwen --data my.jsonl --lr 1e-5 ...
  eight GPUs  torchrun --nproc-per-node 8 rho1_wmtp.py --model Qwen/Qwen2.5-7B --ref-model my-finetuned-qwen --lr 1e-5 ...
Results: README.md
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import manual  # noqa: F401 -- first: answers --help without torch
import numpy as np
import torch
import tyro

from common import IGNORE, UsageError, active_heads, build_model, clip_gradients, rank_share, run_script, save_model
from common import set_gradient_sync, setup_ranks, shard
from checkpoints import Checkpoints
from data import batch_sizes, heldout_batches, load_batch, load_data, micro_batches
from reference import Reference
from runs import MetricsFile, Progress, StopSignal, Tracker, command_line, end_run, evaluate_heldout, make_optimizer, open_run
from runs import area, record_run, report, write_whole

# Shapes: B sequences, T positions, K heads, R ranks, N valid targets of a head in a micro-step, over all ranks together, in
# the order rank, row, position: the same order on any number of ranks.


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
    data: str = "stdlib"
    """stdlib (stdlib:a, stdlib:b: halves of it), mbpp, a file or URL (.jsonl .json .parquet .csv or text), or a hub name."""
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
    lambda_: Annotated[float | None, tyro.conf.arg(name="lambda")] = None
    """Strength of regularisation toward equal weights, 0 to 1; None: 0.3, or 0 where --mode leaves tokens out."""
    temperature: float = 0.7
    """Of the softmax of --mode weighted, nats; small: few tokens take all the weight."""
    epsilon: float = 0.05
    """Least weight of --mode weighted, before regularisation."""
    max_weight: float = 3.0
    """Largest weight of --mode weighted, before regularisation."""
    ref_model: str = ""
    """Reference: a run folder, its model/, or a Hugging Face causal LM, with the tokenizer of this run."""
    mode: Literal["weighted", "token_skip"] = "token_skip"
    """weighted: softmax of the scores. token_skip: the lowest scores are left out, the others weigh the same."""
    skip_ratio: float = 0.3
    """Share of the valid tokens that token_skip leaves out, from 0 to below 1."""
    score: Literal["excess", "abs", "reference", "loss"] = "excess"
    """excess: loss - reference loss. Ablations: its absolute value; minus the reference loss alone; the loss alone."""
    score_heads: Literal["first", "each"] = "first"
    """first: all heads weigh a token by head 1's score. each: by their own; needs a reference with as many heads."""
    min_excess: float = 0.0
    """A score nearer to zero than this (nats) counts as zero."""
    control: Literal["none", "shuffle", "random"] = "none"
    """Weights that know nothing: permuted among the valid tokens, or drawn from them with replacement."""
    ref_online: bool = False
    """Compute the reference losses in every step instead of once into a file."""

    def __post_init__(self):
        at_least_0 = ("seed", "lr", "weight_decay", "grad_clip", "warmup_steps", "eval_every", "save_every", "keep_last")
        for name, least in (dict.fromkeys(at_least_0, 0) | {"max_steps": 1}).items():
            if not least <= getattr(self, name) < 2**63:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}, below 2^63")
        if self.lambda_ is None:
            self.lambda_ = 0.3 if self.mode == "weighted" else 0.0
        limits = dict(lambda_=(0, 1), temperature=(1e-6, 1e6), epsilon=(0, 1), max_weight=(1, 1e9), min_excess=(0, 1e9))
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                flag = name.rstrip("_").replace("_", "-")
                raise UsageError(f"--{flag} {getattr(self, name)}: from {least:g} to {most:g}")
        if not 0 <= self.skip_ratio < 1:
            raise UsageError(f"--skip-ratio {self.skip_ratio}: at least 0, below 1 (0.3 leaves out 30 % of the tokens)")
        if not self.ref_model:
            first = "python baseline_mtp.py --data stdlib:b --num-heads 1 --run-dir runs/reference"
            then = "python rho1_wmtp.py --data stdlib:a --ref-model runs/reference"
            raise UsageError(f"--ref-model: names no reference; on the built-in data make one by `{first}`, then `{then}`")


# ------------------------------------------------------------------------------------------------------------- algorithm
def token_scores(loss_N, ref_N, args):
    """Score of every target, nats: by default the excess loss over the reference, signed (2404.07965, eq. 3)."""
    excess_N = loss_N - ref_N
    score_N = {"excess": excess_N, "abs": excess_N.abs(), "reference": -ref_N, "loss": loss_N}[args.score]
    return torch.where(score_N.abs() < args.min_excess, 0.0, score_N)


def select(score_N, skip_ratio):
    """True for all but the round(ratio N) lowest scores (2404.07965, eq. 5); of equal scores the first stay, one at least."""
    num_kept = max(1, len(score_N) - round(skip_ratio * len(score_N)))
    kept_N = torch.zeros_like(score_N, dtype=torch.bool)
    kept_N[score_N.sort(descending=True, stable=True).indices[:num_kept]] = True
    return kept_N


def weights_of_scores(score_N, key, args):
    """Weights u of the valid targets of a micro-step, mean 1: a softmax, clipped, or a selection; or a control of either."""
    if args.mode == "token_skip":
        u_N = select(score_N, args.skip_ratio).float()
    else:
        u_N = (torch.softmax(score_N / args.temperature, 0) * len(score_N)).clamp(args.epsilon, args.max_weight)
    u_N = u_N / u_N.mean()
    if args.control != "none" and len(u_N) > 0:
        random, N = np.random.default_rng(key), len(u_N)
        drawn = random.permutation(N) if args.control == "shuffle" else random.integers(0, N, N)
        u_N = u_N[torch.from_numpy(drawn).to(u_N.device)]
        if args.control == "random":
            u_N = u_N / u_N.mean() if u_N.any() else torch.ones_like(u_N)
    return u_N


def target_weights(loss_KBT, ref_KBT, batch, key, args, ranks):
    """Weight of every target of this rank, `[K, B, T]`, and what `rho1_metrics` needs of head 1's targets of all ranks.

    The losses of all ranks are gathered, and each computes all weights: so they are the same on any number of ranks, and a
    shard may have no target. Nothing here has a gradient. `key` seeds the controls.
    """
    scored = len(ref_KBT)  # heads that have a score of their own: 1, or all
    noise_KBT = weights_of_targets(batch.is_noise_BT.float(), scored)
    valid_KBT = (batch.targets_KBT[:scored] != IGNORE).float()
    parts_RCKBT = ranks.gather(torch.stack([loss_KBT[:scored].detach(), ref_KBT, noise_KBT, valid_KBT]))
    weight_RKBT = torch.ones_like(parts_RCKBT[:, 0])
    for k in reversed(range(scored)):
        valid_RBT = parts_RCKBT[:, 3, k] > 0
        loss_N, ref_N, noise_N = parts_RCKBT[:, :3, k].transpose(0, 1)[:, valid_RBT]
        score_N = token_scores(loss_N, ref_N, args)
        u_N = weights_of_scores(score_N, (*key, k), args)
        weight_N = 1 + (1 - args.lambda_) * (u_N - 1)  # lambda + (1 - lambda) u, and exactly 1 where u is
        weight_RKBT[:, k][valid_RBT] = weight_N
    weight_KBT = weight_RKBT[ranks.rank]
    if args.score_heads == "first":
        weight_BT = torch.ones_like(weight_KBT[0])
        weight_BT[:, 1:] = weight_KBT[0, :, :-1]  # head 1's target at t is token t+1
        weight_KBT = weights_of_targets(weight_BT, len(loss_KBT))
    return weight_KBT, torch.stack([score_N, weight_N, (u_N > 0).float(), loss_N, ref_N, noise_N])


def noise_auc(score_N, noise_N):
    """Probability that a noise token scores lower than a clean one, ties counted half: exact area under the curve."""
    return area(score_N, noise_N == 0)


def rho1_metrics(told, args):
    """What README defines under `rho1/` and `weights/on_..`, over head 1's targets of the whole update."""
    score_N, weight_N, kept_N, loss_N, ref_N, noise_N = torch.cat(told, 1).cpu().double()
    if len(score_N) == 0:
        return {}
    metrics = {"rho1/excess_mean": (loss_N - ref_N).mean().item(), "rho1/kept_frac": kept_N.mean().item()}
    now_N, untrained_N = (select(s, args.skip_ratio) for s in (score_N, -ref_N))
    metrics |= {"rho1/overlap_untrained": ((now_N & untrained_N).sum() / now_N.sum()).item()}
    if 0 < noise_N.sum() < len(noise_N):
        on_noise, on_clean = weight_N[noise_N > 0].mean().item(), weight_N[noise_N == 0].mean().item()
        metrics |= {"weights/on_noise": on_noise, "weights/on_clean": on_clean, "rho1/noise_auc": noise_auc(score_N, noise_N)}
    return metrics


@torch.no_grad()
def write_sample(model, reference, data, run_dir, args, ranks):
    """Leave `weights.json`: ids of up to 3 held-out rows and the weight of each token (null: no target) among them all."""
    batch = load_batch(data.heldout, np.arange(min(3, len(data.heldout))), args.num_heads, ranks.device)
    model.eval()
    with ranks.autocast():
        loss_KBT = model(batch.x_BT, batch.targets_KBT)
    alone = replace(ranks, rank=0, world_size=1)  # every rank has the same rows
    key, sample = (args.seed, args.max_steps, 0), []
    weight_BT = target_weights(loss_KBT, reference(batch, "heldout"), batch, key, args, alone)[0][0]
    for row, ids, weights, targets in zip(batch.rows_B, batch.x_BT.tolist(), weight_BT.tolist(), batch.targets_KBT[0].tolist()):
        weight = [None] + [None if target == IGNORE else w for w, target in zip(weights[:-1], targets)]
        sample.append({"row": int(row), "ids": ids, "weight": weight})
    if ranks.rank == 0:
        write_whole(run_dir / "weights.json", json.dumps(sample))


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
    data = load_data(args.data, tokenizer, args.seq_len, args.seed, args.noise_frac, ranks)
    if len(data.train) < args.batch_size:
        held = f"{len(data.train)} rows of --seq-len {args.seq_len} tokens"
        raise UsageError(f"--batch-size {args.batch_size}: --data {args.data} has {held} for training, fewer than one batch")
    reference = Reference(args, model, tokenizer, data, ranks)  # ALGO LOGIC: refused, if it must be, before anything is written
    run = record_run(run_dir, args, script, data, ranks)
    run |= {"reference_fingerprint": reference.fingerprint}  # ALGO LOGIC: a resumed run goes on with the same one
    reference.prepare(data)  # ALGO LOGIC: its losses, computed once
    parameters = sum(p.numel() for p in model.parameters())
    model = shard(model.to(ranks.device), ranks)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    tokens = args.batch_size * args.seq_len
    ranks.say(f"model     {args.model}, {parameters / 1e6:.2f} M parameters, {args.num_heads} head(s)")
    ranks.say(f"memory    {rank_share(model, optimizer, ranks)}")
    ranks.say(f"data      {args.data}, {len(data.train):,} rows of {args.seq_len} tokens, {len(data.heldout):,} held out")
    ranks.say(f"batch     {args.batch_size} rows = {ranks.world_size} rank(s) x {micro_batch_size} x {accumulation} accumulation")
    ranks.say(f"run       {args.max_steps:,} updates, {args.max_steps * args.batch_size / len(data.train):.2f} epochs")

    # Resume: a killed run goes on where its last checkpoint was taken, and ends as if it had never stopped
    folder = f"{args.checkpoint_dir}/{run_dir.name}" if args.checkpoint_dir else run_dir / "checkpoints"
    checkpoints = Checkpoints(folder, run, args.keep_last, ranks)
    start, size = checkpoints.load(model, optimizer)
    metrics_file = MetricsFile(run_dir / "metrics.jsonl", size, ranks)
    tracker = Tracker(args.tracker, run_dir, args, ranks)
    progress = Progress(start, args.max_steps, ranks)
    signals, stopping = StopSignal(), False

    # Loop: it comes round once more than there are updates, so that nothing of it has to be written again at the end
    ranks.patience(minutes=10)  # the ranks go in step
    model.train()
    for step in range(start, args.max_steps + 1):
        last = step == args.max_steps
        due = args.save_every and step % args.save_every == 0
        if step > start and (last or stopping or due):  # first, as evaluation may fail
            checkpoints.save(step, model, optimizer, metrics_file.saved())
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
        batches = micro_batches(data.train, args.batch_size, micro_batch_size, args.seed, step, num_heads, ranks)
        count_K = ranks.gather(sum((batch.targets_KBT != IGNORE).sum((1, 2)) for batch in batches)).sum(0)
        num_valid = count_K[0].clamp(min=1)
        sums = []
        told = []  # ALGO LOGIC: of all micro-steps, for the log
        for number, batch in enumerate(batches, start=1):
            set_gradient_sync(model, number == len(batches))
            with ranks.autocast():
                loss_KBT = model(batch.x_BT, batch.targets_KBT)
            ref_KBT = reference(batch)  # ALGO LOGIC: of the same tokens in the same context
            key = (args.seed, step, number)  # ALGO LOGIC: of the controls
            weight_KBT, told_6N = target_weights(loss_KBT, ref_KBT, batch, key, args, ranks)  # ALGO LOGIC: from excess loss
            told.append(told_6N)  # ALGO LOGIC
            objective = (weight_KBT * loss_KBT).sum() / num_valid
            objective.backward()
            weights = weight_KBT[0] * (batch.targets_KBT[0] != IGNORE)
            stop = objective.new_full((), bool(signals.name))  # goes round with the figures: all ranks stop at the same update
            figures = [stop, objective, weights.sum(), weights.square().sum(), weights.max(), *loss_KBT.sum((1, 2))]
            sums.append(torch.stack(figures).detach())
        grad_norm = clip_gradients(model, args.grad_clip)

        # Figures of the update, exact over all ranks and micro-steps; what is not finite never reaches the weights
        gathered = ranks.gather(torch.stack(sums)).cpu().double()  # [ranks, accumulation, 5 + K]
        stopping, objective, weight, weight_squared, _, *loss_K = gathered.sum((0, 1)).tolist()
        loss_K = [loss / max(1, count) for loss, count in zip(loss_K, count_K.tolist())]
        if not all(map(math.isfinite, (*loss_K, objective, grad_norm))):
            broken = [f"loss of head {k}" for k, loss in enumerate(loss_K, start=1) if not math.isfinite(loss)] or ["gradient"]
            checkpoints.wait()
            ranks.say(f"stopped   update {step + 1}: {', '.join(broken)} not finite; nothing was stepped, checkpoints are whole")
            tracker.finish([run_dir / "args.json", run_dir / "metrics.jsonl"], status="FAILED")
            raise SystemExit(1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        told = rho1_metrics(told, args)  # ALGO LOGIC

        seconds, valid = time.perf_counter() - began, max(1, count_K[0].item())
        ess_frac = weight**2 / max(weight_squared, 1e-12) / valid
        metrics = {"train/loss": objective} | {f"train/loss_head_{k}": loss for k, loss in enumerate(loss_K, 1) if count_K[k - 1]}
        metrics |= {"weights/mean": weight / valid, "weights/max": gathered[..., 4].max().item(), "weights/ess_frac": ess_frac}
        metrics = metrics if count_K[0] else {}  # no target, no figure
        metrics |= {"train/grad_norm": grad_norm, "train/lr": learning_rate(step, args), "perf/tokens_per_s": tokens / seconds}
        metrics |= told  # ALGO LOGIC
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
    write_sample(model, reference, data, run_dir, args, ranks)  # ALGO LOGIC: what the weights look like
    save_model(model, tokenizer, run_dir / "model", ranks)
    shown_by = tracker.finish([run_dir / "args.json", run_dir / "metrics.jsonl"])
    other = command_line(script, args, num_heads=1 if args.num_heads > 1 else 4)
    report(run_dir, args, data, heldout, shown_by, other, ranks)
    end_run(run_dir, ranks)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
