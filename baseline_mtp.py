"""Multi-token prediction (MTP): the control, in which every token weighs the same.

H heads on one trunk predict the next H tokens at once (Gloeckle et al. 2024,
https://arxiv.org/abs/2404.19737, eq. 2):

    L = 1/N * sum_t sum_k  m[t,k] * w[t+k] * CE[t,k]     with w = 1

    symbol   variable       meaning
    CE[t,k]  loss_KBT       cross entropy (nats) of head k at position t for the token k places on
    m[t,k]   targets_KBT    IGNORE where m = 0: prompt, padding, past the end of row or document
    w[j]     weight_BT      weight of token j, whichever head predicts it; mean 1 over the targets
    N        num_valid      valid targets of head 1 in the update, over all ranks and micro-steps
    H        --num-heads    1 is plain next-token training

Each head is one transformer layer on the output of the trunk; norm and unembedding are shared.
Head 1 is the model's own last layer, so trunk and head 1 are a plain Hugging Face model.

Deviations from the paper:
  1. One joint forward and backward instead of one head after the other: logits exist for a chunk
     of tokens at a time, and the backward makes them again (memory: benchmarks/README.md).
  2. From a pretrained model, heads 2..H are added as copies of the last layer (table S6).
  3. Targets do not cross the end of a document.

Commands:
  laptop      python baseline_mtp.py
  one GPU     python baseline_mtp.py --model Qwen/Qwen2.5-0.5B --data my.jsonl --lr 1e-5 ...
  eight GPUs  torchrun --nproc-per-node 8 baseline_mtp.py --model Qwen/Qwen2.5-7B --lr 1e-5 ...
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from common import Run, Sums, active_heads, build_model, check_run_args, clip_gradients
from common import count_targets, describe, learning_rate, load_data, make_optimizer
from common import micro_batch_rows, micro_batches, run_script, set_gradient_sync, setup_ranks
from common import shard, weights_of_targets

# Shapes: B sequences, T positions, K heads. weight_BT holds a weight for every token of x_BT.


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
    data: str = "stdlib"  # stdlib(:a|:b), stdlib-bugs, sums, mbpp; a file, folder, URL or hub name
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

    # Algorithm specific arguments: none

    def __post_init__(self):
        check_run_args(self)


# ------------------------------------------------------------------------------------- algorithm
def token_weights(batch, loss_KBT):
    """Weight of every token, `[B, T]`: 1."""
    return torch.ones_like(batch.x_BT, dtype=torch.float32)


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
    data = load_data(args, tokenizer, ranks)
    describe(args, model, data, micro_batch_size, ranks)
    run.record(data)
    model = shard(model.to(ranks.device), ranks)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(model, args)

    # Loop: save, evaluate, update. It comes round once more than there are updates
    start = run.resume(model=model, optimizer=optimizer)
    model.train()
    for step in range(start, args.max_steps + 1):
        if run.should_save(step):
            run.save(step, model=model, optimizer=optimizer)  # after a stop signal it ends here
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
        count_K = ranks.sum(count_targets(batches))
        num_valid = count_K[0].clamp(min=1)
        sums = Sums(ranks)
        for number, batch in enumerate(batches, start=1):
            set_gradient_sync(model, number == len(batches))
            with ranks.autocast():
                loss_KBT = model(batch.x_BT, batch.targets_KBT)

            # ALGO LOGIC: every token weighs 1
            weight_BT = token_weights(batch, loss_KBT)

            weight_BT = weight_BT * batch.weight_BT  # of the data; 1 where it has none
            weight_KBT = weights_of_targets(weight_BT, num_heads)
            objective = (weight_KBT * loss_KBT).sum() / num_valid
            objective.backward()
            sums.add(batch, loss_KBT, weight_KBT, objective=objective)
        grad_norm = clip_gradients(model, args.grad_clip)

        # Metrics of the update, exact over all ranks and micro-steps
        metrics = sums.metrics(count_K)
        metrics["train/grad_norm"] = grad_norm
        metrics["train/lr"] = lr
        run.require_finite(step, metrics)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        metrics["perf/tokens_per_s"] = args.batch_size * args.seq_len / seconds
        run.log(step + 1, metrics)
        if step + 1 == args.max_steps:
            run.write_weights(batch, weight_BT)

    # End: the model as others read it, and the held-out figures
    run.finish(model, tokenizer, data, heldout)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
