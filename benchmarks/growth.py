"""How cost grows with sequence length, heads, vocabulary, ranks and data size, beside what theory says and beside a peer.

    python benchmarks/growth.py [--axes seq_len heads vocabulary ranks data] [--rounds 5] [--threads 1]

Ours is `baseline_mtp.main` as it stands; its seconds are those of `perf/tokens_per_s`. Only `vocabulary` steps the model, loss
and optimizer of the script directly on random tokens, as a vocabulary needs a tokenizer of its size. The peer is a bare loop on
the same transformer, batch and optimizer settings, with the logits of all heads at once; on ranks its model is wrapped in
DistributedDataParallel, and on data sizes `datasets.load_dataset` and `map` make its rows.

    seq_len     64 to 2,048 tokens a row, 2,048 tokens an update. Theory: counted FLOPs, which are a + b T.
    heads       1 to 8 on a trunk of 3 layers (fixed trunk), and 8 layers in all, trunk and heads (fixed total)
    vocabulary  259 to 65,536
    ranks       1, 2, 4 processes of one thread with the variables that torchrun sets, gloo; 8 rows an update (fixed global), or
                4 a rank (fixed per rank). More ranks than cores share them: CPU seconds and bytes a rank count there.
    data        1, 10, 100 MB of documents of 2 kB: opened first, opened again, resident when the first step is done

Every setting is a forked process that waits; in a round each does --steps updates in turn, the order moving on by one. The
first --uncounted updates (vocabulary: 2) and the first round are left out. Opening the data takes --data-rounds fresh caches, in
turn. Figures are medians over rounds (least to most). MB above rest: peak resident size in those first updates above the size
before them, so activations and gradients; taken once. Exponent: slope of a least-squares line through the logarithms of medians
and of x; theory's is that of counted FLOPs at the same x, or of what the table names. FLOPs: forward and
backward, by flops.py (attention with half of its pairs, as it is causal). A rank's CPU seconds are summed over ranks. Linux only.
Prints Markdown tables, writes growth.json and growth.png.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402

import baseline_mtp  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
from flops import counted_flops  # noqa: E402
from common import IGNORE  # noqa: E402
from runs import commit, make_optimizer, versions  # noqa: E402

transformers.LlamaForCausalLM  # noqa: B018  # loaded here, so that no forked process has to
AXES = {"seq_len": "tokens a row", "heads": "heads", "vocabulary": "vocabulary", "ranks": "ranks", "data": "MB of text"}
SIZES = dict(hidden_size=128, intermediate_size=352, num_attention_heads=2, max_position_embeddings=2048,
             tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None)  # fmt: skip
LENGTH = 256  # where it is not the axis
TIME, CPU, PEAK, HELD = "ms a step", "CPU ms a step", "MB above rest", "MB held a rank"


def status(key):
    """MB of this process, from /proc."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024


# ------------------------------------------------------------------------------------------------- one setting, one process
class Turns:
    """Lets `uncounted` updates pass and reports on them; then waits for a number, lets so many pass, reports, and so on."""

    def __init__(self, pipe, uncounted):
        self.pipe, self.left, self.report, self.seconds = pipe, uncounted, {}, []
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.rest = status("VmRSS")

    def update(self, seconds):
        self.seconds.append(seconds)
        self.left -= 1
        if "resident_mb" not in self.report:
            self.report |= dict(resident_mb=status("VmRSS"), anonymous_mb=status("RssAnon"))
        if self.left == 0:
            cpu = (time.process_time() - self.began) / len(self.seconds) if hasattr(self, "began") else None
            peak = status("VmHWM") - self.rest
            self.pipe.send(self.report | dict(seconds=statistics.median(self.seconds), cpu=cpu, peak_mb=peak))
            self.left, self.seconds, self.began = self.pipe.recv(), [], time.process_time()


def run_script(pipe, uncounted, folder, num_heads, **arguments):
    """`baseline_mtp.main` itself, stopped after each turn."""
    opened, text, load_data = {}, io.StringIO(), baseline_mtp.load_data
    args = baseline_mtp.Args(num_heads=num_heads, mtp_schedule="constant", tracker="none", save_every=0, device="cpu",
                             dtype="fp32", max_steps=10**6, run_dir=str(folder), **arguments)  # fmt: skip

    def timed_load_data(*words):
        began = time.perf_counter()
        result = load_data(*words)
        opened["open_s"] = time.perf_counter() - began
        return result

    class Shown:
        def __init__(self, start, total, ranks):
            self.first, self.turns = ranks.rank == 0, Turns(pipe, uncounted)
            held = re.search(r"memory .*?parameters ([\d.,]+) MB.*?optimizer ([\d.,]+) MB", text.getvalue())
            mb = sum(float(figure.replace(",", "")) for figure in held.groups()) if held else None
            self.turns.report |= opened | dict(held_mb=mb)

        def show(self, step, figures):
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) if self.first else None
            self.turns.update(args.batch_size * args.seq_len / last["perf/tokens_per_s"] if last else 0.0)

    baseline_mtp.Progress, baseline_mtp.load_data, sys.stdout = Shown, timed_load_data, text
    baseline_mtp.main(args)


class Stacked(torch.nn.Module):
    """The peer's loss: logits of all heads at once."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x_BT, targets_KBT):
        logits_KBTV = F.linear(self.model.hidden(x_BT, len(targets_KBT)), self.model.causal_lm.lm_head.weight)
        return F.cross_entropy(logits_KBTV.flatten(0, -2), targets_KBT.flatten(), ignore_index=IGNORE, reduction="sum")


def random_batch(rows, length, vocabulary, num_heads):
    x_BT = np.random.default_rng(0).integers(0, vocabulary, (rows, length))
    targets_KBT = data.make_targets(x_BT, np.zeros_like(x_BT), np.ones_like(x_BT, bool), num_heads)
    return torch.from_numpy(x_BT), torch.from_numpy(targets_KBT)


def run_loop(pipe, uncounted, model, num_heads, batch_at, ours=False, opened=None):
    """The peer's ten lines; `ours`: with the script's loss. `batch_at(step, rank, ranks)` gives x and targets."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = model.train() if ours else Stacked(model).train()
    if ranks > 1:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = make_optimizer(model, lr=3e-3, weight_decay=0.1)
    turns, step = Turns(pipe, uncounted), 0
    held = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values() if t.ndim)]
    turns.report |= (opened or {}) | dict(held_mb=sum(t.numel() * t.element_size() for t in held) / 1e6)
    while True:
        began = time.perf_counter()
        x_BT, targets_KBT = batch_at(step, rank, ranks)
        (model(x_BT, targets_KBT).sum() / (targets_KBT[0] != IGNORE).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        turns.update(time.perf_counter() - began)


def run_loop_on_text(pipe, uncounted, model, num_heads, data_file, seq_len, batch_size):
    """The loop on the rows and batches of the script."""
    torch.manual_seed(0)
    model, tokenizer = common.build_model(model, num_heads, seq_len)
    rows = data.load_data(data_file, tokenizer, seq_len, 0, 0.0, common.Ranks()).train

    def batch_at(step, rank, ranks):
        batch = data.load_batch(rows, data.batch_rows(len(rows), batch_size, 0, step).reshape(ranks, -1)[rank], num_heads, "cpu")
        return batch.x_BT, batch.targets_KBT

    run_loop(pipe, uncounted, model, num_heads, batch_at)


def run_loop_on_random(pipe, uncounted, config, num_heads, batch, ours):
    torch.manual_seed(0)
    run_loop(pipe, uncounted, common.from_config(config, num_heads), num_heads, lambda *ignored: batch, ours)


def run_loop_on_map(pipe, uncounted, model, num_heads, data_file, batch_size, plain):
    """The loop on rows that `datasets` makes, `plain` with the tokenizer itself, else with the script's encoding of bytes."""
    model, tokenizer = common.build_model(model, num_heads, LENGTH)
    datasets.disable_progress_bars()

    def packed(texts):
        ids = tokenizer(texts)["input_ids"] if plain else [np.append(i, 1) for i, _ in data.encode(tokenizer, texts, True, None)]
        ids = np.concatenate(ids).astype(np.int32)
        return {"input_ids": ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)}

    began = time.perf_counter()
    documents = datasets.load_dataset("json", data_files=data_file, split="train")
    rows = documents.map(packed, input_columns="text", batched=True, remove_columns=["text"]).with_format("numpy")
    opened = dict(open_s=time.perf_counter() - began)

    def batch_at(step, rank, ranks):
        x_BT = rows[data.batch_rows(len(rows), batch_size, 0, step)]["input_ids"].astype(np.int64)
        targets_KBT = data.make_targets(x_BT, np.zeros_like(x_BT), np.ones_like(x_BT, bool), num_heads)
        return torch.from_numpy(x_BT), torch.from_numpy(targets_KBT)

    run_loop(pipe, uncounted, model, num_heads, batch_at, opened=opened)


def count_flops(pipe, config, num_heads, rows, length, ours):
    """Of forward and backward of one update; sends the number."""
    model = common.from_config(config, num_heads).train()
    model = model if ours else Stacked(model)
    batch = random_batch(rows, length, config.vocab_size, num_heads)
    pipe.send(counted_flops(lambda: model(*batch).sum().backward()))


# ------------------------------------------------------------------------------------------------------- processes in turns
def fork(function, *args, environment=None, threads=1, **kwargs):
    """A process that runs the function with a pipe as its first argument, and our end of the pipe."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child():
        here.close()  # else a process whose parent was killed would wait for ever
        os.environ.update(environment or {})
        torch.set_num_threads(threads)
        function(there, *args, **kwargs)

    process = context.Process(target=child, daemon=True)
    process.start()
    there.close()
    return process, here


def fork_ranks(number, function, *args, **kwargs):
    if number == 1:
        return [fork(function, *args, **kwargs)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(number))
    ranks = [where | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(number)]
    return [fork(function, *args, environment=environment, **kwargs) for environment in ranks]


def flops_of(*args):
    process, pipe = fork(count_flops, *args)
    flops = pipe.recv()
    process.join()
    return flops


def take_turns(settings, rounds, steps):
    """Reports of each setting: of its uncounted updates (a list over ranks), and of each round (the same)."""
    running = {name: fork_ranks(number, *words, **kwargs) for name, (number, words, kwargs) in settings.items()}
    first = {name: [pipe.recv() for _, pipe in group] for name, group in running.items()}
    reports, names = {name: [] for name in running}, list(running)
    for turn in range(rounds + 1):  # the first warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for _, pipe in running[name]:
                pipe.send(steps)
            reports[name].append([pipe.recv() for _, pipe in running[name]])
    stop(running.values())
    return first, {name: rounds[1:] for name, rounds in reports.items()}


def stop(groups):
    for process, _ in (member for group in groups for member in group):
        process.kill()
        process.join()


# ---------------------------------------------------------------------------------------------------------------- the axes
def curve(form, quantity, x, samples, theory, theory_of="FLOPs"):
    """One line of a table: medians (least, most) at each x; numbers it is proportional to by theory, or None."""
    figures = [[statistics.median(values), min(values), max(values)] for values in samples]
    return dict(form=form, quantity=quantity, x=list(x), figures=figures, theory=theory, theory_of=theory_of) | fits(
        x, [middle for middle, *_ in figures], theory
    )


def fits(x, y, theory):
    """Exponents of both, and the line a + b x through the medians (relative errors count) with its largest relative error."""
    x, y = np.array(x, float), np.maximum(y, 1e-9)
    exponent, expected = (values and float(np.polyfit(np.log(x), np.log(values), 1)[0]) for values in (list(y), theory))
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(x)), rcond=None)
    return dict(exponent=exponent, theory_exponent=expected, line=[float(a), float(b)], off=float(abs((a + b * x) / y - 1).max()))


def curves_of(x, forms, theory, first, reports, quantities=(TIME, CPU, PEAK)):
    """Curves of settings named (form, x); `theory(form, quantity)` gives numbers for each x and what they are."""
    result = []
    for form in forms:
        per_round = [reports[form, value] for value in x]
        samples = {
            TIME: [[1e3 * ranks[0]["seconds"] for ranks in rounds] for rounds in per_round],
            CPU: [[1e3 * sum(report["cpu"] for report in ranks) for ranks in rounds] for rounds in per_round],
            PEAK: [[first[form, value][0]["peak_mb"]] for value in x],
            HELD: [[first[form, value][0]["held_mb"]] for value in x],
        }
        result += [curve(form, quantity, x, samples[quantity], *theory(form, quantity)) for quantity in quantities]
    return result


def config_of(folder, layers):
    file = folder / f"{layers} layers.json"
    file.write_text(json.dumps(dict(model_type="llama", vocab_size=259, num_hidden_layers=layers) | SIZES))
    return file


def both_forms(name, x, args, folder, text, threads, layers, num_heads, seq_len, batch_size, ranks=1):
    """The script and the loop at one x, as settings of `take_turns`."""
    kwargs = dict(
        model=str(config_of(folder, layers)), num_heads=num_heads, seq_len=seq_len, batch_size=batch_size, threads=threads
    )
    run_dir = folder / f"{name} {x}"
    return {
        (f"ours{name}", x): (ranks, (run_script, args.uncounted, run_dir), kwargs | dict(data=text)),
        (f"stacked{name}", x): (ranks, (run_loop_on_text, args.uncounted), kwargs | dict(data_file=text)),
    }


def llama(layers, vocabulary=259):
    return transformers.LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **SIZES)


def seq_len(args, folder):
    lengths, settings, flops = [64, 128, 256, 512, 1024, 2048], {}, {}
    text = write_text(folder, 1)
    for length in lengths:
        settings |= both_forms("", length, args, folder, text, args.threads, 4, 2, length, 2048 // length)
        for form in ("ours", "stacked"):
            flops[form, length] = flops_of(llama(4), 2, 2048 // length, length, form == "ours")

    def theory(form, quantity):
        return ([1.0] * len(lengths), "constant") if quantity == PEAK else ([flops[form, length] for length in lengths], "FLOPs")

    return curves_of(lengths, ("ours", "stacked"), theory, *take_turns(settings, args.rounds, args.steps))


def heads(args, folder):
    numbers, settings, flops = [1, 2, 4, 8], {}, {}
    text = write_text(folder, 1)
    for kind, layers in ((", fixed trunk", lambda number: 3 + number), (", fixed total", lambda number: 8)):
        for number in numbers:
            settings |= both_forms(kind, number, args, folder, text, args.threads, layers(number), number, LENGTH, 2)
            for form in ("ours", "stacked"):
                flops[form + kind, number] = flops_of(llama(layers(number)), number, 2, LENGTH, form == "ours")
    forms = list(dict.fromkeys(form for form, _ in settings))

    def theory(form, quantity):
        return [flops[form, number] for number in numbers], "FLOPs"

    return curves_of(numbers, forms, theory, *take_turns(settings, args.rounds, args.steps), quantities=(TIME, CPU))


def vocabulary(args, folder):
    sizes, settings, flops = [259, 1024, 4096, 16384, 65536], {}, {}
    for size in sizes:
        for form in ("ours", "stacked"):
            words = (run_loop_on_random, 2, llama(3, size), 2, random_batch(2, LENGTH, size, 2), form == "ours")
            settings[form, size] = (1, words, dict(threads=args.threads))
            flops[form, size] = flops_of(llama(3, size), 2, 2, LENGTH, form == "ours")

    def theory(form, quantity):
        return (None, "") if quantity == PEAK else ([flops[form, size] for size in sizes], "FLOPs")

    return curves_of(sizes, ("ours", "stacked"), theory, *take_turns(settings, args.rounds, 1), quantities=(TIME, CPU, PEAK))


def ranks(args, folder):
    numbers, settings, cores = [1, 2, 4], {}, len(os.sched_getaffinity(0))
    text = write_text(folder, 1)
    for kind, rows in ((", fixed global", lambda number: 8), (", fixed per rank", lambda number: 4 * number)):
        for number in numbers:
            settings |= both_forms(kind, number, args, folder, text, 1, 4, 2, LENGTH, rows(number), number)
    forms = list(dict.fromkeys(form for form, _ in settings))

    def theory(form, quantity):
        work = [1.0 if "global" in form else float(number) for number in numbers]
        if quantity == HELD:
            return ([1 / n for n in numbers], "1 / ranks") if form.startswith("ours") else ([1.0] * len(numbers), "a copy a rank")
        if quantity == CPU:
            return work, "rows"
        return [w / min(n, cores) for w, n in zip(work, numbers)], f"rows / cores, of {cores}"

    measured = take_turns(settings, args.rounds, 2 * args.steps)
    names = {form: form.replace("stacked", "DDP") for form in forms}
    return [c | dict(form=names[c["form"]]) for c in curves_of(numbers, forms, theory, *measured, quantities=(TIME, CPU, HELD))]


def write_text(folder, megabytes):
    """A .jsonl file of documents of 2 kB, no two alike."""
    file, number = folder / f"{megabytes} MB.jsonl", 0
    with open(file, "w") as out:
        for first in range(0, 500 * megabytes):
            text = "".join(
                f"entry {number + i}: {(number + i) ** 2 % 99_991} apples of {first} in basket {i}\n" for i in range(40)
            )
            out.write(json.dumps({"text": text[:2000].ljust(2000, ".")}) + "\n")
            number += 40
    return str(file)


def data_size(args, folder):
    opened, steps, model = {}, {}, str(config_of(folder, 4))
    forms = ("ours", "datasets map, our encoding", "datasets map, tokenizer")
    sizes = {form: [mb for mb in args.megabytes if mb <= 10 or form != forms[2]] for form in forms}  # 1.2 s a MB
    texts = {mb: write_text(folder, mb) for mb in args.megabytes}
    for turn in range(args.data_rounds):
        for form, mb in [(form, mb) for mb in args.megabytes for form in forms if mb in sizes[form]]:
            cache = folder / f"cache {turn} {form} {mb}"
            for when in ("first", "again"):
                kwargs = dict(model=model, num_heads=2, batch_size=4, threads=args.threads)
                words = (
                    (run_script, args.uncounted, folder / f"{turn} {mb} {when}")
                    if form == "ours"
                    else (run_loop_on_map, args.uncounted)
                )
                kwargs |= (
                    dict(data=texts[mb], seq_len=LENGTH) if form == "ours" else dict(data_file=texts[mb], plain=form == forms[2])
                )
                datasets.config.HF_DATASETS_CACHE = cache
                process, pipe = fork(*words, **kwargs)
                report = pipe.recv()
                opened.setdefault((form, when, mb), []).append(report)
                if when == "again":
                    pipe.send(4 * args.steps)
                    steps.setdefault((form, mb), []).append(pipe.recv())
                stop([[(process, pipe)]])
            shutil.rmtree(cache)
    result = []
    for form in forms:
        x = sizes[form]
        flat = [1.0] * len(x)
        for when, theory in (("first", (x, "bytes")), ("again", (flat, "constant"))):
            samples = [[report["open_s"] for report in opened[form, when, mb]] for mb in x]
            result.append(curve(form, f"s to open {when}", x, samples, *theory))
        for key, name in (("resident_mb", "MB resident"), ("anonymous_mb", "MB resident, anonymous")):
            samples = [[report[key] for report in opened[form, "again", mb]] for mb in x]
            result.append(curve(form, name, x, samples, flat, "constant"))
        for key, name in (("seconds", TIME), ("cpu", CPU)):
            samples = [[1e3 * report[key] for report in steps[form, mb]] for mb in x]
            result.append(curve(form, name, x, samples, flat, "constant"))
    return result


MEASURES = dict(seq_len=seq_len, heads=heads, vocabulary=vocabulary, ranks=ranks, data=data_size)


# ------------------------------------------------------------------------------------------------------------ table, figure
def table(axis, curves):
    xs = sorted({x for c in curves for x in c["x"]})
    print(f"\n| {AXES[axis]} |  | {' | '.join(f'{x:,}' for x in xs)} | exponent | theory | a + b x, most off |")
    print("|---" * (len(xs) + 5) + "|")
    for c in curves:
        at = dict(zip(c["x"], c["figures"]))
        cells = [told(*at[x]) if x in at else "" for x in xs]
        fit = f"{c['exponent']:.2f} | " + (f"{c['theory_exponent']:.2f} ({c['theory_of']})" if c["theory"] else "")
        line = f"{c['line'][0]:.3g} + {c['line'][1]:.3g} x, {100 * c['off']:.0f} %" if len(c["x"]) > 3 else ""
        print(f"| {c['form']} | {c['quantity']} | {' | '.join(cells)} | {fit} | {line} |")


def told(middle, least, most):
    middle, least, most = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (middle, least, most))
    return middle if least == most else f"{middle} ({least} to {most})"


def draw(record, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("seq_len", TIME), ("heads", TIME), ("vocabulary", TIME), ("ranks", CPU), ("ranks", HELD), ("data", "s to open")]
    panels = [(axis, quantity) for axis, quantity in panels if axis in record["axes"]]
    columns = min(3, len(panels))
    grid = (-(-len(panels) // columns), columns)
    figure, axes = plt.subplots(*grid, figsize=(5 * grid[1], 3.8 * grid[0]), layout="constrained", squeeze=False)
    for place, (axis, quantity) in zip(axes.flat, panels):
        chosen = [c for c in record["axes"][axis] if c["quantity"].startswith(quantity)]
        for number, c in enumerate(chosen):
            y, least, most = np.array(c["figures"]).T
            name = c["form"] + c["quantity"].removeprefix(quantity)
            place.errorbar(c["x"], y, [y - least, most - y], fmt="o", markersize=4, color=f"C{number}", label=name)
            theory = np.array(c["theory"])
            place.plot(c["x"], theory * np.exp(np.mean(np.log(y / theory))), "--", linewidth=1, color=f"C{number}")
        place.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=quantity)
        place.set_xticks(chosen[0]["x"], [f"{x:,}" for x in chosen[0]["x"]], minor=False)
        place.set_xticks([], minor=True)
        place.legend(fontsize=7)
        place.spines[["top", "right"]].set_visible(False)
    for place in list(axes.flat)[len(panels) :]:
        place.set_axis_off()
    figure.suptitle("dots: median, least to most; dashed: growth by theory, through the dots' mean", fontsize=9)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=2, help="updates a turn (vocabulary 1, ranks twice, data four times as many)"
    )
    parser.add_argument("--uncounted", type=int, default=10, help="updates of each process before its first turn")
    parser.add_argument("--threads", type=int, default=1, help="of each process but ranks, which have one")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--data-rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "growth.json")
    args = parser.parse_args()
    words = [w for w in sys.argv[1:] if w not in ("--out", str(args.out))]  # no path of this machine
    machine = dict(processor=platform.processor() or platform.machine(), cores=len(os.sched_getaffinity(0)), threads=args.threads)
    command = shlex.join(["python", "benchmarks/growth.py", *words])
    record = dict(command=command, **commit(), **machine, versions=versions(), seconds={}, axes={})
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        for axis in args.axes:
            folder, began = Path(name) / axis, time.perf_counter()
            folder.mkdir()
            datasets.config.HF_DATASETS_CACHE = folder / "cache"
            record["axes"][axis] = MEASURES[axis](args, folder)
            record["seconds"][axis] = round(time.perf_counter() - began)
            shutil.rmtree(folder)
            print(f"{axis}: {record['seconds'][axis]} s", file=sys.stderr, flush=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, args.out.with_suffix(".png"))
    for axis, curves in record["axes"].items():
        table(axis, curves)


if __name__ == "__main__":
    main()
