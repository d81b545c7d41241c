"""Draws tokens of the last training batch of a run, coloured by their weight.

python benchmarks/weights.py runs/X OUT.png        (runs/X/weights.json, written by each script)
"""

import json
from pathlib import Path

import tools
from matplotlib import colormaps
from matplotlib.figure import Figure

from common import load_tokenizer

parser = tools.parser(__doc__)
parser.add_argument("run_dir", type=Path)
parser.add_argument("out")
args = parser.parse_args()
run_dir, out = args.run_dir, args.out
tokenizer = load_tokenizer(run_dir / "model")
rows = json.loads((run_dir / "weights.json").read_text())
tokens = [pair for row in rows for pair in zip(row["ids"], row["weight"])]
most = max(weight for _, weight in tokens if weight is not None)
figure = Figure(figsize=(8, 3.3), dpi=120)
line, column = 0, 0
for token, weight in tokens:
    text = tokenizer.decode([token])
    if text == "\n" or column >= 84:
        line, column = line + 1, 0
    if text == "\n" or line >= 14:
        continue
    shade = "white" if weight is None else colormaps["Blues"](0.55 * weight / most)
    box = dict(facecolor=shade, edgecolor="none", boxstyle="square,pad=0.18")
    place = (0.01 + column / 86, 0.95 - line / 14.5)
    figure.text(*place, text, family="monospace", fontsize=9, bbox=box, va="center")
    column += len(text)
figure.savefig(out)
