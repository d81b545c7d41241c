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
import dataclasses
import datetime
import functools
import glob
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import warnings
import zlib
from pathlib import Path

import datasets
import filelock
import numpy as np
import scipy.stats
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.generation.logits_process import TopPLogitsWarper

IGNORE = -100  # a masked target: prompt, padding, past the end of the row or of the document
HEADS_FILE = "mtp_heads.safetensors"
warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # at every first save


class UsageError(Exception):
    """Bad input: one line that names the value, the limit and the flag. The exit code is 2."""


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------- ranks and FSDP2
class Output(io.FileIO):
    """Standard output or error; where nobody reads any more (`| head`), what is written is lost."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def run_script(main, args_class, doc):
    """Parse the command line and run `main(args)`; a `UsageError` is one line and exit code 2.

    Of arguments, `~` is a home, and `folder/` is `folder`.
    """
    is_first = os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ
    for name, number in (("stdout", 1), ("stderr", 2)):
        if (stream := getattr(sys, name)) is not None:
            raw = io.BufferedWriter(Output(number, "w", closefd=False))
            options = dict(errors="backslashreplace", line_buffering=True)
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, **options))
    transformers.utils.logging.disable_progress_bar()
    try:
        args = tyro.cli(args_class, description=doc, console_outputs=is_first)
        for name, value in vars(args).items():
            if isinstance(value, str):
                setattr(args, name, re.sub(r"(?<=[^:/])/+$", "", os.path.expanduser(value)))
        main(args)
    except UsageError as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # once a run trains, it catches signals itself
        if is_first:
            print("stopped   by SIGINT", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except Exception:
        if "mlflow" in sys.modules:
            sys.modules["mlflow"].end_run("FAILED")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check_ranges(args, **limits):
    """Raise a `UsageError` for an argument outside of its limits, `name=(least, most)`."""
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            flag = f"--{name.rstrip('_').replace('_', '-')} {getattr(args, name)}"
            raise UsageError(f"{flag}: from {least:g} to {most:g}")


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
    def rank_0_first(self, failure=""):
        """True on rank 0, which works alone inside; its `UsageError` is raised on all ranks.

        Where `failure` is given, any other error is raised as a `UsageError` that begins so.
        """
        message = None
        try:
            yield self.rank == 0
        except UsageError as error:
            message = str(error)
        except Exception as error:
            if not failure:
                raise
            message = f"{failure} ({type(error).__name__}: {first_line(error)})"
        message = self.broadcast(message)
        if message is not None:
            raise UsageError(message)

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def print(self, text):
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # its variables


def setup_ranks(device, dtype):
    """Join torchrun's process group (without torchrun: one process); choose device and dtype.

    `dtype="auto"` is bf16 on a GPU that has it and fp32 elsewhere, so a command gives the same
    numbers on any CPU.
    """
    missing = ", ".join(name for name in TORCHRUN if name not in os.environ)
    for name in ("RANK", "WORLD_SIZE"):
        if missing and name in os.environ:
            text = f"is set without {missing}; unset it, or start by torchrun"
            raise UsageError(f"{name}={os.environ[name]} in the environment {text}")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available.get(device, True):
        raise UsageError(f"--device {device}: torch finds no such device; use --device cpu")
    own_device = torch.device(device)
    if device == "cuda":
        own_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own_device)
    if world_size > 1:
        timeout = datetime.timedelta(hours=1)  # rank 0 tokenises while the others wait
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
    if dtype == "auto":
        has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if has_bf16 else "fp32"
    products = torch.bfloat16 if dtype == "bf16" else torch.float32
    ranks = Ranks(rank, world_size, own_device, products)
    ranks.print(f"device    {device}, {world_size} rank(s), {dtype} products, fp32 master weights")
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


def clip_gradients(model, limit):
    """Scale the gradient down to norm `limit` (0: off); returns its norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def make_optimizer(model, lr, weight_decay):
    """AdamW with decay on matrices alone; its moments exist from the start.

    (torch.distributed.checkpoint drops parameters without moments, such as the late heads of a
    curriculum: pytorch #192202.)
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decayed = dict(params=matrices, weight_decay=weight_decay)
    groups = [decayed, dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for p in [*matrices, *vectors]:
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
        self.recompute = False  # the backward runs the head layers again

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:  # decoders ask a layer for its kind of attention
            return getattr(super().__getattr__("layers")[0], name)

    def forward(self, hidden_BTD, *args, **kwargs):
        outputs = []
        for layer in list(self.layers)[: self.active]:  # a slice of a ModuleList is a new module
            if self.recompute:
                layer = functools.partial(checkpoint, layer, use_reentrant=False)
            outputs.append(layer(hidden_BTD, *args, **kwargs))
        return torch.cat(outputs)


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

    def forward(self, x_BT, targets_KBT, with_correct=False):
        """Cross entropy of each target, nats, fp32, `[K, B, T]`; 0 where the target is `IGNORE`.

        Heads 1..K run, K being the first size of `targets_KBT`. With `with_correct` a second
        `[K, B, T]` says where the most likely token is the target.
        """
        hidden_ND = self.hidden(x_BT, targets_KBT.shape[0]).flatten(0, -2)
        weight_VD, targets_N = self.causal_lm.lm_head.weight, targets_KBT.flatten()
        if torch.is_autocast_enabled(hidden_ND.device.type):
            half = torch.get_autocast_dtype(hidden_ND.device.type)
            hidden_ND, weight_VD = hidden_ND.to(half), weight_VD.to(half)
        values = token_losses(hidden_ND, weight_VD, targets_N, self.softcap, with_correct)
        values = [v.view(targets_KBT.shape).clone() for v in values]  # FSDP2 takes no views
        return tuple(values) if with_correct else values[0]


def weights_of_targets(weight_BT, num_heads):
    """`weight_KBT[k-1, b, t] = weight_BT[b, t+k]`, and 0 past the row: one token, one weight."""
    weight_KBT = weight_BT.new_zeros(num_heads, *weight_BT.shape)
    for k in range(1, num_heads + 1):
        weight_KBT[k - 1, :, :-k] = weight_BT[:, k:]
    return weight_KBT


def bounded_softmax(logit_N, epsilon, max_weight):
    """`clip(exp(logit + c), epsilon, max_weight)`, `[N]`, with the c that makes its mean 1.

    N times the softmax where no bound is met; so the bounds hold for the weights that are used. c
    is found by bisection. epsilon is at most 1, max_weight at least 1.
    """
    if len(logit_N) == 0:
        return logit_N
    dtype, logit_N = logit_N.dtype, logit_N.double()
    low = math.log(max(epsilon, 1e-9)) - logit_N.max()  # every weight at most epsilon
    high = math.log(max_weight) - logit_N.min()  # every weight at least max_weight
    for _ in range(60):
        middle = (low + high) / 2
        is_low = (logit_N + middle).exp().clamp(epsilon, max_weight).mean() < 1
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return (logit_N + high).exp().clamp(epsilon, max_weight).to(dtype)


def control_weights(u_N, control, key, row_N=None):
    """Weights without information: `shuffle` permutes u (within rows `row_N`), `random` draws anew.

    `key` seeds the draw; the mean stays 1.
    """
    if control == "none" or len(u_N) == 0:
        return u_N
    random_numbers, N = np.random.default_rng(key), len(u_N)
    if control == "shuffle":
        rows = np.zeros(N) if row_N is None else row_N.cpu().numpy()
        order = np.lexsort((random_numbers.random(N), rows))
        return u_N[torch.from_numpy(order).to(u_N.device)]
    u_N = u_N[torch.from_numpy(random_numbers.integers(0, N, N)).to(u_N.device)]
    return u_N / u_N.mean() if u_N.any() else torch.ones_like(u_N)


def active_heads(schedule, step, max_steps, num_heads):
    """How many heads, 1..k, train in update `step` (0-based): the curricula of 2505.22757.

    `constant`: all. `forward`: 1, 2, .. H in equal parts of the run. `reverse`: H, .. 2, 1.
    """
    part = min(num_heads - 1, step * num_heads // max_steps)
    return {"constant": num_heads, "forward": 1 + part, "reverse": num_heads - part}[schedule]


# ------------------------------------------------------------------------------------------ loss
CHUNK_LOGITS = {"cpu": 2**23, "mps": 2**23, "cuda": 2**26}  # 32 and 256 MB (no GPU was tried)


def token_losses(hidden_ND, weight_VD, targets_N, softcap, with_correct, chunk=None):
    """Cross entropy `[N]` and, `with_correct`, where the most likely token is the target.

    Logits that fit into one chunk (of tokens) are kept for the backward. Otherwise they exist a
    chunk at a time and the backward makes them again.
    """
    chunk = chunk or max(256, CHUNK_LOGITS[hidden_ND.device.type] // len(weight_VD))
    if len(targets_N) > chunk:
        inputs = (hidden_ND, weight_VD, targets_N, softcap, chunk, with_correct)
        return TokenLosses.apply(*inputs)[: 1 + with_correct]
    logits = logits_of(hidden_ND, weight_VD, softcap)
    loss_N = F.cross_entropy(logits, targets_N, ignore_index=IGNORE, reduction="none")
    return (loss_N, logits.argmax(-1) == targets_N) if with_correct else (loss_N,)


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
    def forward(ctx, hidden_ND, weight_VD, targets_N, softcap, chunk, with_correct):
        total_N = hidden_ND.new_zeros(len(targets_N), dtype=torch.float32)  # log sum exp of logits
        loss_N, correct_N = torch.zeros_like(total_N), torch.zeros_like(targets_N, dtype=torch.bool)
        buffer = hidden_ND.new_empty(chunk * len(weight_VD))
        for rows in TokenLosses.chunks(targets_N != IGNORE, chunk):
            logits = logits_of(hidden_ND[rows], weight_VD, softcap, buffer)
            if with_correct:
                correct_N[rows] = logits.argmax(-1) == targets_N[rows]
            chosen = logits.gather(-1, targets_N[rows, None].clamp(min=0))[:, 0]
            largest = logits.amax(-1, keepdim=True)
            total_N[rows] = logits.sub_(largest).exp_().sum(-1).log_() + largest[:, 0]
            loss_N[rows] = total_N[rows] - chosen
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, total_N)
        ctx.softcap, ctx.chunk = softcap, chunk
        ctx.mark_non_differentiable(correct_N)
        return loss_N.masked_fill_(targets_N == IGNORE, 0.0), correct_N

    @staticmethod
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, targets_N, total_N = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_N = grad_N.masked_fill(targets_N == IGNORE, 0.0)
        buffer = hidden_ND.new_empty(ctx.chunk * len(weight_VD))
        for rows in TokenLosses.chunks(grad_N != 0, ctx.chunk):
            hidden, grad = hidden_ND[rows], grad_N[rows, None]
            logits = logits_of(hidden, weight_VD, ctx.softcap, buffer)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            error = logits.sub_(total_N[rows, None]).exp_().mul_(grad)
            error.scatter_add_(-1, targets_N[rows, None].clamp(min=0), -grad)  # softmax - one-hot
            error = (error if slope is None else error.mul_(slope)).to(weight_VD.dtype)
            grad_hidden[rows] = error @ weight_VD
            if error.dtype == torch.float32:
                grad_weight.addmm_(error.t(), hidden)
            else:
                grad_weight += error.t() @ hidden
        return grad_hidden, grad_weight.to(weight_VD.dtype), None, None, None, None


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
    path = Path(name)
    if num_heads < 1:
        raise UsageError(f"--num-heads {num_heads}: at least 1")
    if name == "tiny":
        model = from_config(transformers.LlamaConfig(**TINY), num_heads)
        tokenizer = load_tokenizer()
        # 0.07 bits per byte better than a deviation of 0.05, after 1 M tokens
        nn.init.normal_(model.causal_lm.model.embed_tokens.weight)
    elif path.suffix == ".json":
        model = from_config(read_config(name, path), num_heads)
        tokenizer = load_tokenizer(path.parent)
    else:
        model = load_mtp(name, num_heads, add_heads=True)
        tokenizer = load_tokenizer(model_dir(name))
    check_vocabulary(name, model, tokenizer)
    if (seq_len or 0) > max_positions(model.causal_lm.config):
        longest = max_positions(model.causal_lm.config)
        raise UsageError(f"--seq-len {seq_len}: --model {name} has {longest} positions at most")
    model.heads.recompute = recompute == "heads"
    if recompute == "all":
        model.causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def max_positions(config):
    """Longest text that a model has positions for, tokens; infinite where it has no limit."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def check_vocabulary(name, model, tokenizer):
    """Refuse a tokenizer that is not the model's own, by the sizes of the two vocabularies."""
    rows, entries = model.causal_lm.lm_head.weight.shape[0], len(tokenizer)
    if not 0 <= rows - entries < 1024:  # families pad to round numbers: by 399 in Qwen2.5-7B
        sizes = f"its vocabulary has {rows} entries, its tokenizer {entries}"
        raise UsageError(f"--model {name}: {sizes}; name a folder whose tokenizer is its own")


def load_tokenizer(folder=None):
    """The tokenizer in `folder`; bytes (`ByT5Tokenizer`: byte + 3, EOS 1) where it has none."""
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    is_local = folder is not None and Path(folder).is_dir()
    if folder is None or (is_local and not any(Path(folder, file).exists() for file in files)):
        return transformers.ByT5Tokenizer(extra_ids=0)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raise errors without a common class
        reason = f"its tokenizer cannot be read ({first_line(error)})"
        raise UsageError(f"--model {folder}: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(f"--model {folder}: its tokenizer has no end-of-sequence token")
    return tokenizer


def from_config(config, num_heads):
    """A fresh model with `config.num_hidden_layers` layers, trunk and heads together."""
    total = config.num_hidden_layers
    if num_heads > total:
        layers = f"the model has {total} layers, trunk and heads together"
        raise UsageError(f"--num-heads {num_heads}: {layers}; at most {total}")
    kept, config = total - num_heads + 1, copy.deepcopy(config)
    with _family_errors(config):
        if kinds := getattr(config, "layer_types", None):  # heads are of head 1's kind
            config.layer_types = kinds[:kept] + [kinds[kept - 1]] * (num_heads - 1)
        causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        layers = causal_lm.model.layers
        extra_heads = [copy.deepcopy(layers[kept - 1]) for _ in range(num_heads - 1)]
        for head, layer in zip(extra_heads, layers[kept:]):
            head.load_state_dict(layer.state_dict())  # some families build layers by their number
        causal_lm.model.layers = layers[:kept]
        causal_lm.config.num_hidden_layers = kept
        if kinds:
            causal_lm.config.layer_types = config.layer_types[:kept]
        return _checked(causal_lm, extra_heads)


def load_mtp(name, num_heads=None, add_heads=False):
    """Load trunk and heads from a run folder, a `model/` or a Hugging Face model.

    Args:
        num_heads: H; None takes the number that the files hold.
        add_heads: where the files hold head 1 alone, add heads 2..H as copies of it (taking
            layers away instead hurts: 2404.19737, table S6).

    Raises:
        UsageError: no such model; another number of heads asked for than the files hold.
    """
    folder, states = model_dir(name), {}
    if Path(folder).is_file():
        raise UsageError(f"--model {name}: a file, not the folder of a model")
    config = read_config(name, folder)
    try:
        with _family_errors(config):
            options = dict(dtype=torch.float32, output_loading_info=True)
            causal_lm, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        if Path(folder, HEADS_FILE).exists():
            for key, value in load_file(Path(folder, HEADS_FILE)).items():
                _, number, parameter = key.split(".", 2)  # heads.2.self_attn...
                states.setdefault(int(number), {})[parameter] = value
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--model {name}: weights cannot be read ({first_line(error)})") from error
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise UsageError(f"--model {name}: lacks {len(lacking)} weights, {lacking[0]} among them")
    held = 1 + len(states)
    if (states or not add_heads) and num_heads not in (None, held):
        raise UsageError(f"--num-heads {num_heads}: {name} has {held} head(s); --num-heads {held}")
    num_extra = len(states) or (num_heads or 1) - 1
    with _family_errors(config):
        extra_heads = [copy.deepcopy(causal_lm.model.layers[-1]) for _ in range(num_extra)]
        for layer, number in zip(extra_heads, sorted(states)):
            layer.load_state_dict(states[number])
        return _checked(causal_lm, extra_heads)


def read_config(name, path):
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # a broken file raises errors without a common class
        reason = f"not a preset (tiny), nor a model that can be read ({first_line(error)})"
        raise UsageError(f"--model {name}: {reason}") from error


def model_dir(name):
    """The `model/` of a run folder; any other name as it is."""
    return str(Path(name, "model")) if Path(name, "model", "config.json").exists() else str(name)


@contextlib.contextmanager
def _family_errors(config):
    """Turn errors of a family whose code does not fit into one line that names the family."""
    try:
        yield
    except (AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
        family = f"the family {config.model_type} is not supported"
        raise UsageError(f"--model: {family} ({first_line(error)})") from error


@torch.no_grad()
def _checked(causal_lm, extra_heads):
    """Wrap the model; refuse a family in which head 1 is not the plain model to rounding."""
    family, head = f"the family {causal_lm.config.model_type} is not supported", causal_lm.lm_head
    is_linear = isinstance(head, nn.Linear) and head.bias is None
    if not is_linear or not hasattr(causal_lm.model, "norm"):
        raise UsageError(f"--model: {family} (needs model.norm and an lm_head without bias)")
    causal_lm.eval()
    x_BT = torch.arange(12)[None] % head.weight.shape[0]
    plain = causal_lm(input_ids=x_BT, use_cache=False).logits.float()
    model = MTPModel(causal_lm, extra_heads).eval()
    targets = plain.argmax(-1)[None]
    expected = F.cross_entropy(plain[0], targets[0, 0], reduction="none")
    difference = (model(x_BT, targets)[0, 0] - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise UsageError(f"--model: {family} (head 1 differs from it by {difference:.3g} nats)")
    return model


def save_model(model, tokenizer, folder, ranks):
    """Write trunk and head 1 as a Hugging Face model with its tokenizer, and heads 2..H beside it.

    It is written under another name and renamed, so `folder` is whole. Every rank takes part.
    """
    full = full_state(model, ranks)
    if ranks.rank == 0:
        causal_lm, number = model.causal_lm, len(model.trunk_layers)
        plain, heads = {}, {}
        for key, value in full.items():
            key = key.removeprefix("causal_lm.")
            match = re.fullmatch(rf"model\.layers\.{number}\.layers\.(\d+)\.(.+)", key)
            if match and match[1] != "0":
                heads[f"heads.{int(match[1]) + 1}.{match[2]}"] = value.contiguous()
            else:
                plain[f"model.layers.{number}.{match[2]}" if match else key] = value
        if causal_lm.config.tie_word_embeddings:
            plain.pop("lm_head.weight", None)
        temporary = Path(f"{folder}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        causal_lm.save_pretrained(temporary, state_dict=plain)
        tokenizer.save_pretrained(temporary)
        if heads:
            metadata = {"format": "pt", "num_heads": str(len(model.heads.layers))}
            save_file(heads, temporary / HEADS_FILE, metadata=metadata)
        temporary.rename(folder)
    ranks.barrier()


def full_state(module, ranks):
    """State of a module, whole and, of a sharded one, on the CPU of rank 0."""
    if ranks.world_size == 1:
        return module.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


# --------------------------------------------------------------------------------------------- data
PRESETS = ("stdlib", "stdlib:a", "stdlib:b", "stdlib-bugs", "mbpp")
CORRECT = 0.5  # a record is correct if its reward is above
FORMATS = re.compile(r"\.(json|parquet|csv)l?(\.(gz|zst|bz2|xz))?(\?.*)?$")  # all else is text


@dataclasses.dataclass
class Data:
    """Packed rows of `seq_len` tokens, memory-mapped, and figures of the held-out text.

    Columns of `train` and `heldout`: `input_ids`, `document` (number of a token's document, -1
    padding), `is_target` (False in prompts and padding), `is_noise` (True where `--noise-frac` put
    it); of records with outcomes also `reward` and `sibling` (number of their task).
    """

    train: datasets.Dataset  # of records with outcomes the correct ones
    records: datasets.Dataset  # all training rows, wrong records too
    heldout: datasets.Dataset
    fingerprint: str  # of the text of both and of the split
    tokenizer_fingerprint: str
    heldout_fingerprint: str  # of the held-out text: where it is the same, bits per byte compare
    heldout_bytes: int  # UTF-8 bytes of held-out target text (with outcomes: of correct records)
    heldout_tokens: int  # tokens of the same text, end-of-sequence tokens included
    order0_bits_per_byte: float  # entropy of the byte frequencies of that text
    zlib_bits_per_byte: float  # the same text as one stream through zlib level 9
    prompt: str  # the beginning of a held-out document
    heldout_records: list | None  # of data with outcomes: the record of each held-out row


def load_data(name, tokenizer, seq_len, seed, noise_frac, ranks, score=None):
    """Read, split by document, tokenise once into a cache, and memory-map what `--data` names.

    Args:
        name: a preset, a file or URL (.jsonl, .json, .parquet, .csv; anything else is text), a
            folder of .txt, or a hub name. Columns: `text` or `content`; or `prompt`, `completion`
            and, where it is known, `reward` from 0 to 1.
        seed: fixes which documents are held out. `stdlib:a` and `stdlib:b` train on one half each
            of what `stdlib` trains on with seed 0, and hold out the same, whatever the seed.
        noise_frac: share of the non-blank training lines replaced by random printable characters.
        score: `score(prompts, completions)` gives the rewards `[N]` of records without one.

    Raises:
        UsageError: no such data, columns missing, a bad reward, or no document left that fits.
    """
    if not 0 <= noise_frac <= 1:
        raise UsageError(f"--noise-frac {noise_frac}: from 0 to 1")
    if seq_len < 2:
        raise UsageError(f"--seq-len {seq_len}: at least 2")
    options = (name, tokenizer, seq_len, seed, noise_frac, ranks, score)
    with ranks.rank_0_first() as is_first:  # rank 0 fills the cache, the others then read it
        data = _load_data(*options) if is_first else None
    return data or _load_data(*options)


def _load_data(name, tokenizer, seq_len, seed, noise_frac, ranks, score):
    datasets.disable_progress_bars()
    half = name.partition("stdlib:")[2] if name in PRESETS else ""
    documents = _read_documents("stdlib" if half else name, score)
    target = target_column(documents)
    has_reward = "reward" in documents.column_names
    train_N, heldout_N = _split(documents, 0 if half else seed, name)
    if half:  # by the text, so that copies of a file fall into one half
        side_N = np.array([zlib.crc32(t.encode("utf-8", "replace")) % 2 for t in documents["text"]])
        train_N = train_N[side_N[train_N] == "ab".index(half)]
    vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
    if tokenizer.is_fast:  # merges, normaliser and template make tokens too
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary += [pipeline[key] for key in sorted(pipeline.keys() - {"truncation", "padding"})]
    tokenizer_fingerprint = _fingerprint(vocabulary)
    parts, fingerprints, names = {}, [], {"records": "training", "heldout": "held-out"}
    for part, numbers, noise in (("records", train_N, noise_frac), ("heldout", heldout_N, 0.0)):
        chosen = documents.select(numbers)
        digest = hashlib.sha256()
        for text in _texts(chosen):
            digest.update(json.dumps(text).encode())
        fingerprints.append(digest.hexdigest())
        made_of = ["rows 1", digest.hexdigest(), tokenizer_fingerprint, seq_len, noise]
        made_of.append(seed if noise else 0)
        rows = _pack(chosen, tokenizer, seq_len, noise, seed, _fingerprint(made_of))
        if len(rows) == 0:
            reason = "no document" if len(chosen) == 0 else f"no record fits --seq-len {seq_len}"
            raise UsageError(f"--data {name}: nothing for the {names[part]} part ({reason})")
        if "prompt" in documents.column_names:
            if lost := len(chosen) - len(rows):
                reason = f"longer than --seq-len {seq_len} tokens"
                kind = f"{lost} of {len(chosen)} {names[part]} records"
                ranks.print(f"data      left out {kind}: {reason}")
            chosen = chosen.select(np.array(rows["document"][:]).max(1))
        if has_reward:
            rows = rows.add_column("reward", chosen["reward"][:])
            rows = rows.add_column("sibling", chosen["sibling"][:])
            if max(chosen["reward"]) <= CORRECT:
                reward = f"no {names[part]} record has a reward above {CORRECT}"
                raise UsageError(f"--data {name}: {reward}")
            fingerprints.append(_fingerprint(chosen["reward"][:]))
        parts[part] = rows.with_format("numpy")
    correct = parts["records"]
    if has_reward:  # batches hold no row that is not imitated
        correct = correct.select(np.flatnonzero(np.array(correct["reward"][:]) > CORRECT))
    heldout_documents = chosen  # the loop ends with them
    texts = heldout_documents[target][:]
    if has_reward:
        rewards = heldout_documents["reward"]
        texts = [text for text, reward in zip(texts, rewards) if reward > CORRECT]
    stream = np.frombuffer("".join(texts).encode("utf-8", "replace"), np.uint8)
    return Data(
        train=correct,
        **parts,
        fingerprint=_fingerprint(fingerprints),
        tokenizer_fingerprint=tokenizer_fingerprint,
        heldout_fingerprint=_fingerprint(texts),
        heldout_bytes=len(stream),
        heldout_tokens=sum(len(ids) + 1 for ids in encode(tokenizer, texts)),
        order0_bits_per_byte=float(scipy.stats.entropy(np.bincount(stream), base=2)),
        zlib_bits_per_byte=8 * len(zlib.compress(stream, 9)) / len(stream),
        prompt=(heldout_documents[0].get("prompt") or texts[0])[:200],
        heldout_records=heldout_documents.to_list() if has_reward else None,
    )


def _fingerprint(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def target_column(documents):
    return "completion" if "completion" in documents.column_names else "text"


def _texts(documents):
    """The text of each document, of records prompt and completion as a list."""
    columns = [c for c in ("prompt", "completion", "text") if c in documents.column_names]
    return list(zip(*(documents[column][:] for column in columns)))


def _read_documents(name, score):
    """Data of `text`, or of `prompt` and `completion`; `part` where it has a split of its own."""
    if name == "stdlib":
        return datasets.Dataset.from_dict({"text": stdlib_texts()})
    if name == "stdlib-bugs":
        texts = stdlib_texts()
        key = _fingerprint([Path(__file__).read_text(), sys.version, texts])
        records = functools.partial(stdlib_bugs, texts)
        return datasets.Dataset.from_generator(records, fingerprint=key)
    path, file_format = Path(name), FORMATS.search(name)
    source = dict(path=name, split="train")
    if name == "mbpp":
        source = dict(path="google-research-datasets/mbpp", name="full", split="all")
    elif path.is_dir() and (files := sorted(map(str, path.rglob("*.txt")))):
        source.update(path="text", data_files=files, sample_by="document")
    elif (path.is_file() or "://" in name) and file_format:
        source.update(path=file_format[1], data_files=name)
    elif path.is_file() or "://" in name:
        source.update(path="text", data_files=name, sample_by="document")
    elif not path.is_dir() and (file_format or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise UsageError(f"--data {name}: no such file, hub name or preset ({', '.join(PRESETS)})")
    try:
        loaded = datasets.load_dataset(**source)
    except Exception as error:  # what datasets raises has no common class
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"--data {name}: cannot be loaded ({reason})") from error
    columns = set(loaded.column_names)
    for column in {"text", "content", "prompt", "completion"} & columns:
        is_text = loaded.features[column].dtype in ("string", "large_string")
        if not is_text or (column == "prompt" and None in loaded["prompt"][:]):
            raise UsageError(f"--data {name}: the column {column} holds something else than text")
    if {"task_id", "text", "code", "test_list"} <= columns:  # MBPP: tasks 11 to 510 are its test
        id_N = np.array(loaded["task_id"])
        part_N = np.select([id_N >= 601, id_N >= 511], ["train", "heldout"], "test")
        records = loaded.map(mbpp_record, remove_columns=loaded.column_names)
        records = records.add_column("part", part_N.tolist())
        return records.select_columns(["part", "prompt", "completion"])
    if {"prompt", "completion"} <= columns:
        records = loaded.filter(lambda record: bool(record["completion"]))
        if score or "reward" in columns:
            return _with_rewards(records, name, score)
        return records.select_columns(["prompt", "completion"])
    if not {"text", "content"} & columns:
        names = ", ".join(sorted(columns))
        raise UsageError(f"--data {name}: columns {names}; needs text, or prompt and completion")
    texts = [text for text in loaded["text" if "text" in columns else "content"] if text]
    if len(texts) != 1:
        return datasets.Dataset.from_dict({"text": texts})
    lines = texts[0].splitlines(keepends=True)  # of one long text the last 3 % of the lines
    if len(lines) < 2:
        raise UsageError(f"--data {name}: one line; the split needs two")
    cut = len(lines) - max(1, round(0.03 * len(lines)))
    texts = ["".join(lines[:cut]), "".join(lines[cut:])]
    return datasets.Dataset.from_dict({"part": ["train", "heldout"], "text": texts})


def stdlib_texts():
    """Source files of this Python's standard library, without tests, tables and bundled tools."""
    left_out = "test tests idlelib lib2to3 turtledemo ensurepip encodings pydoc_data __pycache__"
    left_out = {*left_out.split(), "site-packages", "dist-packages"}
    root, texts = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted({f for f in folders if not f.startswith("config-")} - left_out)
        for name in names:
            if name.endswith(".py"):
                texts.append((Path(folder, name), Path(folder, name).read_bytes()))
    texts = [data.decode("utf-8", "replace").replace("\r\n", "\n") for _, data in sorted(texts)]
    return [text for text in texts if text.strip()]


def mbpp_record(record):
    """The prompt of the MBPP paper (2108.07732): its tests name the function, its text does not."""
    tests = "\n".join(record["test_list"])
    task = f"You are an expert Python programmer, and here is your task: {record['text']}"
    prompt = f"{task} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    completion = re.sub("\r\n?", "\n", record["code"]).strip("\n") + "\n"
    return {"prompt": re.sub("\r\n?", "\n", prompt), "completion": completion}


def _with_rewards(records, name, score):
    """Records with outcomes; those of one prompt are siblings and stay on one side of the split."""
    prompts, completions = records["prompt"][:], records["completion"][:]
    rewards = [None] * len(records)
    if "reward" in records.column_names:
        rewards = records["reward"][:]
    try:
        reward_N = np.array([np.nan if r is None else float(r) for r in rewards])
    except (TypeError, ValueError):
        raise UsageError(f"--data {name}: reward holds something else than numbers") from None
    lacking = np.flatnonzero(np.isnan(reward_N))
    if len(lacking) and score:
        reward_N[lacking] = score([prompts[n] for n in lacking], [completions[n] for n in lacking])
    for number in np.flatnonzero(~((reward_N >= 0) & (reward_N <= 1)))[:1]:
        reward = f"the reward {reward_N[number]:g}; from 0 to 1 (--reward-model adds missing ones)"
        raise UsageError(f"--data {name}: record {number + 1} has {reward}")
    sibling_N = np.unique(prompts, return_inverse=True)[1].tolist()
    table = dict(prompt=prompts, reward=reward_N.tolist(), group=sibling_N, sibling=sibling_N)
    for column in ("group", "sibling", "fault_start", "fault_end"):
        if {"group", "sibling"} <= set(records.column_names) and column in records.column_names:
            table[column] = records[column][:]
    return datasets.Dataset.from_dict({**table, "completion": completions})


def _split(documents, seed, name):
    """Numbers of the documents to train on and of those held out, two arrays.

    Groups (a text and its copies, or the records of one group) are held out in the order of a hash
    of (seed, text) until 3 % of the bytes (10 % of records with outcomes; at most 4 MB) are
    reached. The group that reaches them is held out too, which favours no length.
    """
    if "part" in documents.column_names:
        part_N = np.array(documents["part"])
        return np.flatnonzero(part_N == "train"), np.flatnonzero(part_N == "heldout")
    has_group = "group" in documents.column_names
    hashes = [_fingerprint([seed, text]) for text in _texts(documents)]
    groups = documents["group"][:] if has_group else hashes
    size, first_hash = collections.Counter(), {}
    for group, text_hash, text in zip(groups, hashes, documents[target_column(documents)]):
        size[group] += len(text.encode("utf-8", "replace"))
        first_hash[group] = min(text_hash, first_hash.get(group, text_hash))
    if len(size) < 2:
        kind = "prompt or group" if has_group else "text"
        raise UsageError(f"--data {name}: holds {len(size)} {kind}(s); the split needs at least 2")
    budget = min(4_000_000, (0.1 if has_group else 0.03) * size.total())
    heldout, num_bytes = set(), 0
    for group in sorted(size, key=first_hash.get)[:-1]:
        if num_bytes < budget:
            heldout.add(group)
            num_bytes += size[group]
    is_heldout_N = np.array([group in heldout for group in groups])
    return np.flatnonzero(~is_heldout_N), np.flatnonzero(is_heldout_N)


def _pack(documents, tokenizer, seq_len, noise_frac, seed, key):
    """Rows of the documents, built once, kept under `key` and memory-mapped.

    Texts stand one after the other, each ended by EOS, the last row padded; a record has a row of
    its own, padded, and is left out if it does not fit.
    """
    has_prompt, eos = "prompt" in documents.column_names, tokenizer.eos_token_id
    padding_41 = np.array([[tokenizer.pad_token_id or 0], [-1], [0], [0]], np.int32)
    template = encode(tokenizer, [""], not has_prompt)[0]
    before_text = template[template != eos]  # a BOS, where the tokenizer adds one
    rest_4N = np.zeros((4, 0), np.int32)  # tokens that fill no row yet

    def padded(tokens_4N):
        missing = -tokens_4N.shape[1] % seq_len
        return np.concatenate([tokens_4N, padding_41.repeat(missing, 1)], 1)

    def rows_of(batch, numbers):
        nonlocal rest_4N
        texts = batch[target_column(documents)]
        prompts = encode(tokenizer, batch["prompt"], True) if has_prompt else [[]] * len(texts)
        encoded, pieces = encode(tokenizer, texts, not has_prompt), [rest_4N]
        for number, prompt, ids, text in zip(numbers, prompts, encoded, texts):
            noise = np.zeros(len(ids))
            if noise_frac:
                ids, noise = _noisy(text, noise_frac, (seed, number), tokenizer)
                ids = np.append(before_text, ids)
                noise = np.append(np.zeros(len(before_text)), noise)
            if list(prompt[-1:]) == [eos]:  # some templates end a prompt
                prompt = prompt[:-1]
            if list(ids[-1:]) != [eos]:
                ids, noise = np.append(ids, eos), np.append(noise, 0)
            tokens_4N = np.zeros((4, len(prompt) + len(ids)), np.int32)
            tokens_4N[0] = np.concatenate([prompt, ids])
            tokens_4N[1] = number
            tokens_4N[2, len(prompt) :] = 1
            tokens_4N[3, len(prompt) :] = noise
            if not has_prompt:
                pieces.append(tokens_4N)
            elif tokens_4N.shape[1] <= seq_len:
                pieces.append(padded(tokens_4N))
        tokens_4N = np.concatenate(pieces, 1)
        if numbers[-1] == len(documents) - 1:
            tokens_4N = padded(tokens_4N)
        whole = tokens_4N.shape[1] // seq_len * seq_len
        rest_4N = tokens_4N[:, whole:]
        return dict(zip(types, tokens_4N[:, :whole].reshape(4, -1, seq_len)))

    types = dict(input_ids="int32", document="int32", is_target="bool", is_noise="bool")
    features = {c: datasets.List(datasets.Value(t), length=seq_len) for c, t in types.items()}
    folder = Path(datasets.config.HF_DATASETS_CACHE, "wmtp")
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(with_indices=True, batched=True, batch_size=256, new_fingerprint=key)
    options.update(features=datasets.Features(features), remove_columns=documents.column_names)
    return documents.map(rows_of, cache_file_name=f"{folder}/rows-{key}.arrow", **options)


def encode(tokenizer, texts, special_tokens=False):
    """Token ids of each text, int32; with `special_tokens` those of the template too."""
    if isinstance(tokenizer, transformers.ByT5Tokenizer):  # without its slow loop over characters
        bytes_ = [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
        return [byte_N + np.int32(tokenizer.offset) for byte_N in bytes_]
    ids = tokenizer(texts, add_special_tokens=special_tokens)["input_ids"]
    return [np.array(ids_N, np.int32) for ids_N in ids]


def _noisy(text, noise_frac, key, tokenizer):
    """Tokens of the text with that share of its non-blank lines replaced, and flags of the noise.

    No token crosses the border of a noisy line: what lies between two of them is encoded by itself.
    """
    random, pieces = np.random.default_rng(key), [["", False]]
    for line in text.splitlines(keepends=True):
        body = line.rstrip("\r\n")
        if body.strip() and random.random() < noise_frac:
            noise = bytes(random.integers(32, 127, len(body), np.uint8)).decode()
            pieces += [[noise, True], [line[len(body) :], False]]
        else:
            pieces[-1][0] += line
    ids = encode(tokenizer, [piece for piece, _ in pieces])
    flags = [np.full(len(ids_N), is_noise) for ids_N, (_, is_noise) in zip(ids, pieces)]
    return np.concatenate(ids), np.concatenate(flags)


@functools.lru_cache(maxsize=2)
def _epoch_order(num_rows, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def batch_rows(num_rows, batch_size, seed, step):
    """Numbers of the rows of update `step` (0-based), `[B]`; every row comes once an epoch."""
    epochs, places = divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_rows)
    return np.array([_epoch_order(num_rows, seed, int(e))[p] for e, p in zip(epochs, places)])


@dataclasses.dataclass
class Batch:
    """One micro-batch of one rank."""

    rows_B: np.ndarray  # which rows of the data set
    x_BT: torch.Tensor  # tokens
    targets_KBT: torch.Tensor  # the token k places on, or IGNORE
    is_noise_BT: torch.Tensor  # True for tokens that `--noise-frac` put in
    completion_BT: torch.Tensor = None  # True for tokens that are no prompt and no padding
    reward_B: torch.Tensor = None  # outcome, 0 to 1; 1 where the data has none


def load_batch(rows, numbers, num_heads, device, train_on="correct"):
    """The rows of these numbers as a `Batch`, with targets for heads 1..num_heads.

    Numbers below 0 give rows without targets. So do records that are not correct by their outcome,
    unless `train_on` is "all".
    """
    columns = rows[np.maximum(numbers, 0)]
    x_BT, document_BT = columns["input_ids"].astype(np.int64), columns["document"]
    completion_BT = columns["is_target"] & (numbers >= 0)[:, None]
    reward_B = columns.get("reward", np.ones(len(numbers))).astype(np.float32)
    is_imitated_B = (reward_B > CORRECT) | (train_on == "all")
    targets_KBT = make_targets(x_BT, document_BT, completion_BT & is_imitated_B[:, None], num_heads)
    arrays = (x_BT, targets_KBT, columns["is_noise"], completion_BT, reward_B)
    return Batch(numbers, *(torch.from_numpy(a).to(device) for a in arrays))


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
    """Rows of a rank's micro-batch.

    Raises:
        UsageError: the batch cannot be shared out evenly; it names the nearest sizes that can.
    """
    batch_size, rows, world_size = args.batch_size, args.micro_batch_size, ranks.world_size
    check_ranges(args, batch_size=(1, 1e9), micro_batch_size=(0, 1e9))
    unit = world_size * (rows or 1)
    below = batch_size // unit * unit
    if batch_size != below:
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        division = f"{world_size} rank(s) x --micro-batch-size {rows or 1} = {unit}"
        raise UsageError(f"--batch-size {batch_size}: not divisible by {division}; use {nearest}")
    return rows or batch_size // world_size


def micro_batches(rows, args, micro_batch_size, step, num_heads, ranks):
    """This rank's share of update `step`: the same rows in all, on any number of ranks.

    Where a script has `--train-on all`, wrong records are targets too.
    """
    numbers = batch_rows(len(rows), args.batch_size, args.seed, step)
    numbers = numbers.reshape(-1, ranks.world_size, micro_batch_size)[:, ranks.rank]
    train_on = getattr(args, "train_on", "correct")
    return [load_batch(rows, part, num_heads, ranks.device, train_on) for part in numbers]


def count_targets(batches):
    """Valid targets of each head in these micro-batches, `[K]`."""
    return sum((batch.targets_KBT != IGNORE).sum((1, 2)) for batch in batches)


def heldout_batches(data, micro_batch_size, num_heads, ranks):
    """This rank's share of the held-out rows; every rank yields as many batches as the others."""
    total = len(data.heldout)
    for first in range(0, total, micro_batch_size * ranks.world_size):
        numbers = first + ranks.rank * micro_batch_size + np.arange(micro_batch_size)
        numbers = np.where(numbers < total, numbers, -1)  # past the end: without targets
        yield load_batch(data.heldout, numbers, num_heads, ranks.device)


SWAPS = {}  # operators and comparisons of equal length, which a broken function has swapped
for _pair in "Add Sub,Mult Div,Lt Gt,LtE GtE,Eq NotEq".split(","):
    _one, _other = (getattr(ast, name) for name in _pair.split())
    SWAPS.update({_one: _other, _other: _one})


def stdlib_bugs(texts):
    """Records of functions in source texts, each with a sibling that one mutation broke.

    Signature (`prompt`) and body (`completion`) are written by `ast.unparse`, both siblings alike:
    nothing but the fault tells them apart. `fault_start` and `fault_end` hold its whole words and
    the character after them, which shows that a word has ended.
    """
    records, seen = [], set()
    for group, text in enumerate(texts):
        with contextlib.suppress(SyntaxError, ValueError):
            for function in ast.walk(ast.parse(text)):
                if not isinstance(function, ast.FunctionDef):
                    continue
                function.decorator_list = []
                if ast.get_docstring(function, clean=False) is not None:
                    function.body = function.body[1:]
                original = ast.unparse(function) if function.body else ""
                if not 0 < len(original) <= 300 or original in seen:
                    continue
                seen.add(original)
                if (broken := _mutant(function, random.Random(original))) is None:
                    continue
                prompt, _, right = original.partition("\n")
                wrong = broken.partition("\n")[2]
                start = len(os.path.commonprefix([right, wrong]))
                rest = len(os.path.commonprefix([right[start:][::-1], wrong[start:][::-1]]))
                head, tail = wrong[: len(wrong) - rest], wrong[len(wrong) - rest :]
                start -= len(re.search(r"\w*$", wrong[:start])[0])
                if re.search(r"\w$", head):  # a word ends with the character after it
                    head += re.match(r"\w*\W?", tail)[0]
                fault = (start, max(start + 1, len(head)))
                for code, reward, span in ((right, 1.0, (-1, -1)), (wrong, 0.0, fault)):
                    record = dict(prompt=prompt + "\n", completion=code + "\n", reward=reward)
                    record.update(group=group, sibling=len(seen))
                    records.append({**record, "fault_start": span[0], "fault_end": span[1]})
    return records


def _mutant(function, choose):
    """The function's text with another operator, variable or constant; None if it has no place.

    Variables are drawn as often as the function uses them: so neither sibling tends to be longer.
    """
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    variables = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    variables |= {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    uses = [n.id for n in names if isinstance(n.ctx, ast.Load) and n.id in variables]
    changes = []
    for node in nodes:
        if type(getattr(node, "op", None)) in SWAPS:
            changes.append((node, "op", SWAPS[type(node.op)]()))
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            changes.append((node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in variables:
            if others := [use for use in uses if use != node.id]:
                changes.append((node, "id", choose.choice(others)))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value > 0:
            changes.append((node, "value", node.value + choose.choice([-1, 1])))
    if not changes:
        return None
    node, field, value = choose.choice(changes)
    setattr(node, field, value)
    return ast.unparse(function)


# --------------------------------------------------------------------------------------- the run
# Arguments without effect on the result: a resumed run may change them
MAY_CHANGE = "run_dir tracker device recompute compile eval_every save_every keep_last".split()
SHOWN = "train/loss value/loss weights/ess_frac train/grad_norm eval/bits_per_byte"  # on the screen


class Run:
    """The folder of a run and all that is no algorithm: lock, metrics, signals, checkpoints.

    Without `--run-dir` the folder's name holds a hash of the arguments and of the sources, so
    edited sources are another run. `finished` says that the folder holds this run's `model/`. With
    `--run-dir`, another `--max-steps` goes on from the last checkpoint on the new schedule.

    Raises:
        UsageError: the folder cannot be written, is in use, or holds other files, a run with
            other arguments, or a run of other sources.
    """

    def __init__(self, args, script, ranks):
        self.args, self.ranks, self.num_steps = args, ranks, args.max_steps
        self.name, self.tracker, self.signals, self.stopping = "", None, [], False
        self.finished = False
        self.files = [Path(script), Path(__file__)]
        fixed = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        self.identity = {"script": Path(script).stem, **fixed}
        sources = [sha256(file.read_bytes()) for file in self.files]
        digest = sha256(json.dumps([self.identity, sources]).encode())[:8]
        self.folder = Path(args.run_dir or f"runs/{Path(script).stem}-s{args.seed}-{digest}")
        self.lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        flag = f"--run-dir {self.folder}"
        with ranks.rank_0_first(f"{flag}: cannot be read or written") as is_first:
            if is_first:
                self._open(flag)
        self.finished = ranks.broadcast(self.finished)
        if self.finished:
            more = f"more updates: --run-dir {shlex.quote(str(self.folder))} and --max-steps"
            ranks.print(f"finished  {self.folder} holds this run; nothing to do ({more})")

    def _open(self, flag):
        """Lock the folder and check what it holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UsageError(f"{flag}: in use by another process") from None
        if not (self.folder / "metrics.jsonl").exists():  # nothing was trained here yet
            own = {".lock", "args.json", "args.tmp", *(file.name for file in self.files)}
            if {file.name for file in self.folder.iterdir()} - own:
                raise UsageError(f"{flag}: not empty and no run; name a new folder")
            (self.folder / "args.json").unlink(missing_ok=True)
            return
        record = json.loads((self.folder / "args.json").read_text())
        stored = {"script": record["script"], **record["args"]}
        stored = {name: stored.get(name) for name in self.identity}
        same_steps = stored["max_steps"] == self.args.max_steps
        self.finished = same_steps and (self.folder / "model").is_dir()
        if changes := differences(stored, self.identity, but="max_steps"):
            raise UsageError(f"{flag}: holds a run with other arguments ({changes})")
        for file in self.files:
            if file.read_bytes() != (self.folder / file.name).read_bytes():
                copy = shlex.join(["cp", str(file), str(self.folder)])
                remedy = f"to resume under the new one: {copy}; or name a new folder"
                raise UsageError(f"{flag}: {file.name} differs from the copy in it; {remedy}")

    def record(self, data, **fingerprints):
        """Write args.json and copy the sources, once; a resumed run must find the same inputs.

        Raises:
            UsageError: data, tokenizer or another fingerprint is not the one of the start.
        """
        file = self.folder / "args.json"
        fingerprints["data_fingerprint"] = data.fingerprint
        fingerprints["tokenizer_fingerprint"] = data.tokenizer_fingerprint
        if self.ranks.rank == 0 and not file.exists():
            for source in self.files:
                shutil.copy(source, self.folder)
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            record = dict(script=self.identity["script"], command=command, args=vars(self.args))
            record.update(products=str(self.ranks.dtype).removeprefix("torch."), **fingerprints)
            record.update(heldout_fingerprint=data.heldout_fingerprint, versions=versions())
            write_whole(file, json.dumps(record, indent=1))
        record = json.loads(file.read_text()) if self.ranks.rank == 0 else None
        record = self.ranks.broadcast(record)
        if changes := differences({name: record.get(name) for name in fingerprints}, fingerprints):
            raise UsageError(f"--run-dir {self.folder}: was started on other inputs ({changes})")
        self.ranks.dtype = getattr(torch, record["products"])  # --device may have changed
        self.identity.update(fingerprints)

    def stage(self, name, num_steps):
        """A stage before the main one, after `resume`: with steps and checkpoints of its own."""
        stage = copy.copy(self)
        stage.name, stage.num_steps = name, num_steps
        return stage

    def resume(self, model, optimizer):
        """Read the last checkpoint in place; returns the number of updates that are done."""
        folder = self.folder / "checkpoints"
        if self.args.checkpoint_dir:
            folder = f"{self.args.checkpoint_dir}/{self.folder.name}"
        folder = f"{folder}/{self.name}".rstrip("/")
        self.checkpoints = Checkpoints(folder, self.identity, self.args.keep_last, self.ranks)
        self.start, metrics = self.checkpoints.load(model, optimizer)
        if self.start > self.num_steps:
            remedy = f"{self.start} updates are done; raise it, or name a new --run-dir"
            raise UsageError(f"--max-steps {self.num_steps}: {remedy}")
        if self.ranks.rank == 0:  # lines after the checkpoint go: their updates are done again
            (self.folder / "metrics.jsonl").write_bytes(metrics)
            record = json.loads((self.folder / "args.json").read_text())
            if (self.folder / "model").is_dir():  # it was finished with other --max-steps
                name = f"model_step_{record['args']['max_steps']:06d}"
                (self.folder / "model").rename(self.folder / name)
            record["args"]["max_steps"] = self.args.max_steps
            write_whole(self.folder / "args.json", json.dumps(record, indent=1))
        if self.tracker is None:
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
            numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # nohup
            self.handlers = {number: signal.signal(number, self._catch) for number in numbers}
            kind = self.args.tracker if self.ranks.rank == 0 else "none"
            self.tracker = Tracker(kind, self.folder, vars(self.args))
        return self.start

    def _catch(self, number, frame):
        self.signals.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second SIGINT ends the process

    def should_save(self, step):
        """After `step` updates: a checkpoint is due, or a signal to any rank asks to stop."""
        if step == self.start:
            self.began = time.time()
        self.stopping = self.ranks.sum(torch.tensor(float(len(self.signals)))).item() > 0
        is_due = self.args.save_every and step % self.args.save_every == 0
        return step > self.start and bool(is_due or self.stopping or step == self.num_steps)

    def save(self, step, model, optimizer):
        """Copy the state and write it beside training.

        Raises:
            SystemExit: a signal asked to stop. Exit code 0, or 1 if the checkpoint failed.
        """
        metrics = (self.folder / "metrics.jsonl").read_bytes() if self.ranks.rank == 0 else b""
        self.checkpoints.save(step, model, optimizer, metrics)
        is_end = step == self.num_steps and not self.name
        if self.stopping and not is_end:
            is_saved = self.checkpoints.wait()
            state = "saved; the same command resumes" if is_saved else "not saved"
            cause = self.signals[0] if self.signals else "a signal to another rank"
            updates = f"{self.name} update {step} of {self.num_steps}".strip()
            self.ranks.print(f"stopped   by {cause} after {updates}; {state}")
            self.close("KILLED")
            raise SystemExit(0 if is_saved else 1)

    def should_evaluate(self, step):
        is_due = self.args.eval_every and step > 0 and step % self.args.eval_every == 0
        return bool(is_due or step == self.num_steps)

    def require_finite(self, step, metrics):
        """Leave with exit code 1, before the optimizer's step, where a figure is not finite."""
        if broken := [name for name, value in metrics.items() if not math.isfinite(value)]:
            self.checkpoints.wait()
            names = ", ".join(broken)
            self.ranks.print(f"stopped   update {step + 1}: {names} not finite; it is not applied")
            self.close("FAILED")
            raise SystemExit(1)

    def log(self, step, metrics):
        """Write metrics after `step` updates to metrics.jsonl, the tracker and the screen."""
        if self.ranks.rank > 0:
            return
        steps = {"step": 0, f"{self.name}/step": step} if self.name else {"step": step}
        with open(self.folder / "metrics.jsonl", "ab") as file:
            file.write(json.dumps({**steps, **metrics}).encode() + b"\n")
        self.tracker.log(step, {**steps, **metrics})
        is_due = step % max(1, self.num_steps // 50) == 0 or step == self.num_steps
        shown = {name: metrics[name] for name in SHOWN.split() if name in metrics}
        if shown and (is_due or "eval/bits_per_byte" in shown):
            words = [f"{name.partition('/')[2]} {value:.4g}" for name, value in shown.items()]
            pace = (time.time() - self.began) / max(1, step - self.start)
            left = datetime.timedelta(seconds=int(pace * (self.num_steps - step)))
            line = f"{self.name} step {step}/{self.num_steps} | {' | '.join(words)}".lstrip()
            print(f"{line} | eta {left}", flush=True)

    def write_weights(self, batch, weight_BT):
        """Write `weights.json` for evaluate.py: ids and weights (null: no target) of three rows."""
        is_target_BT = F.pad(batch.targets_KBT[0, :, :-1] != IGNORE, (1, 0))
        rows = []
        for ids, weights, is_target in list(zip(batch.x_BT, weight_BT, is_target_BT))[:3]:
            pairs = zip(weights.tolist(), is_target.tolist())
            weights = [weight if flag else None for weight, flag in pairs]
            rows.append({"ids": ids.tolist(), "weight": weights})
        if self.ranks.rank == 0:
            write_whole(self.folder / "weights.json", json.dumps(rows))

    def finish(self, model, tokenizer, data, heldout):
        """Write `model/`, close the run, and print the held-out figures beside zlib's."""
        self.checkpoints.wait()
        save_model(model, tokenizer, self.folder / "model", self.ranks)
        address = self.close("FINISHED")
        say = self.ranks.print
        say("\nheld-out  head   loss (nats)  accuracy")
        for k in range(1, self.args.num_heads + 1):
            loss, accuracy = heldout[f"eval/loss_head_{k}"], heldout[f"eval/acc_head_{k}"]
            say(f"          {k:>4} {loss:>13.4f} {accuracy:>9.3f}")
        bits, zlib_bits = heldout["eval/bits_per_byte"], data.zlib_bits_per_byte
        say(f"          {bits:.3f} bits per byte of {data.heldout_bytes:,} held-out bytes")
        say(f"          zlib -9: {zlib_bits:.3f}")
        say(f"\nwritten   {self.folder}/  args.json metrics.jsonl checkpoints/ model/")
        say(f"look      {address or 'no tracker; see metrics.jsonl'}")
        say(f"next      python evaluate.py --run-dir {shlex.quote(str(self.folder))}")

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
    batch = f"{ranks.world_size} rank(s) x {micro_batch_size} x {micro_steps} micro-step(s)"
    rows = f"{len(data.train):,} rows of {args.seq_len} tokens, {len(data.heldout):,} held out"
    epochs = args.max_steps * args.batch_size / len(data.train)
    ranks.print(f"model     {args.model}, {parameters:.2f} M parameters, {args.num_heads} head(s)")
    ranks.print(f"data      {args.data}, {rows}")
    ranks.print(f"batch     {args.batch_size} rows = {batch}")
    ranks.print(f"run       {args.max_steps:,} updates, {epochs:.2f} epochs")
    if args.warmup_steps >= args.max_steps:
        text = f"is not below --max-steps {args.max_steps}: the rate only rises"
        ranks.print(f"warning   --warmup-steps {args.warmup_steps} {text}")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


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
        self.kind, self.folder, self.arguments = kind, folder, arguments
        file = folder / "tracker.json"
        run_id = json.loads(file.read_text()).get(kind) if file.exists() else None
        start = {"mlflow": self._start_mlflow, "wandb": self._start_wandb}.get(kind)
        with self._off_if_it_fails():
            if start:
                write_whole(file, json.dumps({kind: start(run_id)}))

    @contextlib.contextmanager
    def _off_if_it_fails(self):
        try:
            yield
        except Exception as error:  # whatever the tracker raises
            text = f"tracker   {self.kind} failed and is off from here on: {first_line(error)}"
            print(text, file=sys.stderr, flush=True)
            self.kind = "none"

    def _start_mlflow(self, run_id):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        runs = self.folder.parent.resolve()
        database = f"sqlite:///{runs}/mlflow.db"
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", database))
        with filelock.FileLock(runs / ".mlflow.lock"):  # MLflow migrates a new file without a lock
            if mlflow.get_experiment_by_name("wmtp") is None:
                mlflow.create_experiment("wmtp", f"{runs.as_uri()}/mlartifacts")
            mlflow.set_experiment("wmtp")
            self.run = mlflow.start_run(run_id, run_name=self.folder.name)
        if run_id is None:
            mlflow.log_params({name: str(value)[:500] for name, value in self.arguments.items()})
        self.mlflow = mlflow
        return self.run.info.run_id

    def _start_wandb(self, run_id):
        import wandb

        has_key = os.environ.get("WANDB_API_KEY") or Path.home().joinpath(".netrc").exists()
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        run_id = run_id or sha256(str(self.folder.resolve()).encode())[:16]
        options = dict(id=run_id, resume="allow", dir=str(self.folder), mode=mode)
        options.update(project="wmtp", name=self.folder.name, config=self.arguments)
        self.run = wandb.init(**options)
        self.run.define_metric("*", step_metric="step")  # wandb's own step cannot go back
        self.run.define_metric("value/*", step_metric="value/step")
        return run_id

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


@torch.no_grad()
def evaluate_heldout(model, data, micro_batch_size, num_heads, ranks):
    """Loss (nats) and accuracy of each head on the held-out targets, bits per byte of head 1.

    bits_per_byte = loss_head_1 / ln 2 * tokens / bytes, both counted over the held-out text.
    """
    model.eval()
    sums_3K = torch.zeros(3, num_heads, dtype=torch.float64)
    for batch in heldout_batches(data, micro_batch_size, num_heads, ranks):
        with ranks.autocast():
            loss_KBT, correct_KBT = model(batch.x_BT, batch.targets_KBT, with_correct=True)
        figures = (loss_KBT, correct_KBT, batch.targets_KBT != IGNORE)
        sums_3K += torch.stack([values.sum((1, 2)).cpu().double() for values in figures])
    model.train()
    loss_K, correct_K, count_K = ranks.sum(sums_3K).tolist()
    metrics = {}
    for name, values_K in (("loss", loss_K), ("acc", correct_K)):
        for k, (value, count) in enumerate(zip(values_K, count_K), start=1):
            metrics[f"eval/{name}_head_{k}"] = value / max(1, count)
    bits = metrics["eval/loss_head_1"] / math.log(2)
    metrics["eval/bits_per_byte"] = bits * data.heldout_tokens / data.heldout_bytes
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
        self.folder, self.identity, self.keep_last = str(folder), identity, keep_last
        self.flag = f"--checkpoint-dir {self.folder}"
        self.ranks, self.bad, self.pending = ranks, set(), None
        try:
            if "://" in self.folder:
                self.fs, self.root = url_to_fs(self.folder)
            else:  # a path, whatever its name: fsspec chains file systems at ::
                self.fs, self.root = LocalFileSystem(), os.path.abspath(self.folder)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{self.flag}: {first_line(error)}") from None
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self.options = dict(process_group=self.group, no_dist=self.group is None)

    def save(self, step, model, optimizer, metrics):
        """Copy the state, then write it beside training; waits for the save before this one."""
        self.wait()
        name = f"step_{step:06d}"
        meta = dict(step=step, identity=self.identity, versions=versions())
        writer = self._storage(name, dcp.FileSystemWriter, FsspecWriter)
        write_metadata = writer.finish

        def finish(metadata, results):  # on rank 0, after the files of all ranks
            write_metadata(metadata, results)
            files = {result.storage_data.relative_path for part in results for result in part}
            self._finish(f"{self.root}/{name}", meta, metrics, files)

        writer.finish = finish
        state = named_state(model, optimizer)
        self.pending = name, dcp.async_save(state, storage_writer=writer, **self.options)

    def wait(self):
        """Wait for the save that is under way; False, with one line, if it failed on any rank."""
        if self.pending is None:
            return True
        name, future = self.pending
        self.pending = None
        try:
            future.result()
            return True
        except dcp.api.CheckpointException as failed:  # the same on every rank
            error = next(iter(failed.failures.values()))[0]
        except Exception as other:  # whatever a store raises
            error = other
        if self.ranks.rank == 0:
            text = f"checkpoint {self.folder}/{name} failed: {first_line(error)}; training goes on"
            print(text, file=sys.stderr, flush=True)
        return False

    def _finish(self, path, meta, metrics, files):
        """Write metrics.jsonl and meta.json; remove the checkpoints before the last `keep_last`."""
        self.fs.invalidate_cache()
        self.fs.pipe_file(f"{path}/metrics.jsonl", metrics)
        files = sorted([*files, ".metadata", "metrics.jsonl"])
        meta["files"] = {file: self._fingerprint(f"{path}/{file}") for file in files}
        self.fs.pipe_file(f"{path}/meta.json", json.dumps(meta).encode())
        self.bad.discard(path)
        good = [path for path in self._complete() if path not in self.bad]
        for path in good[: -self.keep_last] if self.keep_last else []:
            self.fs.rm(path, recursive=True)

    def load(self, model, optimizer):
        """Read the last good checkpoint in place; returns its step and metrics.jsonl (0, empty).

        Files are compared with `meta.json` first. A bad checkpoint is named, and the one before
        it is taken.

        Raises:
            UsageError: the folder cannot be read or written, or holds checkpoints of another run
                or none that is good.
        """
        last_good = None
        with self.ranks.rank_0_first(f"{self.flag}: cannot be read or written") as is_first:
            if is_first:
                last_good = self._last_good()
        name, meta, metrics = self.ranks.broadcast(last_good)
        if name:
            reader = self._storage(name, dcp.FileSystemReader, FsspecReader)
            dcp.load(named_state(model, optimizer), storage_reader=reader, **self.options)
            self.ranks.print(f"resume    from {self.folder}/{name}")
            before, now = meta["identity"].get("max_steps"), self.identity.get("max_steps")
            if before != now:
                text = "on the new schedule: not what a straight run gives"
                self.ranks.print(f"resume    --max-steps was {before} and is {now}; {text}")
            if changes := differences(meta["versions"], versions()):
                self.ranks.print(f"resume    not bit for bit, as versions changed: {changes}")
        return meta["step"], metrics

    def _last_good(self):
        """Name, `meta.json` and metrics.jsonl of the last good checkpoint; None, step 0, empty."""
        if self.is_local:
            self.fs.makedirs(self.root, exist_ok=True)
        self.fs.pipe_file(f"{self.root}/.writable", b"")  # fail now, not at the first save
        self.fs.rm_file(f"{self.root}/.writable")
        for path in reversed(self._complete()):
            name = path.rpartition("/")[2]
            try:
                meta = json.loads(self.fs.cat_file(f"{path}/meta.json"))
                files = {file: self._fingerprint(f"{path}/{file}") for file in meta["files"]}
                damage = differences(meta["files"], files)
            except (FileNotFoundError, ValueError) as error:
                damage = first_line(error)
            if not damage:
                if changes := differences(meta["identity"], self.identity, but="max_steps"):
                    raise UsageError(f"{self.flag}: {name} is of another run ({changes})")
                return name, meta, self.fs.cat_file(f"{path}/metrics.jsonl")
            print(f"checkpoint {path} is bad: {damage}", flush=True)
            self.bad.add(path)
        if self.bad:
            raise UsageError(f"{self.flag}: no checkpoint is good; move them away to start anew")
        return None, {"step": 0}, b""

    def _storage(self, name, local_class, remote_class):
        path = f"{self.root}/{name}"
        return local_class(path) if self.is_local else remote_class(self.fs.unstrip_protocol(path))

    def _fingerprint(self, file):
        """Size of a file and, on a local disk, its SHA-256."""
        if not self.is_local:
            return [self.fs.size(file), ""]
        with open(file, "rb") as stream:
            return [self.fs.size(file), hashlib.file_digest(stream, "sha256").hexdigest()]

    def _complete(self):
        """Paths of the checkpoints that have a meta.json, in order of their steps."""
        self.fs.invalidate_cache()
        files = self.fs.glob(f"{glob.escape(self.root)}/step_*/meta.json")
        return sorted((file.rpartition("/")[0] for file in files), key=lambda p: (len(p), p))


def named_state(model, optimizer):
    """Parameters and optimizer state by the names of the parameters."""
    parameters = dict(model.named_parameters())
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

    @property
    def tokens_per_forward(self):
        """Mean number of new tokens that a row gets from a pass; 1 for plain decoding."""
        return self.new_tokens / max(1, self.row_steps)


class RowCache(Cache):
    """Keys and values with slot = position: each row has its own length, and nothing is cropped.

    Refused drafts stay past a row's length: masked, until a later pass writes over them.
    """

    def __init__(self, capacity):
        super().__init__(layers=[])
        self.capacity = capacity
        self.pairs = {}  # by layer: keys and values, `[B, heads, capacity, size]`

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Write to slots `position_BQ` (`start` to `end - 1`); returns slots 0 to `end - 1`."""
        if layer_idx not in self.pairs:  # the prompts, from slot 0 on
            room = (0, 0, 0, self.capacity - keys.shape[2])
            self.pairs[layer_idx] = [F.pad(new, room) for new in (keys, values)]
        for kept, new in zip(self.pairs[layer_idx], (keys, values)):
            if self.end - self.start == new.shape[2]:  # all rows at the same slots: a plain copy
                kept[:, :, self.start : self.end] = new
            else:
                kept[self.row_B1, :, self.position_BQ] = new.transpose(1, 2)
        return tuple(kept[:, :, : self.end] for kept in self.pairs[layer_idx])

    def keep_rows(self, rows):
        for layer, pair in self.pairs.items():
            self.pairs[layer] = [kept[rows] for kept in pair]


def attention_masks(config, position_BQ, end, dtype):
    """Additive masks `[B, 1, Q, end]`: a token sees the slots up to its own, or a window of them.

    A dict by kind of layer for families with several kinds.
    """
    slot_E, position = torch.arange(end, device=position_BQ.device), position_BQ[:, None, :, None]
    seen, hidden = torch.tensor([0.0, torch.finfo(dtype).min], dtype=dtype, device=slot_E.device)
    visible = slot_E <= position
    full = sliding = torch.where(visible, seen, hidden)
    several_kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    slides = several_kinds or getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    if slides and window and end > window:
        sliding = torch.where(visible & (slot_E > position - window), seen, hidden)
    return dict(full_attention=full, sliding_attention=sliding) if several_kinds else sliding


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


def propose(logits_BMV, temperature, top_p, uniform_BM):
    """Drafts `[B, M]` of heads 2..K and the distributions they were drawn from, `[B, M, V]`."""
    if temperature == 0:
        return logits_BMV.argmax(-1), None
    proposal_BMV = nucleus(logits_BMV, temperature, top_p)
    return draw(proposal_BMV, uniform_BM), proposal_BMV


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
    if draft_BM.shape[1] == 0:
        return torch.zeros_like(rows), draw(target_BQV[:, 0], uniform_BQ[:, 0])

    target_BM = target_BQV[:, :-1].gather(-1, draft_BM[..., None])[..., 0]
    proposed_BM = proposal_BMV.gather(-1, draft_BM[..., None])[..., 0]
    accepted_BM = uniform_BQ[:, :-1] * proposed_BM < target_BM
    taken_B = accepted_BM.long().cumprod(1).sum(1)
    target_BV = target_BQV[rows, taken_B]
    proposal_BV = F.pad(proposal_BMV, (0, 0, 0, 1))[rows, taken_B]
    residual_BV = (target_BV - proposal_BV).clamp(min=0)
    refusable_B1 = residual_BV.sum(-1, keepdim=True) > 0  # else p = q but for rounding
    return taken_B, draw(torch.where(refusable_B1, residual_BV, target_BV), uniform_BQ[:, -1])


def _read(model, cache, x_BQ, starts):
    """Normed states `[K, B, Q, D]` of the active heads; row b reads at positions `starts[b]` on."""
    decoder, dtype = model.causal_lm.model, model.causal_lm.lm_head.weight.dtype
    num_tokens = x_BQ.shape[1]
    start_B1 = torch.tensor(starts, device=x_BQ.device)[:, None]
    position_BQ = start_B1 + torch.arange(num_tokens, device=x_BQ.device)
    cache.start, cache.end = min(starts), max(starts) + num_tokens
    cache.position_BQ = position_BQ
    cache.row_B1 = torch.arange(len(starts), device=x_BQ.device)[:, None]
    rows_alike = cache.end - cache.start == num_tokens
    masked_BQ = position_BQ[:1] if rows_alike else position_BQ
    masks = attention_masks(decoder.config, masked_BQ, cache.end, dtype)
    options = dict(position_ids=position_BQ, past_key_values=cache, use_cache=True)
    states = decoder(input_ids=x_BQ, attention_mask=masks, **options).last_hidden_state
    return states.view(-1, *x_BQ.shape, states.shape[-1])


def _append(tokens, drafts, following, result, max_new_tokens, eos):
    """Add a row's new tokens up to the limit or `eos`; returns whether the row has ended."""
    new = [*drafts, following][: max_new_tokens - len(tokens)]
    ended = eos is not None and eos in new
    used = new.index(eos) + 1 if ended else len(new)
    tokens += new[: used - ended]
    result.row_steps += 1
    result.new_tokens += used
    result.accepted[: min(len(drafts), used)] += 1
    return ended or len(tokens) >= max_new_tokens


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_new_tokens,
    eos,
    num_heads=1,
    temperature=0.0,
    top_p=1.0,
    seeds=None,
    finished=None,
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
        UsageError: an empty prompt; more heads than the model has.
    """
    if not 1 <= num_heads <= len(model.heads.layers):
        limit = len(model.heads.layers)
        raise UsageError(f"decoding with {num_heads} heads: the model has {limit}")
    if not all(prompts):
        raise UsageError("decoding: an empty prompt; give at least one token")
    num_drafts = num_heads - 1
    result = Generated([[] for _ in prompts], np.zeros(num_drafts, np.int64))
    if not prompts:
        return result

    weight_VD = model.causal_lm.lm_head.weight
    rows = list(range(len(prompts)))  # the prompts that are still in the batch
    num_read = [len(prompt) for prompt in prompts]
    longest = max(num_read)
    cache = RowCache(longest + max_new_tokens + num_drafts)
    randoms = [np.random.default_rng(seed) for seed in (rows if seeds is None else seeds)]

    def uniform(count):
        if temperature == 0:
            return None
        numbers = np.stack([randoms[row].random(count) for row in rows])
        return torch.tensor(numbers, device=weight_VD.device)

    model.heads.active = num_heads
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    x_BT = torch.tensor(padded, device=weight_VD.device)
    places, length_B = torch.tensor([rows, num_read], device=x_BT.device)
    states_KBTD = _read(model, cache, x_BT, [0] * len(rows))
    states_KBQD = states_KBTD[:, places, length_B - 1][:, :, None]
    draft_BM, proposal_BMV = x_BT[:, :0], None
    result.forwards = 1
    while True:
        logits_BQV = logits_of(states_KBQD[0], weight_VD, model.softcap)
        random_BQ = uniform(logits_BQV.shape[1])
        taken_B, next_B = verify(logits_BQV, draft_BM, proposal_BMV, temperature, top_p, random_BQ)

        transfer = torch.cat([taken_B[:, None], next_B[:, None], draft_BM], 1).tolist()
        going = []  # places in the batch of the rows that have not ended
        for place, (row, (taken, following, *drafts)) in enumerate(zip(rows, transfer)):
            tokens = result.tokens[row]
            num_read[row] += taken + 1
            ended = _append(tokens, drafts[:taken], following, result, max_new_tokens, eos)
            if not ended and not (finished and finished(tokens)):
                going.append(place)
        if result.forwards == 1:  # the first tokens come from the prompts' own pass
            result.row_steps = result.new_tokens = 0
        if not going:
            return result

        states_KBD = states_KBQD[:, places, taken_B]
        if len(going) < len(rows):
            keep = torch.tensor(going, device=x_BT.device)
            rows, places = [rows[place] for place in going], places[: len(going)]
            states_KBD, next_B = states_KBD[:, keep], next_B[keep]
            cache.keep_rows(keep)
        x_BQ = next_B[:, None]
        draft_BM = x_BQ[:, :0]
        if num_drafts:
            draft_logits_BMV = logits_of(states_KBD[1:], weight_VD, model.softcap).transpose(0, 1)
            random_BM = uniform(num_drafts)
            draft_BM, proposal_BMV = propose(draft_logits_BMV, temperature, top_p, random_BM)
            x_BQ = torch.cat([x_BQ, draft_BM], 1)
        states_KBQD = _read(model, cache, x_BQ, [num_read[row] - 1 for row in rows])
        result.forwards += 1
