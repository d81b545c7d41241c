"""Draw a run: loss of each head over the updates, and what it reached on the held-out documents beside the yardsticks.

python benchmarks/default_run.py RUN_DIR OUT.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

run_dir, out = Path(sys.argv[1]), Path(sys.argv[2])
record = json.loads((run_dir / "args.json").read_text())
lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
num_heads = record["args"]["num_heads"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=[2, 1], layout="constrained")
for k in range(1, num_heads + 1):
    key, window = f"train/loss_head_{k}", 25
    steps, losses = np.array([(line["step"], line[key]) for line in lines if key in line]).T
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    (curve,) = left.plot(steps[window - 1 :], smooth, label=f"head {k}")
    left.plot(lines[-1]["step"], lines[-1][f"eval/loss_head_{k}"], "o", color=curve.get_color())
    accuracy = lines[-1][f"eval/acc_head_{k}"]
    right.bar(k, accuracy, color=curve.get_color())
    right.text(k, accuracy, f"{accuracy:.3f}", ha="center", va="bottom")
left.set(xlabel="update", ylabel="loss (nats)", title=f"training, mean of {window} updates; dots: held out")
left.legend()
right.set(xlabel="head", title="held-out accuracy", xticks=range(1, num_heads + 1))
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(out, dpi=110)
print(f"{out}: {lines[-1]['step']} updates, {lines[-1]['eval/bits_per_byte']:.3f} bits per byte held out, {record['command']}")
