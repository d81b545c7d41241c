"""The ranks of a run and the model they train: torchrun and FSDP2 setup, MTP heads, their loss, loading and saving.

What every script needs and no paper claims is in this file, `data.py` (from `--data` to batches) and `runs.py` (run
directory, checkpoints, tracking). Weights, the reduction to a loss, the loop and the arguments stay in the scripts.

Shapes: B batch, T positions, K heads, V vocabulary, D width, N tokens.
"""

import contextlib
import copy
import dataclasses
import datetime
import errno
import functools
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that is no target: prompt, padding, past the end of the row or of the document
HEADS_FILE = "mtp_heads.safetensors"


class UsageError(Exception):
    """What a user can mend: one line that names the value, the limit and the flag. The entry point exits with 2."""


# ------------------------------------------------------------------------------------------------------- entry and ranks
def run_script(main, args_class, doc):
    """Parse the command line, run `main(args)`, and turn a `UsageError` into one line and exit code 2."""
    rank = int(os.environ.get("RANK", 0))
    transformers.utils.logging.disable_progress_bar()
    try:
        main(tyro.cli(args_class, description=doc, console_outputs=rank == 0))
    except UsageError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        text = str(error).replace("os error 28", f"Errno {errno.ENOSPC}")  # as safetensors has it
        if not any(f"rrno {number}" in text for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)):
            raise
        print(f"error: rank {rank}: {text}; no checkpoint was touched: make room, start again", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"stopped   rank {rank} by SIGINT, outside the updates; nothing of this step is saved", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclasses.dataclass
class Ranks:
    """This process among all of the run: which one it is, where and in which type it computes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def autocast(self):
        """Context of a forward pass: half-precision products over fp32 master weights, or nothing in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def gather(self, values):
        """The tensor of every rank, `[world_size, ...]`."""
        if self.world_size == 1:
            return values[None]
        values = values.to(self.device)
        everyone = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(everyone, values.contiguous())
        return torch.stack(everyone)

    @contextlib.contextmanager
    def first(self):
        """True on rank 0, which does the work inside alone while the others wait; its `UsageError` is raised on all."""
        message = None
        try:
            yield self.rank == 0
        except UsageError as error:
            message = str(error)
        if message := self.of_first(message):
            raise UsageError(message)

    def of_first(self, value):
        """What rank 0 has for `value`, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def patience(self, minutes):
        """From here on a collective fails once it has waited so long: a host without power or network closes no connection."""
        if self.world_size > 1:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=minutes))

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def say(self, text):
        """Print once, not once a rank."""
        if self.rank == 0:
            print(text, flush=True)


def setup_ranks(device, dtype):
    """Join the process group that torchrun describes (none: one process); choose device and compute type and say which.

    `dtype="auto"` takes bf16 where the device multiplies faster in it: on a CPU by a measured product.
    """
    world_size, mps = int(os.environ.get("WORLD_SIZE", 1)), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps and world_size == 1 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if device == "mps" and not (mps and world_size == 1):
        raise UsageError("--device mps: needs one process on a machine with Metal; use --device cpu")
    if device == "mps" and dtype == "bf16":
        raise UsageError("--dtype bf16: not on Metal, whose half type loses gradients without loss scaling; use --dtype fp32")
    where = torch.device(device)
    if device == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(where)
    if world_size > 1:
        patience = datetime.timedelta(hours=2)  # rank 0 tokenises alone
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=patience)
    why, half = f"--dtype {dtype}", dtype == "bf16"
    if dtype == "auto" and device == "cpu":
        seconds = []
        for kind in (torch.bfloat16, torch.float32):
            a = torch.ones(256, 256, dtype=kind)
            times = [(time.perf_counter(), a @ a, time.perf_counter()) for _ in range(6)]
            seconds.append(sorted(end - start for start, _, end in times)[2])
        ratio = torch.tensor(seconds[0] / seconds[1])
        if world_size > 1:
            dist.broadcast(ratio, 0)  # every rank must choose alike
        half, why = bool(ratio < 0.8), f"a bf16 product takes {ratio:.2g} times an fp32 one"
    elif dtype == "auto":
        half = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        why = "the GPU has bf16" if half else "no bf16 on this device"
    chosen = torch.bfloat16 if half else torch.float32
    ranks = Ranks(int(os.environ.get("RANK", 0)), world_size, where, chosen)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # pytorch #135712: the store outlives a restart
        ranks.say("restarts  torchrun may fail to restart workers: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it")
    ranks.say(f"device    {where.type}, {world_size} rank(s), products in {str(chosen)[6:]} ({why}), master weights in float32")
    return ranks


SMALL = 2**20  # parameters of a layer below which its own gathers cost more than they save in memory


def shard(model, ranks):
    """Shard parameters, gradients and optimizer state over all ranks (FSDP2); on one rank, leave the model as it is.

    Gradients are summed, not averaged: the loss is already divided by the count of valid targets of all ranks.
    """
    if ranks.world_size == 1:
        return model
    half = ranks.dtype if ranks.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for layer in [*model.trunk_layers, *model.heads.layers]:
        if sum(p.numel() for p in layer.parameters()) >= SMALL:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    return model


def rank_share(model, optimizer, ranks):
    """One line: bytes of parameters and of optimizer state that a rank holds (the largest share), beside those of all."""

    def measure(tensors):
        tensors = list(tensors)
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in local), sum(t.numel() * t.element_size() for t in tensors)

    state = [t for values in optimizer.state.values() for t in values.values() if t.ndim]
    (part, whole), (moments, all_moments) = measure(model.parameters()), measure(state)
    part, moments = ranks.gather(torch.tensor([part, moments])).amax(0).tolist()
    return (
        f"parameters {part / 1e6:,.2f} MB of {whole / 1e6:,.2f} on each rank ({part / whole:.4f}), "
        f"optimizer {moments / 1e6:,.2f} MB of {all_moments / 1e6:,.2f} ({moments / all_moments:.4f})"
    )


def set_gradient_sync(model, sync):
    """Reduce gradients over ranks in the next backward, or (micro-steps but the last) keep them on each rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def clip_gradients(model, limit):
    """Scale the gradient down to norm `limit` (0: leave it); returns its norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ------------------------------------------------------------------------------------------------------------- the model
class Heads(nn.Module):
    """The prediction heads, standing where the decoder had its last layer: all run on the trunk's output.

    The decoder goes on with their outputs side by side in the batch, `[K*B, T, D]`, so its own final norm, its masks,
    rotary tables, embedding scale and sliding windows serve every head, whatever the family.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.active = len(layers)  # heads 1..active run
        self.recompute = False  # keep no activations of the head layers, run them again in the backward

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:  # decoders ask a layer for its kind of attention
            return getattr(super().__getattr__("layers")[0], name)

    def forward(self, hidden_BTD, *args, **kwargs):
        outputs = []
        for layer in list(self.layers)[: self.active]:  # a slice of the ModuleList would be a new module
            run = functools.partial(checkpoint, layer, use_reentrant=False) if self.recompute else layer
            outputs.append(run(hidden_BTD, *args, **kwargs))
        return torch.cat(outputs)


class MTPModel(nn.Module):
    """A `transformers` causal LM whose last layer is head 1 of several (Gloeckle et al. 2024, arXiv 2404.19737, sec. 2).

    Trunk and head 1 are the plain model: `causal_lm` still generates and saves as one.

    Args:
        causal_lm: a causal LM with `model.layers`, `model.norm` and a bias-free `lm_head`.
        extra_heads: layers of the same kind for heads 2..H.
    """

    def __init__(self, causal_lm, extra_heads):
        super().__init__()
        layers = causal_lm.model.layers
        for number, layer in enumerate(extra_heads, start=len(layers)):  # each layer owns a slot of the key-value cache
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
        layers[-1] = Heads([layers[-1], *extra_heads])
        self.causal_lm = causal_lm
        self.softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
        self.tile = None  # tokens and entries of the vocabulary whose logits exist at once; None: TILE

    @property
    def heads(self):
        return self.causal_lm.model.layers[-1]

    @property
    def trunk_layers(self):
        return self.causal_lm.model.layers[:-1]

    def hidden(self, x_BT, num_heads):
        """Normed states of heads 1..num_heads, `[K, B, T, D]`."""
        self.heads.active = num_heads
        for layer in list(self.heads.layers)[num_heads:]:  # micro-steps fail on one that never ran (pytorch #194058)
            if isinstance(layer, FSDPModule):
                layer.set_requires_gradient_sync(True)
        states = self.causal_lm.model(input_ids=x_BT, use_cache=False).last_hidden_state
        return states.view(num_heads, *x_BT.shape, -1)

    def forward(self, x_BT, targets_KBT, with_correct=False):
        """Cross entropy of each target in nats, fp32, `[K, B, T]`, 0 where the target is `IGNORE`.

        Heads 1..K run, K being the first size of `targets_KBT`. Where a tile holds all logits they are kept, else they
        exist a tile at a time and the backward makes them again. With `with_correct` a second `[K, B, T]` says where the
        most likely token is the target.
        """
        hidden = self.hidden(x_BT, targets_KBT.shape[0]).flatten(0, -2)
        weight, targets = self.causal_lm.lm_head.weight, targets_KBT.flatten()
        if torch.is_autocast_enabled(hidden.device.type):
            half = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(half), weight.to(half)
        tile = self.tile or TILE.get(hidden.device.type, TILE["cuda"])
        if len(targets) * len(weight) <= math.prod(tile):
            logits = F.linear(hidden, weight).float()
            logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
            correct = logits.argmax(-1) == targets if with_correct else loss
        else:
            loss, correct = TokenLosses.apply(hidden, weight, targets, self.softcap, tile, with_correct)
        loss, correct = (v.unflatten(0, targets_KBT.shape).clone() for v in (loss, correct))  # FSDP2 wants no views out
        return (loss, correct) if with_correct else loss


TILE = {"cpu": (1024, 2048), "cuda": (8192, 8192)}  # 8 MB stay in a CPU's cache; 256 MB: few kernels (not measured on a GPU)


class TokenLosses(torch.autograd.Function):
    """Cross entropy of every token through a shared unembedding, logits for a tile of tokens and vocabulary at a time.

    Unreduced, as weights may depend on the losses; so the backward makes the logits again (four products where a loss
    reduced beforehand costs three). Tokens without target, and in the backward those of weight 0, are in no product. Sums
    and losses are fp32 whatever the type of the products. Soft-capping, gradients of a bf16 unembedding summed in fp32,
    and torch 2.11 are what `torch.nn.functional.linear_cross_entropy` lacks.
    """

    @staticmethod
    def logits(hidden_ND, weight_VD, softcap, buffer=None):
        if buffer is None:
            logits = F.linear(hidden_ND, weight_VD).float()
        else:  # fresh pages for every tile would cost as much as its exponentials
            size = len(hidden_ND), len(weight_VD)
            logits = torch.mm(hidden_ND, weight_VD.t(), out=buffer[: math.prod(size)].view(size)).float()
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    @staticmethod
    def tiles(mask_N, vocabulary, tile):
        """Groups of the tokens in the mask, and spans of the vocabulary."""
        compiled = torch.compiler.is_compiling()  # sizes must be known then: every token is in the products
        rows_M = torch.arange(len(mask_N), device=mask_N.device) if compiled else mask_N.nonzero()[:, 0]
        return rows_M.split(tile[0]), [slice(v, min(v + tile[1], vocabulary)) for v in range(0, vocabulary, tile[1])]

    @staticmethod
    def place(targets, span):
        """Where in the span each target lies (somewhere, if elsewhere), and which of them lie there."""
        return (targets - span.start).clamp(0, span.stop - span.start - 1), (targets >= span.start) & (targets < span.stop)

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, softcap, tile, with_correct):
        groups, spans = TokenLosses.tiles(targets_N != IGNORE, len(weight_VD), tile)
        ctx.softcap, ctx.tile = softcap, tile
        total_N, loss_N = hidden_ND.new_zeros(2, len(targets_N), dtype=torch.float32)
        correct_N = torch.zeros_like(targets_N, dtype=torch.bool)
        buffer = hidden_ND.new_empty(len(groups[0]) * (spans[0].stop - spans[0].start))
        for rows in groups:
            hidden, targets = hidden_ND[rows], targets_N[rows, None]
            best = chosen = total_N.new_full((len(rows), 1), -math.inf)  # largest logit so far; the target's
            total, token = torch.zeros_like(best), torch.zeros_like(targets)  # sum of exp(logit - best); the largest one's
            for span in spans:
                logits = TokenLosses.logits(hidden, weight_VD[span], softcap, buffer)
                place, here = TokenLosses.place(targets, span)
                chosen = torch.where(here, logits.gather(-1, place), chosen)
                value, place = logits.max(-1, keepdim=True) if with_correct else (logits.amax(-1, keepdim=True), None)
                if with_correct:
                    token = torch.where(value > best, place + span.start, token)
                before, best = best, torch.maximum(best, value)
                total = total * (before - best).exp() + logits.sub_(best).exp_().sum(-1, keepdim=True)
            total_N[rows] = (best + total.log())[:, 0]
            loss_N[rows] = total_N[rows] - chosen[:, 0]
            correct_N[rows] = (token == targets)[:, 0]
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, total_N)
        ctx.mark_non_differentiable(correct_N)
        return loss_N.masked_fill_(targets_N == IGNORE, 0.0), correct_N

    @staticmethod
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, targets_N, total_N = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_N = grad_N.masked_fill(targets_N == IGNORE, 0.0)
        groups, spans = TokenLosses.tiles(grad_N != 0, len(weight_VD), ctx.tile)
        buffer = hidden_ND.new_empty(len(groups[0]) * (spans[0].stop - spans[0].start))
        for rows in groups:
            hidden, targets, grad = hidden_ND[rows], targets_N[rows, None], grad_N[rows, None]
            grad_rows = hidden.new_zeros(hidden.shape, dtype=torch.float32)
            for span in spans:
                weight = weight_VD[span]
                logits = TokenLosses.logits(hidden, weight, ctx.softcap, buffer)
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2  # of the soft-capping
                place, here = TokenLosses.place(targets, span)
                error = logits.sub_(total_N[rows, None]).exp_().mul_(grad)  # softmax - one-hot
                error = error.scatter_add_(-1, place, -grad * here)
                error = (error if slope is None else error.mul_(slope)).to(weight_VD.dtype)
                if error.dtype == torch.float32:
                    grad_rows.addmm_(error, weight)
                    grad_weight[span].addmm_(error.t(), hidden)
                else:
                    grad_rows += error @ weight
                    grad_weight[span] += error.t() @ hidden
            grad_hidden[rows] = grad_rows.to(hidden.dtype)
        return grad_hidden, grad_weight.to(weight_VD.dtype), None, None, None, None


TINY = dict(  # of the sizes tried, what learns most in five minutes on 2 CPU cores
    vocab_size=259, hidden_size=128, intermediate_size=352, num_hidden_layers=7, num_attention_heads=4, initializer_range=0.05,
    max_position_embeddings=2048, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def build_model(name, num_heads, seq_len=None, recompute="none"):
    """Model and tokenizer from what `--model` names.

    Args:
        name: `tiny` or a `config.json` (from scratch: its layers are trunk and heads together, so every number of
            heads has the same number of parameters), a folder or hub name of a Hugging Face causal LM (heads 2..H
            start as copies of the last layer), a run directory or `model/` of ours (its heads are read), or a folder
            in Meta's release layout (`consolidated.pth`, `params.json`).
        num_heads: H, at least 1; for a folder that holds heads, the number it holds.
        seq_len: longest input there will be.
        recompute: `heads` or `all` layers keep no activations for the backward.

    Raises:
        UsageError: nothing there, a family whose logits the heads cannot reproduce, numbers that do not fit.
    """
    if num_heads < 1:
        raise UsageError(f"--num-heads {num_heads}: at least 1")
    path = Path(name)
    if name == "tiny":
        model, tokenizer = from_config(transformers.LlamaConfig(**TINY), num_heads), load_tokenizer(None)
        nn.init.normal_(model.causal_lm.model.embed_tokens.weight)  # 0.07 bits per byte better than 0.05 after 1 M tokens
    elif path.suffix == ".json":
        if not path.is_file():
            raise UsageError(f"--model {name}: no such file")
        model, tokenizer = from_config(_read_config(name, path), num_heads), load_tokenizer(path.parent)
    else:
        model, tokenizer = load_mtp(name, num_heads, add_heads=True), load_tokenizer(model_dir(name))
    check_vocabulary(name, model, tokenizer)
    longest = max_positions(model.causal_lm.config)
    if (seq_len or 0) > longest:
        raise UsageError(f"--seq-len {seq_len}: --model {name} has positions for {longest} tokens at most")
    model.heads.recompute = recompute == "heads"
    if recompute == "all":
        model.causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def max_positions(config):
    """Longest text that a model has positions for; infinite where it has no limit."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def check_vocabulary(name, model, tokenizer):
    """Refuse a tokenizer that is not the model's own, by the sizes of the two vocabularies."""
    rows, known = model.causal_lm.lm_head.weight.shape[0], len(tokenizer)
    if not 0 <= rows - known < 1024:  # families pad their vocabulary to round numbers: 399 rows in Qwen2.5-7B
        raise UsageError(
            f"--model {name}: its vocabulary has {rows} entries, its tokenizer {known}; at least {known} and fewer "
            f"than {known + 1024} fit, so give --model a folder whose tokenizer is its own"
        )


def load_tokenizer(folder):
    """The tokenizer in `folder`; bytes (`ByT5Tokenizer`: byte + 3, EOS 1) where there is none to read."""
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if folder is None or (Path(folder).is_dir() and not any((Path(folder) / f).exists() for f in files)):
        return transformers.ByT5Tokenizer(extra_ids=0)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UsageError(f"--model {folder}: its tokenizer cannot be read ({first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(f"--model {folder}: its tokenizer has no end-of-sequence token, and documents must end in one")
    return tokenizer


def from_config(config, num_heads):
    """A freshly initialised model with `config.num_hidden_layers` layers, trunk and heads together."""
    total = config.num_hidden_layers
    if num_heads > total:
        raise UsageError(f"--num-heads {num_heads}: the model has {total} layers, trunk and heads together; at most {total}")
    kept = total - num_heads + 1
    config = copy.deepcopy(config)
    with _refusing(config):
        if getattr(config, "layer_types", None):  # heads are of head 1's kind
            config.layer_types = config.layer_types[:kept] + [config.layer_types[kept - 1]] * (num_heads - 1)
        causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        extra_heads = [copy.deepcopy(causal_lm.model.layers[kept - 1]) for _ in range(num_heads - 1)]
        for head, layer in zip(extra_heads, causal_lm.model.layers[kept:]):  # some families build layers by their number
            head.load_state_dict(layer.state_dict())
        causal_lm.model.layers = causal_lm.model.layers[:kept]
        causal_lm.config.num_hidden_layers = kept
        if getattr(config, "layer_types", None):
            causal_lm.config.layer_types = config.layer_types[:kept]
        return _checked(causal_lm, extra_heads)


def load_mtp(name, num_heads=None, add_heads=False):
    """Load trunk, head 1 and heads 2..H from a run directory, a `model/`, Meta's layout or a Hugging Face model.

    Args:
        num_heads: H; None takes the number that the files hold.
        add_heads: where the files hold head 1 alone, make heads 2..H as copies of it (the next-token function is
            untouched; taking layers away instead hurts: 2404.19737, table S6).

    Raises:
        UsageError: no such model; another number of heads asked for than the files hold.
    """
    folder = model_dir(name)
    if (Path(folder) / "consolidated.pth").exists():
        try:
            model = _load_meta(Path(folder))
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise UsageError(f"--model {name}: not in Meta's release layout ({first_line(error)})") from error
        _same_number(name, num_heads, len(model.heads.layers))
        return model
    config, file, states = _read_config(name, folder), Path(folder) / HEADS_FILE, []
    try:
        with _refusing(config):
            options = dict(dtype=torch.float32, output_loading_info=True)
            causal_lm, found = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        if file.exists():
            tensors = load_file(file)
            numbers = sorted({int(key.split(".")[1]) for key in tensors})
            states = [{k.split(".", 2)[2]: v for k, v in tensors.items() if int(k.split(".")[1]) == n} for n in numbers]
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--model {name}: its weights cannot be read ({first_line(error)})") from error
    if found["missing_keys"] or found["mismatched_keys"]:
        lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        raise UsageError(f"--model {name}: lacks {len(lacking)} weights of its architecture, {lacking[0]} among them")
    if states or not add_heads:
        _same_number(name, num_heads, 1 + len(states))
    with _refusing(config):
        extra_heads = [copy.deepcopy(causal_lm.model.layers[-1]) for _ in range(len(states) or (num_heads or 1) - 1)]
        for layer, state in zip(extra_heads, states):
            layer.load_state_dict(state)
        return _checked(causal_lm, extra_heads)


def _read_config(name, path):
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # what a broken file raises has no common class
        raise UsageError(f"--model {name}: not a preset (tiny), nor a model that can be read ({first_line(error)})") from error


def model_dir(name):
    inside = Path(name) / "model"
    return str(inside) if (inside / "config.json").exists() else str(name)


def _same_number(name, asked, held):
    if asked not in (None, held):
        raise UsageError(f"--num-heads {asked}: {name} holds {held} heads; use --num-heads {held}")


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _refusing(config):
    """Turn the ways in which a family's code does not fit into one line that names the family."""
    try:
        yield
    except UsageError:
        raise
    except (AttributeError, TypeError, KeyError, NotImplementedError, ValueError, RuntimeError) as error:
        raise UsageError(f"--model: the family {config.model_type} is not supported ({first_line(error)})") from error


@torch.no_grad()
def _checked(causal_lm, extra_heads):
    """Wrap, and refuse a family where head 1 is not the plain model to rounding: it must never be trained wrongly."""
    family, head = causal_lm.config.model_type, causal_lm.lm_head
    if not isinstance(head, nn.Linear) or head.bias is not None or not hasattr(causal_lm.model, "norm"):
        raise UsageError(f"--model: the family {family} is not supported (needs model.norm and an lm_head without bias)")
    causal_lm.eval()
    x_BT = torch.arange(12)[None] % head.weight.shape[0]
    plain = causal_lm(input_ids=x_BT, use_cache=False).logits.float()
    model = MTPModel(causal_lm, extra_heads).eval()
    targets = plain.argmax(-1)[None]
    expected = F.cross_entropy(plain[0], targets[0, 0], reduction="none")
    difference = (model(x_BT, targets)[0, 0] - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise UsageError(
            f"--model: the family {family} is not supported (head 1 differs from the plain model by {difference:.3g} nats)"
        )
    return model


def _load_meta(folder):
    """Meta's release layout (huggingface.co/facebook/multi-token-prediction): LLaMA-1 names, rotary pairs interleaved."""
    params = json.loads((folder / "params.json").read_text())
    tensors = torch.load(folder / "consolidated.pth", map_location="cpu", weights_only=True, mmap=True)
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    num_heads = params.get("n_future_tokens", 1)
    kept = params["n_layers"] - num_heads + 1
    vocab_size, width = tensors["output.weight"].shape
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=params["n_layers"],
        intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0], num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"], rms_norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0), max_position_embeddings=params.get("max_seq_len", 4096),
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    def renamed(prefix, number):
        state = {}
        for old, new in names.items():
            value = tensors[f"{prefix}.{number}.{old}.weight"].float()
            if old in ("attention.wq", "attention.wk"):  # pairs (2i, 2i+1) there, halves (i, i + D/2) in transformers
                size = width // params["n_heads"]
                value = value.view(-1, size // 2, 2, width).transpose(1, 2).reshape(-1, width)
            state[f"{new}.weight"] = value
        return state

    causal_lm = transformers.LlamaForCausalLM(config)
    order = [("layers", n) for n in range(kept)] + [("extra_heads", n) for n in range(num_heads - 1)]
    for layer, (prefix, number) in zip(causal_lm.model.layers, order, strict=True):
        layer.load_state_dict(renamed(prefix, number))
    for module, old in (
        (causal_lm.model.embed_tokens, "tok_embeddings"),
        (causal_lm.model.norm, "norm"),
        (causal_lm.lm_head, "output"),
    ):
        module.load_state_dict({"weight": tensors[f"{old}.weight"].float()})
    extra_heads = list(causal_lm.model.layers[kept:])
    causal_lm.model.layers = causal_lm.model.layers[:kept]
    causal_lm.config.num_hidden_layers = kept
    return _checked(causal_lm, extra_heads)


def save_model(model, tokenizer, folder, ranks):
    """Write `folder`: trunk and head 1 as a plain Hugging Face model with tokenizer, heads 2..H in `mtp_heads.safetensors`.

    Written beside and renamed, so a folder of that name is whole. Every rank takes part.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options) if ranks.world_size > 1 else model.state_dict()
    if ranks.rank == 0:
        causal_lm, number = model.causal_lm, len(model.trunk_layers)
        plain, heads = {}, {}
        for key, value in full.items():
            key = key.removeprefix("causal_lm.")
            found = re.fullmatch(rf"model\.layers\.{number}\.layers\.(\d+)\.(.+)", key)
            if found and found[1] != "0":
                heads[f"heads.{int(found[1]) + 1}.{found[2]}"] = value.contiguous()
            else:
                plain[f"model.layers.{number}.{found[2]}" if found else key] = value
        if causal_lm.config.tie_word_embeddings:
            plain.pop("lm_head.weight", None)
        temporary = Path(folder).with_name(Path(folder).name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        causal_lm.save_pretrained(temporary, state_dict=plain)
        tokenizer.save_pretrained(temporary)
        if heads:
            save_file(heads, temporary / HEADS_FILE, metadata={"format": "pt", "num_heads": str(len(model.heads.layers))})
        temporary.rename(folder)
    ranks.barrier()


def active_heads(schedule, step, max_steps, num_heads):
    """How many heads, 1..k, train in update `step` (0-based): the curricula of 2505.22757.

    `constant`: all. `forward`: 1, 2, .. H in equal parts of the run. `reverse`: H, .. 2, 1, so it ends with head 1 alone.
    """
    part = min(num_heads - 1, step * num_heads // max_steps)
    return {"constant": num_heads, "forward": 1 + part, "reverse": num_heads - part}[schedule]
