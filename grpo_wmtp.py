"""Group-relative policy optimisation (GRPO) for multi-token prediction: rewards weigh every head.

The policy samples groups of G completions of one prompt. Its heads draft; the distribution is that
of head 1 (2211.17192). A completion's reward less the group's mean is the weight of its tokens,
whichever head predicts them (GRPO, https://arxiv.org/abs/2402.03300, eq. 3):

    A        = (R - mean R) / (deviation of R + 1e-4)         over the group; 0 without spread
    w[t,k]   = A                                              --credit completion
    w[t,k]   = A + (V[t+k] - V[t]) / (deviation + 1e-4)       --credit tree (TEMPO 2509.18314)
    w       <- lambda + (1 - lambda) w
    r[t,k]   = exp(CE_old[t,k] - CE[t,k])                     1 in the first pass over a batch
    S[t,k]   = min(r w, clip(r, 1 - clip, 1 + clip_high) w)   w exp(-CE[t,k]) if w < 0 and k > 1
    KL[t]    = exp(d) - d - 1,  d = CE[t,1] - CE_ref[t,1]     to the start; never below 0
    L        = 1/N * sum_t (beta m[t,1] KL[t] - sum_k m[t,k] c S[t,k])     c: --head-coef, if k > 1

Where w >= 0 the first pass has the gradient of 1/N sum m w CE, the loss of the other scripts. Where
w < 0, w CE has no bound. Head 1 no longer samples what it unlearned, so it stops by itself; heads
2..H do not sample, so they minimise a probability, not its logarithm.

    symbol   variable       meaning
    CE[t,k]  loss_KBT       cross entropy (nats) of head k at position t for the token k places on
    m[t,k]   targets_KBT    IGNORE where m = 0: prompt, padding, past the end of the row
    R        reward_G       of a completion, 0 to 1, by `reward`; the place for a task of your own
    A        advantage_B    of a completion
    V[t]     value_BT       mean reward of the group's completions that begin with tokens 0..t
    w        weight_KBT     of head k's target: with `tree` for all tokens from t+1 to t+k
    CE_ref   ref_BT         of the start policy's head 1; CE_old: old_KBT, of the first pass
    lambda   --lambda       1: every sampled token weighs 1, no reward enters
    N        num_valid      sampled tokens of the update, ends included, over all ranks

Deviations from the paper:
  1. A mean over all tokens of an update, not over completions (DAPO 2503.14476, as is clip_high).
  2. Completions without an end within --max-new-tokens have reward 0.

Commands:
  laptop      python grpo_wmtp.py    prints two: a start, and this; of one --seed (held-out sums)
  eight GPUs  torchrun --nproc-per-node 8 grpo_wmtp.py --model ... --data my.jsonl ...
"""

import ast
import collections
import copy
import functools
import operator
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from common import CORRECT, IGNORE, Run, Sums, UsageError, active_heads, batch_rows
from common import build_model, check_ranges, check_run_args, clip_gradients, count_targets
from common import describe, generate, is_fresh, learning_rate, load_data, make_optimizer
from common import make_targets, max_positions, micro_batch_rows, run_script, set_gradient_sync
from common import setup_ranks, shard, unsharded

# Shapes: B sequences, T positions, K heads, G completions of a group, N completions of this rank.
START = "python critic_wmtp.py --model benchmarks/sums.json --num-heads 3 --data sums --seq-len 10"
START += " --batch-size 64 --max-steps 1500 --lambda 1 --train-on all --run-dir runs/start"
NEXT = "python grpo_wmtp.py --model runs/start --num-heads 3 --data sums --seq-len 10"
NEXT += " --batch-size 128 --group-size 8 --lr 3e-4 --warmup-steps 5 --max-steps 200"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


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
    data: str = "sums"  # or a file, folder or hub name with prompt and completion, the answer
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
    reward: Literal["answer", "expressions"] = "answer"
    """1 if a completion is the record's own; if its value is that of the prompt (`reward`)."""
    group_size: int = 4  # completions of a prompt (one alone has no advantage); all of one rank
    max_new_tokens: int = 8  # longest completion, its end included, tokens
    decode: Literal["heads", "plain"] = "heads"  # heads 2..H draft: faster, exact
    credit: Literal["completion", "tree"] = "completion"  # weight of a token (see above)
    scale: Literal["group", "none"] = "group"  # divide by the group's deviation, or do not
    clip: float = 0.2  # how far below 1 the ratio of probabilities still counts
    clip_high: float = 0.28  # how far above
    updates_per_batch: int = 1  # passes over the completions of a step, each with an update
    beta: float = 0.02  # share of the KL divergence to the start; 0: no reference is loaded
    head_loss: Literal["policy", "imitate", "none"] = "policy"
    """Of heads 2..H: as head 1; CE of all samples, detached from trunk and unembedding; no loss."""
    head_coef: float | None = None  # its share; None: 1, and 0.1 to imitate
    control: Literal["none", "shuffle"] = "none"  # shuffle: rewards permuted in the group

    def __post_init__(self):
        if is_fresh(self.model):
            raise UsageError(f"--model {self.model}: name a start; `{START}`, then `{NEXT}`")
        check_run_args(self)
        if self.head_coef is None:
            self.head_coef = 0.1 if self.head_loss == "imitate" else 1.0
        check_ranges(self, lambda_=(0, 1), clip=(0, 1), noise_frac=(0, 0), group_size=(2, 1e9))
        check_ranges(self, **dict.fromkeys(["beta", "head_coef", "clip_high"], (0, 1e9)))
        check_ranges(self, **dict.fromkeys(["max_new_tokens", "updates_per_batch"], (1, 1e9)))
        if self.train == "heads" and self.head_loss == "none":
            raise UsageError("--train heads --head-loss none: nothing trains; change one of them")


# ---------------------------------------------------------------------------------------- reward
def reward(prompt, completion, answer, rule):
    """Reward of a completion, 0 to 1. Replace this function for a task of your own.

    Rule `answer`: it is the completion of the record. Rule `expressions`: its value is that of the
    prompt before "=", as after "7*8=" or "56=". A reward by tests goes here too: run `prompt +
    completion` and the tests in `answer` in a sandbox, such as that of evaluate.py.
    """
    if rule == "answer":
        return float(completion == answer)
    goal, own = expression_value(prompt.rstrip("= \n")), expression_value(completion)
    return float(goal is not None and goal == own)


def expression_value(text):
    """Python's own value of integers with + - * and brackets; None for any other text."""

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("another kind of expression")

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# ------------------------------------------------------------------------------------- algorithm
def advantages(reward_G, scale):
    """A of a group (2402.03300, section 4.1.2), and the number that rewards are divided by."""
    if np.ptp(reward_G) == 0:  # a mean of equal numbers may not be that number
        return np.zeros(len(reward_G)), 1.0
    unit = reward_G.std() + 1e-4 if scale == "group" else 1.0
    return (reward_G - reward_G.mean()) / unit, unit


def prefix_values(tokens_G, reward_G):
    """V of every prefix of each completion, the empty one first: G lists (2509.18314)."""
    rewards = collections.defaultdict(list)
    for tokens, own in zip(tokens_G, reward_G):
        for end in range(len(tokens) + 1):
            rewards[tuple(tokens[:end])].append(own)
    means = {prefix: np.mean(own) for prefix, own in rewards.items()}
    return [[means[tuple(ids[:end])] for end in range(len(ids) + 1)] for ids in tokens_G]


def token_weights(batch, args):
    """Weight of every head's targets, `[K, B, T]`: A and what V changes up to the target."""
    weights = []
    for k, valid_BT in enumerate(batch.targets_KBT != IGNORE, start=1):
        change_BT = F.pad(batch.value_BT[:, k:], (0, k)) - batch.value_BT
        weight_BT = args.lambda_ + (1 - args.lambda_) * (batch.advantage_B[:, None] + change_BT)
        weights.append(weight_BT * valid_BT)
    return torch.stack(weights)


def gains(loss_KBT, old_KBT, weight_KBT, args):
    """c S of every target, and where the clip stops its gradient, both `[K, B, T]`."""
    ratio_KBT = (old_KBT - loss_KBT).exp()
    free_KBT = ratio_KBT * weight_KBT
    clipped_KBT = ratio_KBT.clamp(1 - args.clip, 1 + args.clip_high) * weight_KBT
    gain_KBT = torch.minimum(free_KBT, clipped_KBT)
    if args.head_loss == "imitate":
        others_KBT = -loss_KBT[1:]
    else:
        bounded_KBT = weight_KBT * (-loss_KBT).exp()
        others_KBT = torch.where(weight_KBT < 0, bounded_KBT, gain_KBT)[1:]
    return torch.cat([gain_KBT[:1], args.head_coef * others_KBT]), clipped_KBT < free_KBT


def divergence(loss_BT, ref_BT):
    """KL of every token, never below 0; its mean over samples is the divergence (k3)."""
    log_ratio_BT = loss_BT - ref_BT
    return torch.expm1(log_ratio_BT) - log_ratio_BT


# -------------------------------------------------------------------------------------- rollouts
@dataclass
class Samples:
    """Completions of this rank, N lists; those of one prompt are neighbours."""

    prompts: list  # token ids before each completion
    tokens: list  # token ids of each completion, the end of sequence included
    rewards: list  # of each, 0 to 1
    row_steps: int = 0  # decoding passes, counted once for each row in them, and
    new_tokens: int = 0  # the tokens from them


@dataclass
class GroupBatch:
    """A micro-batch of completions, with what their weights and their loss are made of."""

    x_BT: torch.Tensor
    targets_KBT: torch.Tensor
    advantage_B: torch.Tensor
    value_BT: torch.Tensor  # V over the deviation, in prompts the mean; 0 with --credit completion
    old_KBT: torch.Tensor = None  # CE of the first pass
    ref_BT: torch.Tensor = None  # CE of the start policy's head 1


class Sampler:
    """Draws completions from the policy; each depends on weights, seed, step and place alone.

    A `UsageError` names sizes that do not fit, or data without prompts or with weights.
    """

    def __init__(self, model, tokenizer, data, micro_batch_size, args, ranks):
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.micro_batch_size, self.args, self.ranks = micro_batch_size, args, ranks
        unit, longest = ranks.world_size * args.group_size, max_positions(model.causal_lm.config)
        if args.batch_size % unit:
            raise UsageError(f"--batch-size {args.batch_size}: no multiple of {unit} completions")
        if args.seq_len + args.max_new_tokens > longest:
            sizes = f"and --seq-len {args.seq_len}: {longest} positions in --model at most"
            raise UsageError(f"--max-new-tokens {args.max_new_tokens} {sizes}")
        if any(rows["is_target"][:, 0].any() for rows in (data.train[:], data.heldout[:])):
            raise UsageError(f"--data {args.data}: holds no prompts; needs prompt and completion")
        if "weight" in data.train.column_names:
            raise UsageError(f"--data {args.data}: its weights have no use here; take them out")
        self.heldout, self.num_prompts = data.heldout, args.batch_size // args.group_size
        if "reward" in self.heldout.column_names:  # each prompt with its right answer
            is_right_N = self.heldout["reward"][:] > CORRECT
            self.heldout = self.heldout.select(np.flatnonzero(is_right_N))

    def draw(self, rows, numbers, seeds, temperature):
        """Samples for the prompts of these rows, a completion for each number."""
        args, eos, samples = self.args, self.tokenizer.eos_token_id, Samples([], [], [])
        decode = functools.partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        num_heads = args.num_heads if args.decode == "heads" else 1
        self.model.eval()
        with unsharded(self.model), self.ranks.autocast():
            for first in range(0, len(numbers), self.micro_batch_size):
                part = slice(first, first + self.micro_batch_size)
                columns = rows[numbers[part]]
                ends = [np.flatnonzero(row)[[0, -1]] for row in columns["is_target"]]
                pairs = list(zip(columns["input_ids"].tolist(), ends))
                prompts = [ids[:start] for ids, (start, _) in pairs]
                answers = [decode(ids[start:end]) for ids, (start, end) in pairs]
                options = (args.max_new_tokens, eos, num_heads, temperature, 1, seeds[part])
                done = generate(self.model, prompts, *options)
                samples.prompts += prompts
                samples.row_steps += done.row_steps
                samples.new_tokens += done.new_tokens
                for prompt, tokens, answer in zip(prompts, done.tokens, answers):
                    is_whole = len(tokens) < args.max_new_tokens
                    texts = decode(prompt, skip_special_tokens=True), decode(tokens), answer
                    samples.rewards.append(reward(*texts, args.reward) if is_whole else 0.0)
                    samples.tokens.append([*tokens, eos] if is_whole else tokens)
        self.model.train()
        return samples

    def rollout(self, step):
        """This rank's groups of update `step` (0-based), at temperature 1."""
        args, ranks = self.args, self.ranks
        numbers = batch_rows(len(self.data.train), self.num_prompts, args.seed, step)
        numbers = numbers.repeat(args.group_size).reshape(ranks.world_size, -1)[ranks.rank]
        first = ranks.rank * len(numbers)
        seeds = [(args.seed, step, first + place, 1) for place in range(len(numbers))]
        return self.draw(self.data.train, numbers, seeds, temperature=1)

    def batches(self, samples, step, num_heads):
        """Micro-batches of prompt and completion, padded; controls change the rewards here."""
        args, ranks, tokens, size = self.args, self.ranks, samples.tokens, self.args.group_size
        width = max(map(len, samples.prompts)) + max(map(len, tokens))
        x_NT = np.full((len(tokens), width), self.tokenizer.pad_token_id or 0, np.int64)
        is_target_NT, advantage_N = np.zeros(x_NT.shape, bool), np.zeros(len(x_NT), np.float32)
        value_NT, batches = np.zeros(x_NT.shape, np.float32), []
        for first in range(0, len(x_NT), size):
            group = slice(first, first + size)
            reward_G = np.array(samples.rewards[group])
            if args.control == "shuffle":
                key = (args.seed, step, ranks.rank * len(x_NT) + first, 2)
                reward_G = np.random.default_rng(key).permutation(reward_G)
            advantage_N[group], unit = advantages(reward_G, args.scale)
            values = [[0.0]] * size
            if args.credit == "tree":
                values = prefix_values(tokens[group], reward_G / unit)
            for n, value in enumerate(values, start=first):
                start, row = len(samples.prompts[n]), samples.prompts[n] + tokens[n]
                x_NT[n, : len(row)] = row
                is_target_NT[n, start : len(row)] = True
                value_NT[n, : start - 1 + len(value)] = [*value[:1] * (start - 1), *value]
        for first in range(0, len(x_NT), self.micro_batch_size):
            part = slice(first, first + self.micro_batch_size)
            x_BT, is_target_BT = x_NT[part], is_target_NT[part]
            targets_KBT = make_targets(x_BT, np.zeros_like(x_BT), is_target_BT, num_heads)
            arrays = (x_BT, targets_KBT, advantage_N[part], value_NT[part])
            batches.append(GroupBatch(*(torch.from_numpy(a).to(ranks.device) for a in arrays)))
        return batches

    def metrics(self, samples, total, num_valid):
        """`grpo/..` of the completions of all ranks, and of their tokens in the last pass."""
        reward_NG = np.reshape(samples.rewards, (-1, self.args.group_size))
        mixed = np.ptp(reward_NG, axis=1).astype(bool).sum() * self.args.group_size
        truncated = sum(tokens[-1] != self.tokenizer.eos_token_id for tokens in samples.tokens)
        numbers = [reward_NG.sum(), mixed, sum(map(len, samples.tokens)), truncated]
        numbers = torch.tensor([*numbers, samples.row_steps, samples.new_tokens])
        *totals, row_steps, new_tokens = self.ranks.sum(numbers.double()).tolist()
        names = ("reward_mean", "mixed_groups", "length", "truncated")
        result = {name: total / self.args.batch_size for name, total in zip(names, totals)}
        result["tokens_per_forward"] = new_tokens / max(1, row_steps)
        result["clip_frac"] = total["clipped"] / num_valid
        if self.args.beta > 0:
            result["kl"] = total["kl"] / num_valid
        return {f"grpo/{name}": value for name, value in result.items()}

    def judge(self, step):
        """Mean reward of held-out prompts: greedy (`eval/accuracy`), and sampled, fixed seeds."""
        args, ranks, total = self.args, self.ranks, len(self.heldout)
        count = min(args.eval_rows or total, total)
        numbers = np.linspace(0, total - 1, count).astype(int)[ranks.rank :: ranks.world_size]
        seeds, metrics = [(args.seed, int(number), 0, 3) for number in numbers], {}
        for name, temperature in (("eval/accuracy", 0), ("eval/reward", 1)):
            samples = self.draw(self.heldout, numbers, seeds, temperature)
            metrics[name] = ranks.sum(torch.tensor(float(sum(samples.rewards)))).item() / count
        if step == 0 and metrics["eval/reward"] < 0.3:
            start = f"--model {args.model} has a sampled reward of {metrics['eval/reward']:.2f}"
            ranks.print(f"warning   {start}; below 0.3 runs did not learn: train it for longer")
        return metrics


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

    # ALGO LOGIC: the start is the reference; a resumed run must find the same one
    sampler = Sampler(model, tokenizer, data, micro_batch_size, args, ranks)
    sums_of_bits = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
    run.record(data, start_fingerprint=sum(sums_of_bits).item())
    model.heads.detached = args.head_loss == "imitate"
    reference = None
    if args.beta > 0:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        reference.heads.layers = reference.heads.layers[:1]
        reference = shard(reference.to(ranks.device), ranks)

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
            run.log(step, sampler.judge(step))  # ALGO LOGIC
        if step == args.max_steps:
            break

        # One update: targets are counted over all ranks and micro-steps before the first backward
        began = time.perf_counter()
        torch.manual_seed(hash((args.seed, step, ranks.rank)))  # dropout: no generator to save
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        num_heads = active_heads(args.mtp_schedule, step, args.max_steps, args.num_heads)

        # ALGO LOGIC: the policy samples what it trains on
        num_heads = 1 if args.head_loss == "none" else num_heads
        samples = sampler.rollout(step)
        batches = sampler.batches(samples, step, num_heads)
        rollout_s = time.perf_counter() - began
        count_K = ranks.sum(count_targets(batches))
        num_valid = count_K[0].clamp(min=1)
        for _ in range(args.updates_per_batch):
            sums = Sums(ranks)
            for number, batch in enumerate(batches, start=1):
                set_gradient_sync(model, number == len(batches))
                with ranks.autocast():
                    loss_KBT = model(batch.x_BT, batch.targets_KBT)

                # ALGO LOGIC: the group's rewards weigh the targets; the start holds the policy
                if batch.old_KBT is None:
                    batch.old_KBT, batch.ref_BT = loss_KBT.detach(), loss_KBT[0].detach()
                    if reference:
                        with ranks.autocast():
                            batch.ref_BT = reference(batch.x_BT, batch.targets_KBT[:1])[0]
                weight_KBT = token_weights(batch, args)
                gain_KBT, stopped_KBT = gains(loss_KBT, batch.old_KBT, weight_KBT, args)
                kl_BT = divergence(loss_KBT[0], batch.ref_BT)
                objective = (args.beta * kl_BT.sum() - gain_KBT.sum()) / num_valid
                objective.backward()
                figures = dict(kl=kl_BT.sum(), clipped=stopped_KBT[0].sum())
                sums.add(batch, loss_KBT, weight_KBT, objective=objective, **figures)
            grad_norm = clip_gradients(model, args.grad_clip)

            # Metrics of the update, exact over all ranks and micro-steps
            metrics = sums.metrics(count_K)
            metrics["train/grad_norm"] = grad_norm
            metrics["train/lr"] = lr
            run.require_finite(step, metrics)
            if grad_norm > 0:  # ALGO LOGIC: without spread and KL, no step on momentum alone
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        metrics["perf/tokens_per_s"] = num_valid.item() / seconds

        # ALGO LOGIC: figures of the last pass and of the completions
        del metrics["weights/ess_frac"]  # it says nothing of weights with signs
        metrics.update(sampler.metrics(samples, sums.total, num_valid.item()))
        metrics["grpo/skipped"] = float(grad_norm == 0)
        metrics["perf/rollout_s"], metrics["perf/train_s"] = rollout_s, seconds - rollout_s
        run.log(step + 1, metrics)
        if step + 1 == args.max_steps:
            run.write_weights(batch, F.pad(weight_KBT[0, :, :-1], (1, 0)))

    # End: the model as others read it, and the held-out figures
    run.finish(model, tokenizer, data, heldout)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
