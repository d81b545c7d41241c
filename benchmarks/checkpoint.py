"""How long a save holds training up: in the background against waiting for it.

    python benchmarks/checkpoint.py [--sizes tiny 60M] [--rounds 5] [--folder DIR]

In every round, side by side in one process: the seconds of `save()` and then `wait()` (a
synchronous save, the peer), and of `save()` by itself; then updates run for as long as a
synchronous save took, and their median stands beside that of updates without a write.
"""

import statistics
import tempfile
import time

import tools

SIZES = {  # width, width of the feed-forward layer, layers, attention heads
    "tiny": (128, 352, 7, 4),
    "60M": (640, 1728, 12, 10),
}
FIGURES = ("synchronous", "held up", "update", "update while writing")


def measure(size, rounds, folder):
    """Medians in seconds for one model size, and MB of parameters and moments."""
    import torch
    from transformers import LlamaConfig

    from common import Checkpoints, Ranks, from_config, make_optimizer

    torch.manual_seed(0)
    width, wide, layers, heads = SIZES[size]
    sizes = dict(hidden_size=width, intermediate_size=wide, num_hidden_layers=layers)
    config = LlamaConfig(vocab_size=259, num_attention_heads=heads, **sizes)
    model = from_config(config, 4).train()
    rates = tools.SimpleNamespace(lr=1e-4, heads_lr=1e-4, weight_decay=0.1)
    optimizer = make_optimizer(model, rates)
    state_mb = 3 * sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    x_BT = torch.randint(0, 259, (4, 128))
    targets_KBT = torch.randint(0, 259, (4, 4, 128))

    def update():
        began = time.perf_counter()
        model(x_BT, targets_KBT).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    checkpoints = Checkpoints(folder, {}, 1, Ranks())
    seconds = {name: [] for name in FIGURES}
    for number in range(rounds + 1):  # the first round is not counted
        quiet = statistics.median(update() for _ in range(5))
        began = time.perf_counter()
        checkpoints.save(2 * number, model, optimizer, b"")
        checkpoints.wait()
        synchronous = time.perf_counter() - began
        update()
        began = time.perf_counter()
        checkpoints.save(2 * number + 1, model, optimizer, b"")
        held = time.perf_counter() - began
        meanwhile = [update()]
        while time.perf_counter() - began < synchronous:
            meanwhile.append(update())
        checkpoints.wait()
        if number:
            figures = (synchronous, held, quiet, statistics.median(meanwhile))
            for name, value in zip(FIGURES, figures):
                seconds[name].append(value)
    return dict(size=size, state_mb=state_mb, **{n: tools.spread(v) for n, v in seconds.items()})


def main():
    parser = tools.parser(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--folder", default="", help="where to save; empty: a temporary folder")
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
            rows.append(measure(size, args.rounds, folder))
    tools.write_json(args.out, dict(command=tools.command(), **tools.machine(), rows=rows))
    cells = [
        [r["size"], f"{r['state_mb']:,.0f}", *(tools.shown(r[name], 3) for name in FIGURES)]
        for r in rows
    ]
    tools.print_table(["size", "MB", *(f"{name}, s" for name in FIGURES)], cells)


if __name__ == "__main__":
    main()
