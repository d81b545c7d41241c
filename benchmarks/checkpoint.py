"""How long a save holds training up: in the background against waiting for it, side by side in one process.

    python benchmarks/checkpoint.py [--sizes tiny 60M] [--rounds 5] [--folder DIR]

In every round, after one update: the seconds of `save()` followed by `wait()` (a synchronous save: copy, files, SHA-256,
fsync, meta.json, rename), and of `save()` alone; then updates run until the background write is done, and their median
time is set against that of updates without a write. Prints a table and writes checkpoint.json (medians over rounds).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {"tiny": None, "60M": dict(hidden_size=640, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=10)}


def measure(size, rounds, folder):
    """Medians in seconds for one model size."""
    import torch
    from transformers import LlamaConfig

    from checkpoints import Checkpoints
    from common import Ranks, build_model, from_config
    from runs import make_optimizer

    torch.manual_seed(0)
    model = build_model("tiny", 4)[0] if size == "tiny" else from_config(LlamaConfig(vocab_size=259, **SIZES[size]), 4)
    model.train()
    optimizer = make_optimizer(model, 1e-4, 0.1)
    state_mb = sum(p.numel() * p.element_size() for p in model.parameters()) * 3 / 1e6
    x_BT = torch.randint(0, 259, (4, 128))
    targets_KBT = torch.randint(0, 259, (4, 4, 128))

    def update():
        began = time.perf_counter()
        model(x_BT, targets_KBT).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    checkpoints = Checkpoints(folder, {}, 1, Ranks())
    seconds = {name: [] for name in ("synchronous", "held up", "update", "update while writing")}
    for number in range(rounds + 1):  # the first round is not counted
        quiet = statistics.median(update() for _ in range(5))
        began = time.perf_counter()
        checkpoints.save(2 * number, model, optimizer, 0)
        assert checkpoints.wait()
        synchronous = time.perf_counter() - began
        update()
        began = time.perf_counter()
        checkpoints.save(2 * number + 1, model, optimizer, 0)
        held = time.perf_counter() - began
        meanwhile = []
        while checkpoints.thread.is_alive():
            meanwhile.append(update())
        assert checkpoints.wait()
        if number:
            for name, value in zip(seconds, (synchronous, held, quiet, statistics.median(meanwhile))):
                seconds[name].append(value)
    result = {name: dict(median=statistics.median(v), min=min(v), max=max(v)) for name, v in seconds.items()}
    return dict(size=size, state_mb=round(state_mb, 1), rounds=rounds, seconds=result)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="", help="where to save; empty: the system's temporary folder")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    args = parser.parse_args()
    import torch

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = dict(command=" ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]), commit=commit, cores=os.cpu_count(),
                  machine=platform.machine(), torch=torch.__version__, threads=torch.get_num_threads(), results=[])  # fmt: skip
    print(
        f"{'size':>6} {'state MB':>9} {'synchronous s':>14} {'held up s':>10} {'ratio':>7} {'update s':>9} {'while writing':>14}"
    )
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
            result = measure(size, args.rounds, folder)
        record["results"].append(result)
        synchronous, held, update, meanwhile = (v["median"] for v in result["seconds"].values())
        print(
            f"{size:>6} {result['state_mb']:>9,} {synchronous:>14.3f} {held:>10.4f} {held / synchronous:>7.3f} "
            f"{update:>9.3f} {meanwhile:>14.3f}",
            flush=True,
        )
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
