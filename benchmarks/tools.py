"""What the benchmarks share: records of measurements, runs of the scripts, medians, intervals."""

import argparse
import collections
import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import scipy.stats
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `from common import ..`

PROOF_MODEL = dict(model_type="llama", vocab_size=259, hidden_size=96, intermediate_size=256)
PROOF_MODEL |= dict(num_attention_heads=4, initializer_range=0.05, max_position_embeddings=2048)
PROOF_MODEL |= dict(tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None)
# every flag of the training scripts on which the figures of a proof depend
PROOF_FLAGS = dict(mtp_schedule="constant", seq_len=256, micro_batch_size=0, dtype="fp32")
PROOF_FLAGS |= dict(weight_decay=0.1, grad_clip=1.0, recompute="none", tracker="none")
PROOF_FLAGS |= dict(eval_every=0, save_every=0)


def parser(doc, rounds=None):
    """A parser whose help is the docstring; `rounds` adds --rounds and --out."""
    form = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=doc, formatter_class=form)
    if rounds:
        result.add_argument("--rounds", type=int, default=rounds)
        result.add_argument("--out", default=str(Path(sys.argv[0]).with_suffix(".json")))
    return result


def proof_parser(doc, steps, batch_size, arms):
    """A parser with what the proofs share."""
    result = parser(doc)
    result.add_argument("--out", required=True, help="folder of runs and results")
    result.add_argument("--model", default="", help="empty: a small Llama of width 96")
    result.add_argument("--seeds", type=int, default=3)
    result.add_argument("--num-heads", type=int, default=2)
    several = "+" if isinstance(steps, list) else None
    result.add_argument("--steps", type=int, nargs=several, default=steps)
    result.add_argument("--batch-size", type=int, default=batch_size)
    result.add_argument("--device", default="cpu")
    result.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    result.add_argument("--arms", nargs="+", choices=arms, default=list(arms))
    return result


# ------------------------------------------------------------ records of a measurement
def machine(device="cpu"):
    """Commit, versions and processor, for the JSON file of a measurement."""
    from common import versions

    processor = platform.processor() or platform.machine()
    if device == "cuda":
        import torch

        processor = torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0))
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "versions": versions(), "processor": processor, "cores": cores}


def command():
    """The command line as typed, without paths of this machine."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv]
    return " ".join(["python", f"benchmarks/{words[0]}", *words[1:]])


def write_json(file, values):
    Path(file).write_text(json.dumps(values, indent=1) + "\n")


def spread(values, digits=4):
    """Median, least and most."""
    ordered = sorted(values)
    return [round(v, digits) for v in (statistics.median(ordered), ordered[0], ordered[-1])]


def shown(median_least_most, digits=2):
    """`1.02 (0.97 to 1.10)`."""
    return "{:,.{d}f} ({:,.{d}f} to {:,.{d}f})".format(*median_least_most, d=digits)


def ratios(values, base):
    return [value / other for value, other in zip(values, base)]


def in_turn(names, number):
    """The names in an order that moves on by one each round."""
    names = list(names)
    first = number % len(names)
    return names[first:] + names[:first]


def cell(value):
    """A figure of a table; a pair is a difference with its interval."""
    if isinstance(value, tuple):
        return f"{value[0]:+.4f} [{value[1][0]:+.4f}, {value[1][1]:+.4f}]"
    return f"{value:.4f}" if isinstance(value, float) else str("" if value is None else value)


def plot_differences(results, file):
    """Points with intervals; of each its panel, its colour, its name, and what `cell` takes."""
    panels = collections.defaultdict(lambda: collections.defaultdict(dict))
    for title, label, name, result in results:
        if result:
            panels[title][label][name] = result
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    every_axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, (title, series) in zip(every_axes, panels.items()):
        for number, (label, points) in enumerate(series.items()):
            middle_N = np.array([middle for middle, _ in points.values()])
            error_2N = abs(np.array([interval for _, interval in points.values()]).T - middle_N)
            options = dict(fmt="o", capsize=3, label=label)
            axes.errorbar(middle_N, np.arange(len(points)) + number / 5, xerr=error_2N, **options)
        axes.set_yticks(range(len(points)), list(points))
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_title(title)
        axes.invert_yaxis()
        axes.legend()
    figure.savefig(file, dpi=110)


def print_table(header, rows):
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")
    print()


# ------------------------------------------------------------ runs of the scripts
def as_flags(values):
    """`dict(max_steps=3)` -> `["--max-steps", "3"]`; True makes a switch, None no flag."""
    words = []
    for name, value in values.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def write_changed(file, script, old, new):
    """Write a copy of a script in which a piece of its text is another."""
    source = (ROOT / script).read_text()
    assert source.count(old) == 1, f"{script}: not once: {old}"
    Path(file).write_text(source.replace(old, new))


def train(script, flags, log):
    """Run a script in this process, from an empty run folder; returns metrics and command.

    That spares a process its imports; the numbers are the same. The run's checkpoints are deleted.

    Raises:
        RuntimeError: it failed, or a signal stopped it; `log` holds what it printed.
    """
    script, words, run_dir = ROOT / script, as_flags(flags), Path(flags["run_dir"])
    shutil.rmtree(run_dir, ignore_errors=True)
    sys.path.insert(0, str(script.parent))
    module = importlib.import_module(script.stem)
    argv, sys.argv = sys.argv, [str(script), *words]  # a run records its command
    with open(log, "w") as file:
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                module.main(tyro.cli(module.Args, args=words))
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{log}: {error!r}") from error
        finally:
            sys.argv = argv
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    command = " ".join([script.name, *words]).replace(str(run_dir.parent), "OUT")
    return [json.loads(line) for line in lines], command


def prepare_proof(args, free, num_layers):
    """The folder `args.out` with `config.json`; returns it and the settings.

    It goes on only with the settings it was started with; arguments named in `free` may change.
    """
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    args.out = str(out)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", *free)}
    file = out / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        held = f"holds runs with other settings ({file.read_text()})"
        raise SystemExit(f"error: --out {out}: {held}; name a new one")
    file.write_text(json.dumps(settings))
    write_json(out / "config.json", {**PROOF_MODEL, "num_hidden_layers": num_layers})
    return out, settings


def data_args(data, **changes):
    defaults = dict(heldout_data="", seq_len=256, seed=0, noise_frac=0.0, noise_by="line")
    return SimpleNamespace(data=data, **{**defaults, **changes})


def document_sums(model, rows, numbers):
    """Head 1's loss, correct and all targets of each held-out document, sums `[documents, 3]`."""
    import torch

    from common import IGNORE, load_batch

    model.eval()
    sums_D3 = np.zeros((rows[:]["document"].max() + 1, 3))
    for first in range(0, len(numbers), 32):
        batch = load_batch(rows, numbers[first : first + 32], 1, "cpu")
        with torch.no_grad():
            loss, correct = model(batch.x_BT, batch.targets_KBT, "correct")
        valid_BT = batch.targets_KBT[0] != IGNORE
        values_3N = torch.stack([loss[0], correct[0], valid_BT])[:, valid_BT].double().numpy()
        document_N = rows[batch.rows_B]["document"][valid_BT.numpy()]
        np.add.at(sums_D3, document_N, values_3N.T)
    return sums_D3


def kept(file, work):
    """What `work()` returned, from `file` where an earlier call left it there."""
    if file.exists():
        return json.loads(file.read_text())
    began, cpu = time.time(), time.process_time()
    result = work()
    result |= dict(began=began, seconds=time.time() - began, cpu_seconds=time.process_time() - cpu)
    result["commit"] = machine()["commit"]
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(file)
    return json.loads(file.read_text())


def quiet():
    """One thread of torch, and no progress bars of transformers."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def run_jobs(function, tasks, num_jobs):
    """Results of `function(*task)`, by `kept`, in their order; so many processes of one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else its processes outlive it
    began, results, done = time.time(), [], 0
    pool = ProcessPoolExecutor(num_jobs, get_context("spawn"), initializer=quiet)
    try:
        futures = [pool.submit(function, *task) for task in tasks]
        for number, future in enumerate(futures, start=1):
            results.append(future.result())
            done += results[-1]["began"] > began  # not by an earlier call
            spent = time.time() - began
            left = spent * (len(tasks) - number) / max(1, done)
            name = " ".join(str(part) for part in tasks[number - 1][1:])
            took = f"{results[-1]['seconds']:.0f} s, {spent:.0f} s in all, {left:.0f} s left"
            print(f"{number:>3}/{len(tasks)}  {name:<28} {took}", flush=True)
    finally:  # after an error or a signal those that run end, and no further one begins
        pool.shutdown(cancel_futures=True)
    return results


# ------------------------------------------------------------ statistics
def difference_with_interval(one, other, count):
    """Difference of two sums divided by a count, with a 95 % interval.

    The paired percentile bootstrap draws the items (documents, functions) 10,000 times.

    Args:
        one, other: figure of each item under the two runs, `[N]`.
        count: what their sums are divided by, `[N]`.
    """

    def statistic(difference, count, axis=-1):
        return difference.sum(axis) / count.sum(axis)

    difference = np.asarray(one) - np.asarray(other)
    options = dict(paired=True, vectorized=True, method="percentile", n_resamples=10_000)
    values = (difference, np.asarray(count))
    result = scipy.stats.bootstrap(values, statistic, **options, batch=500, rng=0)
    low, high = result.confidence_interval
    return float(statistic(difference, np.asarray(count))), [float(low), float(high)]
