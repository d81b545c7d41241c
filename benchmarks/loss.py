"""Memory and time of the loss of H heads: forward and backward through one unembedding, ours beside its peers.

    python benchmarks/loss.py [memory] [time] [layers] [tables] [--tokens 512] [--forms ours trl] [--device cuda]

- `memory` and `time` measure the loss alone: the heads' states are given, need gradients, and come out of no layer, since
  layers cost the same in every form and would hide what the loss needs. Every token has a weight of its own, and the form
  has to return the losses before it is known (the last form of the list cannot: it is there as the bound for speed).
- `layers` puts H = 4 layers under the loss and an embedding under these, where keeping the graphs of all heads until one
  backward costs memory that a backward per head does not; `--recompute heads` is what ours has against it.
- `tables` prints the tables of loss.json, which each of the other words ends with too. With none of them: all three.

Memory is the peak of one step above rest, less the gradient of the states (H x tokens x width, which every form returns). At
rest there are weights, states and, as in every micro-step after an update's first, a gradient of the unembedding, to which
the step adds one: about a gradient's size is the least. It is the resident size on the CPU (Linux only; the C library is told
to hand freed blocks back at once, MALLOC_MMAP_THRESHOLD_, in memory runs alone), torch's allocator on CUDA. Each form has a
process of its own, which compares losses and gradients with float64 on a small case first (and so imports and compiles).
Time: the processes wait and take turns, steps are repeated for at least 0.2 s, a first round is not counted; medians.
Packages of the peers: benchmarks/requirements.txt; one that is missing or fails here is named with its reason.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FORMS = {
    "stacked": "all heads' logits at once",
    "head by head": "a backward per head (Meta)",
    "checkpointed": "each head's logits made again in the backward (Lingua)",
    "trl": "TRL, ChunkedLogProbFunction",
    "liger, torch": "Liger, chunk_forward of its chunked losses in torch",
    "liger": "Liger, LigerFusedLinearCrossEntropyLoss",
    "cce": "cut-cross-entropy, cce",
    "cce, torch": "cut-cross-entropy, torch_compile",
    "native": "torch, F.linear_cross_entropy, its own chunks",
    "native, 256": "torch, F.linear_cross_entropy, chunks of 256 tokens",
    "ours": "ours",
    "ours, recompute": "ours, --recompute heads",
    "native, sum": "torch, F.linear_cross_entropy, chunks of 256 tokens, one weight for all tokens",
}
LAYERED = ["stacked", "head by head", "ours", "ours, recompute"]
PEERS = ("trl", "liger-kernel", "cut-cross-entropy")
WHOLE_LOGITS = dict.fromkeys(["stacked", "cce, torch"], lambda heads: heads)  # the heads whose logits exist at once
WHOLE_LOGITS |= dict.fromkeys(["head by head", "checkpointed"], lambda heads: 1)
TIMED = ["256:1", "256:2", "256:4", "256:8", "32000:1", "32000:4", "32000:8", "128256:1"]
SMALL = dict(vocabulary=500, heads=2, tokens=48, width=64)


def losses_of(form, hidden_ND, weight_VD, targets_N):
    """Cross entropy of each token, `[N]` (of `native, sum` their sum)."""
    import torch
    import torch.nn.functional as F

    if form in ("stacked", "head by head", "checkpointed"):
        return F.cross_entropy(F.linear(hidden_ND, weight_VD), targets_N, reduction="none")
    if form == "trl":
        from trl.kernels import ChunkedLogProbFunction

        # no bias, temperature 1, the vocabulary chunk of its trainer, no softcap, scale 1, no further outputs
        return -ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, targets_N, 1.0, 32768, None, 1.0, ())[0]
    if form == "liger, torch":
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

        return -LigerFusedLinearPPOBase.chunk_forward(hidden_ND[None], weight_VD, targets_N[None])[0]
    if form == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="none")(weight_VD, hidden_ND, targets_N)
    if form.startswith("cce"):
        from cut_cross_entropy import linear_cross_entropy

        # filter_eps would leave out gradients by their size before the weights are known
        impl = "torch_compile" if form == "cce, torch" else "cce"
        return linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="none", filter_eps=None, impl=impl)
    chunks = {} if form == "native" else dict(batch_chunk_size=256)
    reduction, options = "sum" if form == "native, sum" else "none", torch.nn.LinearCrossEntropyOptions(**chunks)
    return F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction=reduction, options=options)


def step_of(form, vocabulary, heads, tokens, width, layers=False, device="cpu", double=False, equal=False):
    """A function that runs one step and returns the losses, and the tensors whose gradients it makes, unembedding last."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import LlamaConfig

    from common import from_config

    torch.manual_seed(0)
    depth = heads if layers else 1
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=depth,
                         num_attention_heads=8, max_position_embeddings=tokens, tie_word_embeddings=not layers)  # fmt: skip
    model = from_config(config, depth)
    unembedding = model.causal_lm.lm_head.weight
    unembedding.data.mul_(5)  # losses that differ
    hidden_HND, weight_HN = torch.randn(heads, tokens, width), torch.rand(heads, tokens) / tokens
    targets_HN, x_BT = torch.randint(0, vocabulary, (heads, tokens)), torch.randint(0, vocabulary, (1, tokens))
    if equal:
        weight_HN.fill_(1 / tokens)
    if double:
        model, hidden_HND, weight_HN = model.double(), hidden_HND.double(), weight_HN.double()
    model, hidden_HND, weight_HN, targets_HN, x_BT = (v.to(device) for v in (model, hidden_HND, weight_HN, targets_HN, x_BT))
    model.heads.recompute = form.endswith("recompute")
    given = list(hidden_HND.clone()) if form in ("head by head", "checkpointed") else [hidden_HND]  # a tensor of each head
    given = [v.detach().clone().requires_grad_() for v in given]
    wrt = [*(p for p in model.parameters() if p is not unembedding), unembedding] if layers else [*given, unembedding]
    unembedding = model.causal_lm.lm_head.weight
    if not layers:
        model.hidden = lambda *_: given[0][:, None]  # the loss of MTPModel as it is, on given states
    head_layers, decoder = list(model.heads.layers), model.causal_lm.model

    def states():
        """The heads' states, `[H, N, D]`, or one head's after another."""
        if not layers:
            yield from given
        elif form == "head by head":  # the trunk is an embedding: looking it up again stands for detaching the trunk
            for layer in head_layers:
                decoder.layers[-1] = layer
                yield decoder(input_ids=x_BT, use_cache=False).last_hidden_state[0]
        else:
            yield model.hidden(x_BT, heads)[:, 0]

    def step():
        for leaf in given:
            leaf.grad = None
        losses = []
        if form == "head by head":
            for hidden_ND, targets_N, weight_N in zip(states(), targets_HN, weight_HN):
                loss_N = losses_of(form, hidden_ND, unembedding, targets_N)
                (loss_N * weight_N).sum().backward()
                losses.append(loss_N.detach())
            return torch.cat(losses)
        if form == "checkpointed":
            for hidden_ND, targets_N in zip(states(), targets_HN):
                losses.append(checkpoint(losses_of, form, hidden_ND, unembedding, targets_N, use_reentrant=False))
            losses = torch.stack(losses)
        elif form.startswith("ours"):
            losses = model(x_BT, targets_HN[:, None])[:, 0]
        else:
            losses = losses_of(form, next(states()).flatten(0, 1), unembedding, targets_HN.flatten())
        (losses * weight_HN.view(losses.shape)).sum().backward() if losses.dim() else (losses / tokens).backward()
        return losses.detach().flatten()

    return step, wrt


def largest_error(form, layers, device):
    """Largest error of losses and gradients on a small case against all logits in float64, relative to the largest value."""
    import torch

    def run(form, **options):
        step, wrt = step_of(form, **SMALL, layers=layers, device=device, equal=equal, **options)
        losses = step()
        *others, unembedding = (p.grad.flatten() for p in wrt)
        return [losses, torch.cat(others), unembedding]

    equal = form == "native, sum"
    found, expected = run(form), run("stacked", double=True)
    expected[0] = expected[0].sum(0, keepdim=True) if equal else expected[0]
    assert all(f.shape == e.shape for f, e in zip(found, expected))
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected))


def resident_mb(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024


def peak_mb(step, device):
    """Peak of one step above rest."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - at_rest) / 2**20
    at_rest = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    return resident_mb("VmHWM") - at_rest


def seconds_a_step(step, device):
    import torch

    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < 0.2:
        step()
        count += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def from_peer(form):
    """Whether a package of benchmarks/requirements.txt computes it: its failure is an entry of the table, ours is the end."""
    return form.startswith(("trl", "liger", "cce"))


def worker(form, tokens, width, layers, device):
    """Prints the error on the small case, then answers each line `memory V H` or `time V H` with MB or seconds."""
    import torch

    try:
        error = largest_error(form, layers, device)
        assert error < 1e-5 or from_peer(form), f"{form}: losses or gradients differ from float64 by {error:.1e} of the largest"
        print(json.dumps(dict(error=error)), flush=True)
    except Exception as error:
        if not from_peer(form):
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name in ("trl", "liger_kernel", "cut_cross_entropy")
        why = "not installed" if missing else f"does not run here: {type(error).__name__}: {str(error).splitlines()[0]}"
        return print(json.dumps(dict(why=why)), flush=True)
    case = step = None
    for line in sys.stdin:
        what, vocabulary, heads = line.split()[0], *map(int, line.split()[1:])
        if case != (vocabulary, heads):
            if what == "memory" and (case is None or case[0] != vocabulary):  # libraries keep buffers after a first call
                step_of(form, vocabulary, 1, tokens, width, layers, device)[0]()
            case, step = (vocabulary, heads), None
            step, wrt = step_of(form, vocabulary, heads, tokens, width, layers, device)
            for p in wrt if layers else wrt[-1:]:
                p.grad = torch.zeros_like(p)
        given_mb = 0 if layers else heads * tokens * width * 4 / 2**20
        print(peak_mb(step, device) - given_mb if what == "memory" else seconds_a_step(step, device), flush=True)


def peers():
    """Versions of the peers' packages."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def logits_gb(form, vocabulary, heads, tokens):
    """What a form that holds whole logits must hold at once: they, their log-softmax and its gradient."""
    return WHOLE_LOGITS.get(form, lambda heads: 0)(heads) * 3 * vocabulary * tokens * 4 / 1e9


def memory_gb(device):
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    return next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable")) / 1e6


def measure(what, forms, cases, layers, args):
    """A row for each case and form, with `peak_mb` or `seconds`, or `why` there is none."""
    rounds = args.rounds + 1 if what == "time" else 1
    env = os.environ | dict(TORCHINDUCTOR_COMPILE_THREADS="1")
    env |= dict(MALLOC_MMAP_THRESHOLD_="65536") if what == "memory" else {}
    available, processes, errors, rows = memory_gb(args.device), {}, {}, []
    for form in forms:
        command = [sys.executable, __file__, "--tokens", args.tokens, "--width", args.width, "--device", args.device]
        command = [str(word) for word in [*command, "--worker", form, *["layers"] * layers]]
        processes[form] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    for form in forms:  # checks run side by side, what is measured one at a time
        errors[form] = json.loads(processes[form].stdout.readline() or '{"why": "ended without a word"}')
        if "why" in errors[form] and not from_peer(form):
            sys.exit(f"{form}: {errors[form]['why']}")
        print(f"{form:16} {errors[form]}", flush=True)
    for vocabulary, heads in cases:
        found = {form: [] for form in forms}
        for number in range(rounds):
            for form in forms if number % 2 else reversed(forms):
                if "why" in errors[form] or logits_gb(form, vocabulary, heads, args.tokens) > available:
                    continue
                processes[form].stdin.write(f"{what} {vocabulary} {heads}\n")
                processes[form].stdin.flush()
                found[form].append(float(processes[form].stdout.readline()))
                print(f"{what} V={vocabulary} H={heads} {form:16} {found[form][-1]:10.3f}", flush=True)
        for form, values in found.items():
            row = dict(vocabulary=vocabulary, heads=heads, form=form) | errors[form]
            if "why" not in row and not values:
                row["why"] = f"does not fit: needs {logits_gb(form, vocabulary, heads, args.tokens):.1f} GB by arithmetic"
            elif what == "time" and values:
                row |= dict(seconds=statistics.median(values[1:]), spread=[min(values[1:]), max(values[1:])])
            elif values:
                row["peak_mb"] = values[0]
            rows.append(row)
    for process in processes.values():
        process.communicate()
    return rows


def print_tables(results):
    """One table a section: a row for each form, a column for each vocabulary and number of heads."""
    titles = dict(memory="Peak MB", time="Seconds a step, median (least to most)", layers="H layers: peak MB; seconds a step")
    for section in [name for name in titles if name in results]:
        found = results[section]
        rows = {(r["form"], r["vocabulary"], r["heads"]): r for r in found["rows"]}
        cases = list(dict.fromkeys(key[1:] for key in rows))
        print(f"\n{titles[section]}; {found['tokens']:,} tokens a head, width {found['width']}, {found['machine']}\n")
        print(f"| form | {' | '.join(f'V = {v:,}, H = {h}' for v, h in cases)} | error |\n{'|---' * (len(cases) + 2)}|")
        for form in [form for form in FORMS if any(key[0] == form for key in rows)]:
            of_form = [rows[form, *case] for case in cases]
            error = f"{of_form[0]['error']:.0e}" if "error" in of_form[0] else ""
            print(f"| {FORMS[form]} | {' | '.join(map(cell, of_form))} | {error} |")


def cell(row):
    peak = [f"{row['peak_mb']:,.0f}"] if "peak_mb" in row else []
    seconds = ["{:.3g} ({:.3g} to {:.3g})".format(row["seconds"], *row["spread"])] if "seconds" in row else []
    return "; ".join(peak + seconds) or row["why"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="memory|time|layers|tables", help="default: the first three")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[256, 32000, 128256])
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--timed", nargs="+", default=TIMED, metavar="V:H")
    parser.add_argument("--layered", nargs="+", default=["256:4", "32000:4"], metavar="V:H")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each head")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "loss.json"))
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], args.tokens, args.width, "layers" in args.worker, args.device)
    if unknown := set(args.what) - {"memory", "time", "layers", "tables"}:
        parser.error(f"{' '.join(unknown)}: memory, time, layers or tables")
    import torch

    from runs import commit, versions

    def pairs(words):
        return [tuple(map(int, word.split(":"))) for word in words]

    cases = dict(memory=[(v, h) for v in args.vocabularies for h in args.heads], time=pairs(args.timed))
    alone, out = [form for form in args.forms if form != "ours, recompute"], Path(args.out)
    before = json.loads(out.read_text()) if out.exists() else {}
    results = {name: before[name] for name in ("memory", "time", "layers") if name in before}  # what is not measured anew stays
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    about = dict(machine=machine, cores=len(os.sched_getaffinity(0)), tokens=args.tokens, width=args.width, rounds=args.rounds)
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    about |= dict(versions=versions() | peers(), **commit(), command=" ".join(["python benchmarks/loss.py", *words]))
    for section in args.what or ["memory", "time", "layers"]:
        if section in cases:
            rows = measure(section, alone, cases[section], False, args)
        elif section == "layers":
            forms = [form for form in LAYERED if form in args.forms]
            both = zip(*(measure(what, forms, pairs(args.layered), True, args) for what in ("memory", "time")))
            rows = [memory | seconds for memory, seconds in both]
        else:
            continue
        results[section] = about | dict(rows=rows)
        out.write_text(json.dumps(results, indent=1) + "\n")
    print_tables(results)


if __name__ == "__main__":
    main()
