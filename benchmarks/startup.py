"""Seconds from the start of a process to its first result: the manual, the first update, the first held-out figures.

    python benchmarks/startup.py [--rounds 7] [--data stdlib] [--what help update evaluation split]      (needs accelerate)

Every figure is a process of its own, started as a user starts it and killed once the result is there: the end of `--help`, the
first line of metrics.jsonl, the end of the first suite. All forms take turns, a round moving the order on by one; the first
round warms the disk's caches and is not counted.

    help        our --help; a script that imports torch and transformers and then asks tyro, or HfArgumentParser for the
                TrainingArguments; and the two imports alone
    update      `python baseline_mtp.py` and transformers.Trainer (one head, same sizes, same text and batch; bytes are tokenised
                by numpy as ours are, packed and kept by `datasets`) to the end of their first update, tracker none or mlflow;
                "nothing cached" starts with an empty cache of tokenised data and no tracker file
    evaluation  `python evaluate.py --suites heldout` to its first measured batch and to its figures (four heads), and
                Trainer.evaluate of the run's model/ on as many rows to its loss (one head)
    split       where ours goes, in one process that imports and calls the same in the same order and looks at the clock between

Clock and CPU seconds (user and system, until the process was killed), medians over rounds (least to most). Prints tables and
writes startup.json. MLflow is opened by ours after 10 s of training: its row of the split says what that costs then.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LENGTH, BATCH = 256, 4


# ---------------------------------------------------------------------------------------------- peers, each in its own process
def tyro_help():
    from dataclasses import dataclass

    import torch  # noqa: F401
    import transformers  # noqa: F401
    import tyro

    @dataclass
    class Args:
        seed: int = 0
        """Fixes initial weights and order of the data."""
        lr: float = 3e-3
        """Peak learning rate."""

    tyro.cli(Args, args=["--help"])


def argument_parser_help():
    import torch  # noqa: F401
    import transformers

    transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses(["--help"])


def packed(examples):
    import numpy as np

    ids = np.concatenate([np.append(np.frombuffer(t.encode(), np.uint8).astype(np.int32) + 3, 1) for t in examples["text"]])
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return {"input_ids": rows, "labels": rows}


def trainer(text, model, folder, tracker, num_rows):
    """First update of a new model of the configuration `model`, or, with `num_rows`, loss of a saved one on so many rows."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=text, split="train")
    rows = rows.map(packed, batched=True, batch_size=100, remove_columns=rows.column_names)

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *ignored, **kw):
            print("first result", file=sys.__stdout__, flush=True)

    settings = dict(output_dir=folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=16, learning_rate=3e-3,
                    optim="adamw_torch_fused", max_steps=100, logging_strategy="no", save_strategy="no", report_to=tracker,
                    use_cpu=True, disable_tqdm=True)  # fmt: skip
    if num_rows:
        causal_lm = transformers.AutoModelForCausalLM.from_pretrained(model)
        settings["prediction_loss_only"] = True
        rows = rows.select(range(num_rows))
        transformers.Trainer(causal_lm, transformers.TrainingArguments(**settings), eval_dataset=rows).evaluate()
        return print("first result", file=sys.__stdout__, flush=True)
    causal_lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
    arguments = transformers.TrainingArguments(**settings)
    transformers.Trainer(causal_lm, arguments, train_dataset=rows, callbacks=[Callback()]).train()


def split(data, folder):
    """Ours with a look at the clock after every part; prints seconds of each as JSON."""
    seconds, last = {}, time.time()

    def passed(part):
        nonlocal last
        seconds[part] = seconds.get(part, 0) + time.time() - last
        last = time.time()

    sys.path.insert(0, str(ROOT))
    import torch  # noqa: F401

    passed("import torch")
    import transformers  # noqa: F401

    passed("import transformers")
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    passed("import transformers' model code (torch.distributed, torch._dynamo and scipy with it)")
    import datasets  # noqa: F401

    passed("import datasets")
    import tyro

    import baseline_mtp

    passed("import our files")
    opened = []

    def timed(name, part):
        before = getattr(baseline_mtp, name)

        def call(*args, **kw):
            passed("the rest: run folder, type of the products, optimizer, signals")
            result = before(*args, **kw)
            passed(part)
            opened.extend([result] if name == "Tracker" else [])
            return result

        setattr(baseline_mtp, name, call)

    class Shown(baseline_mtp.Progress):
        def show(self, step, text):
            passed("first update")
            opened[0].send()
            passed("tracker, 10 s later")
            print(json.dumps(seconds), file=sys.__stdout__, flush=True)
            time.sleep(60)

    timed("build_model", "model")
    timed("load_data", "data")
    timed("Tracker", "the rest: run folder, type of the products, optimizer, signals")
    timed("micro_batches", "first update")
    baseline_mtp.Progress = Shown
    sys.stdout = sys.stderr
    baseline_mtp.main(tyro.cli(baseline_mtp.Args, args=["--data", data, "--run-dir", folder, "--tracker", "mlflow"]))


# ------------------------------------------------------------------------------------------------------------------ measurement
def measure(command, env, cwd, file=None, lines=()):
    """Start, wait for each sign in turn (a file that is not empty, lines that begin so; else the end), kill.

    Returns seconds to each sign, CPU seconds in all, and the lines read.
    """
    began, seconds, read = time.time(), [], []
    process = subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE if lines else subprocess.DEVNULL,
                               stderr=subprocess.PIPE if not lines and not file else subprocess.DEVNULL, text=True)  # fmt: skip
    if file:
        while not (file.exists() and file.stat().st_size) and process.poll() is None:
            time.sleep(0.005)
        seconds.append(time.time() - began)
        failed = not (file.exists() and file.stat().st_size)
    for line in lines:
        read.append(next((text for text in process.stdout if text.startswith(line)), None))
        seconds.append(time.time() - began)
        failed = read[-1] is None
    if not file and not lines:
        errors = process.stderr.read()
    else:
        process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status  # it was waited for here
    if not file and not lines:
        seconds.append(time.time() - began)
        failed = status != 0 and errors
    if failed:
        raise SystemExit(f"{command}: ended before its result")
    return seconds, usage.ru_utime + usage.ru_stime, read


def forms_of(what, data, text, config, folder):
    """Every figure: name, and a function of the round that measures it and gives the same as `measure`."""
    python, peer = [sys.executable], [sys.executable, __file__, "--worker"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "WANDB_MODE": "offline"}
    forms = {}

    def fresh(name, number):
        place = folder / f"{name} {number}".replace(" ", "_").replace(",", "")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def first_update(name, tracker, cached):
        def ours(number):
            place = fresh(f"ours {name}", number)
            run_dir = (folder if cached else place) / "runs" / f"{tracker} {number}"
            shutil.rmtree(run_dir, ignore_errors=True)
            words = [str(ROOT / "baseline_mtp.py"), "--data", data, "--run-dir", str(run_dir), "--tracker", tracker]
            here = env if cached else env | {"HF_DATASETS_CACHE": str(place / "cache")}
            return measure(python + words, here, place, file=run_dir / "metrics.jsonl")

        def theirs(number):
            place = fresh(f"Trainer {name}", number)
            here = env if cached else env | {"HF_DATASETS_CACHE": str(place / "cache")}
            here = here | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder if cached else place}/trainer.db"}
            return measure([*peer, "trainer", text, config, str(place), tracker, "0"], here, place, lines=["first result"])

        forms[f"first update, baseline_mtp.py, {name}"] = ours
        forms[f"first update, Trainer, {name}"] = theirs

    if "help" in what:
        forms["--help, baseline_mtp.py"] = lambda n: measure([*python, str(ROOT / "baseline_mtp.py"), "--help"], env, folder)
        forms["--help, tyro after torch and transformers"] = lambda n: measure([*peer, "tyro_help"], env, folder)
        forms["--help, HfArgumentParser"] = lambda n: measure([*peer, "argument_parser_help"], env, folder)
        forms["import torch, transformers"] = lambda n: measure([*python, "-c", "import torch, transformers"], env, folder)
    if "update" in what:
        for tracker in ("none", "mlflow"):
            first_update(f"data cached, tracker {tracker}", tracker, True)
            first_update(f"nothing cached, tracker {tracker}", tracker, False)
    if "evaluation" in what:
        run_dir, rows = folder / "evaluated", []
        words = ["--data", data, "--run-dir", str(run_dir), "--tracker", "none", "--max-steps", "1"]
        subprocess.run([*python, str(ROOT / "baseline_mtp.py"), *words], env=env, check=True, stdout=subprocess.DEVNULL)

        def evaluation(number):
            words = [str(ROOT / "evaluate.py"), "--run-dir", str(run_dir), "--suites", "heldout", "--out"]
            out = str(fresh("evaluation", number))
            result = measure([*python, *words, out], env, folder, lines=["data ", "heldout "])
            rows[:] = [result[2][0].split(", ")[1].split(" held-out")[0].replace(",", "")]
            return result

        def theirs(number):
            place = str(fresh("Trainer.evaluate", number))
            return measure([*peer, "trainer", text, str(run_dir / "model"), place, "none", rows[0]], env, folder,
                           lines=["first result"])  # fmt: skip

        forms["held-out figures, evaluate.py"] = evaluation
        forms["held-out loss, Trainer.evaluate"] = theirs
    if "split" in what:

        def parts(number):
            place = fresh("split", number)
            return measure([*peer, "split", data, str(folder / "runs" / place.name)], env, place, lines=["{"])

        forms["split"] = parts
    return forms


def show(record):
    """The tables of README, from what startup.json holds."""
    names = [name for name in record["seconds"] if name != "split"]
    print(f"| from the start of the process to | clock, s | CPU, s |\n{'|---' * 3}|")

    def told(values):
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    for name in names:
        *before, last = zip(*record["seconds"][name])
        for values in before:
            print(f"| {name}, first measured batch | {told(values)} |  |")
        print(f"| {name} | {told(last)} | {told(record['cpu_seconds'][name])} |")
    if record["parts"]:
        print(f"\n| part of `python baseline_mtp.py` | clock, s |\n{'|---' * 2}|")
        for part in record["parts"][0]:
            print(f"| {part} | {told([parts[part] for parts in record['parts']])} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = ("help", "update", "evaluation", "split")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", default="stdlib", help="stdlib, or a .jsonl file with the column text")
    parser.add_argument("--what", nargs="+", choices=whats, default=whats)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "startup.json"))
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        form, *words = args.worker
        if form == "trainer":
            words[-1] = int(words[-1])
        return dict(tyro_help=tyro_help, argument_parser_help=argument_parser_help, trainer=trainer, split=split)[form](*words)
    sys.path.insert(0, str(ROOT))
    import common
    import data
    from runs import commit, versions

    folder = Path(tempfile.mkdtemp(prefix="startup-"))
    text, config = str(folder / "text.jsonl"), str(folder / "config.json")
    texts = data._stdlib() if args.data == "stdlib" else [json.loads(t)["text"] for t in Path(args.data).open()]
    Path(text).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    Path(config).write_text(json.dumps({"model_type": "llama"} | common.TINY))
    forms = forms_of(args.what, args.data if args.data == "stdlib" else text, text, config, folder)
    seconds, cpu, parts = {name: [] for name in forms}, {name: [] for name in forms}, []
    for number in range(args.rounds + 1):  # the first warms up
        names, turn = list(forms), number % len(forms)
        for name in names[turn:] + names[:turn]:
            taken, used, read = forms[name](number)
            print(f"round {number} of {args.rounds}  {name:<60} {taken[-1]:7.2f}  CPU {used:7.2f}", flush=True)
            if number:
                seconds[name].append(taken)
                cpu[name].append(used)
                parts.extend([json.loads(read[0])] if name == "split" else [])
    machine = dict(processor=platform.processor() or platform.machine(), cores=len(os.sched_getaffinity(0)),
                   threads=os.environ.get("OMP_NUM_THREADS", "all"), versions=versions())  # fmt: skip
    command = f"python benchmarks/startup.py --rounds {args.rounds} --data {Path(args.data).name} --what {' '.join(args.what)}"
    record = dict(command=command, **commit(), **machine, seconds=seconds, cpu_seconds=cpu, parts=parts)
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder)
    show(record)


if __name__ == "__main__":
    main()
