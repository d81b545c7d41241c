"""Memory and time of one training step in the forms that the multi-head loss can take, side by side.

    python benchmarks/loss.py [--vocabularies 256 32000 128256] [--timed 256 32000] [--repeats 5]

One model (4 heads straight on the embedding, width 512, fp32, 2,048 tokens: no trunk, as its activations are the same in
every form), one step (forward, backward with random weights on every token), each form in a process of its own. Memory is
the peak resident size of the step above the size at rest with gradients allocated, so it is what the form itself needs;
the C library is told to hand freed blocks back at once (MALLOC_MMAP_THRESHOLD_), in memory runs alone. Time is the median
over rounds in which the forms take turns. Linux only (the peak is read from /proc). Prints a table and writes loss.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
NUM_HEADS, WIDTH, ROWS, LENGTH, LAYERS = 4, 512, 4, 512, 4
FORMS = {
    "stacked": "all heads' logits at once, one backward",
    "per head": "one backward over a loss per head",
    "head by head": "a backward per head on a detached trunk (Meta)",
    "native": "joint states through torch's linear_cross_entropy",
    "native, recompute": "the same, head layers recomputed",
    "ours": "joint states, chunked unembedding",
    "ours, recompute": "the same, head layers recomputed (--recompute heads)",
}


def step_of(form, vocabulary):
    """A model with gradients in place, and a function that runs one step of this form."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig

    from common import IGNORE, from_config

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=1376, num_hidden_layers=LAYERS,
                         num_attention_heads=8, max_position_embeddings=LENGTH, tie_word_embeddings=False)  # fmt: skip
    model = from_config(config, NUM_HEADS).train()
    model.heads.recompute = form.endswith("recompute")
    x_BT = torch.randint(0, vocabulary, (ROWS, LENGTH))
    targets_KBT = torch.full((NUM_HEADS, ROWS, LENGTH), IGNORE)
    for k in range(1, NUM_HEADS + 1):
        targets_KBT[k - 1, :, :-k] = x_BT[:, k:]
    weight_KBT = torch.rand(targets_KBT.shape) / x_BT.numel()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weight = model.causal_lm.lm_head.weight

    def cross_entropy(hidden, targets):
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none")

    def step():
        if form.startswith("ours"):
            (model(x_BT, targets_KBT) * weight_KBT).sum().backward()
        elif form.startswith("native"):
            hidden = model.hidden(x_BT, NUM_HEADS).flatten(0, -2)
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
            loss = F.linear_cross_entropy(hidden, weight, targets_KBT.flatten(), reduction="none", options=options)
            (loss * weight_KBT.flatten()).sum().backward()
        elif form == "stacked":
            loss = cross_entropy(model.hidden(x_BT, NUM_HEADS), targets_KBT)
            (loss * weight_KBT.flatten()).sum().backward()
        elif form == "per head":
            hidden_KBTD = model.hidden(x_BT, NUM_HEADS)
            parts = [(cross_entropy(h, t) * w.flatten()).sum() for h, t, w in zip(hidden_KBTD, targets_KBT, weight_KBT)]
            sum(parts).backward()
        else:
            trunk, layers = [], list(model.heads.layers)

            class Detached(torch.nn.Module):  # stands in the decoder, keeps the trunk's output and its arguments
                def forward(self, hidden, *args, **kwargs):
                    trunk.append((hidden, args, kwargs))
                    return hidden

            base = model.causal_lm.model
            base.layers[-1] = Detached()
            base(input_ids=x_BT, use_cache=False)
            (hidden, args, kwargs) = trunk[0]
            detached = hidden.detach().requires_grad_()
            for layer, targets, weights in zip(layers, targets_KBT, weight_KBT):
                (cross_entropy(base.norm(layer(detached, *args, **kwargs)), targets) * weights.flatten()).sum().backward()
            hidden.backward(detached.grad)
            from common import Heads

            base.layers[-1] = Heads(layers)

    return model, step


def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024


def worker(form, vocabulary):
    """Prints the peak of one step (MB), then the seconds of a step for every line it is sent."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, step = step_of(form, vocabulary)
    at_rest = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    print(
        json.dumps(
            dict(peak_mb=resident("VmHWM") - at_rest, gradient=float(sum(p.grad.square().sum() for p in model.parameters())))
        )
    )
    for _ in iter(sys.stdin.readline, ""):
        sys.stdout.flush()
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[256, 32000, 128256])
    parser.add_argument("--timed", type=int, nargs="+", default=[256, 32000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "loss.json"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], int(args.worker[1]))
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    machine = dict(processor=platform.processor() or platform.machine(), cores=cores, torch=torch.__version__,
                   transformers=transformers.__version__, commit=commit, command=" ".join(["python", *sys.argv]))  # fmt: skip
    out = Path(args.out)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []  # vocabularies measured before stay
    for vocabulary in args.vocabularies:
        results = {}
        for form in args.forms:
            results[form] = dict(peak_mb=None, seconds=[])
            command = [sys.executable, __file__, "--worker", form, str(vocabulary)]
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            printed = subprocess.run(command, input="", capture_output=True, text=True, env=env, check=True).stdout
            results[form] |= json.loads(printed.splitlines()[0])
        running = {}  # the forms take turns, one at a time, each in a process that waits for a line
        for form in args.forms if vocabulary in args.timed else []:
            command = [sys.executable, __file__, "--worker", form, str(vocabulary)]
            running[form] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for round_ in range(args.repeats + 1):
            for form, process in running.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                line = process.stdout.readline()
                seconds = float(process.stdout.readline() if line.startswith("{") else line)
                if round_:
                    results[form]["seconds"].append(seconds)
        for process in running.values():
            process.communicate()
        middle = {form: statistics.median(r["seconds"]) for form, r in results.items() if r["seconds"]}
        rows = [row for row in rows if row["vocabulary"] != vocabulary]
        for form, result in results.items():
            row = dict(vocabulary=vocabulary, form=form, peak_mb=round(result["peak_mb"]), gradient=result["gradient"])
            if "stacked" in results:
                row |= dict(stacked_over_this=results["stacked"]["peak_mb"] / result["peak_mb"])
            if form in middle:
                row |= dict(seconds=middle[form], spread=[min(result["seconds"]), max(result["seconds"])])
            if form in middle and "head by head" in middle:
                row |= dict(over_head_by_head=middle[form] / middle["head by head"])
            rows.append(row | dict(machine=machine))
        rows.sort(key=lambda row: (row["vocabulary"], list(FORMS).index(row["form"])))
        out.write_text(json.dumps(dict(rows=rows), indent=1))
    print(f"| vocabulary | form | peak MB above rest | stacked / this | s a step (min to max) | / head by head |\n{'|---' * 6}|")
    for r in rows:
        seconds = "{:.2f} ({:.2f} to {:.2f})".format(r["seconds"], *r["spread"]) if "seconds" in r else ""
        share, ratio = (
            f"{r[key]:{form}}" if key in r else "" for key, form in (("stacked_over_this", ".1f"), ("over_head_by_head", ".2f"))
        )
        print(f"| {r['vocabulary']:,} | {r['form']}: {FORMS[r['form']]} | {r['peak_mb']:,} | {share} | {seconds} | {ratio} |")


if __name__ == "__main__":
    main()
