"""A run on disk and on screen: run directory and its lock, stop signals, metrics, tracker, progress, closing report."""

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from common import IGNORE, UsageError, first_line

# ------------------------------------------------------------------------------------------- run directory, lock, signals
MAY_CHANGE = ("run_dir", "tracker", "device", "save_every", "keep_last")  # arguments that a resumed run may give anew


def open_run(args, script, ranks):
    """The run directory for these arguments, locked if it is there, and whether the run in it is finished.

    Raises:
        UsageError: it cannot be written, is in use, or holds something else, or a run with other arguments.
    """
    fixed = _fixed(args, script)
    digest = hashlib.sha256(json.dumps([script, fixed]).encode()).hexdigest()[:8]
    run_dir = Path(args.run_dir or f"runs/{script}-s{args.seed}-{digest}")
    with ranks.first() as alone:
        if alone:
            _check_writable(run_dir, "--run-dir")
            if args.checkpoint_dir and "://" not in args.checkpoint_dir:
                _check_writable(Path(args.checkpoint_dir), "--checkpoint-dir")
            if (run_dir / "args.json").exists():
                there = json.loads((run_dir / "args.json").read_text())
                if differ := differences(_fixed(there["args"], there["script"]), fixed):
                    raise UsageError(f"--run-dir {run_dir}: holds a run with other arguments ({differ})")
                if not (run_dir / "model").is_dir():
                    lock_run(run_dir, ranks)
            elif run_dir.exists() and {f.name for f in run_dir.iterdir()} - {LOCK, OWNER, *UNWHOLE}:
                raise UsageError(f"--run-dir {run_dir}: not empty and no run of this project; name a new folder")
    return run_dir, (run_dir / "model").is_dir()


def _fixed(args, script):
    values = args if isinstance(args, dict) else vars(args)
    return {"script": script} | {k: v for k, v in values.items() if k not in MAY_CHANGE}


def differences(before, now):
    """What differs between two flat records, as `name old there, new here; ...`; empty if nothing does."""
    changed = [k for k in sorted(before | now) if before.get(k) != now.get(k)]
    return "; ".join(f"{k} {before.get(k)} there, {now.get(k)} here" for k in changed)


def _check_writable(folder, flag):
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"{flag} {folder}: cannot be written ({nearest} is no folder that this user may write)")


def record_run(run_dir, args, script, data, ranks):
    """Make and lock the run folder; write `args.json` once: arguments, versions, commit, data, type of the products.

    Returns what a checkpoint must have been taken of to be this run's: arguments, fingerprints of data and tokenizer.

    Raises:
        UsageError: the run in the folder was started on other data or with another tokenizer, or is in use.
    """
    file = run_dir / "args.json"
    with ranks.first() as alone:
        if alone:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--run-dir {run_dir}: cannot be written ({error.strerror})") from None
            lock_run(run_dir, ranks)
        if alone and not file.exists():
            record = dict(script=script, command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), args=vars(args),
                          products=str(ranks.dtype).removeprefix("torch."), data_fingerprint=data.fingerprint,
                          tokenizer_fingerprint=data.tokenizer_fingerprint, heldout_fingerprint=data.heldout_fingerprint,
                          versions=versions(), **commit())  # fmt: skip
            write_whole(file, json.dumps(record, indent=1))
    record = json.loads(file.read_text())
    made_of = dict(tokenizer_fingerprint=data.tokenizer_fingerprint, data_fingerprint=data.fingerprint)
    for flag, (name, here) in zip((f"--model {args.model}", f"--data {args.data}"), made_of.items()):
        if record[name] != here:
            what = name.removesuffix("_fingerprint")
            raise UsageError(f"{flag}: not the {what} that {run_dir} was started on ({record[name]} there, {here} here)")
    if str(ranks.dtype) != f"torch.{record['products']}":
        ranks.dtype = getattr(torch, record["products"])
        ranks.say(f"resume    products in {record['products']}, as the run was started")
    return _fixed(record["args"], script) | made_of


@functools.cache  # 7 ms otherwise, in every save
def versions():
    """Versions of Python and of the packages that results depend on."""
    packages = ("torch", "transformers", "datasets", "numpy")
    return {p: importlib.metadata.version(p) for p in packages} | {"python": sys.version.split()[0]}


LOCK, OWNER = ".lock", ".owner.json"
UNWHOLE = (".owner.tmp", "args.tmp")  # what `write_whole` leaves in a new folder when it is killed or the disk is full
BEAT_S, PATIENCE_S = 10, 40  # a holder on another machine has gone once its mark has not moved for so long
_held = {}


def lock_run(run_dir, ranks):
    """Hold the run directory until `end_run` or the end of this process.

    On one machine the operating system's file lock decides, and ends with its holder. Shared file systems may not carry
    it from host to host, so the holder also touches a mark every 10 s: where the mark was left by another machine (or
    the file system knows no locks), 40 s without a touch say that its holder has gone.

    Raises:
        UsageError: another process holds it; names its host and process id.
    """
    import filelock

    key, mark, lock = run_dir.resolve(), run_dir / OWNER, filelock.FileLock(run_dir / LOCK)
    if key in _held:
        return
    free, certain = True, True
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        free = False
    except (NotImplementedError, OSError) as error:
        ranks.say(f"lock      no file locks under {run_dir} ({first_line(error)})")
        certain = False
    try:
        owner = json.loads(mark.read_text())
    except (OSError, ValueError):  # none, or not whole yet
        owner = None
    holder = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "another process"
    if free and owner and not (certain and owner["machine"] == _machine()):
        ranks.say(f"lock      {run_dir} was held by {holder}; waiting {PATIENCE_S} s for a sign of life")
        touched, until = mark.stat().st_mtime_ns, time.monotonic() + PATIENCE_S
        while free and mark.exists() and time.monotonic() < until:
            time.sleep(0.5)
            free = not mark.exists() or mark.stat().st_mtime_ns == touched
    if not free:
        lock.release()
        raise UsageError(f"--run-dir {run_dir}: in use by {holder}; stop it or name another folder")
    if owner:
        ranks.say(f"lock      {run_dir} was left by {holder}, which has gone; taken over")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    write_whole(mark, json.dumps(dict(host=socket.gethostname(), pid=os.getpid(), since=since, machine=_machine())))
    _held[key] = lock

    def beat():
        while key in _held:
            with contextlib.suppress(OSError):
                os.utime(mark)
            time.sleep(BEAT_S)

    threading.Thread(target=beat, daemon=True).start()
    atexit.register(_unlock, key)


def _unlock(key):
    if key in _held:
        (key / OWNER).unlink(missing_ok=True)
        _held.pop(key).release()


def end_run(run_dir, ranks):
    """Let all ranks come here (none leaves while another is at work), then free the run directory."""
    ranks.barrier()
    _unlock(run_dir.resolve())


def _machine():
    """The running operating system: two containers on one are the same, a restarted host is another."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and the first SIGINT into `name`, which the loop reads; a second SIGINT ends the process."""

    def __init__(self):
        self.name, numbers = "", [signal.SIGINT, signal.SIGTERM, *filter(None, [getattr(signal, "SIGUSR1", None)])]
        self.before = {number: signal.signal(number, self.note) for number in numbers}

    def note(self, number, frame):
        self.name = self.name or signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system ends the process, whatever it waits for

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def commit():
    """Commit of these sources and whether tracked files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return dict(commit=None, dirty=None)
    return dict(commit=commit, dirty=bool(dirty))


def write_whole(file, text):
    """Write a file so that it is never seen half written."""
    temporary = Path(file).with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)


class MetricsFile:
    """`metrics.jsonl`: one object a line. A resumed run cuts it back to what the checkpoint knew."""

    def __init__(self, file, size, ranks):
        self.file = None
        if ranks.rank == 0:
            self.file = open(file, "a+b")
            if self.size() < size:
                raise UsageError(f"{file}: holds {self.size()} bytes, fewer than the {size} that the checkpoint knew; restore it")
            self.file.truncate(size)

    def write(self, step, metrics):
        if self.file:
            self.file.write(json.dumps({"step": step} | metrics).encode() + b"\n")
            self.file.flush()

    def size(self):
        return self.file.seek(0, os.SEEK_END) if self.file else 0

    def saved(self):
        """Size once all of it is on the disk: what a checkpoint may rely on."""
        if self.file:
            os.fsync(self.file.fileno())
        return self.size()


def make_optimizer(model, lr, weight_decay):
    """AdamW with decay on matrices alone; its moments exist from the start, so that every checkpoint holds them all.

    (torch.distributed.checkpoint drops parameters that never had a gradient, as late heads of a curriculum: pytorch #192202.)
    """
    parameters = list(model.parameters())
    matrices, rest = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


# ---------------------------------------------------------------------------------------------- tracking, progress, report
class Tracker:
    """MLflow (a SQLite file beside the run directories) or wandb. If it fails, training goes on and one line says so.

    It is opened with the first metrics that go out, 10 s into the run: loading MLflow and making its file take longer than all
    else between the imports and the first update.
    """

    def __init__(self, kind, run_dir, args, ranks):
        self.kind, self.run_dir, self.args = kind if ranks.rank == 0 else "none", run_dir, args
        self.id, self.pending, self.began, self.sent = None, [], int(time.time() * 1000), time.time()
        self.commit = commit() if self.kind != "none" else {}  # asks git: not on every rank; now, as these sources are what runs

    def open(self):
        """Find or make the run's record and send arguments and tags."""
        record = self.run_dir / "tracker.json"  # a resumed run goes on in the same record
        known = json.loads(record.read_text()) if record.exists() else {}
        tags = {"run": self.run_dir.name, "seed": str(self.args.seed)} | {k: str(v) for k, v in self.commit.items()}
        if self.kind == "mlflow":
            quick = dict(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_HTTP_REQUEST_MAX_RETRIES="2", MLFLOW_HTTP_REQUEST_TIMEOUT="20")
            os.environ.update({k: v for k, v in quick.items() if k not in os.environ})
            import mlflow

            for noisy in ("alembic", "mlflow"):
                logging.getLogger(noisy).setLevel(logging.WARNING)
            runs = self.run_dir.parent.resolve()
            self.uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{runs}/mlflow.db")
            self.client = mlflow.MlflowClient(self.uri)
            found = self.client.get_experiment_by_name("wmtp")
            number = found.experiment_id if found else self.client.create_experiment("wmtp", f"{runs.as_uri()}/mlartifacts")
            if "mlflow" in known:
                self.id = known["mlflow"]
                self.client.update_run(self.id, status="RUNNING")
            else:
                made = self.client.create_run(number, start_time=self.began, tags=tags, run_name=self.run_dir.name)
                self.id = made.info.run_id
                params = [mlflow.entities.Param(k, str(v)[:500]) for k, v in vars(self.args).items()]
                self.client.log_batch(self.id, params=params)
        elif self.kind == "wandb":
            import wandb

            has_key = os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists()
            mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
            self.id = known.get("wandb") or hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:16]
            self.run = wandb.init(project="wmtp", name=self.run_dir.name, id=self.id, resume="allow", dir=str(self.run_dir),
                                  mode=mode, config=vars(self.args), tags=[f"{k}:{v}"[:64] for k, v in tags.items()])  # fmt: skip
        write_whole(record, json.dumps(known | {self.kind: self.id}))

    @contextlib.contextmanager
    def guarded(self):
        try:
            yield
        except Exception as error:  # whatever a tracker or its server does, the run is worth more
            print(f"tracker   {self.kind} failed and is off from here on: {first_line(error)}", file=sys.stderr, flush=True)
            self.kind = "none"

    def log(self, step, metrics):
        """Keep the metrics of `step`; they go out every 10 s, not with a write for every update."""
        self.pending.append((step, int(time.time() * 1000), metrics))
        if time.time() - self.sent > 10:
            self.send()

    def send(self):
        pending, self.pending, self.sent = self.pending, [], time.time()
        with self.guarded():
            if self.kind != "none" and not self.id:
                self.open()
            if self.kind == "mlflow":
                from mlflow.entities import Metric

                points = [Metric(k, v, stamp, step) for step, stamp, metrics in pending for k, v in metrics.items()]
                for i in range(0, len(points), 1000):
                    self.client.log_batch(self.id, metrics=points[i : i + 1000])
            elif self.kind == "wandb":
                for step, _, metrics in pending:
                    self.run.log(metrics, step=step)

    def finish(self, files, status="FINISHED"):
        """Send what is left and the run's small files; returns the command or address that shows the run, or None."""
        self.send()
        with self.guarded():
            if self.kind == "mlflow":
                for file in files:
                    self.client.log_artifact(self.id, str(file))
                self.client.set_terminated(self.id, status)
                return f"mlflow ui --backend-store-uri {self.uri}"
            if self.kind == "wandb":
                for file in files:
                    self.run.save(str(file), base_path=str(file.parent), policy="now")
                folder, address = Path(self.run.dir).parent, self.run.url
                self.run.finish(exit_code=int(status != "FINISHED"))
                return address or f"wandb sync {folder}"
        return None


class Progress:
    """A bar with the time left on a terminal, about 50 plain lines elsewhere; on rank 0 alone."""

    def __init__(self, start, total, ranks):
        from tqdm import tqdm

        self.silent, self.start, self.total, self.began = ranks.rank > 0, start, total, time.time()
        hidden = self.silent or not sys.stderr.isatty()
        self.bar = tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, leave=False, disable=hidden)

    def show(self, step, text):
        """`step` updates are done; `text` says how it stands."""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and not self.silent and (step % max(1, self.total // 50) == 0 or step == self.total):
            left = int((time.time() - self.began) / (step - self.start) * (self.total - step))
            print(f"step {step:>6}/{self.total} | {text} | eta {left // 60}m{left % 60:02d}s", flush=True)

    def say(self, text):
        if not self.silent:
            self.bar.write(text, file=sys.stdout)


def area(score_N, positive_N):
    """Area under the curve: probability that a positive scores higher than a negative, ties half; nan without both kinds."""
    score_N, positive_N = np.asarray(score_N, float), np.asarray(positive_N, bool)
    values, place = np.unique(score_N, return_inverse=True)
    counts = np.stack([np.bincount(place[positive_N == kind], minlength=len(values)) for kind in (False, True)])
    pairs = counts[0].sum() * counts[1].sum()
    return float((counts[1] * (np.cumsum(counts[0]) - counts[0] / 2)).sum() / pairs) if pairs else float("nan")


@torch.no_grad()
def evaluate_heldout(model, batches, data, num_heads, ranks):
    """Loss (nats) and accuracy of each head over all its valid held-out targets, and bits per byte of head 1.

    bits_per_byte = loss_head_1 / ln 2 * tokens / bytes, both counted over the held-out target text.
    """
    model.eval()
    sums = torch.zeros(3, num_heads, dtype=torch.float64)
    for batch in batches:
        with ranks.autocast():
            loss, correct = model(batch.x_BT, batch.targets_KBT, with_correct=True)
        sums += torch.stack([v.sum((1, 2)).cpu().double() for v in (loss, correct, batch.targets_KBT != IGNORE)])
    model.train()
    loss, correct, count = ranks.gather(sums).sum(0).tolist()
    metrics = {f"eval/loss_head_{k + 1}": loss[k] / max(1, count[k]) for k in range(num_heads)}
    metrics |= {f"eval/acc_head_{k + 1}": correct[k] / max(1, count[k]) for k in range(num_heads)}
    bits = metrics["eval/loss_head_1"] / math.log(2) * data.heldout_tokens / data.heldout_bytes
    return metrics | {"eval/bits_per_byte": bits}


def command_line(script, args, **changes):
    """The command that runs `script` with these arguments but for the changes, and without folders."""
    words = [f"python {script}.py"]
    for name, value in (vars(args) | changes).items():
        if value != getattr(type(args), name) and name not in ("run_dir", "checkpoint_dir"):
            flag = "--" + name.rstrip("_").replace("_", "-")
            words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def report(run_dir, args, data, metrics, shown_by, next_command, ranks):
    """What a run ends with: the held-out figures beside the yardsticks, a completion, where things lie, what to type next."""
    if ranks.rank > 0:
        return
    print("\nheld-out  head   loss (nats)  accuracy")
    for k in range(1, args.num_heads + 1):
        print(f"          {k:>4} {metrics[f'eval/loss_head_{k}']:>13.4f} {metrics[f'eval/acc_head_{k}']:>9.3f}")
    print(f"\nbits per byte on the same {data.heldout_bytes:,} held-out bytes")
    rows = [("this model, head 1", metrics["eval/bits_per_byte"]), ("zlib level 9", data.zlib_bits_per_byte)]
    for name, bits in [*rows, ("order-0 entropy", data.order0_bits_per_byte)]:
        print(f"          {name:<18} {bits:>8.3f}")
    model = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "model")
    prompt = tokenizer(data.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    prompt = prompt[:, -max(1, args.seq_len // 2) :]  # prompt and completion together fill what the model was trained on
    options = dict(max_new_tokens=min(128, args.seq_len - prompt.shape[1]), do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    print("\na held-out beginning | and how the model goes on (greedy, plain transformers from model/)")
    added = tokenizer.decode(text[0, prompt.shape[1] :], skip_special_tokens=True)
    shown = tokenizer.decode(prompt[0]).lstrip("\n") + "|" + added
    print("\n".join("    " + line for line in shown.splitlines()))
    print(f"\nwritten   {run_dir}/  args.json  metrics.jsonl  checkpoints/  model/")
    if shown_by:
        print(f"look      {shown_by}")
    print(f"next      {next_command}", flush=True)
