"""Memory and time of the loss of H heads: forward and backward through one unembedding.

    pip install -r benchmarks/requirements.txt
    python benchmarks/loss.py [memory] [time] [--tokens 512] [--forms ours trl] [--device cuda]

The heads' states are given and need gradients; they come out of no layer, because layers cost the
same in every form. Every token has a weight of its own, and the form must return the losses before
the weight is known.

Memory: peak of one step above rest, less the gradient of the states, which every form returns. At
rest there are weights, states and a gradient of the unembedding, to which the step adds another.
On the CPU it is the resident size (Linux only), on CUDA what torch's allocator counts. Time: the
processes take turns, a step is repeated for at least 0.2 s, medians over rounds. Each form has a
process of its own, which first compares losses and gradients with float64 on a small case. A peer
that is missing or fails here is named with its reason.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import tools

FORMS = {
    "stacked": "all heads' logits at once",
    "head by head": "a backward per head (Meta)",
    "trl": "TRL, ChunkedLogProbFunction",
    "liger": "Liger, LigerFusedLinearCrossEntropyLoss",
    "cce": "cut-cross-entropy, cce",
    "cce, torch": "cut-cross-entropy, torch_compile",
    "native, 256": "torch, F.linear_cross_entropy, chunks of 256 tokens",
    "ours": "ours",
}
PEERS = ("trl", "liger-kernel", "cut-cross-entropy")
MEMORY = [f"{v}:{h}" for v in (256, 32000, 128256) for h in (1, 2, 4, 8)]
TIME = ["256:1", "256:2", "256:4", "256:8", "32000:1", "32000:4", "32000:8", "128256:1"]
SMALL = dict(vocabulary=500, heads=2, tokens=48, width=64)


def losses_of(form, hidden_ND, weight_VD, targets_N):
    """Cross entropy of each token, `[N]`."""
    import torch
    import torch.nn.functional as F

    if form in ("stacked", "head by head"):
        return F.cross_entropy(F.linear(hidden_ND, weight_VD), targets_N, reduction="none")
    if form == "trl":
        from trl.kernels import ChunkedLogProbFunction

        # temperature 1, its trainer's vocabulary chunk, no softcap, scale 1, no more outputs
        options = (1.0, 32768, None, 1.0, ())
        return -ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, targets_N, *options)[0]
    if form == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="none")(weight_VD, hidden_ND, targets_N)
    if form.startswith("cce"):
        from cut_cross_entropy import linear_cross_entropy

        # filter_eps would leave out gradients by their size before the weights are known
        options = dict(impl="torch_compile" if form == "cce, torch" else "cce", filter_eps=None)
        return linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="none", **options)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    chunked = F.linear_cross_entropy
    return chunked(hidden_ND, weight_VD, targets_N, reduction="none", options=options)


def step_of(form, vocabulary, heads, tokens, width, device, dtype="float32"):
    """A function that runs one step and returns the losses; the states; the unembedding."""
    import torch
    from transformers import LlamaConfig

    from common import from_config

    torch.manual_seed(0)
    sizes = dict(vocab_size=vocabulary, hidden_size=width, num_attention_heads=8)
    model = from_config(LlamaConfig(**sizes, num_hidden_layers=1), 1)
    model.causal_lm.lm_head.weight.data.mul_(5)  # losses that differ
    hidden_HND = torch.randn(heads, tokens, width)
    weight_HN = torch.rand(heads, tokens) / tokens
    targets_HN = torch.randint(0, vocabulary, (heads, tokens)).to(device)
    model = model.to(device, getattr(torch, dtype))
    hidden_HND, weight_HN = (v.to(device, getattr(torch, dtype)) for v in (hidden_HND, weight_HN))
    tensors = hidden_HND if form == "head by head" else [hidden_HND]
    states = [tensor.clone().requires_grad_() for tensor in tensors]
    model.hidden = lambda *ignored: states[0][:, None]  # MTPModel's own loss, on given states
    unembedding = model.causal_lm.lm_head.weight

    def step():
        for leaf in states:
            leaf.grad = None
        if form == "head by head":
            losses = []
            for hidden_ND, targets_N, weight_N in zip(states, targets_HN, weight_HN):
                loss_N = losses_of(form, hidden_ND, unembedding, targets_N)
                (loss_N * weight_N).sum().backward()
                losses.append(loss_N.detach())
            return torch.cat(losses)
        if form == "ours":
            losses = model(targets_HN[:1], targets_HN[:, None])[:, 0]
        else:
            hidden_ND = states[0].flatten(0, 1)
            losses = losses_of(form, hidden_ND, unembedding, targets_HN.flatten())
        (losses * weight_HN.view(losses.shape)).sum().backward()
        return losses.detach().flatten()

    return step, states, unembedding


def largest_error(form, device):
    """Largest error of losses and gradients against all logits in float64, to the largest value."""
    import torch

    results = []
    for name, dtype in ((form, "float32"), ("stacked", "float64")):
        step, states, unembedding = step_of(name, **SMALL, device=device, dtype=dtype)
        losses = step()
        hidden = torch.cat([leaf.grad.flatten() for leaf in states])
        results.append([losses, hidden, unembedding.grad.flatten()])
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(*results))


def peak_mb(step, device):
    """Peak of one step above rest."""
    import torch

    def resident_mb(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

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


def seconds_of(step, device):
    import torch

    count, began = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < 0.2:
        step()
        count += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def worker(form, args):
    """Prints the error on the small case, then answers `memory V H` or `time V H` with a number."""
    import torch

    try:
        error = largest_error(form, args.device)
        assert error < 1e-5, f"losses or gradients differ from float64 by {error:.1e}"
        print(json.dumps(dict(error=error)), flush=True)
    except Exception as failure:
        if not form.startswith(("trl", "liger", "cce")):
            raise
        why = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
        return print(json.dumps(dict(why=why)), flush=True)
    step_of(form, 256, 1, args.tokens, args.width, args.device)[0]()  # libraries keep buffers
    for line in sys.stdin:
        what, vocabulary, heads = line.split()
        case = (int(vocabulary), int(heads))
        step, _, unembedding = step_of(form, *case, args.tokens, args.width, args.device)
        unembedding.grad = torch.zeros_like(unembedding)
        if what == "memory":
            states_mb = case[1] * args.tokens * args.width * 4 / 2**20
            print(peak_mb(step, args.device) - states_mb, flush=True)
        else:
            print(seconds_of(step, args.device), flush=True)


def measure(what, cases, args):
    """A row for each case and form: MB or seconds, or the reason why there is none."""
    # in memory runs the C library hands freed blocks back at once
    env = dict(os.environ, **(dict(MALLOC_MMAP_THRESHOLD_="65536") if what == "memory" else {}))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    options = ["--tokens", args.tokens, "--width", args.width, "--device", args.device]
    processes, errors, rows = {}, {}, []
    for form in args.forms:
        words = [sys.executable, __file__, *options, "--worker", form]
        processes[form] = subprocess.Popen(list(map(str, words)), **pipes)
    for form, process in processes.items():
        errors[form] = json.loads(process.stdout.readline() or '{"why": "ended without a word"}')
        print(f"{form:16} {errors[form]}", flush=True)
    for case in cases:
        values = {form: [] for form in args.forms if "why" not in errors[form]}
        for number in range(1 if what == "memory" else args.rounds + 1):  # the first warms up
            for form in tools.in_turn(values, number):
                processes[form].stdin.write(f"{what} {case.replace(':', ' ')}\n")
                processes[form].stdin.flush()
                values[form].append(float(processes[form].stdout.readline()))
        for form in args.forms:
            measured = values.get(form, [])
            figure = tools.spread(measured[1:] or measured, 6) if measured else None
            rows.append({"case": case, "form": form, **errors[form], what: figure})
    for process in processes.values():
        process.communicate()
    return rows


def main():
    parser = tools.parser(__doc__, rounds=3)
    parser.add_argument("what", nargs="*", metavar="memory|time", help="default: both")
    parser.add_argument("--memory", nargs="+", default=MEMORY, metavar="V:H")
    parser.add_argument("--time", nargs="+", default=TIME, metavar="V:H")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each head")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    record = dict(command=tools.command(), **tools.machine(args.device))
    record |= dict(tokens=args.tokens, width=args.width, rounds=args.rounds)
    record["peers"] = {name: d.version for d in distributions() if (name := d.name) in PEERS}
    for what in args.what or ("memory", "time"):
        cases = getattr(args, what)
        record[what] = measure(what, cases, args)
        cells = []
        for form in args.forms:
            figures = [row[what] for row in record[what] if row["form"] == form]
            texts = ["" if f is None else f"{f[0]:.4g} ({f[1]:.4g} to {f[2]:.4g})" for f in figures]
            cells.append([FORMS[form], *texts])
        print(f"{'Peak MB' if what == 'memory' else 'Seconds'}; columns: vocabulary:heads\n")
        tools.print_table(["form", *cases], cells)
        tools.write_json(args.out, record)


if __name__ == "__main__":
    main()
