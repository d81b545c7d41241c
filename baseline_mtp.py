"""Multi-token prediction (MTP): the control in which every token weighs the same.

H heads on one trunk predict the next H tokens at once (Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737, eq. 2):

    L = 1/N * sum_t sum_k  m[t,k] * w[t+k] * CE[t,k]          with w = 1

    symbol   variable       meaning
    CE[t,k]  loss_KBT       cross entropy (nats) of head k at position t for the token k places on; 0 where m = 0
    m[t,k]   targets_KBT    IGNORE where m = 0: prompt, padding, past the end of the row or of the document
    w[j]     weight_BT      weight of token j, whichever head predicts it; mean 1 over the valid targets of head 1
    N        num_valid      valid targets of head 1 in the update, over all ranks and accumulation steps
    H        --num-heads    1 is plain next-token training

Each head is one transformer layer on the output of the trunk; norm and unembedding are shared. Head 1 is the model's own
last layer, so trunk and head 1 are a plain Hugging Face model and are saved as one.

Deviations from the paper:
  1. One joint forward and backward instead of one head after the other: the unembedding runs over tiles of tokens and
     vocabulary; logits that one tile cannot hold are made again in the backward (README has the table).
  2. From a pretrained model, heads 2..H are added as copies of the last layer; nothing is taken away (table S6).
  3. Targets do not cross the end of a document.

Commands:
  laptop      python baseline_mtp.py
  one GPU     python baseline_mtp.py --model Qwen/Qwen2.5-0.5B --data my.jsonl --seq-len 1024 --batch-size 32 --lr 1e-5
  eight GPUs  torchrun --nproc-per-node 8 baseline_mtp.py --model Qwen/Qwen2.5-7B --data my.jsonl --lr 1e-5 --batch-size 256 ...
Results: README.md
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import manual  # noqa: F401 -- first: answers --help without torch
import torch

from common import IGNORE, UsageError, active_heads, build_model, clip_gradients, rank_share, run_script, save_model
from common import set_gradient_sync, setup_ranks, shard
from checkpoints import Checkpoints
from data import batch_sizes, heldout_batches, load_data, micro_batches
from runs import MetricsFile, Progress, StopSignal, Tracker, command_line, end_run, evaluate_heldout, make_optimizer, open_run
from runs import record_run, report

# Shapes: B sequences, T positions, K heads. weight_BT holds a weight for every token of x_BT.


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

    # Algorithm specific arguments: none

    def __post_init__(self):
        at_least_0 = ("seed", "lr", "weight_decay", "grad_clip", "warmup_steps", "eval_every", "save_every", "keep_last")
        for name, least in (dict.fromkeys(at_least_0, 0) | {"max_steps": 1}).items():
            if not least <= getattr(self, name) < 2**63:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}, below 2^63")


# ------------------------------------------------------------------------------------------------------------- algorithm
def token_weights(x_BT):
    """Weight of every token, `[B, T]`: 1."""
    return torch.ones(x_BT.shape, device=x_BT.device)


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
    run = record_run(run_dir, args, script, data, ranks)
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
        for number, batch in enumerate(batches, start=1):
            set_gradient_sync(model, number == len(batches))
            with ranks.autocast():
                loss_KBT = model(batch.x_BT, batch.targets_KBT)
            weight_BT = token_weights(batch.x_BT)  # ALGO LOGIC: every token weighs 1
            weight_KBT = weights_of_targets(weight_BT, num_heads)
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

        seconds, valid = time.perf_counter() - began, max(1, count_K[0].item())
        ess_frac = weight**2 / max(weight_squared, 1e-12) / valid
        metrics = {"train/loss": objective} | {f"train/loss_head_{k}": loss for k, loss in enumerate(loss_K, 1) if count_K[k - 1]}
        metrics |= {"weights/mean": weight / valid, "weights/max": gathered[..., 4].max().item(), "weights/ess_frac": ess_frac}
        metrics = metrics if count_K[0] else {}  # no target, no figure
        metrics |= {"train/grad_norm": grad_norm, "train/lr": learning_rate(step, args), "perf/tokens_per_s": tokens / seconds}
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
    save_model(model, tokenizer, run_dir / "model", ranks)
    shown_by = tracker.finish([run_dir / "args.json", run_dir / "metrics.jsonl"])
    other = command_line(script, args, num_heads=1 if args.num_heads > 1 else 4)
    report(run_dir, args, data, heldout, shown_by, other, ranks)
    end_run(run_dir, ranks)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
