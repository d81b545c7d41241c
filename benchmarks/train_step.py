"""A whole training step of one transformer, side by side: plain next-token training, stacked heads, and our script.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train_step.py [--sizes tiny small] [--rounds 7] [--steps 10]
    python benchmarks/train_step.py --device cuda --sizes 350M 1B --batch-size 32 --seq-len 1024 --compile

Every form trains on the same rows of `--data stdlib` (bytes; 4 x 256 unless told) a model of the same layers and width, so of
the same number of parameters: with 4 heads the trunk has 3 layers fewer. AdamW (fused), gradients clipped at 1, fp32 on a CPU,
bf16 autocast on a GPU. Data loading, figures and logs of each form are in its time.

    Trainer     transformers.Trainer, plain next-token training of LlamaForCausalLM
    bare loop   the same in ten lines of torch
    stacked 4   4 heads, logits of all heads at once, one backward, in ten lines of torch
    ours 1, 4   baseline_mtp.py as it stands, its loop and nothing taken out, with 1 and 4 heads

Each form is a process that waits; a round has every form do --steps updates in turn, the order moving on by one. The table
gives medians over rounds and the median of the ratios to the bare loop within a round, by the clock and by CPU time. FLOPs of
a step are those of the products and attention of the plain form with as many heads, forward and backward (flops.py; what a
form computes twice is not counted); their share is that of the machine's limit: the best of 20 products of square matrices
on the same threads, in the same type. Prints a table and writes train_step.json.
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
FORMS = ("Trainer", "bare loop", "stacked 4", "ours 1", "ours 4")
SIZES = {
    "tiny": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=7, num_attention_heads=4),
    "small": dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8),
    "350M": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=27, num_attention_heads=16),
    "1B": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=16),
}


class Turns:
    """Waits for a line, lets `chunk` updates pass, prints their seconds by clock and CPU; ends the process with its input."""

    def __init__(self, chunk):
        self.chunk, self.done, self.began = chunk, 0, None

    def update(self):
        self.done += 1
        if self.done % self.chunk == 0:
            if self.began is not None:
                taken = [after - before for after, before in zip(clocks(), self.began)]
                print(*taken, file=sys.__stdout__, flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.began = clocks()


def clocks():
    return time.perf_counter(), time.process_time()


def run_ours(num_heads, args, turns):
    import tyro

    import baseline_mtp

    class InTurn(baseline_mtp.Progress):
        def show(self, step, text):
            super().show(step, text)
            turns.update()

    baseline_mtp.Progress = InTurn
    words = ["--model", args.config, "--num-heads", num_heads, "--max-steps", 10**6, "--mtp-schedule", "constant"]
    words += ["--run-dir", Path(args.config).parent / f"ours {num_heads}", "--batch-size", args.batch_size]
    words += ["--seq-len", args.seq_len, "--save-every", 0, "--tracker", "none", "--device", args.device]
    words += ["--dtype", "fp32" if args.device == "cpu" else "bf16", *(["--compile"] if args.compile else [])]
    baseline_mtp.main(tyro.cli(baseline_mtp.Args, args=[str(word) for word in words]))


def rows_and_model(args, num_heads):
    import torch

    import common
    import data

    torch.manual_seed(0)
    model, tokenizer = common.build_model(args.config, num_heads, args.seq_len)
    return data.load_data("stdlib", tokenizer, args.seq_len, 0, 0.0, common.Ranks()).train, model


def run_trainer(args, turns):
    import torch
    import transformers

    import data

    rows, model = rows_and_model(args, 1)
    numbers = [n for step in range(2000) for n in data.batch_rows(len(rows), args.batch_size, 0, step).tolist()]

    class Ordered(torch.utils.data.Dataset):
        def __len__(self):
            return len(numbers)

        def __getitem__(self, i):
            ids = torch.from_numpy(rows[numbers[i]]["input_ids"].astype("int64"))
            return dict(input_ids=ids, labels=ids)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *ignored):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *ignored, **kw):
            turns.update()

    settings = dict(output_dir=str(Path(args.config).parent / "trainer"), per_device_train_batch_size=args.batch_size,
                    learning_rate=3e-3, weight_decay=0.1, adam_beta2=0.95, optim="adamw_torch_fused", max_grad_norm=1.0,
                    lr_scheduler_type="cosine", warmup_steps=40, num_train_epochs=1, logging_strategy="no", save_strategy="no",
                    report_to=[], use_cpu=args.device == "cpu", bf16=args.device == "cuda", torch_compile=args.compile,
                    disable_tqdm=True)  # fmt: skip
    arguments = transformers.TrainingArguments(**settings)
    InOrder(model.causal_lm, arguments, train_dataset=Ordered(), callbacks=[Callback()]).train()


def run_loop(num_heads, args, turns):
    """The ten lines: plain for one head, else all logits stacked."""
    import torch
    import torch.nn.functional as F

    import data

    rows, model = rows_and_model(args, num_heads)
    model = model.to(args.device).train()
    if args.compile:
        model.causal_lm.compile()
        model.causal_lm.model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    step = 0
    while True:
        batch = data.load_batch(rows, data.batch_rows(len(rows), args.batch_size, 0, step), num_heads, args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = loss_of_step(model, num_heads, batch, F)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        turns.update()


def loss_of_step(model, num_heads, batch, F):
    if num_heads == 1:
        return model.causal_lm(input_ids=batch.x_BT, labels=batch.x_BT, use_cache=False).loss
    logits = F.linear(model.hidden(batch.x_BT, num_heads), model.causal_lm.lm_head.weight)
    count = (batch.targets_KBT[0] >= 0).sum()
    return F.cross_entropy(logits.flatten(0, -2).float(), batch.targets_KBT.flatten(), ignore_index=-100, reduction="sum") / count


def count_flops(num_heads, args):
    """Of forward and backward of one update in its plain form."""
    import torch.nn.functional as F
    from flops import counted_flops

    import data

    rows, model = rows_and_model(args, num_heads)
    batch = data.load_batch(rows, data.batch_rows(len(rows), args.batch_size, 0, 0), num_heads, args.device)
    model.to(args.device).train()
    flops = counted_flops(lambda: loss_of_step(model, num_heads, batch, F).backward())
    return flops, sum(p.numel() for p in model.parameters())


def measured_limit(device):
    """Best of 20 products of square matrices, FLOPs a second."""
    import torch

    n, kind = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a, b, best = torch.randn(n, n, device=device, dtype=kind), torch.randn(n, n, device=device, dtype=kind), 0.0
    for _ in range(20):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def worker(form, args):
    turns = Turns(args.steps)
    sys.stdout = open(os.devnull, "w")
    num_heads = 4 if form.endswith("4") else 1
    if form == "limit":
        print(measured_limit(args.device), file=sys.__stdout__)
    elif form.startswith("flops"):
        print(*count_flops(num_heads, args), file=sys.__stdout__)
    elif form == "Trainer":
        run_trainer(args, turns)
    elif form.startswith("ours"):
        run_ours(num_heads, args, turns)
    else:
        run_loop(num_heads, args, turns)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "train_step.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    from runs import commit, versions

    folder, rows = Path(tempfile.mkdtemp(prefix="train_step-")), []

    def command(form, config):
        return [sys.executable, __file__, *sys.argv[1:], "--worker", form, "--config", str(config)]

    for size in args.sizes:
        (folder / size).mkdir()
        config = folder / size / "config.json"
        shape = dict(model_type="llama", vocab_size=259, max_position_embeddings=args.seq_len, tie_word_embeddings=False,
                     eos_token_id=1, pad_token_id=0, bos_token_id=None)  # fmt: skip
        config.write_text(json.dumps(shape | SIZES[size]))
        work = {n: list(map(int, subprocess.check_output(command(f"flops {n}", config)).split())) for n in (1, 4)}
        running, seconds, cpu, limits = {}, {form: [] for form in args.forms}, {form: [] for form in args.forms}, []
        for form in args.forms:
            running[form] = subprocess.Popen(command(form, config), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(args.rounds + 1):  # the first warms up
            for form in args.forms[number % len(args.forms) :] + args.forms[: number % len(args.forms)]:
                process = running[form]
                process.stdin.write("go\n")
                process.stdin.flush()
                taken, used = (float(value) / args.steps for value in process.stdout.readline().split())
                if number:
                    seconds[form].append(taken)
                    cpu[form].append(used)
            limits.append(float(subprocess.check_output(command("limit", config))))
        for process in running.values():
            process.stdin.close()
            process.wait()
        for form in args.forms:
            middle, (flops, parameters) = statistics.median(seconds[form]), work[4 if form.endswith("4") else 1]
            ratios = [a / b for a, b in zip(seconds[form], seconds.get("bare loop", seconds[form]))]
            row = dict(size=size, form=form, parameters=parameters, seconds=middle, rounds=seconds[form], ratios=ratios)
            of_cpu = [a / b for a, b in zip(cpu[form], cpu.get("bare loop", cpu[form]))]
            row |= dict(to_bare_loop=statistics.median(ratios), flops=flops, cpu_ratios=of_cpu)
            rows.append(row | dict(share_of_limit=flops / middle / statistics.median(limits), limits=limits))
            print(size, form, round(middle, 4), file=sys.stderr, flush=True)
        if {"ours 1", "ours 4"} <= set(args.forms):
            four = [a / b for a, b in zip(seconds["ours 4"], seconds["ours 1"])]
            extra = [ratio * work[1][0] / work[4][0] for ratio in four]  # beyond what the FLOPs say
            rows[-1] |= dict(to_ours_1=statistics.median(four), to_ours_1_beyond_flops=statistics.median(extra), extra=extra)
    device = dict(processor=platform.processor() or platform.machine(), cores=len(os.sched_getaffinity(0)), versions=versions())
    if args.device == "cuda":
        import torch

        device["gpu"] = torch.cuda.get_device_name()
    shown = " ".join(["python benchmarks/train_step.py", *(w for w in sys.argv[1:] if w not in ("--out", args.out))])
    what = dict(command=shown, **commit(), **device, batch_size=args.batch_size, seq_len=args.seq_len)
    out = Path(args.out)
    before = json.loads(out.read_text())["rows"] if out.exists() else []  # of sizes measured before
    rows = [row for row in before if row["size"] not in args.sizes] + [row | what for row in rows]
    out.write_text(json.dumps(dict(rows=rows), indent=1) + "\n")
    print("| model | form | ms a step | to the bare loop (least to most) | the same by CPU time | GFLOPs | share of the limit |")
    print("|---" * 7 + "|")
    for r in rows:
        both = (r.get("ratios"), r.get("cpu_ratios"))  # sizes measured before may lack the second
        ratios = [f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" if v else "" for v in both]
        told = f"| {r['size']}, {r['parameters'] / 1e6:.1f} M | {r['form']} | {r['seconds'] * 1e3:.1f} | {' | '.join(ratios)} | "
        print(told + f"{r['flops'] / 1e9:.1f} | {r['share_of_limit']:.2f} |")
        if "extra" in r:
            spread = f"{min(r['extra']):.3f} to {max(r['extra']):.3f}"
            told = f"ours 4 to ours 1: {r['to_ours_1']:.3f}, beyond the FLOPs {r['to_ours_1_beyond_flops']:.3f} ({spread})"
            print(f"\n{r['size']}: {told}\n")


if __name__ == "__main__":
    main()
