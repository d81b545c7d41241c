"""A whole training step of one transformer, side by side: plain, stacked heads, ours.

    python benchmarks/train_step.py [--sizes tiny small] [--rounds 7] [--steps 10]

Every form trains on the rows of `--data stdlib` (bytes; 4 x 256 by default) a model of the same
layers and width; with 4 heads the trunk has 3 layers fewer. AdamW (fused), gradients clipped at 1,
fp32 on a CPU, bf16 autocast on a GPU. Data loading, figures and logs count.

    Trainer     transformers.Trainer, plain next-token training of LlamaForCausalLM
    bare loop   the same in ten lines of torch
    stacked 4   4 heads, logits of all heads at once, one backward, in ten lines of torch
    ours 1, 4   baseline_mtp.py as it stands, with 1 and 4 heads

Each form is a process that waits for its turn; a round gives each --steps updates. The table gives
medians over rounds, and the ratio to the bare loop within a round.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tools

FORMS = ("Trainer", "bare loop", "stacked 4", "ours 1", "ours 4")
SIZES = {  # width, width of the feed-forward layer, layers, attention heads
    "tiny": (128, 352, 7, 4),
    "small": (512, 1376, 8, 8),
    "350M": (1024, 2816, 27, 16),
    "1B": (2048, 5632, 22, 16),
}


class Turns:
    """Waits for a line, lets `chunk` updates pass, prints their seconds; ends with its input."""

    def __init__(self, chunk):
        self.chunk, self.done, self.began = chunk, 0, None

    def update(self, *ignored, **kwargs):
        self.done += 1
        if self.done % self.chunk == 0:
            if self.began is not None:
                print(time.perf_counter() - self.began, file=sys.__stdout__, flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.began = time.perf_counter()


def run_ours(num_heads, args):
    """The script's own `main`."""
    flags = dict(model=args.config, num_heads=num_heads, mtp_schedule="constant", max_steps=10**6)
    flags |= dict(run_dir=Path(args.config).parent / f"ours {num_heads}", seq_len=args.seq_len)
    flags |= dict(batch_size=args.batch_size, save_every=0, tracker="none", device=args.device)
    flags["dtype"] = "fp32" if args.device == "cpu" else "bf16"
    tools.train("baseline_mtp.py", flags, os.devnull)


def rows_and_model(args, num_heads):
    import torch

    from common import Ranks, build_model, load_data

    torch.manual_seed(0)
    model, tokenizer = build_model(args.config, num_heads, args.seq_len)
    data = load_data(tools.data_args("stdlib", seq_len=args.seq_len), tokenizer, Ranks())
    return data.train, model


def run_trainer(args):
    import torch
    import transformers

    rows, model = rows_and_model(args, 1)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, number):
            ids = torch.from_numpy(rows[number]["input_ids"].astype("int64"))
            return dict(input_ids=ids, labels=ids)

    settings = dict(learning_rate=3e-3, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0)
    settings |= dict(optim="adamw_torch_fused", lr_scheduler_type="cosine", warmup_steps=40)
    settings |= dict(per_device_train_batch_size=args.batch_size, num_train_epochs=1)
    settings |= dict(logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True)
    settings |= dict(use_cpu=args.device == "cpu", bf16=args.device == "cuda")
    folder = str(Path(args.config).parent / "trainer")
    settings = transformers.TrainingArguments(output_dir=folder, **settings)
    transformers.Trainer(model.causal_lm, settings, train_dataset=Rows()).train()


def loss_of_step(model, num_heads, batch):
    """Plain for one head, else all logits stacked."""
    import torch.nn.functional as F

    if num_heads == 1:
        return model.causal_lm(input_ids=batch.x_BT, labels=batch.x_BT, use_cache=False).loss
    logits = F.linear(model.hidden(batch.x_BT, num_heads), model.causal_lm.lm_head.weight)
    logits, targets = logits.flatten(0, -2).float(), batch.targets_KBT.flatten()
    count = (batch.targets_KBT[0] >= 0).sum()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count


def run_loop(num_heads, args):
    """The ten lines."""
    import torch

    from common import batch_rows, load_batch

    rows, model = rows_and_model(args, num_heads)
    model = model.to(args.device).train()
    options = dict(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for step in range(10**6):
        numbers = batch_rows(len(rows), args.batch_size, 0, step)
        batch = load_batch(rows, numbers, num_heads, args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = loss_of_step(model, num_heads, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def worker(form, args):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    sys.stdout = open(os.devnull, "w")
    register_optimizer_step_post_hook(Turns(args.steps).update)
    num_heads = 4 if form.endswith("4") else 1
    if form == "Trainer":
        run_trainer(args)
    elif form.startswith("ours"):
        run_ours(num_heads, args)
    else:
        run_loop(num_heads, args)


def measure(size, args):
    """A row for every form of one size."""
    width, wide, layers, heads = SIZES[size]
    config = Path(tempfile.mkdtemp(prefix="train_step-")) / "config.json"
    shape = dict(hidden_size=width, intermediate_size=wide, num_hidden_layers=layers)
    shape |= dict(num_attention_heads=heads, initializer_range=0.02)
    tools.write_json(config, {**tools.PROOF_MODEL, **shape})

    def command(form):
        words = [sys.executable, __file__, *sys.argv[1:], "--worker", form, "--config", config]
        return list(map(str, words))

    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = {form: subprocess.Popen(command(form), **pipes) for form in args.forms}
    seconds = {form: [] for form in args.forms}
    for number in range(args.rounds + 1):  # the first warms up
        for form in tools.in_turn(args.forms, number):
            processes[form].stdin.write("go\n")
            processes[form].stdin.flush()
            taken = float(processes[form].stdout.readline()) / args.steps
            if number:
                seconds[form].append(taken)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    rows = []
    for form, values in seconds.items():
        to_bare_loop = tools.ratios(values, seconds.get("bare loop", values))
        row = dict(size=size, form=form, seconds=tools.spread(values, 6))
        rows.append(dict(row, to_bare_loop=tools.spread(to_bare_loop)))
    return rows


def main():
    parser = tools.parser(__doc__, rounds=7)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    rows = [row for size in args.sizes for row in measure(size, args)]
    record = dict(command=tools.command(), **tools.machine(args.device), rows=rows)
    record |= dict(batch_size=args.batch_size, seq_len=args.seq_len)
    tools.write_json(args.out, record)
    cells = []
    for r in rows:
        figures = [f"{r['seconds'][0] * 1e3:,.1f}", tools.shown(r["to_bare_loop"])]
        cells.append([r["size"], r["form"], *figures])
    tools.print_table(["model", "form", "ms a step", "to the bare loop"], cells)


if __name__ == "__main__":
    main()
