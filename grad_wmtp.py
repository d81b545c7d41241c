"""Weights from the gradient of a clean target set, for multi-token prediction.

How much does a step on clean text lower the loss of this token? To first order it is a product of
two gradients (2002.08484; with Adam's scale 2402.04333), which in the unembedding W has a closed
form (https://arxiv.org/abs/2508.10180), here for every head. It is Rho-1 with a reference of one
step, and needs no reference model. One token's score is noisy: near ones are averaged.

    G       = moving mean of dL*/dW                       L*: loss of a small clean target set
    D       = G / (sqrt(v) + 1e-8)                        v: Adam's second moment of W
    s[t,k]  = <dCE[t,k]/dW, D> = p . (D h) - (D h)[x[t+k]]
    s[j]    = sum_k s[j-k,k]                              all heads that predict token j
    s'[j]   = mean of s[i], |i - j| <= smooth             in one document; outliers are cut
    z       = (s' - mean) / deviation                     both moving over updates
    u       = sigmoid(2 (z - middle)), mean 1             --mode weighted; middle: --target-ess
    u[j]    = 1/(1 - ratio) if z[j] is among the highest  --mode token_skip (2404.07965, eq. 5)
    w       = lambda + (1 - lambda) u
    L       = 1/N * sum_t sum_k  m[t,k] * w[t+k] * CE[t,k]

    symbol   variable       meaning
    CE[t,k]  loss_KBT       cross entropy (nats) of head k at position t for the token k places on
    s[t,k]   score_KBT      how fast that loss falls where W moves against D, `direction_VD`
    p, h                    distribution of head k at t, and its state before the unembedding
    m[t,k]   targets_KBT    IGNORE where m = 0: prompt, padding, past the end of row or document
    w[j]     weight_BT      weight of token j, whichever head predicts it; mean 1 over the targets
    lambda   --lambda       1 is baseline_mtp.py to the last bit, 0 the bare algorithm
    ratio    --skip-ratio   share left out by token_skip
    N        num_valid      valid targets of head 1 in the update, over all ranks and micro-steps

Commands:
  laptop      python grad_wmtp.py --data stdlib:a --noise-frac 0.3 --target stdlib:b
  eight GPUs  torchrun --nproc-per-node 8 grad_wmtp.py --model Qwen/Qwen2.5-7B --target ...
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn.metrics import roc_auc_score

from common import IGNORE, Run, Sums, UsageError, active_heads, build_model, check_ranges
from common import check_run_args, clip_gradients, control_weights, count_targets, describe
from common import errors_as, learning_rate, load_data, make_optimizer, micro_batch_rows
from common import micro_batches, run_script, select, set_gradient_sync, setup_ranks, shard
from common import sum_like, weights_of_ess, weights_of_targets, whiten, whole

# Shapes: B sequences, T positions, K heads, V vocabulary, D width, R ranks, N valid targets of head
# 1 in a micro-step over all ranks, in the order rank, row, position: the same on any number.
CUT = 0.02  # share of the scores that is cut off at each end
GATE_SLOPE, GATE_MIDDLE = 2.0, -1.0  # of --mode weighted, in deviations of the score


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

    # Algorithm specific arguments
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.0  # share of equal weights, 0 to 1
    target: str = ""  # clean target set, named as --data; its training part is read
    target_rows: int = 256  # rows of it that are used, evenly spaced; 0: all
    target_every: int = 4  # updates between clean batches of --batch-size rows
    target_ema: float = 0.97  # share of the old gradient that stays when a new one comes
    score: Literal["influence", "norm"] = "influence"  # norm: of the token's own gradient
    smooth: int = 16  # targets to each side over which the score is averaged; 0: off
    mode: Literal["weighted", "token_skip"] = "weighted"  # a soft gate, or the lowest left out
    target_ess: float | None = None  # effective share of u, by the gate's middle; None: middle -1
    skip_ratio: float | None = None  # share of the tokens that token_skip leaves out; None: 0.3
    start: int = 20  # updates with equal weights before, at least 1: Adam's moments must settle
    control: Literal["none", "shuffle", "random", "target"] = "none"
    """Weights permuted among the tokens, drawn anew, or equal: clean batches join the training."""

    def __post_init__(self):
        check_run_args(self)
        check_ranges(self, lambda_=(0, 1), target_rows=(0, 1e9), target_every=(1, 1e9))
        check_ranges(self, target_ema=(0, 0.9999), skip_ratio=(0, 0.9999))
        check_ranges(self, smooth=(0, 1e6), start=(1, 1e18), target_ess=(0.001, 1))
        if self.mode == "token_skip" and self.target_ess is not None:
            raise UsageError("--target-ess: needs --mode weighted")
        if self.mode == "weighted" and self.skip_ratio is not None:
            raise UsageError("--skip-ratio: needs --mode token_skip")
        if self.train == "heads":
            raise UsageError("--train heads: the unembedding must train; use --train all")
        if not self.target:
            example = "python grad_wmtp.py --data stdlib:a --noise-frac 0.3 --target stdlib:b"
            raise UsageError(f"--target: name clean text, such as `{example}`")


# ------------------------------------------------------------------------------------- algorithm
def token_scores(score_KBT):
    """Score of every token, `[B, T]`: the sum over the heads that predict it."""
    score_BT = torch.zeros_like(score_KBT[0])
    for k, head_BT in enumerate(score_KBT, start=1):
        score_BT[:, k:] += head_BT[:, :-k]
    return score_BT


def smoothed(score_BT, valid_BT, reach):
    """Mean of the scores of the targets up to `reach` places away in the same document, `[B, T]`.

    The first token of a document is no target, so a run of targets lies in one document.
    """
    run_BT = (~valid_BT).cumsum(1).masked_fill(~valid_BT, -1)
    sides, size = (reach, reach), 2 * reach + 1
    near_BTW = F.pad(run_BT, sides, value=-1).unfold(1, size, 1) == run_BT[..., None]
    window_BTW = F.pad(score_BT, sides).unfold(1, size, 1)
    return (window_BTW * near_BTW).sum(-1) / near_BTW.sum(-1).clamp(min=1)


def weights_of_scores(score_N, moments, args):
    """Weights u of the valid targets of a micro-step, mean 1: a selection, or a soft gate."""
    z_N = whiten(score_N, moments)

    def gate(middle):
        return (GATE_SLOPE * (z_N - middle)).sigmoid()

    if args.mode == "token_skip":
        u_N = select(z_N, 0.3 if args.skip_ratio is None else args.skip_ratio).float()
    elif args.target_ess:
        u_N = weights_of_ess(lambda odds: gate(math.log(odds) / GATE_SLOPE), args.target_ess)
    else:
        u_N = gate(GATE_MIDDLE)
    return u_N / u_N.mean()


@torch.no_grad()
def token_weights(batch, score_KBT, moments, key, args, ranks):
    """Weight of every token of this rank, `[B, T]`, and figures of all valid targets, `[5, N]`.

    The scores of all ranks are gathered and every rank computes all weights, so they are the same
    on any number of ranks. A token that is no target weighs 1, and before `--start` every token.
    """
    valid_BT = F.pad(batch.targets_KBT[0, :, :-1] != IGNORE, (1, 0))
    values = torch.stack([token_scores(score_KBT), batch.is_noise_BT.float(), valid_BT.float()])
    score_RBT, noise_RBT, valid_RBT = ranks.gather(values).transpose(0, 1)
    valid_RBT, weight_RBT = valid_RBT > 0, torch.ones_like(score_RBT)
    raw_N, (_, step, _) = score_RBT[valid_RBT], key
    if step < args.start or args.control == "target" or len(raw_N) == 0:
        return weight_RBT[ranks.rank], raw_N.new_zeros(5, 0)
    low, high = raw_N.quantile(raw_N.new_tensor([CUT, 1 - CUT]))
    rows = score_RBT.flatten(0, 1).clamp(low, high), valid_RBT.flatten(0, 1)
    score_N = smoothed(*rows, args.smooth)[rows[1]]
    u_N = control_weights(weights_of_scores(score_N, moments, args), args.control, key)
    weight_N = 1 + (1 - args.lambda_) * (u_N - 1)  # lambda + (1 - lambda) u, exactly 1 where u is
    weight_RBT[valid_RBT] = weight_N
    figures = [raw_N, score_N, weight_N, (u_N > 0).float(), noise_RBT[valid_RBT]]
    return weight_RBT[ranks.rank], torch.stack(figures)


def grad_metrics(figures):
    """`grad/..` and `weights/on_..` over the targets of an update; `figures` by `token_weights`.

    `grad/positive_frac`: share of tokens whose loss a step on the target set lowers.
    `grad/noise_auc`: probability that a noise token scores lower than a clean one.
    """
    raw_N, score_N, weight_N, kept_N, noise_N = torch.cat(figures, 1).cpu().double()
    if len(score_N) == 0 or not score_N.isfinite().all():
        return {}
    metrics = {"grad/score_mean": raw_N.mean().item()}
    metrics["grad/positive_frac"] = (raw_N > 0).double().mean().item()
    metrics["grad/kept_frac"] = kept_N.mean().item()
    if 0 < noise_N.sum() < len(noise_N):
        metrics["weights/on_noise"] = weight_N[noise_N > 0].mean().item()
        metrics["weights/on_clean"] = weight_N[noise_N == 0].mean().item()
        metrics["grad/noise_auc"] = float(roc_auc_score(noise_N == 0, score_N))
    return metrics


# ---------------------------------------------------------------------------------------- target
class Target:
    """Clean rows, and the moving mean of their loss's gradient by the unembedding.

    It lies beside Adam's moments of the unembedding: sharded as they are, and in checkpoints.

    Raises:
        UsageError: `--target` cannot be read.
    """

    def __init__(self, args, tokenizer, data, micro_batch_size, ranks):
        self.args, self.ranks, self.figures = args, ranks, {}
        self.micro_batch_size = micro_batch_size
        clean = replace(args, data=args.target, heldout_data="", noise_frac=0.0)
        with errors_as(f"--target {args.target}: cannot be read", other="--data"):
            clean = load_data(clean, tokenizer, ranks)
        if clean.fingerprint == data.fingerprint:
            ranks.print(f"warning   --target {args.target} holds the text of --data")
        self.rows, self.fingerprint = clean.train, clean.fingerprint
        if 0 < args.target_rows < len(self.rows):
            numbers = np.linspace(0, len(self.rows) - 1, args.target_rows).astype(int)
            self.rows = self.rows.select(numbers)

    def prepare(self, model, optimizer):
        """Put what checkpoints must hold into the optimizer's state of the unembedding."""
        weight_VD, self.group = model.causal_lm.lm_head.weight, optimizer.param_groups[0]
        self.state = optimizer.state[weight_VD]
        self.state["target_gradient"] = torch.zeros_like(weight_VD)
        self.moments = self.state["score_moments"] = torch.zeros(3, device=weight_VD.device)

    def batches(self, step, num_heads):
        """This rank's share of the clean batch of update `step`; none where none is due."""
        number, rest = divmod(step, self.args.target_every)
        args = replace(self.args, seed=self.args.seed + 1)
        options = (self.micro_batch_size, number, num_heads, self.ranks)
        return [] if rest else micro_batches(self.rows, args, *options)

    @torch.no_grad()
    def direction(self, model, step, num_heads):
        """D of update `step`, `[V, D]`, after the clean batch that may be due; or "norm"."""
        args, self.figures = self.args, {}
        if args.score == "norm":
            return "norm"
        if batches := self.batches(step, num_heads):
            self.refresh(model, batches)
        num_batches, (_, beta) = 1 + step // args.target_every, self.group["betas"]
        mean_VD = self.state["target_gradient"] / (1 - args.target_ema**num_batches)
        square_VD = self.state["exp_avg_sq"] / (1 - beta ** max(1, step))
        direction_VD = mean_VD / (square_VD.sqrt() + self.group["eps"])
        return whole(direction_VD).to(self.ranks.dtype)

    def refresh(self, model, batches):
        """Take the gradient of a clean batch into the mean: exact over ranks and micro-steps.

        `grad/target_loss`: head 1's, nats. `grad/direction_cosine`: between this gradient and the
        mean of those before, small where they are noisy.
        """
        model.eval()
        gradient_VD, loss = 0.0, 0.0
        for batch in batches:
            with self.ranks.autocast():
                loss_KBT, own_VD = model(batch.x_BT, batch.targets_KBT, "gradient")
            gradient_VD, loss = gradient_VD + own_VD.float(), loss + loss_KBT[0].sum()
        model.train()
        num_valid = self.ranks.sum(count_targets(batches))[0].clamp(min=1)
        mean_VD = self.state["target_gradient"]
        gradient_VD = sum_like(gradient_VD / num_valid, mean_VD)
        pairs = (mean_VD, gradient_VD), (mean_VD, mean_VD), (gradient_VD, gradient_VD)
        dot, *squares = (whole((a * b).sum()).item() for a, b in pairs)
        if all(squares):
            self.figures["grad/direction_cosine"] = dot / (squares[0] * squares[1]) ** 0.5
        self.figures["grad/target_loss"] = (self.ranks.sum(loss) / num_valid).item()
        mean_VD += (1 - self.args.target_ema) * (gradient_VD - mean_VD)


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

    # ALGO LOGIC: rows of the clean target set
    target = Target(args, tokenizer, data, micro_batch_size, ranks)
    run.record(data, target_fingerprint=target.fingerprint)

    model = shard(model.to(ranks.device), ranks)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(model, args)
    target.prepare(model, optimizer)  # ALGO LOGIC

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

        # ALGO LOGIC: the step that lowers the loss of the target set; one control trains on it
        direction_VD = target.direction(model, step, num_heads)
        batches += target.batches(step, num_heads) if args.control == "target" else []
        count_K = ranks.sum(count_targets(batches))
        num_valid = count_K[0].clamp(min=1)
        sums, figures = Sums(ranks), []
        for number, batch in enumerate(batches, start=1):
            set_gradient_sync(model, number == len(batches))
            with ranks.autocast():
                loss_KBT, score_KBT = model(batch.x_BT, batch.targets_KBT, direction_VD)

            # ALGO LOGIC: how much that step lowers the loss of each token gives the weights
            work = (target.moments, (args.seed, step, number), args, ranks)
            weight_BT, values = token_weights(batch, score_KBT, *work)
            figures.append(values)

            weight_BT = weight_BT * batch.weight_BT  # of the data; 1 where it has none
            weight_KBT = weights_of_targets(weight_BT, num_heads)
            objective = (weight_KBT * loss_KBT).sum() / num_valid
            objective.backward()
            sums.add(batch, loss_KBT, weight_KBT, objective=objective)
        grad_norm = clip_gradients(model, args.grad_clip)

        # Metrics of the update, exact over all ranks and micro-steps
        metrics = sums.metrics(count_K)
        metrics.update(target.figures | grad_metrics(figures))  # ALGO LOGIC
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
