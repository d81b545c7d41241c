"""Draw a run: loss of each head over the updates (mean of 25), and what it reached held out.

python benchmarks/default_run.py RUN_DIR OUT.png
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tools

parser = tools.parser(__doc__)
parser.add_argument("run_dir", type=Path)
parser.add_argument("out", type=Path)
args = parser.parse_args()
record = json.loads((args.run_dir / "args.json").read_text())
lines = tools.read_metrics(args.run_dir)
last = lines[-1]
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for k in range(1, record["args"]["num_heads"] + 1):
    key = f"train/loss_head_{k}"
    steps, losses = np.array([(line["step"], line[key]) for line in lines if key in line]).T
    smooth = np.convolve(losses, np.ones(25) / 25, mode="valid")
    label = f"head {k}: accuracy {last[f'eval/acc_head_{k}']:.3f}"
    (curve,) = axes.plot(steps[24:], smooth, label=label)
    axes.plot(last["step"], last[f"eval/loss_head_{k}"], "o", color=curve.get_color())
axes.set(xlabel="update", ylabel="loss (nats)", title="training; dots: held out")
axes.legend()
figure.savefig(args.out, dpi=110)
print(
    f"{args.out}: {last['step']} updates, {last['eval/bits_per_byte']:.3f} bits per byte held out"
)
