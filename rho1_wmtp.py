"""Rho-1 for multi-token prediction: weights from the excess loss over a reference model.

Selective language modeling (Lin et al. 2024, https://arxiv.org/abs/2404.07965) scores each token by
its excess loss over a reference that was trained on clean text, and trains on the tokens of highest
score: what can be learnt and is not known yet. Noise has a high loss under both models, and what is
known has a low one, so both score low. A token has one weight, whichever head predicts it:

    s[j] = CE_1[j] - CE_ref[j]                              eq. 3: same token, same prefix
    u    = N softmax(s / temperature), bounded, mean 1      --mode weighted (default)
    u[j] = 1/(1 - ratio) for the highest s, else 0          --mode token_skip, eq. 4 and 5
    w    = lambda + (1 - lambda) u
    L    = 1/N * sum_t sum_k  m[t,k] * w[t+k] * CE[t,k]

    symbol   variable       meaning
    CE[t,k]  loss_KBT       cross entropy (nats) of head k at position t for the token k places on
    CE_ref   ref_BT         the same of the reference's head 1, at the position before the token
    s, u     score_N, u_N   of the valid targets of a micro-step, over all ranks together
    m[t,k]   targets_KBT    IGNORE where m = 0: prompt, padding, past the document, left out
    w[j]     weight_BT      weight of token j; mean 1 over the targets
    lambda   --lambda       1 is baseline_mtp.py to the last bit, 0 the bare algorithm
    temperature             the one at which (sum u)^2 / (N sum u^2) is --target-ess, 0.7
    ratio    --skip-ratio   share left out by token_skip: 0.3 in the paper's 7B runs, 0.4 at 1B;
                            auto: the share of noise, if the held-out text is clean
    N        num_valid      valid targets of head 1 in the update (in u: micro-step), all ranks

Deviations from the paper:
  1. The score is head 1's and serves all heads. Graded weights are the default: in our short runs
     they gain more than the paper's selection (benchmarks/README.md).
  2. Reference losses are computed once per data set, split over the ranks, and cached next to the
     tokens (4 bytes per token).
  3. Coarse to fine: --skip-documents leaves out whole documents first (2506.01317 selects in two
     stages too), and --skip-ramp lets the selection of tokens grow in.

Commands:
  laptop      python baseline_mtp.py --data stdlib:b --num-heads 1 --run-dir runs/reference
              python rho1_wmtp.py --data stdlib:a --noise-frac 0.3 --ref-model runs/reference
  eight GPUs  torchrun --nproc-per-node 8 rho1_wmtp.py --model Qwen/Qwen2.5-7B --ref-model ...
"""

import hashlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import transformers
import tyro
from sklearn.metrics import roc_auc_score

from common import IGNORE, Run, Sums, UsageError, active_heads, bounded_softmax, build_model
from common import check_ranges, check_run_args, clip_gradients, control_weights, count_targets
from common import describe, epoch_order, errors_as, learning_rate, load_batch, load_data
from common import load_mtp, load_tokenizer, make_optimizer, max_positions, micro_batch_rows
from common import micro_batches, model_dir, run_script, select, set_gradient_sync, setup_ranks
from common import shard, weights_of_ess, weights_of_targets

# Shapes: B sequences, T positions, K heads, R ranks, N valid targets of head 1 in a micro-step over
# all ranks, in the order rank, row, position: the same order on any number of ranks.


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
    target_ess: float | None = None  # effective share of tokens of u; None: 0.7, or by temperature
    temperature: float | None = None  # of the softmax, nats, in the place of --target-ess
    epsilon: float = 0.05  # least u of --mode weighted
    max_weight: float = 3.0  # largest u of --mode weighted
    ref_model: str = ""  # reference: a run, its model/, or a Hugging Face model of this tokenizer
    mode: Literal["weighted", "token_skip"] = "weighted"  # a softmax, or the lowest left out
    skip_ratio: float | Literal["auto"] | None = None
    """Share of the valid tokens that token_skip leaves out; auto: estimated once; None: 0.3."""
    skip_ramp: float = 0.0  # part of the run in which that share grows from 0
    skip_documents: float = 0.0  # share of the targets left out first: documents of highest loss
    control: Literal["none", "shuffle", "random"] = "none"
    """Weights without information: permuted among the tokens, or drawn from them anew."""

    def __post_init__(self):
        check_run_args(self)
        check_ranges(self, lambda_=(0, 1), epsilon=(0, 1), max_weight=(1, 1e9))
        check_ranges(self, temperature=(1e-6, 1e6), skip_ramp=(0, 1), skip_documents=(0, 0.9999))
        if self.skip_ratio != "auto":
            check_ranges(self, skip_ratio=(0, 0.9999))
        given = [value for value in (self.target_ess, self.temperature) if value is not None]
        if self.mode == "token_skip" and given:
            raise UsageError("--target-ess, --temperature: need --mode weighted")
        if self.mode == "token_skip" and self.skip_ratio is None:
            self.skip_ratio = 0.3
        if self.mode == "weighted" and (self.skip_ratio is not None or self.skip_ramp):
            raise UsageError("--skip-ratio, --skip-ramp: need --mode token_skip")
        if self.mode == "weighted" and len(given) == 2:
            raise UsageError("--target-ess, --temperature: give one of the two")
        if self.mode == "weighted" and not given:
            self.target_ess = 0.7
        least = 1 / (self.max_weight + self.epsilon * (1 - self.max_weight))  # every u at a bound
        if self.target_ess is not None and not least <= self.target_ess <= 1:
            bounds = f"--max-weight {self.max_weight:g} --epsilon {self.epsilon:g}"
            raise UsageError(f"--target-ess {self.target_ess}: from {least:.3f} to 1 with {bounds}")
        if not self.ref_model:
            example = "baseline_mtp.py --data stdlib:b --num-heads 1 --run-dir runs/reference"
            raise UsageError(f"--ref-model: name a reference; `{example}` trains one")


# ------------------------------------------------------------------------------------- algorithm
def noise_share(mixed_N, clean_N):
    """Share of noise behind the losses `mixed_N`: the least that is compatible with `clean_N`.

    F_mixed = (1 - share) F_clean + share F_noise, and few losses of noise lie where most clean ones
    do. So the share is the largest 1 - F_mixed(c) / F_clean(c) at or above the median of `clean_N`.
    Noise that is easy to predict is not seen; another kind of text than the clean one counts too.
    The estimate is biased upward: it is 0.00 to 0.03 with 2,000 clean losses where 0 is true.
    """
    clean_N, mixed_N = np.sort(clean_N), np.sort(mixed_N)
    above_N = clean_N[len(clean_N) // 2 :]
    clean_share_N = np.searchsorted(clean_N, above_N, "right") / len(clean_N)
    mixed_share_N = np.searchsorted(mixed_N, above_N, "right") / len(mixed_N)
    return max(0.0, (1 - mixed_share_N / clean_share_N).max())


def weights_of_scores(score_N, skip_ratio, args):
    """Weights u of the valid targets of a micro-step, mean 1: a selection, or a bounded softmax."""
    if args.mode == "token_skip":
        kept_N = select(score_N, skip_ratio).float()
        return kept_N / kept_N.mean()

    def softmax(temperature):
        return bounded_softmax(score_N / temperature, args.epsilon, args.max_weight)

    if args.temperature is None:
        return weights_of_ess(lambda strength: softmax(1 / strength), args.target_ess)
    return softmax(args.temperature)


@torch.no_grad()
def token_weights(batch, loss_KBT, ref_BT, skip_ratio, key, args, ranks):
    """Weight of every token of this rank, `[B, T]`, and figures of all valid targets, `[4, N]`.

    The scores of all ranks are gathered and every rank computes all weights, so they are the same
    on any number of ranks. A token that is no target weighs 1.
    """
    noise_BT = torch.zeros_like(ref_BT)
    noise_BT[:, :-1] = batch.is_noise_BT[:, 1:]  # of the target, as head 1's loss and validity
    valid_BT = (batch.targets_KBT[0] != IGNORE).float()
    values = torch.stack([loss_KBT[0], ref_BT, noise_BT, valid_BT])
    values_4RBT = ranks.gather(values).transpose(0, 1)
    valid_RBT = values_4RBT[3] > 0
    loss_N, ref_N, noise_N = values_4RBT[:3, valid_RBT]

    score_N = loss_N - ref_N  # the excess loss, eq. 3
    u_N = control_weights(weights_of_scores(score_N, skip_ratio, args), args.control, key)
    weight_N = 1 + (1 - args.lambda_) * (u_N - 1)  # lambda + (1 - lambda) u, exactly 1 where u is

    target_weight_RBT = torch.ones_like(values_4RBT[3])
    target_weight_RBT[valid_RBT] = weight_N
    weight_BT = torch.ones_like(ref_BT)
    weight_BT[:, 1:] = target_weight_RBT[ranks.rank, :, :-1]  # head 1's target at t is token t+1
    return weight_BT, torch.stack([score_N, weight_N, (u_N > 0).float(), noise_N])


def rho1_metrics(figures, args):
    """`rho1/..` and `weights/on_..` over the targets of an update; `figures` by `token_weights`.

    `rho1/noise_auc`: probability that a noise token scores lower than a clean one.
    """
    score_N, weight_N, kept_N, noise_N = torch.cat(figures, 1).cpu().double()
    if len(score_N) == 0 or args.lambda_ == 1 or not score_N.isfinite().all():
        return {}
    metrics = {"rho1/excess_mean": score_N.mean().item()}
    if args.mode == "token_skip":
        metrics["rho1/kept_frac"] = kept_N.mean().item()
    if 0 < noise_N.sum() < len(noise_N):
        metrics["weights/on_noise"] = weight_N[noise_N > 0].mean().item()
        metrics["weights/on_clean"] = weight_N[noise_N == 0].mean().item()
        metrics["rho1/noise_auc"] = float(roc_auc_score(noise_N == 0, score_N))
    return metrics


# ------------------------------------------------------------------------------------- reference
class Reference:
    """Losses of the reference's head 1 on this run's tokens, from a file made once.

    The file lies beside the packed rows and is named after them, the rows that this run visits, the
    reference's weights and the type of the products: float32 `[rows, T]`, NaN where no target is, 0
    in rows that are not visited. With --lambda 1 nothing uses them, and nothing is left out.

    Raises:
        UsageError: no model that can be read, or its losses would be of other tokens.
    """

    def __init__(self, args, tokenizer, data, ranks):
        self.args, self.ranks, self.rows = args, ranks, data.train
        self.folder, flag = model_dir(args.ref_model), f"--ref-model {args.ref_model}"
        with errors_as(f"{flag}: no model that can be read", other="--model"):
            config = transformers.AutoConfig.from_pretrained(self.folder)
            other = load_tokenizer(self.folder)
        text = config.get_text_config()
        sample = tokenizer.batch_decode(data.train[:8]["input_ids"], skip_special_tokens=True)
        tokens, own = ([t.get_vocab(), t(sample)["input_ids"]] for t in (other, tokenizer))
        if tokens != own or other.eos_token_id != tokenizer.eos_token_id:
            raise UsageError(f"{flag}: its tokenizer is not this run's (--model {args.model})")
        if max_positions(text) < args.seq_len:
            longest = f"has positions for {max_positions(text)} tokens"
            raise UsageError(f"{flag}: {longest}, fewer than --seq-len {args.seq_len}")
        if model_dir(args.model) == self.folder:
            reason = "is the start of this run too, so every excess loss would be 0"
            raise UsageError(f"{flag}: {reason}; name another model")
        weights = [f for f in Path(self.folder).glob("*") if f.suffix in (".safetensors", ".bin")]
        revision = getattr(config, "_commit_hash", None)  # of a hub model
        digest = hashlib.sha256(f"{text.to_dict()} {revision}".encode())
        for file in sorted(weights) if ranks.rank == 0 else []:
            digest.update(file.read_bytes())
        self.fingerprint = ranks.broadcast(digest.hexdigest()[:16])

    def prepare(self, data):
        """Losses of the rows that this run visits, and what they say to leave out."""
        args, ranks = self.args, self.ranks
        self.left_out_D, self.skip_ratio, self.losses = [], args.skip_ratio, None
        if args.lambda_ == 1:
            self.skip_ratio = 0.0
            return
        visited_N = epoch_order(len(self.rows), args.seed, 0)[: args.max_steps * args.batch_size]
        self.losses = self.stored(self.rows, visited_N)
        if args.skip_documents:
            self.left_out_D = self.worst_documents(visited_N)
        if args.skip_ratio == "auto":
            sample_N = np.sort(visited_N)[:: math.ceil(len(visited_N) / 4096)]
            is_out_NT = np.isin(self.rows[sample_N]["document"], self.left_out_D)
            mixed_NT = np.where(is_out_NT, math.nan, self.losses[sample_N])
            heldout_NT = self.stored(data.heldout, np.arange(len(data.heldout)))
            share = noise_share(*(x[~np.isnan(x)] for x in (mixed_NT, heldout_NT)))
            self.skip_ratio = min(0.999, round(ranks.broadcast(share), 3))
            ranks.print(f"left out  {self.skip_ratio} of the tokens, if held-out text is clean")

    def stored(self, rows, number_N):
        """Losses at these rows of a data set, memory-mapped; each rank computes a share."""
        args, ranks = self.args, self.ranks
        source = Path(rows.cache_files[0]["filename"])
        key = f"{rows._fingerprint}-{self.fingerprint}-{str(ranks.dtype)[6:]}"
        if len(number_N) < len(rows):
            key += f"-s{args.seed}-{len(number_N)}"
        file = source.with_name(f"{source.stem}-{key}.npy")
        if not ranks.broadcast(file.exists()):
            shape = (len(rows), args.seq_len)
            part = ranks.broadcast(file.with_suffix(f".{os.getpid()}.part"))  # a name of this run
            if ranks.rank == 0:
                np.lib.format.open_memmap(part, "w+", np.float32, shape)
            ranks.barrier()
            ranks.print(f"reference losses of {len(number_N):,} rows, computed once: {file}")
            with errors_as(f"--ref-model {args.ref_model}: cannot be read", other="--model"):
                model = load_mtp(self.folder).to(ranks.device).eval()
            losses = np.lib.format.open_memmap(part, "r+")
            block_size = max(1, 8192 // args.seq_len)
            blocks = np.array_split(np.sort(number_N), math.ceil(len(number_N) / block_size))
            for numbers in blocks[ranks.rank :: ranks.world_size]:
                batch = load_batch(rows, numbers, 1, ranks.device)
                with torch.no_grad(), ranks.autocast():
                    loss_BT = model(batch.x_BT, batch.targets_KBT)[0]
                no_target_BT = batch.targets_KBT[0] == IGNORE
                losses[numbers] = loss_BT.masked_fill(no_target_BT, math.nan).cpu().numpy()
            losses.flush()
            ranks.barrier()
            if ranks.rank == 0:
                part.replace(file)
            ranks.barrier()
        return np.load(file, mmap_mode="r")

    def worst_documents(self, visited_N):
        """Documents of highest mean loss with at most --skip-documents of the visited targets."""
        num_documents = self.rows[len(self.rows) - 1]["document"].max() + 1
        loss_D, count_D = np.zeros((2, num_documents))
        for numbers in np.array_split(visited_N, math.ceil(len(visited_N) / 1000)):
            loss_NT, document_NT = self.losses[numbers], self.rows[numbers]["document"]
            is_target_NT = ~np.isnan(loss_NT)
            document_N = document_NT[is_target_NT]
            loss_D += np.bincount(document_N, loss_NT[is_target_NT], num_documents)
            count_D += np.bincount(document_N, minlength=num_documents)
        order_D = np.argsort(-loss_D / count_D.clip(min=1), kind="stable")
        share_D = count_D[order_D].cumsum() / count_D.sum()
        left_out_D = order_D[share_D <= self.args.skip_documents]
        share = count_D[left_out_D].sum() / count_D.sum()
        number = (count_D[left_out_D] > 0).sum()
        self.ranks.print(f"left out  {number} documents, {share:.3f} of the targets")
        return left_out_D

    def leave_out(self, batches):
        """Take the targets of the left out documents from the batches; they stay as context."""
        for batch in batches if len(self.left_out_D) else []:
            is_out_BT = np.isin(self.rows[batch.rows_B]["document"], self.left_out_D)
            batch.targets_KBT[:, torch.from_numpy(is_out_BT).to(self.ranks.device)] = IGNORE

    def ratio(self, step):
        """Share of the tokens that token_skip leaves out in update `step`, counted from 0."""
        ramp = self.args.skip_ramp * self.args.max_steps
        return self.skip_ratio * min(1.0, step / ramp) if ramp else self.skip_ratio

    def __call__(self, batch):
        """Losses at the training rows of a batch, nats, `[B, T]`."""
        if self.losses is None:
            return torch.zeros_like(batch.x_BT, dtype=torch.float32)
        return torch.from_numpy(self.losses[batch.rows_B]).to(batch.x_BT.device)


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

    # ALGO LOGIC: losses of the reference on the rows of this run
    reference = Reference(args, tokenizer, data, ranks)
    run.record(data, reference_fingerprint=reference.fingerprint)
    reference.prepare(data)

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
        reference.leave_out(batches)  # ALGO LOGIC
        count_K = ranks.sum(count_targets(batches))
        num_valid = count_K[0].clamp(min=1)
        sums, figures = Sums(ranks), []
        for number, batch in enumerate(batches, start=1):
            set_gradient_sync(model, number == len(batches))
            with ranks.autocast():
                loss_KBT = model(batch.x_BT, batch.targets_KBT)

            # ALGO LOGIC: the excess loss over the reference gives the weights
            key = (args.seed, step, number)
            work = (reference(batch), reference.ratio(step), key, args, ranks)
            weight_BT, values = token_weights(batch, loss_KBT, *work)
            figures.append(values)

            weight_BT = weight_BT * batch.weight_BT  # of the data; 1 where it has none
            weight_KBT = weights_of_targets(weight_BT, num_heads)
            objective = (weight_KBT * loss_KBT).sum() / num_valid
            objective.backward()
            sums.add(batch, loss_KBT, weight_KBT, objective=objective)
        grad_norm = clip_gradients(model, args.grad_clip)

        # Metrics of the update, exact over all ranks and micro-steps
        metrics = sums.metrics(count_K)
        metrics.update(rho1_metrics(figures, args))  # ALGO LOGIC
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
