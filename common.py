"""What every WMTP script shares and no paper claims.

In this order: ranks and FSDP2; heads and model; loss; build, load, save; data; the run (folder,
lock, metrics, tracker, signals, checkpoints); decoding with the heads. Weights, the objective,
the loop and the arguments stay in the scripts.

Shapes: B sequences, T positions, K heads, V vocabulary, D width, N tokens or rows.
"""

import ast
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import glob
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import datasets
import filelock
import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file, save_file
from scipy.optimize import brentq
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from transformers.cache_utils import Cache
from transformers.generation.logits_process import TopPLogitsWarper
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import has_file

IGNORE = -100  # a masked target: prompt, padding, past the end of the row or of the document
HEADS_FILE = "mtp_heads.safetensors"
warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # at every first save


class UsageError(Exception):
    """Bad input: one line that names the value, the limit and the flag. The exit code is 2."""


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def errors_as(start, other=None):
    """Turn what libraries raise, which has no common class, into one line that begins so.

    A `UsageError` keeps its line, with the flag of `start` in the place of the flag `other`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__
        if isinstance(error, UsageError):
            line = str(error)
            raise UsageError(line.replace(other, start.split()[0], 1) if other else line) from None
        raise UsageError(f"{start} ({type(error).__name__}: {first_line(error)})") from error


# ------------------------------------------------------------------------------- ranks and FSDP2
class Output(io.FileIO):
    """Standard output or error; where nobody reads any more (`| head`), what is written is lost."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def run_script(main, args_class, doc):
    """Parse the command line and run `main(args)`; a `UsageError` is one line and exit code 2."""
    is_first = os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ
    for name, stream in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        if stream is not None:  # a daemon has none
            raw = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            options = dict(errors="backslashreplace", line_buffering=True)
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, **options))
    transformers.utils.logging.disable_progress_bar()
    try:
        args = tyro.cli(args_class, description=doc, console_outputs=is_first)
        for name, value in vars(args).items():
            setattr(args, name, plain_name(value))
        main(args)
    except (UsageError, KeyboardInterrupt) as stop:  # a run that trains catches signals itself
        is_error = isinstance(stop, UsageError)
        if is_first:
            line = f"error: {stop}" if is_error else "stopped   by SIGINT"
            print(line, file=sys.stderr, flush=True)
        raise SystemExit(2 if is_error else 130) from None
    except Exception:
        if "mlflow" in sys.modules:
            sys.modules["mlflow"].end_run("FAILED")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def plain_name(value):
    """An argument, or each of a list, with `~` as a home and no slash at the end."""
    if isinstance(value, list):
        return [plain_name(one) for one in value]
    is_text = isinstance(value, str)
    return re.sub(r"(?<=[^:/])/+$", "", os.path.expanduser(value)) if is_text else value


def check_ranges(args, **limits):
    """Raise a `UsageError` for an argument outside of its `name=(least, most)`; None passes."""
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            flag = f"--{name.rstrip('_').replace('_', '-')} {value}"
            raise UsageError(f"{flag}: from {least:g} to {most:g}")


def is_fresh(name):
    """Whether what `--model` names is trained from scratch."""
    return name == "tiny" or name.endswith(".json")


def check_run_args(args):
    """Refuse arguments that are out of range, and set the rates that are None."""
    fresh = is_fresh(args.model)
    if args.train == "heads" and (fresh or args.num_heads < 2):
        flags = f"--model {args.model} --num-heads {args.num_heads}"
        raise UsageError(f"--train heads: {flags}; needs a model with weights and 2 heads or more")
    if args.lr is None:
        args.lr = 3e-3 if fresh else 1e-5
    if args.heads_lr is None:  # SmolLM2-135M after 20 updates: head 2 at 6.3 nats, 9.0 at 1e-5
        has_heads = fresh or Path(model_dir(args.model), HEADS_FILE).exists()
        args.heads_lr = args.lr if has_heads and args.train == "all" else 1e-3
    names = "seed lr heads_lr weight_decay grad_clip warmup_steps eval_every eval_rows save_every"
    check_ranges(args, **dict.fromkeys([*names.split(), "keep_last"], (0, 1e18)))
    check_ranges(args, max_steps=(1, 1e18), num_heads=(1, 1e18))


@dataclasses.dataclass
class Ranks:
    """This process among all of the run: its rank, its device, and the type of its products."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def autocast(self):
        """Context of a forward pass: bf16 products over fp32 master weights, or nothing in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def gather(self, values):
        """The tensor of every rank, `[world_size, ...]`."""
        if self.world_size == 1:
            return values[None]
        values = values.to(self.device).contiguous()
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def sum(self, values):
        """The sum over all ranks, the same to the last bit on each."""
        return self.gather(values).sum(0)

    def broadcast(self, value):
        """Rank 0's `value`, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    @contextlib.contextmanager
    def rank_0_first(self):
        """True on rank 0, which works alone inside; its `UsageError` is raised on all ranks."""
        message = None
        try:
            yield self.rank == 0
        except UsageError as error:
            message = str(error)
        if message := self.broadcast(message):
            raise UsageError(message)

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def print(self, text):
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


def setup_ranks(device, dtype):
    """Join torchrun's process group (without torchrun: one process); choose device and dtype."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not getattr(torch, device).is_available():
        raise UsageError(f"--device {device}: torch finds no such device; use --device cpu")
    if dtype == "auto":
        has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if has_bf16 else "fp32"
    ranks = Ranks(device=torch.device(device))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and "RANK" in os.environ:
        raise UsageError(f"RANK is set without {', '.join(missing)}; unset it or use torchrun")
    ranks.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    if not missing:
        ranks.rank, ranks.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        ranks.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(ranks.device)
    if ranks.world_size > 1:
        timeout = datetime.timedelta(hours=1)  # rank 0 tokenises while the others wait
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
    products = f"{ranks.world_size} rank(s), {dtype} products, fp32 master weights"
    ranks.print(f"device    {device}, {products}")
    return ranks


SMALL_LAYER = 2**20  # parameters below which a group of its own costs more than it saves


def shard(model, ranks):
    """Shard parameters, gradients and optimizer state over all ranks (FSDP2); a no-op on one.

    Gradients are summed, not averaged: the loss is divided by the targets of all ranks already.
    """
    if ranks.world_size == 1:
        return model
    half = ranks.dtype if ranks.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    options = dict(mesh=init_device_mesh(ranks.device.type, (ranks.world_size,)), mp_policy=policy)
    for layer in model.layers:
        if sum(p.numel() for p in layer.parameters()) >= SMALL_LAYER:
            fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    return model


def set_gradient_sync(model, sync):
    """Reduce gradients over ranks in the next backward; micro-steps but the last do without."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sync, recurse=False)


@contextlib.contextmanager
def unsharded(model):
    """Every parameter whole on each rank: inside, `generate` needs no collective.

    It enters the decoder past the root's hooks, and takes other numbers of passes on each rank.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
    if modules:  # a pass of all heads makes them whole; the module that runs first is the root
        token_BT = torch.zeros(1, 2, dtype=torch.long, device=model.causal_lm.lm_head.weight.device)
        with torch.no_grad():
            model(token_BT, token_BT.expand(len(model.heads.layers), 1, 2))
    yield
    for module in modules:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def clip_gradients(model, limit):
    """Scale the gradient down to norm `limit` (0: off); returns its norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return whole(norm).item()


def whole(values):
    """A tensor that is sharded over the ranks in one piece, on every rank; others as they are."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def sum_like(values, sharded):
    """The sum over all ranks of a whole tensor, sharded as another of its shape is."""
    if not isinstance(sharded, DTensor):
        return values
    parts = DTensor.from_local(values, sharded.device_mesh, [Partial()])
    return parts.redistribute(placements=sharded.placements)


def make_optimizer(model, args):
    """AdamW with decay on matrices alone; the rate of a group is `--lr` times its `scale`.

    Moments exist from the start: parameters without them, such as the late heads of a curriculum,
    would be dropped by torch.distributed.checkpoint (pytorch #192202).
    """
    heads_scale = args.heads_lr / args.lr if args.lr else 1.0
    groups = collections.defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_head = re.search(r"layers\.\d+\.layers\.[1-9]", name)  # 2..H
            decay = args.weight_decay if p.ndim >= 2 else 0.0
            groups[decay, heads_scale if is_head else 1.0].append(p)
    groups = [dict(params=ps, weight_decay=decay, scale=s) for (decay, s), ps in groups.items()]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for p in itertools.chain.from_iterable(group["params"] for group in groups):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        optimizer.state[p] = {"step": step, **moments}
    return optimizer


def learning_rate(step, args):
    """Linear warm-up to the peak, then a cosine to zero; `step` counts updates from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    part = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * part))


# ------------------------------------------------------------------------------- heads and model
class Heads(nn.Module):
    """The prediction heads, in the place of the decoder's last layer: all read the trunk's output.

    The decoder goes on with their outputs side by side in the batch, `[K*B, T, D]`. So its own
    final norm, masks, rotary tables, embedding scale and sliding windows serve every head.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.active = len(layers)  # heads 1..active run
        self.detached = False  # heads 2..H send no gradient to the trunk and the unembedding

    def forward(self, hidden_BTD, *args, **kwargs):
        first, *others = list(self.layers)[: self.active]  # a slice of a ModuleList is a new module
        outputs = [first(hidden_BTD, *args, **kwargs)]
        if self.detached:
            hidden_BTD = hidden_BTD.detach()
        return torch.cat([*outputs, *(layer(hidden_BTD, *args, **kwargs) for layer in others)])


class MTPModel(nn.Module):
    """A `transformers` causal LM whose last layer is head 1 of several (2404.19737, section 2).

    Trunk and head 1 are the plain model: `causal_lm` still generates and saves as one.

    Args:
        causal_lm: a causal LM with `model.layers`, `model.norm` and an `lm_head` without bias.
        extra_heads: layers of the same kind for heads 2..H.
    """

    def __init__(self, causal_lm, extra_heads):
        super().__init__()
        layers = causal_lm.model.layers
        for number, layer in enumerate(extra_heads, start=len(layers)):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number  # its slot of the key-value cache
        layers[-1] = Heads([layers[-1], *extra_heads])
        self.causal_lm = causal_lm
        self.softcap = getattr(causal_lm.config, "final_logit_softcapping", None)

    def set_trained(self, part):
        """What trains: `all`, or the `heads` 2..H, which leaves the plain model as it is."""
        self.requires_grad_(part == "all")
        self.heads.layers[1:].requires_grad_(True)

    @property
    def heads(self):
        return self.causal_lm.model.layers[-1]

    @property
    def trunk_layers(self):
        return self.causal_lm.model.layers[:-1]

    @property
    def layers(self):
        return [*self.trunk_layers, *self.heads.layers]

    def hidden(self, x_BT, num_heads):
        """Normed states of heads 1..num_heads, `[K, B, T, D]`."""
        self.heads.active = num_heads
        for layer in list(self.heads.layers)[num_heads:]:
            if isinstance(layer, FSDPModule):  # it never runs: pytorch #194058
                layer.set_requires_gradient_sync(True)
        states = self.causal_lm.model(input_ids=x_BT, use_cache=False).last_hidden_state
        return states.view(num_heads, *x_BT.shape, -1)

    def forward(self, x_BT, targets_KBT, also=None):
        """Cross entropy of each target, nats, fp32, `[K, B, T]`; 0 where the target is `IGNORE`.

        Heads 1..K run, K being the first size of `targets_KBT`. A second `[K, B, T]`, without
        gradient, comes with `also="correct"` (1 where the most likely token is the target) or
        `also="entropy"` (of the head's distribution, nats). The target's probability is exp(-loss).
        Of each loss's gradient by the unembedding it is the norm with `also="norm"`, and with a
        direction `[V, D]` the product with it: how fast the loss grows along the direction. With
        `also="gradient"` the gradient of the summed losses, `[V, D]`, comes second. Of tied
        embeddings the output side alone counts.
        """
        hidden_ND = self.hidden(x_BT, targets_KBT.shape[0]).flatten(0, -2)
        weight_VD, targets_N = self.causal_lm.lm_head.weight, targets_KBT.flatten()
        if torch.is_autocast_enabled(hidden_ND.device.type):
            half = torch.get_autocast_dtype(hidden_ND.device.type)
            hidden_ND, weight_VD = hidden_ND.to(half), weight_VD.to(half)
        if also == "gradient":
            measured = (hidden_ND, weight_VD, targets_N, self.softcap)
            loss_N, gradient_VD = unembedding_gradient(*measured)
            return loss_N.view(targets_KBT.shape).clone(), gradient_VD
        own = targets_KBT[0].numel() if self.heads.detached else len(targets_N)
        parts = [(hidden_ND[:own], weight_VD, targets_N[:own])]
        if own < len(targets_N):
            parts.append((hidden_ND[own:], weight_VD.detach(), targets_N[own:]))
        values = [token_losses(*part, self.softcap, also) for part in parts]
        shape = (-1, *targets_KBT.shape[1:])  # the result of cat is no view, which FSDP2 refuses
        values = [torch.cat([part.view(shape) for part in parts]) for parts in zip(*values)]
        if not weight_VD.requires_grad:  # head 1 does not train, so no product of it goes backward
            values[0] = torch.cat([values[0][:1].detach(), values[0][1:]])
        return values[0] if also is None else tuple(values)


def weights_of_targets(weight_BT, num_heads):
    """`weight_KBT[k-1, b, t] = weight_BT[b, t+k]`, and 0 past the row: one token, one weight."""
    weight_KBT = weight_BT.new_zeros(num_heads, *weight_BT.shape)
    for k in range(1, num_heads + 1):
        weight_KBT[k - 1, :, :-k] = weight_BT[:, k:]
    return weight_KBT


def bounded_softmax(logit_N, epsilon, max_weight):
    """`clip(exp(logit + c), epsilon, max_weight)`, `[N]`, with the c that makes its mean 1.

    N times the softmax where no bound is met; so the bounds hold for the weights that are used.
    Brent's method finds c; sorted logits and their cumulative sums make a trial O(log N). epsilon
    is at most 1, max_weight at least 1. All weights are NaN if a logit is not finite.
    """
    N = len(logit_N)
    if N == 0 or not logit_N.isfinite().all():
        return logit_N * math.nan
    values_N = logit_N.detach().cpu().double()
    sorted_N = np.sort(values_N.numpy())
    log_sums = np.append(-math.inf, np.logaddexp.accumulate(sorted_N))  # [n]: of the n lowest
    log_least, log_most = math.log(max(epsilon, 1e-9)), math.log(max_weight)

    def missing(c):
        first, last = sorted_N.searchsorted([log_least - c, log_most - c])
        inner = math.exp(log_sums[last] + c) - math.exp(log_sums[first] + c)
        return N - first * epsilon - inner - (N - last) * max_weight

    c = brentq(missing, log_least - sorted_N[-1] - 1, log_most - sorted_N[0] + 1)
    return (values_N + c).exp().clamp(epsilon, max_weight).to(logit_N.device, logit_N.dtype)


def select(score_N, skip_ratio):
    """True for all but the round(ratio N) lowest scores (2404.07965, eq. 5), first ones of ties."""
    num_kept = max(1, len(score_N) - round(skip_ratio * len(score_N)))
    order = score_N.sort(descending=True, stable=True).indices
    kept_N = torch.zeros_like(score_N, dtype=torch.bool)
    kept_N[order[:num_kept]] = True
    return kept_N


def weights_of_ess(weights, share):
    """`weights(strength)`, `[N]`, at the strength that makes their effective share `share`.

    The share, (sum u)^2 / (N sum u^2), falls with the strength. The first of exp(-12), exp(-10), ..
    exp(8) at which it is below `share` brackets the strength. If bounds on the weights keep it
    above at all of these, the one with the least share is taken.
    """

    def excess(log_strength):
        u_N = weights(math.exp(log_strength)).cpu().double()
        return (u_N.sum() ** 2 / (len(u_N) * u_N.square().sum())).item() - share

    tried = []
    for high in range(-12, 10, 2):
        tried.append((excess(high), high))
        if not tried[-1][0] > 0:  # NaN too, of scores that are not finite
            break
    if tried[-1][0] <= 0 and len(tried) > 1:
        return weights(math.exp(brentq(excess, high - 2, high, xtol=1e-6)))
    return weights(math.exp(min(tried)[1]))


def whiten(score_N, moments, decay=0.99):
    """Scores less their moving mean, over their moving deviation; updates `moments` `[3]`."""
    if len(score_N) > 0:
        new = torch.stack([torch.ones_like(moments[0]), score_N.mean()])
        moments[:2] = decay * moments[:2] + (1 - decay) * new
        deviation = (score_N - moments[1] / moments[0]).square().mean()
        moments[2] = decay * moments[2] + (1 - decay) * deviation
    mean, deviation = moments[1] / moments[0], (moments[2] / moments[0]).sqrt()
    return (score_N - mean) / (deviation + 1e-4)


def control_weights(u_N, control, key, row_N=None):
    """Weights without information: `shuffle` permutes u (within rows `row_N`), `random` draws anew.

    `key` seeds the draw; the mean stays.
    """
    if control == "none" or len(u_N) == 0:
        return u_N
    random_numbers, N = np.random.default_rng(key), len(u_N)
    if control == "shuffle":
        rows = np.zeros(N) if row_N is None else row_N.cpu().numpy()
        order = np.lexsort((random_numbers.random(N), rows))
        return u_N[torch.from_numpy(order).to(u_N.device)]
    drawn_N = u_N[torch.from_numpy(random_numbers.integers(0, N, N)).to(u_N.device)]
    return drawn_N * (u_N.mean() / drawn_N.mean()) if drawn_N.any() else torch.ones_like(u_N)


def active_heads(schedule, step, max_steps, num_heads):
    """How many heads, 1..k, train in update `step` (0-based): the curricula of 2505.22757."""
    part = min(num_heads - 1, step * num_heads // max_steps)
    return {"constant": num_heads, "forward": 1 + part, "reverse": num_heads - part}[schedule]


# ------------------------------------------------------------------------------------------ loss
CHUNK_LOGITS = {"cpu": 2**23, "mps": 2**23, "cuda": 2**26}  # 32 and 256 MB (no GPU was tried)


def token_losses(hidden_ND, weight_VD, targets_N, softcap, also=None, chunk=None):
    """Cross entropy `[N]`, and the figure `[N]` that `also` asks for.

    Logits that fit into one chunk (of tokens) are kept for the backward. Otherwise they exist a
    chunk at a time and the backward makes them again.
    """
    chunk = chunk or max(256, CHUNK_LOGITS[hidden_ND.device.type] // len(weight_VD))
    if len(targets_N) > chunk:
        values = TokenLosses.apply(hidden_ND, weight_VD, targets_N, softcap, chunk, also)
        return values[:1] if also is None else values
    logits = logits_of(hidden_ND, weight_VD, softcap)
    loss_N = F.cross_entropy(logits, targets_N, ignore_index=IGNORE, reduction="none")
    if also is None:
        return (loss_N,)
    logits, hidden_ND = logits.detach(), hidden_ND.detach()
    if also == "correct":
        return loss_N, (logits.argmax(-1) == targets_N).float()
    work = (F.softmax(logits, -1), slope_of(logits, softcap), targets_N, hidden_ND)
    return loss_N, token_figure(also, *work)


def token_figure(also, softmax_NV, slope_NV, targets_N, hidden_ND):
    """The figure of each token, `[N]`, that `MTPModel.forward` names; 0 without a target.

    A token's gradient by the unembedding is the outer product of an error of the logits, `[V]`, and
    its state, `[D]`. So neither its norm nor its product with a direction needs that gradient. The
    error is written over the softmax.
    """
    if also == "entropy":
        figure_N = torch.special.entr(softmax_NV).sum(-1)
    else:
        one_hot_N1 = targets_N[:, None].clamp(min=0)
        error_NV = softmax_NV.scatter_add_(-1, one_hot_N1, -torch.ones_like(softmax_NV[:, :1]))
        if slope_NV is not None:
            error_NV *= slope_NV
        if also == "norm":
            figure_N = error_NV.norm(dim=-1) * hidden_ND.float().norm(dim=-1)
        else:  # a direction, `[V, D]`
            product_ND = error_NV.to(also.dtype) @ also
            figure_N = (product_ND.float() * hidden_ND.float()).sum(-1)
    return figure_N.masked_fill(targets_N == IGNORE, 0.0)


def slope_of(logits, softcap):
    """Derivative of the soft cap at these capped logits; None without a cap, where it is 1."""
    return None if softcap is None else 1 - (logits / softcap) ** 2


def unembedding_gradient(hidden_ND, weight_VD, targets_N, softcap):
    """Cross entropy `[N]`, and the gradient of its sum by the unembedding, `[V, D]`."""
    weight_VD = weight_VD.detach().requires_grad_()
    with torch.enable_grad():
        (loss_N,) = token_losses(hidden_ND.detach(), weight_VD, targets_N, softcap)
        (gradient_VD,) = torch.autograd.grad(loss_N.sum(), weight_VD)
    return loss_N.detach(), gradient_VD


def logits_of(hidden_ND, weight_VD, softcap, buffer=None):
    """Logits in fp32, soft-capped where the family does so; `buffer` is memory for the product."""
    if buffer is None:
        logits = F.linear(hidden_ND, weight_VD).float()
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)
    size = len(hidden_ND), len(weight_VD)
    logits = torch.mm(hidden_ND, weight_VD.t(), out=buffer[: math.prod(size)].view(size)).float()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class TokenLosses(torch.autograd.Function):
    """Cross entropy of every token, logits for a chunk of tokens at a time.

    Unreduced, as weights may depend on the losses; so the backward makes the logits again (four
    products where a reduced loss costs three). Tokens without target, and in the backward those
    of weight 0, are in no product. Sums are fp32 whatever the type of the products.
    """

    @staticmethod
    def chunks(mask_N, chunk):
        """Numbers of the tokens in the mask, in groups of `chunk`."""
        if torch.compiler.is_compiling():  # sizes must be known: every token is in the products
            return torch.arange(len(mask_N), device=mask_N.device).split(chunk)
        return mask_N.nonzero()[:, 0].split(chunk)

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, softcap, chunk, also):
        total_N = hidden_ND.new_zeros(len(targets_N), dtype=torch.float32)  # log sum exp of logits
        loss_N, figure_N = torch.zeros_like(total_N), torch.zeros_like(total_N)
        buffer = hidden_ND.new_empty(chunk * len(weight_VD))
        for rows in TokenLosses.chunks(targets_N != IGNORE, chunk):
            logits = logits_of(hidden_ND[rows], weight_VD, softcap, buffer)
            chosen = logits.gather(-1, targets_N[rows, None].clamp(min=0))[:, 0]
            largest, best = logits.max(-1, keepdim=True)
            is_gradient = isinstance(also, torch.Tensor) or also == "norm"
            slope = slope_of(logits, softcap) if is_gradient else None
            sum_N1 = logits.sub_(largest).exp_().sum(-1, keepdim=True)
            total_N[rows] = (sum_N1.log() + largest)[:, 0]
            loss_N[rows] = total_N[rows] - chosen
            if also == "correct":
                figure_N[rows] = (best[:, 0] == targets_N[rows]).float()
            elif also is not None:
                work = (logits.div_(sum_N1), slope, targets_N[rows], hidden_ND[rows])
                figure_N[rows] = token_figure(also, *work)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, total_N)
        ctx.softcap, ctx.chunk = softcap, chunk
        ctx.mark_non_differentiable(figure_N)
        return loss_N.masked_fill_(targets_N == IGNORE, 0.0), figure_N

    @staticmethod
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, targets_N, total_N = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_N = grad_N.masked_fill(targets_N == IGNORE, 0.0)
        buffer = hidden_ND.new_empty(ctx.chunk * len(weight_VD))
        for rows in TokenLosses.chunks(grad_N != 0, ctx.chunk):
            hidden, grad = hidden_ND[rows], grad_N[rows, None]
            logits = logits_of(hidden, weight_VD, ctx.softcap, buffer)
            slope = slope_of(logits, ctx.softcap)
            error = logits.sub_(total_N[rows, None]).exp_().mul_(grad)
            error.scatter_add_(-1, targets_N[rows, None].clamp(min=0), -grad)  # softmax - one-hot
            error = (error if slope is None else error.mul_(slope)).to(weight_VD.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = error @ weight_VD
            if grad_weight is None:
                continue
            if error.dtype == torch.float32:
                grad_weight.addmm_(error.t(), hidden)
            else:
                grad_weight += error.t() @ hidden
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None


# ----------------------------------------------------------------------------- build, load, save
TINY = dict(  # of the sizes tried, the one that learns most in five minutes on 2 CPU cores
    vocab_size=259, hidden_size=128, intermediate_size=352, num_hidden_layers=7,
    num_attention_heads=4, max_position_embeddings=2048, initializer_range=0.05,
    tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def build_model(name, num_heads, seq_len=None, recompute="none"):
    """Model and tokenizer from what `--model` names.

    Args:
        name: `tiny` or a `config.json` (from scratch: its layers are trunk and heads together),
            a Hugging Face causal LM (folder or hub name; heads 2..H start as copies of its last
            layer), or a run folder or `model/` of ours.
        num_heads: H, at least 1; for a folder that holds heads, the number it holds.
        seq_len: longest input, tokens.
        recompute: `heads` or `all` layers run again in the backward.

    Raises:
        UsageError: no such model, an unsupported family, numbers that do not fit.
    """
    if name == "tiny":
        folder, model = None, from_config(transformers.LlamaConfig(**TINY), num_heads)
        # 0.07 bits per byte better than a deviation of 0.05, after 1 M tokens
        nn.init.normal_(model.causal_lm.model.embed_tokens.weight)
    elif is_fresh(name):  # a config.json
        folder = Path(name).parent
        with errors_as(f"--model {name}: not a model that can be used"):
            model = from_config(transformers.AutoConfig.from_pretrained(name), num_heads)
    else:
        folder, model = model_dir(name), load_mtp(name, num_heads)
    tokenizer = load_tokenizer(folder, model)
    longest = max_positions(model.causal_lm.config)
    if seq_len is not None and seq_len > longest:
        raise UsageError(f"--seq-len {seq_len}: --model {name} has {longest} positions at most")
    if recompute != "none":
        model.causal_lm.activation_checkpointing_enable()
    if recompute == "heads":
        for layer in model.trunk_layers:
            layer.gradient_checkpointing = False
    return model, tokenizer


def max_positions(config):
    """Longest text that a model has positions for, tokens; infinite where it has no limit."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def model_dir(name):
    """The `model/` of a run folder; any other name as it is."""
    return str(Path(name, "model")) if Path(name, "model", "config.json").exists() else str(name)


def load_tokenizer(folder=None, model=None):
    """The tokenizer in `folder`; bytes (`ByT5Tokenizer`: byte + 3, EOS 1) where it has none.

    It is what its files say, not what is usual in the family of the model (`AutoTokenizer`).

    Raises:
        UsageError: it cannot be read, does not end texts, or is not that of `model`.
    """
    is_local = folder is not None and Path(folder).is_dir()
    files = [*Path(folder).glob("tokenizer*"), *Path(folder).glob("vocab*")] if is_local else []
    if folder is None or (is_local and not files):
        tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    else:
        with errors_as(f"--model {folder}: not a model that can be used"):
            kind = get_tokenizer_config(folder).get("tokenizer_class", "")
            kind = getattr(transformers, kind, transformers.AutoTokenizer)
            if has_file(folder, "tokenizer.json"):
                kind = transformers.PreTrainedTokenizerFast
            tokenizer = kind.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"--model {folder}: its tokenizer has no end-of-sequence token")
    entries = len(tokenizer)
    rows = entries if model is None else len(model.causal_lm.lm_head.weight)
    if not 0 <= rows - entries < 1024:  # families pad: by 399 in Qwen2.5-7B
        sizes = f"its vocabulary has {rows} entries, its tokenizer {entries}"
        raise UsageError(f"--model {folder}: {sizes}; name a folder whose tokenizer is its own")
    return tokenizer


def from_config(config, num_heads):
    """A fresh model with `config.num_hidden_layers` layers, trunk and heads together.

    Heads are of the kind of head 1 (sliding or full attention), whatever `config` says of them.

    Raises:
        UsageError: more heads than layers.
    """
    total = config.num_hidden_layers
    if num_heads > total:
        layers = f"the model has {total} layers, trunk and heads together"
        raise UsageError(f"--num-heads {num_heads}: {layers}; at most {total}")
    causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers, kept = causal_lm.model.layers, total - num_heads + 1
    causal_lm.model.layers = layers[:kept]
    causal_lm.config.num_hidden_layers = kept
    if getattr(config, "layer_types", None):
        causal_lm.config.layer_types = config.layer_types[:kept]
    return add_heads(causal_lm, [layer.state_dict() for layer in layers[kept:]])


def load_mtp(name, num_heads=None):
    """Load trunk and heads from a run folder, a `model/` or a Hugging Face model.

    Args:
        num_heads: H; None takes the number that the files hold. Where they hold head 1 alone,
            heads 2..H are copies of it (taking layers away instead hurts: 2404.19737, table S6).

    Raises:
        UsageError: no such model; another number of heads asked for than the files hold.
    """
    folder, tensors = model_dir(name), {}
    with errors_as(f"--model {name}: not a model that can be used"):
        options = dict(dtype=torch.float32, output_loading_info=True)
        causal_lm, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise ValueError(f"it lacks {len(lacking)} weights, {lacking[0]} among them")
        if Path(folder, HEADS_FILE).exists():
            tensors = load_file(Path(folder, HEADS_FILE))
        for key, value in {**causal_lm.state_dict(), **tensors}.items():
            if not value.isfinite().all():
                raise UsageError(f"--model {name}: {key} holds NaN or infinite weights")
        states = collections.defaultdict(dict)
        for key, value in tensors.items():
            _, number, parameter = key.split(".", 2)  # heads.2.self_attn...
            states[int(number)][parameter] = value
        head_states = [states[number] for number in sorted(states)]
        if not tensors:
            head_states = [causal_lm.model.layers[-1].state_dict()] * ((num_heads or 1) - 1)
        held = 1 + len(head_states)
        if num_heads not in (None, held):
            raise UsageError(f"--num-heads {num_heads}: {name} has {held} heads, no other number")
        return add_heads(causal_lm, head_states)


@torch.no_grad()
def add_heads(causal_lm, head_states):
    """The model with heads 2..H: copies of its last layer, with the weights in `head_states`.

    Raises:
        UsageError: a family in which head 1 is not the plain model to rounding.
    """
    extra_heads = [copy.deepcopy(causal_lm.model.layers[-1]) for _ in head_states]
    for head, state in zip(extra_heads, head_states):
        head.load_state_dict(state)
    unembedding = causal_lm.lm_head
    x_BT = torch.arange(12)[None] % len(unembedding.weight)
    plain_BTV = causal_lm.eval()(input_ids=x_BT, use_cache=False).logits
    model = MTPModel(causal_lm, extra_heads).eval()
    own_BTV = logits_of(model.hidden(x_BT, 1)[0], unembedding.weight, model.softcap)
    is_same = (own_BTV - plain_BTV).abs().max() <= 1e-4 * plain_BTV.abs().max()
    if unembedding.bias is not None or not is_same:
        family = f"the family {causal_lm.config.model_type} is not supported"
        raise UsageError(f"--model: {family} (its logits are not those of head 1)")
    return model


def save_model(model, tokenizer, folder, ranks):
    """Write trunk and head 1 as a Hugging Face model with its tokenizer, and heads 2..H beside it.

    It is written under another name and renamed, so `folder` is whole. Every rank takes part.
    """
    full = full_state(model)
    if ranks.rank == 0:
        plain, heads, last = {}, {}, f"model.layers.{len(model.trunk_layers)}."
        for key, value in full.items():
            key = key.removeprefix("causal_lm.").replace(f"{last}layers.0.", last)
            if key.startswith(f"{last}layers."):
                number, parameter = key.removeprefix(f"{last}layers.").split(".", 1)
                heads[f"heads.{int(number) + 1}.{parameter}"] = value.contiguous()
            else:
                plain[key] = value
        if model.causal_lm.config.tie_word_embeddings:
            plain.pop("lm_head.weight", None)
        temporary = Path(f"{folder}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.causal_lm.save_pretrained(temporary, state_dict=plain)
        tokenizer.save_pretrained(temporary)
        if heads:
            save_file(heads, temporary / HEADS_FILE, metadata={"format": "pt"})
        temporary.rename(folder)
    ranks.barrier()


def full_state(module):
    """State of a module, whole, on the CPU of rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


# --------------------------------------------------------------------------------------------- data
PRESETS = ("stdlib", "stdlib:a", "stdlib:b", "stdlib-bugs", "mbpp", "sums")
CORRECT = 0.5  # a record is correct if its reward is above
LARGEST_WEIGHT = 1e9  # of a record or a span in the data
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXTS = """.txt .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .cs .java .kt .scala .swift .js .ts
    .jsx .tsx .go .rs .rb .php .pl .lua .jl .r .sh .sql .html .css .xml .yaml .yml .toml""".split()
LAYOUTS = "task_id text code test_list, messages, instruction input output, instruction output, "
LAYOUTS += "prompt completion, text, content"  # columns of a row; the first that are there count
DOCUMENT = {  # columns of a document, and what they hold where a source does not have them
    "prompt": "", "completion": "", "is_chat": False, "reward": math.nan, "part": "",
    "group": "", "sibling": "", "fault_start": -1, "fault_end": -1, "weight": 1.0, "weights": "[]",
}  # fmt: skip


@dataclasses.dataclass
class Data:
    """Packed rows of `seq_len` tokens, memory-mapped, and figures of the held-out text.

    Columns of `train` and `heldout`: `input_ids`, `document` (number of a token's document, -1
    padding), `is_target` (False in prompts and padding), `is_noise` (True where `--noise-frac` put
    it, and in a record's known fault); of records with outcomes also `reward` and `sibling` (number
    of their task); of training data with weights also `weight` of a token and `weight_mean`.
    """

    train: datasets.Dataset  # of records with outcomes the correct ones
    records: datasets.Dataset  # all training rows, wrong records too
    heldout: datasets.Dataset
    fingerprint: str  # of the text of both and of the split
    tokenizer_fingerprint: str
    heldout_fingerprint: str  # of the held-out text: where it is the same, bits per byte compare
    heldout_bytes: int  # UTF-8 bytes of held-out target text (with outcomes: of correct records)
    heldout_tokens: int  # tokens of the same text, end-of-sequence tokens included
    zlib_bits_per_byte: float  # the same text as one stream through zlib level 9


def load_data(args, tokenizer, ranks, score=None):
    """Read, split by document, tokenise once into a cache, and memory-map what `--data` names.

    Rank 0 does this alone; every rank must see the folder of the cache (`HF_HOME`).

    Args:
        args.data: a preset, a file, a glob, a URL, a folder of texts, or a hub name. Rows have
            `text` or `content`; `prompt` and `completion` (texts, or messages) and perhaps `reward`
            from 0 to 1; `messages`; or `instruction`, `input` and `output`. They may have weights
            from 0 on, which multiply those of the algorithm: `weight` of the row, EOS too, times
            `weights`, spans `[start, end, weight]` of characters of the completion or text (1
            outside; the last counts of those that overlap a token). In batches they are divided,
            once, by the mean over head 1's targets in all of `train`. (Divided in each micro-step,
            the weight of a record would have no effect where it is alone.) Held-out figures have
            none.
        args.heldout_data: held-out documents, named so too; empty: a part of `args.data`.
        args.seed: fixes which documents are held out. `stdlib:a` and `stdlib:b` train on one half
            each of what `stdlib` trains on with seed 0, and hold out the same, whatever the seed.
        args.noise_frac: share of the non-blank training lines replaced by random characters; with
            `args.noise_by` "byte" of the characters, with "document" of the documents, every line.
        score: `score(prompts, completions)` gives the rewards `[N]` of records without one.

    Raises:
        UsageError: no such data, a row that cannot be used, or no document left that fits.
    """
    check_ranges(args, noise_frac=(0, 1), seq_len=(2, 1e9))
    datasets.disable_progress_bars()
    folder = Path(datasets.config.HF_DATASETS_CACHE, "wmtp")
    with errors_as(f"{folder}: cannot be written; set HF_HOME"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    with ranks.rank_0_first() as is_first:
        data = _load_data(args, tokenizer, score) if is_first else None
    with errors_as(f"{folder}: lacks the rows that rank 0 wrote; set HF_HOME to a shared folder"):
        return ranks.broadcast(data)


def _load_data(args, tokenizer, score):
    documents = _documents(args, tokenizer, score)
    has_outcomes = documents["reward"].notna().any()
    is_packed = not has_outcomes and not documents["prompt"].any()
    rows, fingerprints = {}, []
    for part in ("training", "held-out"):
        chosen = documents[documents["part"] == part].fillna({"reward": 1.0})
        noise = (args.noise_frac, args.noise_by, args.seed)
        if part == "held-out":
            chosen, noise = chosen.assign(weight=1.0, weights="[]"), (0, "", 0)
        packed = _pack(chosen, is_packed, tokenizer, args.seq_len, noise)
        kept = chosen
        if not is_packed:
            kept = chosen.iloc[packed["document"][:].reshape(-1, args.seq_len)[:, 0]]
        if len(kept) < len(chosen):
            number = f"{len(chosen) - len(kept)} of {len(chosen)} {part} records"
            print(f"data      left out {number}: longer than --seq-len {args.seq_len} tokens")
        if not (kept["reward"] > CORRECT).any():
            fits = f"fits --seq-len {args.seq_len}"
            needed = f"{fits}, with a reward above {CORRECT} if rewards are given"
            raise UsageError(f"--data {args.data}: no {part} document {needed}")
        fingerprints.append(digest(_texts(chosen)))
        if has_outcomes:
            packed = packed.add_column("reward", kept["reward"].to_numpy())
            packed = packed.add_column("sibling", kept["sibling"].to_numpy())
            fingerprints.append(digest(kept["reward"].tolist()))
        if "weight" in packed.column_names:
            packed = _with_mean_weight(packed.with_format("numpy"))
            mean = packed[0]["weight_mean"]
            if mean == 0:
                raise UsageError(f"--data {args.data}: the weights of all training targets are 0")
            print(f"data      has weights: their mean over the targets, {mean:.3g}, becomes 1")
            fingerprints.append(digest(chosen[["weight", "weights"]].to_numpy().tolist()))
        rows[part] = packed.with_format("numpy")

    train = records = rows["training"]
    if has_outcomes:  # batches hold no row that is not imitated
        train = records.select(np.flatnonzero(records["reward"][:] > CORRECT))
    is_correct_D = (chosen["reward"] > CORRECT).to_numpy()  # of held-out documents
    document_NT = packed["document"][:]
    is_measured_NT = packed["is_target"][:] & is_correct_D[document_NT]
    texts = chosen["completion"].iloc[np.unique(document_NT[is_measured_NT])].tolist()
    stream = "".join(texts).encode()
    return Data(
        train=train,
        records=records,
        heldout=rows["held-out"],
        fingerprint=digest(fingerprints),
        tokenizer_fingerprint=_tokenizer_fingerprint(tokenizer),
        heldout_fingerprint=digest(texts),
        heldout_bytes=len(stream),
        heldout_tokens=int(is_measured_NT.sum()),
        zlib_bits_per_byte=8 * len(zlib.compress(stream, 9)) / len(stream),
    )


def _with_mean_weight(rows):
    """The rows with the mean of the data's weights over all targets of head 1, as a column."""
    total, count = 0.0, 0
    for block in np.array_split(np.arange(len(rows)), 1 + len(rows) // 1000):
        batch = load_batch(rows, block, 1, "cpu")
        weight_N = batch.weight_BT[:, 1:][batch.targets_KBT[0, :, :-1] != IGNORE].double()
        total, count = total + weight_N.sum().item(), count + len(weight_N)
    mean_N = np.full(len(rows), total / count)
    return rows.add_column("weight_mean", mean_N).with_format("numpy")


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _tokenizer_fingerprint(tokenizer):
    """Hash of all that makes tokens: vocabulary, merges, normaliser, template."""
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
    if tokenizer.is_fast:
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        parts += [pipeline[key] for key in sorted(pipeline.keys() - {"truncation", "padding"})]
    return digest(parts)


def _texts(documents):
    """Each document as a list of its text, or of prompt and completion."""
    pairs = zip(documents["prompt"], documents["completion"])
    return [[text for text in pair if text] for pair in pairs]


def _documents(args, tokenizer, score):
    """All documents as a table, each with its `part`; they all have a `reward`, or none has one."""
    name, half = args.data, args.data.partition("stdlib:")[2] if args.data in PRESETS else ""
    table = _read_documents("stdlib" if half else name, tokenizer)
    if args.heldout_data:
        heldout = _read_documents(args.heldout_data, tokenizer)
        texts = table["prompt"] + table["completion"]
        if number := (heldout["prompt"] + heldout["completion"]).isin(texts).sum():
            print(f"warning   {number} documents of --heldout-data are in --data too")
        parts = [table.assign(part="training"), heldout.assign(part="held-out")]
        table = pd.concat(parts, ignore_index=True)
    if table["is_chat"].nunique() > 1:
        raise UsageError(f"--data {name}: holds messages and plain texts; name one kind alone")

    is_lacking_N = table["reward"].isna()
    if score is not None and is_lacking_N.any():
        columns = [table.loc[is_lacking_N, column].tolist() for column in ("prompt", "completion")]
        table.loc[is_lacking_N, "reward"] = score(*columns)
    elif 0 < is_lacking_N.sum() < len(table):
        number = f"{is_lacking_N.sum()} of {len(table)} documents have no reward"
        raise UsageError(f"--data {name}: {number}; --reward-model scores them")
    siblings = table["sibling"].where(table["sibling"] != "", table["prompt"])
    table["sibling"] = pd.factorize(siblings, sort=True)[0]

    if not table["part"].any():
        table["part"] = _split(table, 0 if half else args.seed, name)
    if half:  # by the text, so that copies of a file fall into one half
        sides = table["completion"].map(lambda text: "ab"[zlib.crc32(text.encode()) % 2])
        table = table[(sides == half) | (table["part"] == "held-out")]
    return table


def _split(documents, seed, name):
    """`part` of each document, training or held-out, `[N]`.

    Groups (a text and its copies, or the records of one prompt) are held out in the order of a hash
    of (seed, text) until 3 % of the bytes (10 % of records with outcomes; at most 4 MB) are
    reached. The group that reaches them is held out too, which favours no length.
    """
    table = pd.DataFrame({"hash": [digest([seed, texts]) for texts in _texts(documents)]})
    table["bytes"] = [len(text.encode()) for text in documents["completion"]]
    table["group"], share = table["hash"], 0.03
    if documents["reward"].notna().any():
        groups = documents["group"].where(documents["group"] != "", documents["prompt"])
        table["group"], share = groups.tolist(), 0.1
    groups = table.groupby("group", sort=False).agg({"hash": "min", "bytes": "sum"})
    if len(groups) < 2:
        raise UsageError(f"--data {name}: holds one text, prompt or group; the split needs two")
    groups = groups.sort_values("hash", kind="stable")
    before = groups["bytes"].cumsum() - groups["bytes"]
    is_heldout = before < min(4_000_000, share * groups["bytes"].sum())
    is_heldout.iloc[-1] = False
    return table["group"].map(is_heldout).map({True: "held-out", False: "training"}).to_numpy()


def _read_documents(name, tokenizer):
    """Documents of `--data` as a table with the columns of DOCUMENT, cached.

    It says what was read and how many documents are empty; those are left out. A single text
    without spans is cut into 100 documents of one length, so that some can be held out.
    """
    with errors_as(f"--data {name}: cannot be read"):
        kind, content, sources = _source(name)

        def documents():
            for file, rows in sources:
                with errors_as(f"--data {file}: cannot be read"):
                    for number, row in enumerate(rows, start=1):
                        with errors_as(f"--data {file}: row {number}: cannot be read"):
                            parsed = _documents_of_row(row, tokenizer)
                        yield from (DOCUMENT | document for document in parsed)

        rules = [Path(__file__).read_text(), sys.version, tokenizer.chat_template]
        key = digest([name, content, rules])
        read = datasets.Dataset.from_generator(documents, fingerprint=key).to_pandas()

    table = read[read["completion"] != ""].reset_index(drop=True)
    if len(table) == 0:
        raise UsageError(f"--data {name}: all of its {len(read)} documents are empty")
    prompt, text, eos = table["prompt"][0], table["completion"][0], tokenizer.eos_token
    notes = f", {len(read) - len(table):,} empty ones left out" if len(table) < len(read) else ""
    if num_marked := table["completion"].str.endswith(eos).sum():
        notes += f", {num_marked:,} end in {eos} as text, and EOS follows"
    start = repr((prompt + text)[:60])  # no control characters for the terminal
    print(f"data      read as {kind}: {len(table):,} document(s){notes}; the first: {start}")
    if len(table) == 1 and not prompt and table["weights"][0] == "[]":
        cuts = np.linspace(0, len(text), 101).astype(int)
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]
        table = table.loc[[0] * len(pieces)].assign(completion=pieces).reset_index(drop=True)
    return table


def _source(name):
    """What `--data` is read as, what changes with its content, and its rows: [(file, rows)]."""
    if name in ("stdlib", "stdlib-bugs"):
        texts = stdlib_texts()
        rows = stdlib_bugs(texts) if name == "stdlib-bugs" else [{"text": t} for t in texts]
        return "source files of Python", texts, [(name, rows)]
    if name == "sums":
        return name, "", [(name, sums())]
    is_file = Path(name).exists() or _suffix(name) in {*TABLES, *TEXTS}
    if name == "mbpp" or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_file):
        mbpp = dict(path="google-research-datasets/mbpp", name="full", split="all")
        rows = datasets.load_dataset(**mbpp if name == "mbpp" else dict(path=name, split="train"))
        return "data set", rows._fingerprint, [(name, rows)]

    if name and Path(name).is_dir():
        inside = sorted(str(file) for file in Path(name).rglob("*") if file.is_file())
        files = [file for file in inside if _suffix(file) in TEXTS]
        if len(files) < len(inside):
            print(f"data      {len(inside) - len(files)} files of {name} left out: no texts")
    elif "://" in name or Path(name).is_file():
        files = [name]
    else:
        files = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    if not files:
        kinds = "no such file, no folder of texts (name its tables by folder/*.jsonl), no hub name"
        raise UsageError(f"--data {name}: {kinds} and no preset ({', '.join(PRESETS)})")
    kinds = " and ".join(sorted({_suffix(file)[1:] for file in files}))
    states = [store.ukey(path) for store, path in map(file_system, files)]  # size, ctime, ETag
    return kinds, states, [(file, _file_rows(file)) for file in files]


def _suffix(file):
    """`.jsonl` of `A.JSONL.gz?x`: the last suffix that is no compression, in lower case."""
    path = file.partition("?")[0] if "://" in file else file
    suffixes = [s for s in Path(path.lower()).suffixes if s not in (".gz", ".bz2", ".xz")]
    return suffixes[-1] if suffixes else ""


def file_system(name):
    """The file system of a path or a URL, and the path in it; `::` chains URLs, never paths."""
    return url_to_fs(name) if "://" in name else (LocalFileSystem(), os.path.abspath(name))


def _file_rows(file):
    """Yield the rows of a file, each with its columns. A text is one row; a cell of CSV is text."""
    suffix, (store, path) = _suffix(file), file_system(file)
    if suffix not in {*TABLES, *TEXTS}:
        raise ValueError(f"unknown kind of file; known: {' '.join(TABLES)}, texts such as .txt")
    if suffix == ".parquet":
        table = pyarrow.parquet.read_table(path, filesystem=store, partitioning=None)
        yield from table.to_pylist()
        return
    with store.open(path, "rt", encoding="utf-8-sig", newline="", compression="infer") as stream:
        if suffix in (".csv", ".tsv"):
            csv.field_size_limit(2**31 - 1)
            dialect = "excel" if suffix == ".csv" else "excel-tab"
            yield from csv.DictReader(stream, dialect=dialect, strict=True)
        elif suffix in TABLES:  # a list, or JSON values one after the other, on any lines
            text, end, decoder = stream.read().strip(), 0, json.JSONDecoder()
            while end < len(text):
                value, end = decoder.raw_decode(text, end)
                yield from value if isinstance(value, list) else [value]
                end = re.compile(r"\s*").match(text, end).end()
        else:
            yield {"text": stream.read()}


def _documents_of_row(row, tokenizer):
    """The documents of a row, one for each answer in `messages`; ValueError if it has none."""
    layouts = [names.split() for names in LAYOUTS.split(",")]
    layout = next((names for names in layouts if set(names) <= set(row)), None)
    if layout is None or None in row:  # csv: None holds the cells that have no column
        names = ", ".join(map(str, row))
        raise ValueError(f"columns {names}; needs text, or prompt and completion")
    is_chat = isinstance(row[layout[0]], list)
    extra = {"is_chat": is_chat}
    for column in ("group", "sibling", "fault_start", "fault_end", "reward", "weight"):
        if row.get(column) not in (None, ""):
            extra[column] = type(DOCUMENT[column])(row[column])
    for column, limit in (("reward", 1), ("weight", LARGEST_WEIGHT)):
        if not 0 <= extra.get(column, 0) <= limit:
            raise ValueError(f"the {column} {row[column]} is no number from 0 to {limit:g}")
    if row.get("weights") and (is_chat or "task_id" in layout):
        raise ValueError("weights: the text of such rows is written anew; give one weight a row")
    if "task_id" in layout:
        return [extra | mbpp_record(row)]
    for column in layout:
        if not isinstance(row[column], list if is_chat else str | None):
            held = f"{type(row[column]).__name__} {repr(row[column])[:40]}"
            raise TypeError(f"the column {column} holds {held}, not text")

    *asked, answer = [row[column] or "" for column in layout]
    if "messages" in layout:
        numbers = [n for n, message in enumerate(answer) if message["role"] == "assistant"]
        pairs = [(answer[:n], [answer[n]]) for n in numbers]
    elif "instruction" in layout:
        pairs = [("".join(text + "\n" for text in asked if text), answer)]
    else:
        pairs = [(asked[0] if asked else "", answer)]
    if is_chat:
        pairs = [_chat_texts(*pair, tokenizer) for pair in pairs]
    "".join(itertools.chain(*pairs)).encode()  # fails at half of a surrogate pair
    spans = row.get("weights") or []
    spans = json.loads(spans) if isinstance(spans, str) else spans  # a cell of CSV
    for span in spans:
        try:
            start, end, weight = span
            is_valid = 0 <= start < end <= len(answer) and 0 <= weight <= LARGEST_WEIGHT
        except (TypeError, ValueError):
            is_valid = False
        if not is_valid or start % 1 or end % 1:
            needed = f"[start, end, weight]: {len(answer)} characters, 0 to {LARGEST_WEIGHT:g}"
            raise ValueError(f"weights: {span} is not {needed}")
    extra["weights"] = json.dumps(spans)
    return [extra | {"prompt": prompt, "completion": text} for prompt, text in pairs or [("", "")]]


def _chat_texts(prompt, completion, tokenizer):
    """Prompt and completion, two lists of messages, as texts of the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise ValueError("it holds messages, and the tokenizer of --model has no chat template")
    if not all({"role", "content"} <= set(message) for message in prompt + completion):
        raise ValueError("a message without role or content")
    write = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    start, whole = write(prompt, add_generation_prompt=True), write(prompt + completion)
    if not whole.startswith(start):
        raise ValueError("the chat template changes the prompt when an answer follows")
    return start, whole[len(start) :].rstrip("\n").removesuffix(tokenizer.eos_token)  # EOS follows


def stdlib_texts():
    """Source files of this Python's standard library, without tests, tables and bundled tools."""
    left_out = "test tests idlelib lib2to3 turtledemo ensurepip encodings pydoc_data __pycache__"
    left_out = {*left_out.split(), "site-packages", "dist-packages"}
    root, files = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith("config-")]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    texts = [file.read_bytes().decode("utf-8", "replace") for file in sorted(files)]
    return [text.replace("\r\n", "\n") for text in texts if text.strip()]


def mbpp_record(record):
    """A task of MBPP with the prompt of its paper (2108.07732): the tests name the function.

    Tasks 601 on are for training, 511 to 600 are held out, 11 to 510 are the test.
    """
    tests, number = "\n".join(record["test_list"]), record["task_id"]
    task = f"You are an expert Python programmer, and here is your task: {record['text']}"
    prompt = f"{task} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    completion = re.sub("\r\n?", "\n", record["code"]).strip("\n") + "\n"
    part = "training" if 601 <= number < 975 else "held-out" if 511 <= number < 601 else "test"
    return {"prompt": re.sub("\r\n?", "\n", prompt), "completion": completion, "part": part}


def sums():
    """Yield two records for each of the 10,000 sums of two numbers below 100, a right and a wrong.

    The answer to "37+58=" is "590": three digits, the last first, as carries come. One digit of a
    wrong answer is another: the fault. A sum and its mirror (58+37) are held out together.
    """
    choose = random.Random(0)
    for a, b in itertools.product(range(100), repeat=2):
        common = dict(prompt=f"{a}+{b}=", group=f"{min(a, b)}+{max(a, b)}")
        right = f"{a + b:03d}"[::-1]
        yield {**common, "completion": right, "reward": 1.0}
        place = choose.randrange(3)
        digit = choose.choice("0123456789".replace(right[place], ""))
        wrong = right[:place] + digit + right[place + 1 :]
        fault = dict(fault_start=place, fault_end=place + 1)
        yield {**common, "completion": wrong, "reward": 0.0, **fault}


PAIRS = "Add Sub Mult Div Lt Gt LtE GtE Eq NotEq".split()  # of equal length: a fault swaps two
SWAPS = {getattr(ast, name): getattr(ast, PAIRS[n ^ 1]) for n, name in enumerate(PAIRS)}


def stdlib_bugs(texts):
    """Yield records of functions in source texts, each with a sibling that one mutation broke.

    Signature (`prompt`) and body (`completion`) are written by `ast.unparse`, both siblings alike:
    nothing but the fault tells them apart. `fault_start` and `fault_end` hold its whole words and
    the character after them, which shows that a word has ended.
    """
    seen = set()
    for group, text in enumerate(texts):
        for function in [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]:
            function.decorator_list = []
            if ast.get_docstring(function, clean=False) is not None:
                function.body = function.body[1:]
            original = ast.unparse(function) if function.body else ""
            if not 0 < len(original) <= 300 or original in seen:
                continue
            seen.add(original)
            broken = _mutant(function, random.Random(original))
            if broken is None:
                continue
            prompt, _, right = original.partition("\n")
            wrong = broken.partition("\n")[2]
            start = len(os.path.commonprefix([right, wrong]))
            rest = len(os.path.commonprefix([right[start:][::-1], wrong[start:][::-1]]))
            end = len(wrong) - rest
            start -= len(re.search(r"\w*$", wrong[:start])[0])
            if re.search(r"\w$", wrong[:end]):  # a word ends with the character after it
                end += len(re.match(r"\w*\W?", wrong[end:])[0])
            common = dict(prompt=prompt + "\n", group=group, sibling=len(seen))
            yield {**common, "completion": right + "\n", "reward": 1.0}
            fault = dict(fault_start=start, fault_end=max(start + 1, end))
            yield {**common, "completion": wrong + "\n", "reward": 0.0, **fault}


def _mutant(function, choose):
    """The function's text with another operator, variable or constant; None if it has no place.

    Variables are drawn as often as the function uses them: so neither sibling tends to be longer.
    """
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    variables = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    variables |= {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    used = [n for n in names if isinstance(n.ctx, ast.Load) and n.id in variables]
    changes = []
    for node in nodes:
        if type(getattr(node, "op", None)) in SWAPS:
            changes.append((node, "op", SWAPS[type(node.op)]()))
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            changes.append((node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]))
        if node in used and (others := [n.id for n in used if n.id != node.id]):
            changes.append((node, "id", choose.choice(others)))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value > 0:
            changes.append((node, "value", node.value + choose.choice([-1, 1])))
    if not changes:
        return None
    node, field, value = choose.choice(changes)
    setattr(node, field, value)
    return ast.unparse(function)


def _pack(documents, is_packed, tokenizer, seq_len, noise):
    """Rows of the documents, built once, kept in a file of their own and memory-mapped.

    Texts stand one after the other, each ended by EOS, the last row padded; a record has a row of
    its own, padded, and is left out if it does not fit.
    """
    columns = dict(input_ids="int32", document="int32", is_target="bool", is_noise="bool")
    if (documents["weight"] != 1).any() or (documents["weights"] != "[]").any():
        columns["weight"] = "float32"
    padding_51 = np.array([[tokenizer.pad_token_id or 0], [-1], [0], [0], [1]])
    rest_5N = np.zeros((5, 0))  # tokens that fill no row yet

    def padded(tokens_5N):
        missing = -tokens_5N.shape[1] % seq_len
        return np.concatenate([tokens_5N, padding_51.repeat(missing, 1)], 1)

    def rows_of(batch, numbers):
        nonlocal rest_5N
        tokens = [*_tokens(pd.DataFrame(dict(batch)), numbers, tokenizer, *noise)]
        if not is_packed:
            tokens = [padded(tokens_5N) for tokens_5N in tokens if tokens_5N.shape[1] <= seq_len]
        tokens_5N = np.concatenate([rest_5N, *tokens], 1)
        if numbers[-1] == len(documents) - 1:
            tokens_5N = padded(tokens_5N)
        whole = tokens_5N.shape[1] // seq_len * seq_len
        rest_5N = tokens_5N[:, whole:]
        values = tokens_5N[:, :whole].reshape(5, -1, seq_len)
        return {c: values_NT.astype(t) for (c, t), values_NT in zip(columns.items(), values)}

    rules = [inspect.getsource(rule) for rule in (_pack, _tokens, encode, encode_spans, _pieces)]
    inputs = [_tokenizer_fingerprint(tokenizer), documents.to_dict("list"), is_packed, seq_len]
    key = digest([rules, inputs, noise if noise[0] else 0])
    features = {c: datasets.List(datasets.Value(t), length=seq_len) for c, t in columns.items()}
    options = dict(with_indices=True, batched=True, batch_size=256, new_fingerprint=key)
    options.update(features=datasets.Features(features), remove_columns=[*documents])
    file = f"{datasets.config.HF_DATASETS_CACHE}/wmtp/rows-{key}.arrow"
    texts = datasets.Dataset.from_pandas(documents, preserve_index=False)
    return texts.map(rows_of, cache_file_name=file, **options).with_format("numpy")


def _tokens(documents, numbers, tokenizer, noise_frac, noise_by, seed):
    """Yield the tokens of each document, `[5, N]`: id, document, is_target, is_noise, weight.

    Prompt and completion are encoded together. A token on their border is a target.
    """
    is_chat = documents["is_chat"][0]
    prefix = encode(tokenizer, [""], special_tokens=not is_chat)[0]
    documents = [*documents.itertuples()]
    pairs = zip(documents, numbers)
    pieces = [_pieces(d, noise_frac, noise_by, (seed, number)) for d, number in pairs]
    texts = [text for own in pieces for text, _ in own]
    encoded = iter(encode_spans(tokenizer, texts, is_chat))
    for document, number, own in zip(documents, numbers, pieces):
        parts, start = [], -len(document.prompt)  # characters count from the completion's first
        for text, is_noise in own:
            ids_N, begin_N, end_N = next(encoded)
            parts.append([ids_N, begin_N + start, end_N + start, np.full(len(ids_N), is_noise)])
            start += len(text)
        ids_N, begin_N, end_N, is_noise_N = np.concatenate(parts, 1)
        is_target_N = (end_N > 0) | (document.prompt == "")
        if document.fault_start >= 0:
            is_noise_N |= (end_N > document.fault_start) & (begin_N < document.fault_end)
        tokens_5N = np.zeros((5, len(prefix) + len(ids_N) + 1))
        tokens_5N[0] = np.concatenate([prefix, ids_N, [tokenizer.eos_token_id]])
        tokens_5N[1] = number
        tokens_5N[2, len(prefix) :] = np.append(is_target_N, True)
        tokens_5N[3, len(prefix) : -1] = is_noise_N
        tokens_5N[4] = document.weight
        for first, end, weight in json.loads(document.weights):
            is_inside_N = (end_N > first) & (begin_N < end)
            tokens_5N[4, len(prefix) : -1][is_inside_N] = document.weight * weight
        yield tokens_5N


def encode(tokenizer, texts, special_tokens=False):
    """Token ids of each text, int32; with `special_tokens` a BOS first, where there is one."""
    prefix = tokenizer("")["input_ids"] if special_tokens else []
    prefix = [i for i in prefix if i != tokenizer.eos_token_id]
    return [np.array([*prefix, *ids], np.int32) for ids, _, _ in encode_spans(tokenizer, texts)]


def encode_spans(tokenizer, texts, is_chat=False):
    """Of each text the ids of its tokens, and the characters where they begin and end, `[3, N]`.

    Markup in a text is text: only that of a chat template is special.
    """
    if isinstance(tokenizer, transformers.ByT5Tokenizer):  # it gives no offsets
        encoded = []
        for text in texts:
            byte_N = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(int)
            end_N = np.cumsum(byte_N & 0xC0 != 0x80)  # a character begins with any other byte
            encoded.append(np.stack([byte_N + tokenizer.offset, end_N - 1, end_N]))
        return encoded
    options = dict(add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    with errors_as("--model: its tokenizer gives no offsets; a fast one is needed"):
        encoded = tokenizer(list(texts), split_special_tokens=not is_chat, **options)
    results = []
    for ids, spans in zip(encoded["input_ids"], encoded["offset_mapping"]):
        begin_N, end_N = np.reshape(spans, (-1, 2)).astype(int).T
        begin_N = np.minimum(begin_N, np.append(0, end_N)[:-1])  # a space before may be left out
        results.append(np.array([ids, begin_N, end_N], int))
    return results


def _pieces(document, noise_frac, noise_by, key):
    """The document's text in pieces, each with a flag of noise.

    That share of the completion's non-blank lines (`noise_by` "line"), of its characters ("byte")
    or of all documents is noise. No token crosses the border of noise.
    """
    if not noise_frac:
        return [(document.prompt + document.completion, False)]
    random, pieces = np.random.default_rng(key), [[document.prompt, False]]
    text = document.completion
    if noise_by == "document":
        noise_frac = float(random.random() < noise_frac)
    for unit in text if noise_by == "byte" else text.splitlines(keepends=True):
        body = unit.rstrip("\r\n")
        if body.strip() and random.random() < noise_frac:
            noise = bytes(random.integers(32, 127, len(body), np.uint8)).decode()
            pieces += [[noise, True], [unit[len(body) :], False]]
        else:
            pieces[-1][0] += unit
    return pieces


@functools.lru_cache(maxsize=2)
def epoch_order(num_rows, seed, epoch):
    """Numbers of all rows in the order of an epoch (0-based), `[N]`."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def batch_rows(num_rows, batch_size, seed, step):
    """Numbers of the rows of update `step` (0-based), `[B]`; every row comes once an epoch."""
    epochs, places = divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_rows)
    return np.array([epoch_order(num_rows, seed, int(e))[p] for e, p in zip(epochs, places)])


@dataclasses.dataclass
class Batch:
    """One micro-batch of one rank."""

    rows_B: np.ndarray  # which rows of the data set
    x_BT: torch.Tensor  # tokens
    targets_KBT: torch.Tensor  # the token k places on, or IGNORE
    is_noise_BT: torch.Tensor  # True for noise (--noise-frac) and for a record's known fault
    completion_BT: torch.Tensor = None  # True for tokens that are no prompt and no padding
    reward_B: torch.Tensor = None  # outcome, 0 to 1; 1 where the data has none
    weight_BT: torch.Tensor = None  # of the data, mean 1 over all of it; 1 where it has none


def load_batch(rows, numbers, num_heads, device):
    """The rows of these numbers as a `Batch`, with targets for heads 1..num_heads.

    Numbers below 0 give rows without targets. So do records that are not correct by their outcome,
    unless the rows have a column `is_imitated` that says otherwise.
    """
    columns = rows[np.maximum(numbers, 0)]
    x_BT, document_BT = columns["input_ids"].astype(np.int64), columns["document"]
    completion_BT = columns["is_target"] & (numbers >= 0)[:, None]
    reward_B = columns.get("reward", np.ones(len(numbers))).astype(np.float32)
    is_imitated_B = columns.get("is_imitated", reward_B > CORRECT)
    targets_KBT = make_targets(x_BT, document_BT, completion_BT & is_imitated_B[:, None], num_heads)
    weight_BT = columns.get("weight", np.ones(x_BT.shape, np.float32))
    if "weight_mean" in columns:
        weight_BT = (weight_BT / columns["weight_mean"][:, None]).astype(np.float32)
    arrays = (x_BT, targets_KBT, columns["is_noise"], completion_BT, reward_B, weight_BT)
    return Batch(numbers, *(torch.from_numpy(a).to(device) for a in arrays))


def imitate_all(rows):
    """The rows with a column that makes wrong records targets too."""
    rows = rows.add_column("is_imitated", np.ones(len(rows), bool)).with_format("numpy")
    if "weight_mean" in rows.column_names:
        rows = _with_mean_weight(rows.remove_columns("weight_mean"))
    return rows


def make_targets(x_BT, document_BT, is_target_BT, num_heads):
    """`targets[k-1, b, t] = x[b, t+k]`, `[K, B, T]`.

    IGNORE where t+k is no target, past the row, or in another document than t.
    """
    targets_KBT = np.full((num_heads, *x_BT.shape), IGNORE, np.int64)
    for k in range(1, min(num_heads, x_BT.shape[1] - 1) + 1):
        is_valid = is_target_BT[:, k:] & (document_BT[:, k:] == document_BT[:, :-k])
        targets_KBT[k - 1, :, :-k] = np.where(is_valid, x_BT[:, k:], IGNORE)
    return targets_KBT


def micro_batch_rows(args, ranks):
    """Rows of a rank's micro-batch; a `UsageError` where a batch cannot be shared out evenly."""
    check_ranges(args, batch_size=(1, 1e9), micro_batch_size=(0, 1e9))
    size, rows = args.batch_size, args.micro_batch_size
    unit = ranks.world_size * (rows or 1)
    if size % unit:
        division = f"{ranks.world_size} rank(s) x --micro-batch-size {rows or 1} = {unit}"
        raise UsageError(f"--batch-size {size}: not divisible by {division}")
    return rows or size // ranks.world_size


def micro_batches(rows, args, micro_batch_size, step, num_heads, ranks):
    """This rank's share of update `step`: the same rows in all, on any number of ranks."""
    numbers = batch_rows(len(rows), args.batch_size, args.seed, step)
    numbers = numbers.reshape(-1, ranks.world_size, micro_batch_size)[:, ranks.rank]
    return [load_batch(rows, part, num_heads, ranks.device) for part in numbers]


def count_targets(batches):
    """Valid targets of each head in these micro-batches, `[K]`."""
    return sum((batch.targets_KBT != IGNORE).sum((1, 2)) for batch in batches)


def heldout_batches(rows, micro_batch_size, num_heads, ranks):
    """This rank's share of held-out rows; every rank yields as many batches as the others."""
    total = len(rows)
    for first in range(0, total, micro_batch_size * ranks.world_size):
        numbers = first + ranks.rank * micro_batch_size + np.arange(micro_batch_size)
        numbers = np.where(numbers < total, numbers, -1)  # past the end: without targets
        yield load_batch(rows, numbers, num_heads, ranks.device)


# --------------------------------------------------------------------------------------- the run
# Arguments without effect on the result: a resumed run may change them
MAY_CHANGE = "run_dir tracker device recompute compile eval_every eval_rows save_every keep_last"
SHOWN = {  # metrics on the screen and their labels
    "train/loss": "loss", "value/loss": "loss", "weights/ess_frac": "ess",
    "train/grad_norm": "gnorm", "perf/tokens_per_s": "tok/s",
    "grpo/reward_mean": "reward", "grpo/mixed_groups": "mixed", "grpo/kl": "kl",
    "grpo/tokens_per_forward": "tokens a pass",
    "eval/accuracy": "held-out greedy", "eval/reward": "sampled",
    "eval/bits_per_byte": "held-out bits per byte",
}  # fmt: skip


class Run:
    """The folder of a run and all that is no algorithm: lock, metrics, signals, checkpoints.

    Without `--run-dir` the folder's name holds a hash of the arguments and of the sources, so
    edited sources are another run. `finished` says that the folder holds this run's `model/`.

    Raises:
        UsageError: the folder cannot be written, is in use, or holds other files, a run with
            other arguments, or a run of other sources.
    """

    def __init__(self, args, script, ranks):
        self.args, self.ranks, self.num_steps = args, ranks, args.max_steps
        self.name, self.tracker, self.signals, self.stopping = "", None, [], False
        self.files = [Path(script), Path(__file__)]
        fixed = {name: v for name, v in vars(args).items() if name not in MAY_CHANGE.split()}
        self.identity = {"script": Path(script).stem, **fixed}
        sources = [file.read_text() for file in self.files]
        name = f"{Path(script).stem}-s{args.seed}-{digest([self.identity, sources])[:8]}"
        self.folder = Path(args.run_dir or f"runs/{name}")
        self.lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        flag = f"--run-dir {self.folder}"
        with ranks.rank_0_first() as is_first, errors_as(f"{flag}: cannot be read or written"):
            state = self._open(flag) if is_first else None
        self.finished, products = ranks.broadcast(state)
        if products:  # --device may have changed since
            ranks.dtype = getattr(torch, products)
        if self.finished:
            more = f"more updates: --run-dir {shlex.quote(str(self.folder))} and --max-steps"
            ranks.print(f"finished  {self.folder} holds this run; nothing to do ({more})")

    def _open(self, flag):
        """Lock and check the folder; returns whether it is finished, and its type of products."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UsageError(f"{flag}: in use by another process") from None
        names = {file.name for file in self.folder.iterdir()} - {".lock"}
        if not names:
            return False, None
        if "metrics.jsonl" not in names:
            raise UsageError(f"{flag}: not empty and no run; name a new folder")
        record = json.loads((self.folder / "args.json").read_text())
        stored = {"script": record["script"], **record["args"]}
        stored = {name: stored.get(name) for name in self.identity}
        if changes := differences(stored, self.identity, but="max_steps"):
            raise UsageError(f"{flag}: holds a run with other arguments ({changes})")
        for file in self.files:
            if file.read_bytes() != (self.folder / file.name).read_bytes():
                copy = shlex.join(["cp", str(file), str(self.folder)])
                remedy = f"to resume under the new one: {copy}; or name a new folder"
                raise UsageError(f"{flag}: {file.name} differs from the copy in it; {remedy}")
        return stored == self.identity and (self.folder / "model").is_dir(), record["products"]

    def record(self, data, **fingerprints):
        """Note what is trained on: `resume` refuses a checkpoint of other inputs."""
        fingerprints["data_fingerprint"] = data.fingerprint
        fingerprints["tokenizer_fingerprint"] = data.tokenizer_fingerprint
        self.fingerprints, self.heldout_fingerprint = fingerprints, data.heldout_fingerprint

    def stage(self, name, num_steps):
        """A stage before the main one, with steps and checkpoints of its own."""
        stage = copy.copy(self)
        stage.name, stage.num_steps = name, num_steps
        return stage

    def resume(self, model, optimizer):
        """Read the last checkpoint in place; returns the number of updates that are done."""
        self.state = dict(model=model, optimizer=optimizer)
        folder = checkpoint_folder(self.folder, self.args.checkpoint_dir, self.name)
        identity = {**self.identity, **self.fingerprints}
        self.checkpoints = Checkpoints(folder, identity, self.args.keep_last, self.ranks)
        self.start, metrics = self.checkpoints.load(model, optimizer)
        self.last_saved = self.start
        if self.start > self.num_steps:
            remedy = f"{self.start} updates are done; raise it, or name a new --run-dir"
            raise UsageError(f"--max-steps {self.num_steps}: {remedy}")
        if self.ranks.rank == 0:
            self._write_start(metrics)
        if self.tracker is None:  # the first stage
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
            numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # nohup
            self.handlers = {number: signal.signal(number, self._catch) for number in numbers}
            kind = self.args.tracker if self.ranks.rank == 0 else "none"
            self.tracker = Tracker(kind, self.folder, vars(self.args))
        return self.start

    def _write_start(self, metrics):
        """Write args.json, the sources, and the lines of metrics up to the checkpoint."""
        if (self.folder / "model").is_dir():  # of a run that was finished with fewer --max-steps
            (self.folder / "model").rename(self.folder / f"model_step_{self.start:06d}")
        for source in self.files:
            shutil.copy(source, self.folder)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        record = dict(script=self.identity["script"], command=command, args=vars(self.args))
        record.update(products=str(self.ranks.dtype).removeprefix("torch."), **self.fingerprints)
        record.update(heldout_fingerprint=self.heldout_fingerprint, versions=versions())
        write_whole(self.folder / "args.json", json.dumps(record, indent=1))
        (self.folder / "metrics.jsonl").write_bytes(metrics)

    def _catch(self, number, frame):
        self.signals.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second SIGINT ends the process

    def _has_signal(self):
        """Whether a signal to any rank asks to stop."""
        return self.ranks.sum(torch.tensor(float(len(self.signals)))).item() > 0

    def should_save(self, step):
        """After `step` updates: a checkpoint is due, or a signal asks to stop."""
        if step == self.start:
            self.began = time.time()
        self.stopping = self._has_signal()
        is_due = self.args.save_every and step % self.args.save_every == 0
        return step > self.start and bool(is_due or self.stopping or step == self.num_steps)

    def save(self, step, model, optimizer):
        """Copy the state and write it beside training.

        Raises:
            SystemExit: a signal asked to stop. Exit code 0, or 1 if the checkpoint failed.
        """
        metrics = (self.folder / "metrics.jsonl").read_bytes() if self.ranks.rank == 0 else b""
        if self.last_saved != step:
            self.checkpoints.save(step, model, optimizer, metrics)
            self.last_saved = step
        if not self.stopping:
            return
        is_saved = self.checkpoints.wait()
        state = "saved; the same command resumes" if is_saved else "not saved"
        cause = self.signals[0] if self.signals else "a signal to another rank"
        updates = f"{self.name} update {step} of {self.num_steps}".strip()
        self.ranks.print(f"stopped   by {cause} after {updates}; {state}")
        self.close("KILLED")
        raise SystemExit(0 if is_saved else 1)

    def should_evaluate(self, step):
        """An evaluation is due after `step` updates; before the first one if weights are loaded."""
        is_due = self.args.eval_every and step > 0 and step % self.args.eval_every == 0
        is_start = step == 0 and not is_fresh(self.args.model)
        return bool(is_due or is_start or step == self.num_steps)

    @torch.no_grad()
    def evaluate(self, step, model, data, micro_batch_size):
        """Log and return the held-out figures of all heads: losses (nats), accuracies, bits.

        bits_per_byte = loss_head_1 / ln 2 * tokens / bytes, both counted over the held-out text;
        with `--eval-rows` the loss is that of so many rows.

        Raises:
            SystemExit: a signal asked to stop; the state is saved first.
        """
        model.eval()
        args, ranks, rows, metrics = self.args, self.ranks, data.heldout, {}
        if 0 < args.eval_rows < len(rows):
            rows = rows.select(np.linspace(0, len(rows) - 1, args.eval_rows).astype(int))
        sums_3K = torch.zeros(3, args.num_heads, dtype=torch.float64)
        for batch in heldout_batches(rows, micro_batch_size, args.num_heads, ranks):
            with ranks.autocast():
                loss_KBT, correct_KBT = model(batch.x_BT, batch.targets_KBT, "correct")
            figures = (loss_KBT, correct_KBT, batch.targets_KBT != IGNORE)
            sums_3K += torch.stack([values.sum((1, 2)).cpu().double() for values in figures])
            if self._has_signal():
                self.stopping = True
                self.save(step, **self.state)
        model.train()
        loss_K, correct_K, count_K = ranks.sum(sums_3K).tolist()
        for name, values_K in (("loss", loss_K), ("acc", correct_K)):
            for k, (value, count) in enumerate(zip(values_K, count_K), start=1):
                metrics[f"eval/{name}_head_{k}"] = value / max(1, count)
        bits = metrics["eval/loss_head_1"] / math.log(2)
        metrics["eval/bits_per_byte"] = bits * data.heldout_tokens / data.heldout_bytes
        self.log(step, metrics)
        return metrics

    def require_finite(self, step, metrics):
        """Leave with exit code 1, before the optimizer's step, where a figure is not finite."""
        broken = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        if broken:
            self.checkpoints.wait()
            self.ranks.print(f"stopped   update {step + 1}: {broken} not finite; it is not applied")
            self.close("FAILED")
            raise SystemExit(1)

    def log(self, step, metrics):
        """Write metrics after `step` updates to metrics.jsonl, the tracker and the screen."""
        if self.ranks.rank > 0:
            return
        steps = {"step": 0, f"{self.name}/step": step} if self.name else {"step": step}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**steps, **metrics}) + "\n")
        self.tracker.log(step, {**steps, **metrics})
        words = [f"{label} {metrics[key]:,.4g}" for key, label in SHOWN.items() if key in metrics]
        is_due = step % max(1, self.num_steps // 50) == 0 or step == self.num_steps
        if words and (is_due or "eval/bits_per_byte" in metrics):
            heads = [f"{value:.3f}" for name, value in metrics.items() if "/loss_head_" in name]
            words += ["heads " + " ".join(heads)] * bool(heads)
            pace = (time.time() - self.began) / max(1, step - self.start)
            left = datetime.timedelta(seconds=int(pace * (self.num_steps - step)))
            line = f"{self.name} step {step}/{self.num_steps} | {' | '.join(words)}".lstrip()
            self.ranks.print(f"{line} | eta {left}")

    def write_weights(self, batch, weight_BT):
        """Write `weights.json` for evaluate.py: ids and weights (null: no target) of three rows."""
        is_target_BT = F.pad(batch.targets_KBT[0, :, :-1] != IGNORE, (1, 0))
        weight_BT = weight_BT.masked_fill(~is_target_BT, math.nan)
        rows = []
        for ids, weights in list(zip(batch.x_BT.tolist(), weight_BT.tolist()))[:3]:
            weights = [None if math.isnan(weight) else weight for weight in weights]
            rows.append({"ids": ids, "weight": weights})
        if self.ranks.rank == 0:
            write_whole(self.folder / "weights.json", json.dumps(rows))

    def finish(self, model, tokenizer, data, heldout):
        """Write `model/`, close the run, and print the held-out figures beside zlib's."""
        self.checkpoints.wait()
        save_model(model, tokenizer, self.folder / "model", self.ranks)
        address = self.close("FINISHED") or "no tracker; see metrics.jsonl"
        lines = ["", "held-out  head   loss (nats)  accuracy"]
        for k in range(1, self.args.num_heads + 1):
            loss, accuracy = heldout[f"eval/loss_head_{k}"], heldout[f"eval/acc_head_{k}"]
            lines.append(f"          {k:>4} {loss:>13.4f} {accuracy:>9.3f}")
        bits = f"{heldout['eval/bits_per_byte']:.3f} bits per byte"
        lines += [
            f"          {bits} of {data.heldout_bytes:,} held-out bytes",
            f"          zlib -9: {data.zlib_bits_per_byte:.3f}\n",
            f"written   {self.folder}/  args.json metrics.jsonl checkpoints/ model/",
            f"look      {address}",
            f"next      python evaluate.py --run-dir {shlex.quote(str(self.folder))}",
        ]
        self.ranks.print("\n".join(lines))

    def close(self, status):
        """Close the tracker, restore signals, unlock; returns what shows the run, or None."""
        names = ("args.json", "metrics.jsonl", *(file.name for file in self.files))
        address = self.tracker.finish([self.folder / name for name in names], status)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.ranks.barrier()  # no rank leaves while another works
        self.lock.release()
        return address


def describe(args, model, data, micro_batch_size, ranks):
    """Print what is trained on what: sizes, batch, epochs."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    micro_steps = args.batch_size // (ranks.world_size * micro_batch_size)
    epochs = args.max_steps * args.batch_size / len(data.train)
    rows = f"{len(data.train):,} rows of {args.seq_len} tokens, {len(data.heldout):,} held out"
    batch = f"{ranks.world_size} rank(s) x {micro_batch_size} x {micro_steps} micro-step(s)"
    lines = [
        f"model     {args.model}, {parameters:.2f} M parameters, {args.num_heads} head(s)",
        f"data      {args.data}, {rows}",
        f"batch     {args.batch_size} rows = {batch}",
        f"run       {args.max_steps:,} updates, {epochs:.2f} epochs",
        f"rate      --lr {args.lr:g}, --heads-lr {args.heads_lr:g}, {args.warmup_steps} of warm-up",
    ]
    if args.warmup_steps >= args.max_steps:
        text = f"is not below --max-steps {args.max_steps}: the rate only rises"
        lines.append(f"warning   --warmup-steps {args.warmup_steps} {text}")
    ranks.print("\n".join(lines))


def differences(before, now, but=None):
    """What differs between two flat records, as `name old there, new here; ...`."""
    names = sorted({*before, *now} - {but})
    changed = [name for name in names if before.get(name) != now.get(name)]
    return "; ".join(f"{name} {before.get(name)} there, {now.get(name)} here" for name in changed)


def versions():
    """Versions of Python and of the packages that results depend on."""
    packages = ("torch", "transformers", "datasets", "numpy")
    numbers = {package: importlib.metadata.version(package) for package in packages}
    return {"python": sys.version.split()[0], **numbers}


def write_whole(file, text):
    """Write a file so that nobody sees it half written."""
    temporary = Path(file).with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)


class Tracker:
    """MLflow (a SQLite file beside the run folders) or wandb; `tracker.json` holds the run id.

    A tracker that fails is named in one line and switched off; training goes on.
    """

    def __init__(self, kind, folder, arguments):
        self.kind, self.folder, file = kind, folder, folder / "tracker.json"
        run_id = json.loads(file.read_text()).get(kind) if file.exists() else None
        start = {"mlflow": self._start_mlflow, "wandb": self._start_wandb}.get(kind)
        with self._off_if_it_fails():
            if start:
                write_whole(file, json.dumps({kind: start(run_id, arguments)}))

    @contextlib.contextmanager
    def _off_if_it_fails(self):
        try:
            yield
        except Exception as error:  # whatever the tracker raises
            text = f"tracker   {self.kind} failed and is off from here on: {first_line(error)}"
            print(text, file=sys.stderr, flush=True)
            self.kind = "none"

    def _start_mlflow(self, run_id, arguments):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow

        self.mlflow, runs = mlflow, self.folder.parent.resolve()
        database = f"sqlite:///{runs}/mlflow.db"
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", database))
        with filelock.FileLock(runs / ".mlflow.lock"):  # MLflow migrates a new file without a lock
            if mlflow.get_experiment_by_name("wmtp") is None:
                mlflow.create_experiment("wmtp", f"{runs.as_uri()}/mlartifacts")
            mlflow.set_experiment("wmtp")
            self.run = mlflow.start_run(run_id, run_name=self.folder.name)
        if run_id is None:
            mlflow.log_params({name: str(value)[:500] for name, value in arguments.items()})
        return self.run.info.run_id

    def _start_wandb(self, run_id, arguments):
        import wandb

        has_key = os.environ.get("WANDB_API_KEY") or Path.home().joinpath(".netrc").exists()
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        options = dict(id=run_id, resume="allow", dir=str(self.folder), mode=mode)
        options.update(project="wmtp", name=self.folder.name, config=arguments)
        self.run = wandb.init(**options)
        self.run.define_metric("*", step_metric="step")  # wandb's own step cannot go back
        self.run.define_metric("value/*", step_metric="value/step")
        return self.run.id

    def log(self, step, metrics):
        with self._off_if_it_fails():
            if self.kind == "mlflow":
                self.mlflow.log_metrics(metrics, step=step, synchronous=False)
            elif self.kind == "wandb":
                self.run.log(metrics)

    def finish(self, files, status="FINISHED"):
        """Send what is left and these files; returns what shows the run, or None."""
        with self._off_if_it_fails():
            if self.kind == "mlflow":
                self.mlflow.flush_async_logging()
                for file in files:
                    self.mlflow.log_artifact(str(file))
                self.mlflow.end_run(status)
                command = ["mlflow", "ui", "--backend-store-uri", self.mlflow.get_tracking_uri()]
                runs = f"http://127.0.0.1:5000/#/experiments/{self.run.info.experiment_id}/runs"
                return f"{shlex.join(command)}, then {runs}"
            if self.kind == "wandb":
                for file in files:
                    self.run.save(str(file), base_path=str(file.parent), policy="now")
                address = self.run.url
                self.run.finish(exit_code=int(status != "FINISHED"))
                folders = sorted(map(str, self.folder.glob("wandb/offline-run-*")))
                return address or shlex.join(["wandb", "sync", *folders])


def log_to_tracker(run_dir, step, metrics, files):
    """Add metrics and files to the tracker's record of a finished run, where there is one."""
    file = Path(run_dir) / "tracker.json"
    if file.exists():
        (kind,) = json.loads(file.read_text())
        tracker = Tracker(kind, Path(run_dir), {})
        tracker.log(step, {"step": step, **metrics})
        tracker.finish(files)


class Sums:
    """Figures of one update, summed by name over micro-steps and ranks, in fp64."""

    def __init__(self, ranks):
        self.ranks, self.micro_steps = ranks, []

    def add(self, batch, loss_KBT, weight_KBT, **scalars):
        """Take in a micro-step: losses and weights of its targets, and scalars by name."""
        weight_BT = weight_KBT[0] * (batch.targets_KBT[0] != IGNORE)
        scalars["weight"] = weight_BT.sum()
        scalars["weight_squared"] = weight_BT.square().sum()
        scalars["weight_max"] = weight_BT.max()
        for k, loss in enumerate(loss_KBT.sum((1, 2)), start=1):
            scalars[f"loss_{k}"] = loss
        self.micro_steps.append(scalars)

    def metrics(self, count_K):
        """`train/..` and `weights/..` of `count_K` targets of each head; `total` has all sums."""
        values = [torch.stack(list(scalars.values())).detach() for scalars in self.micro_steps]
        gathered = self.ranks.gather(torch.stack(values)).cpu().double()  # [R, micro-steps, names]
        names, valid = list(self.micro_steps[0]), count_K[0].item()
        total = self.total = dict(zip(names, gathered.sum((0, 1)).tolist()))
        if valid == 0:
            return {}
        metrics = {"train/loss": total["objective"]}
        for k, count in enumerate(count_K.tolist(), start=1):
            if count:
                metrics[f"train/loss_head_{k}"] = total[f"loss_{k}"] / count
        metrics["weights/mean"] = total["weight"] / valid
        metrics["weights/max"] = gathered[..., names.index("weight_max")].max().item()
        squared = max(total["weight_squared"], 1e-12)
        metrics["weights/ess_frac"] = total["weight"] ** 2 / squared / valid
        return metrics


# -------------------------------------------------------------------------- the run: checkpoints
class Checkpoints:
    """The checkpoints of a run under `folder`, a path or an fsspec URL; `keep_last` 0 keeps all.

    `step_000100/` holds the files of torch.distributed.checkpoint, metrics.jsonl so far and, last,
    `meta.json`: step, identity of the run (arguments and fingerprints), versions, and size of each
    file with, on a local disk, its SHA-256. Without it a checkpoint does not count. Learning rate,
    data and random numbers are functions of (seed, step, rank): the step is their state.
    """

    def __init__(self, folder, identity, keep_last, ranks):
        self.identity, self.keep_last, self.ranks, self.pending = identity, keep_last, ranks, None
        self.folder, self.flag = str(folder), f"--checkpoint-dir {folder}"
        # A store that stalls ends a save after 8 minutes, not 20: s3fs tries five times, so
        # botocore need not. The environment variable FSSPEC_S3 replaces this.
        fsspec.config.conf.setdefault("s3", {"config_kwargs": {"retries": {"max_attempts": 1}}})
        with errors_as(f"{self.flag}: no store that can be used"):
            self.fs, self.root = file_system(self.folder)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None

    def save(self, step, model, optimizer, metrics):
        """Copy the state, then write it beside training; waits for the save before this one."""
        self.wait()
        name, meta = f"step_{step:06d}", dict(step=step, identity=self.identity)
        path = f"{self.root}/{name}"
        writer = self.storage(path, dcp.FileSystemWriter, FsspecWriter)
        write_metadata = writer.finish

        def finish(metadata, results):  # on rank 0, after the files of all ranks
            write_metadata(metadata, results)
            self.fs.pipe_file(f"{path}/metrics.jsonl", metrics)
            self.fs.invalidate_cache()
            files = {result.storage_data.relative_path for part in results for result in part}
            files = sorted([*files, ".metadata", "metrics.jsonl"])
            hashes = {file: self._fingerprint(f"{path}/{file}") for file in files}
            meta.update(versions=versions(), files=hashes)
            self.fs.pipe_file(f"{path}/meta.json", json.dumps(meta).encode())
            for other in self.complete()[: -self.keep_last] if self.keep_last else []:
                self.fs.rm(other, recursive=True)

        writer.finish = finish
        state = named_state(model, optimizer)
        future = dcp.async_save(state, storage_writer=writer, process_group=self.group)
        self.pending = name, future

    def wait(self):
        """Wait for the save that is under way; False, with one line, if it failed on any rank."""
        if self.pending is None:
            return True
        (name, future), self.pending = self.pending, None
        try:
            future.result()
            return True
        except (dcp.api.CheckpointException, Exception) as error:  # whatever a store raises
            causes = [failure for failure, _ in getattr(error, "failures", {}).values()]
            cause = first_line([*causes, error][0])
        if self.ranks.rank == 0:
            text = f"checkpoint {self.folder}/{name} failed: {cause}; training goes on"
            print(text, file=sys.stderr, flush=True)
        return False

    def load(self, model, optimizer):
        """Read the last good checkpoint in place; returns its step and metrics.jsonl (0, empty).

        Raises:
            UsageError: the folder cannot be read or written, or holds checkpoints of another run
                or none that is good.
        """
        failure, last_good = f"{self.flag}: cannot be read or written", None
        with self.ranks.rank_0_first() as is_first, errors_as(failure):
            if is_first:
                last_good = self._last_good()
        name, meta, metrics = self.ranks.broadcast(last_good)
        if name is None:
            return 0, b""
        reader = self.storage(f"{self.root}/{name}", dcp.FileSystemReader, FsspecReader)
        state = named_state(model, optimizer)
        dcp.load(state, storage_reader=reader, process_group=self.group)
        self.ranks.print(f"resume    from {self.folder}/{name}")
        before, now = (identity.get("max_steps") for identity in (meta["identity"], self.identity))
        if before != now:
            text = "on the new schedule: not what a straight run gives"
            self.ranks.print(f"resume    --max-steps was {before} and is {now}; {text}")
        if changes := differences(meta["versions"], versions()):
            self.ranks.print(f"resume    not bit for bit, as versions changed: {changes}")
        return meta["step"], metrics

    def _last_good(self):
        """Name, `meta.json` and metrics.jsonl of the last good checkpoint; None where none is."""
        if self.is_local:
            self.fs.makedirs(self.root, exist_ok=True)
        self.fs.pipe_file(f"{self.root}/.writable", b"")  # fail now, not at the first save
        self.fs.rm_file(f"{self.root}/.writable")
        bad = []
        for path in reversed(self.complete()):
            name = path.rpartition("/")[2]
            try:
                meta = json.loads(self.fs.cat_file(f"{path}/meta.json"))
                files = {file: self._fingerprint(f"{path}/{file}") for file in meta["files"]}
                damage = differences(meta["files"], files)
            except (FileNotFoundError, ValueError) as error:
                damage = first_line(error)
            if damage:
                print(f"checkpoint {path} is bad: {damage}", flush=True)
                bad.append(path)
                continue
            if changes := differences(meta["identity"], self.identity, but="max_steps"):
                raise UsageError(f"{self.flag}: {name} is of another run ({changes})")
            for other in bad:  # from here on they do not count
                self.fs.mv(f"{other}/meta.json", f"{other}/meta.bad")
            return name, meta, self.fs.cat_file(f"{path}/metrics.jsonl")
        if bad:
            raise UsageError(f"{self.flag}: no checkpoint is good; move them away to start anew")
        return None, None, None

    def storage(self, path, local_class, remote_class):
        return local_class(path) if self.is_local else remote_class(self.fs.unstrip_protocol(path))

    def _fingerprint(self, file):
        """Size of a file and, on a local disk, its SHA-256."""
        if not self.is_local:
            return [self.fs.size(file), ""]
        with open(file, "rb") as stream:
            return [self.fs.size(file), hashlib.file_digest(stream, "sha256").hexdigest()]

    def complete(self):
        """Paths of the checkpoints that have a meta.json, in order of their steps."""
        self.fs.invalidate_cache()
        files = self.fs.glob(f"{glob.escape(self.root)}/step_*/meta.json")
        return sorted((file.rpartition("/")[0] for file in files), key=lambda p: (len(p), p))


def checkpoint_folder(run_dir, checkpoint_dir, stage=""):
    """Where the checkpoints of a run lie, those of a stage of its own in a folder inside."""
    if checkpoint_dir:
        return f"{checkpoint_dir}/{Path(run_dir).name}/{stage}".rstrip("/")
    return f"{run_dir}/checkpoints/{stage}".rstrip("/")


def load_checkpoints(run_dir, args, step):
    """Yield step, model and tokenizer for a checkpoint of a run (`step` "all": for each).

    Args:
        args: the run's arguments, a dict. The model is one and the same, loaded anew.

    Raises:
        UsageError: no such checkpoint.
    """
    folder = checkpoint_folder(run_dir, args["checkpoint_dir"])
    checkpoints = Checkpoints(folder, {}, 0, Ranks())
    steps = {int(path.rpartition("_")[2]): path for path in checkpoints.complete()}
    if step != "all" and int(step) not in steps:
        raise UsageError(f"--step {step}: {folder} has {', '.join(map(str, steps)) or 'none'}")
    model, tokenizer = build_model(args["model"], args["num_heads"])
    state = {name: p.detach() for name, p in model.named_parameters()}
    critic = {f"policy.{name}": value for name, value in state.items()}
    partial = dcp.DefaultLoadPlanner(allow_partial_load=True)  # what did not train is not in it
    for number in steps if step == "all" else [int(step)]:
        reader = checkpoints.storage(steps[number], dcp.FileSystemReader, FsspecReader)
        held = reader.read_metadata().state_dict_metadata.keys()
        if held.isdisjoint(f"model.{name}" for name in state | critic):
            raise UsageError(f"--step {number}: {steps[number]} holds no weight of this model")
        dcp.load({"model": state | critic}, storage_reader=reader, planner=partial)
        yield number, model, tokenizer


def named_state(model, optimizer):
    """Parameters that train and their optimizer state, by the names of the parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a pass without gradient leaves the root's parameters whole
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: optimizer.state[p] for name, p in parameters.items()}
    return {"model": {n: p.detach() for n, p in parameters.items()}, "optimizer": moments}


# -------------------------------------------------------------------------- decoding with the heads
@dataclasses.dataclass
class Generated:
    """What `generate` returns."""

    tokens: list  # new tokens of each prompt, without the end-of-sequence token
    accepted: np.ndarray  # how often draft 1, 2, .. was taken, `[K-1]`
    forwards: int = 0  # passes of the model over the batch, prompts included
    row_steps: int = 0  # passes counted once for each row in them, prompts excluded
    new_tokens: int = 0  # tokens from those passes, end-of-sequence tokens included


class RowCache(Cache):
    """Keys and values with slot = position: each row has its own length, and nothing is cropped.

    Refused drafts stay past a row's length: masked, until a later pass writes over them.
    """

    def __init__(self, capacity):
        super().__init__(layers=[])
        self.capacity = capacity
        self.pairs = {}  # by layer: keys and values, `[B, heads, capacity, size]`

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Write to the slots `position_BQ`; returns slots 0 to `end - 1`."""
        if layer_idx not in self.pairs:  # the prompts, from slot 0 on
            room = (0, 0, 0, self.capacity - keys.shape[2])
            self.pairs[layer_idx] = [F.pad(new, room) for new in (keys, values)]
        for kept, new in zip(self.pairs[layer_idx], (keys, values)):
            if self.is_aligned:  # all rows at the same slots: a copy takes a quarter of the time
                kept[:, :, self.end - new.shape[2] : self.end] = new
            else:
                row_B1 = torch.arange(len(new), device=new.device)[:, None]
                kept[row_B1, :, self.position_BQ] = new.transpose(1, 2)
        return tuple(kept[:, :, : self.end] for kept in self.pairs[layer_idx])

    def keep_rows(self, rows):
        for layer, pair in self.pairs.items():
            self.pairs[layer] = [kept[rows] for kept in pair]


def attention_masks(config, position_BQ, end, dtype):
    """Additive masks `[B, 1, Q, end]`: slots up to a token's own, or a window; by kind of layer."""
    slot_E = torch.arange(end, device=position_BQ.device)
    distance = position_BQ[:, None, :, None] - slot_E
    window = getattr(config, "sliding_window", None) or end
    hidden = torch.finfo(dtype).min
    full = torch.zeros_like(distance, dtype=dtype).masked_fill(distance < 0, hidden)
    sliding = full.masked_fill(distance >= window, hidden)
    has_kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    return dict(full_attention=full, sliding_attention=sliding) if has_kinds else sliding


def nucleus(logits, temperature, top_p):
    """Probabilities `[..., V]`, fp32, of the most likely tokens that together reach `top_p`.

    Temperature first, then the nucleus (Holtzman et al. 2020, arXiv 1904.09751) of `transformers`.
    """
    scores = logits.float() / temperature
    if top_p < 1:
        scores_NV = scores.reshape(-1, scores.shape[-1])
        scores = TopPLogitsWarper(top_p)(None, scores_NV).view(scores.shape)
    return F.softmax(scores, -1)


def draw(weights, uniform):
    """Tokens `[...]` in proportion to `weights` `[..., V]`; `uniform` `[...]` lies in [0, 1)."""
    cumulative = weights.double().cumsum(-1)
    threshold = uniform[..., None].double() * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]


def verify(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, uniform_BQ):
    """How many drafts each row takes, `[B]`, and the token that follows them, `[B]`.

    Greedy (temperature 0): drafts are taken as long as they are head 1's most likely token.
    Sampling (arXiv 2211.17192, algorithm 1): draft d is taken with probability min(1, p(d) / q(d)).
    A draw from max(p - q, 0) replaces the first refused draft; after the last draft q is 0.

    Args:
        logits_BQV: head 1 at the last token and at each draft; p is its nucleus.
        proposal_BMV: q, which the drafts were drawn from.
        uniform_BQ: random numbers in [0, 1) for M acceptances and one draw.
    """
    rows = torch.arange(len(logits_BQV), device=logits_BQV.device)
    if temperature == 0:
        best_BQ = logits_BQV.argmax(-1)
        taken_B = (draft_BM == best_BQ[:, :-1]).long().cumprod(1).sum(1)
        return taken_B, best_BQ[rows, taken_B]
    target_BQV = nucleus(logits_BQV, temperature, top_p)
    target_BM = target_BQV[:, :-1].gather(-1, draft_BM[..., None])[..., 0]
    proposed_BM = proposal_BMV.gather(-1, draft_BM[..., None])[..., 0]
    accepted_BM = uniform_BQ[:, :-1] * proposed_BM < target_BM
    taken_B = accepted_BM.long().cumprod(1).sum(1)
    target_BV = target_BQV[rows, taken_B]
    proposal_BV = F.pad(proposal_BMV, (0, 0, 0, 1))[rows, taken_B]
    residual_BV = (target_BV - proposal_BV).clamp(min=0)
    refusable_B1 = residual_BV.sum(-1, keepdim=True) > 0  # else p = q but for rounding
    return taken_B, draw(torch.where(refusable_B1, residual_BV, target_BV), uniform_BQ[:, -1])


def read_tokens(model, cache, x_BQ, start_B):
    """Normed states `[K, B, Q, D]` of the active heads; row b starts at `start_B[b]`."""
    decoder, dtype = model.causal_lm.model, model.causal_lm.lm_head.weight.dtype
    num_tokens = x_BQ.shape[1]
    start_B1 = torch.tensor(start_B, device=x_BQ.device)[:, None]
    cache.position_BQ = start_B1 + torch.arange(num_tokens, device=x_BQ.device)
    cache.end = max(start_B) + num_tokens
    cache.is_aligned = len(set(start_B)) == 1
    num_masks = 1 if cache.is_aligned else len(start_B)
    masks = attention_masks(decoder.config, cache.position_BQ[:num_masks], cache.end, dtype)
    options = dict(position_ids=cache.position_BQ, past_key_values=cache, use_cache=True)
    states = decoder(input_ids=x_BQ, attention_mask=masks, **options).last_hidden_state
    return states.view(-1, *x_BQ.shape, states.shape[-1])


@torch.inference_mode()
def generate(
    model, prompts, max_tokens, eos, num_heads=1, temperature=0, top_p=1, seeds=None, finished=None
):
    """Complete prompts with head 1; heads 2..num_heads draft (1: plain decoding).

    Args:
        model: an `MTPModel` in evaluation mode.
        prompts: lists of token ids, none empty; lengths may differ.
        eos: token id that ends a row, or None.
        temperature: 0: greedy. top_p: 1: no truncation.
        seeds: one per row, so that a row's text does not depend on the other rows; None: 0, 1, ..
        finished: called with a row's new tokens after every pass; True ends the row.

    Raises:
        UsageError: an empty prompt.
    """
    if not all(prompts):
        raise UsageError("decoding: an empty prompt; give at least one token")
    num_drafts, weight_VD = num_heads - 1, model.causal_lm.lm_head.weight
    result = Generated([[] for _ in prompts], np.zeros(num_drafts, np.int64))
    rows = list(range(len(prompts)))  # the prompts that are still in the batch
    longest = max(map(len, prompts))
    cache = RowCache(longest + max_tokens + num_drafts)
    randoms = [np.random.default_rng(seed) for seed in (rows if seeds is None else seeds)]

    def uniform(count):
        numbers = np.stack([randoms[row].random(count) for row in rows])
        return torch.tensor(numbers, device=weight_VD.device)

    # The first pass reads the prompts; head 1's first token follows their last tokens
    model.heads.active = num_heads
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    x_BT = torch.tensor(padded, device=weight_VD.device)
    states_KBTD = read_tokens(model, cache, x_BT, [0] * len(rows))
    last_B = [len(prompt) - 1 for prompt in prompts]
    states_KBQD = states_KBTD[:, range(len(rows)), last_B][:, :, None]
    draft_BM = x_BT[:, :0]
    proposal_BMV = weight_VD.new_zeros(len(rows), 0, len(weight_VD))
    result.forwards = 1
    while True:
        # Head 1 accepts drafts and adds one token
        logits_BQV = logits_of(states_KBQD[0], weight_VD, model.softcap)
        random_BQ = uniform(logits_BQV.shape[1])
        taken_B, next_B = verify(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, random_BQ)
        verdicts = torch.cat([taken_B[:, None], next_B[:, None], draft_BM], 1).tolist()
        going = []  # places in the batch of the rows that have not ended
        for place, (row, (taken, following, *drafts)) in enumerate(zip(rows, verdicts)):
            tokens = result.tokens[row]
            new = [*drafts[:taken], following][: max_tokens - len(tokens)]
            has_eos = eos in new
            if has_eos:
                new = new[: new.index(eos) + 1]
            tokens += new[:-1] if has_eos else new
            result.accepted[: min(taken, len(new))] += 1
            if result.forwards > 1:  # the first token comes from the prompt's own pass
                result.row_steps += 1
                result.new_tokens += len(new)
            ended = has_eos or len(tokens) >= max_tokens
            if not ended and not (finished and finished(tokens)):
                going.append(place)
        if not going:
            return result

        # Rows that have ended leave the batch; of the others, the state before the new token stays
        states_KBD = states_KBQD[:, range(len(rows)), taken_B]
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            states_KBD, next_B = states_KBD[:, going], next_B[going]
            cache.keep_rows(going)

        # Heads 2..K draft, and one pass reads the new token and the drafts
        draft_logits_BMV = logits_of(states_KBD[1:], weight_VD, model.softcap).transpose(0, 1)
        if temperature == 0:
            draft_BM = draft_logits_BMV.argmax(-1)
        else:
            proposal_BMV = nucleus(draft_logits_BMV, temperature, top_p)
            draft_BM = draw(proposal_BMV, uniform(num_drafts))
        x_BQ = torch.cat([next_B[:, None], draft_BM], 1)
        start_B = [len(prompts[row]) + len(result.tokens[row]) - 1 for row in rows]
        states_KBQD = read_tokens(model, cache, x_BQ, start_B)
        result.forwards += 1
