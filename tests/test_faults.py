"""What can go wrong while a run trains: killed, stopped, disk full or damaged, folder in use. Every fault really happens.

Runs of one process are forked from a server that has imported everything, which saves their seconds of imports; they are
processes of their own in all that counts here. Runs of two ranks are `torchrun`'s.
"""

import atexit
import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import baseline_mtp
import checkpoints
import common
import runs
import test_data
import test_run
from test_run import CONFIG, ROOT, assert_same_weights, flags, losses_of, metrics_of, weights_of

material = test_run.material
STEPS, PATIENCE_S = 60, 180
TWO = dict(launcher=(), micro_batch_size=2, max_steps=36)  # of two ranks


# ------------------------------------------------------------------------------------------------- runs that can be broken
def in_child(words, out):
    """The entry point in a process of the fork server, its output in files; ends as an interpreter does."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = ["baseline_mtp.py", *words]
    try:
        common.run_script(baseline_mtp.main, baseline_mtp.Args, "test")
    finally:
        atexit._run_exitfuncs()


class Job:
    """A started run: one process, or the ranks of a torchrun with `launcher` as its options."""

    def __init__(self, server, words, out, launcher=None):
        self.run_dir, self.out, self.began = Path(words[1]), out, time.time_ns()
        for name in ("out", "err"):
            Path(f"{out}.{name}").touch()
        if launcher is None:
            self.process = server.Process(target=in_child, args=(words, out))
            self.process.start()
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launcher]
            env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            with open(f"{out}.out", "w") as stdout, open(f"{out}.err", "w") as stderr:
                command += [str(ROOT / "baseline_mtp.py"), *words]
                self.process = subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr)
        self.pid = self.process.pid

    @property
    def code(self):
        """None while it runs; minus the signal that ended it."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    @property
    def stdout(self):
        return Path(f"{self.out}.out").read_text()

    @property
    def stderr(self):
        return Path(f"{self.out}.err").read_text()

    def updates(self):
        file = self.run_dir / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def saving(self):
        """Whether a save of this job (not one that another left behind) is under way or was cut off."""
        try:
            found = [p.stat().st_mtime_ns for p in (self.run_dir / "checkpoints").glob("*.tmp")]
        except FileNotFoundError:  # renamed meanwhile
            return False
        return any(stamp > self.began for stamp in found)

    def state(self):
        """The letter that the system has for it (T: halted); empty where it has gone."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return ""

    def halted_in_save(self, wait_s):
        """Halt it `wait_s` after a save began, if that is still under way: it stays so until it is killed."""
        if not self.saving():
            return False
        time.sleep(wait_s)
        self.kill(signal.SIGSTOP)
        self.until(lambda: self.code is not None or self.state() == "T")
        halted = self.saving()
        if not halted:
            self.kill(signal.SIGCONT)
        return halted

    def until(self, condition, or_ended=False):
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ended = self.code is not None  # looked at first: after it has ended, the condition is as it stays
            if condition():
                return
            if ended:
                assert or_ended, f"ended with {self.code} before that\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"
                return
            assert time.monotonic() < deadline, f"waited in vain\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"
            time.sleep(0.001)

    def wait(self):
        self.until(lambda: self.code is not None)
        return self.code

    def ok(self):
        assert self.wait() == 0, self.stdout[-3000:] + self.stderr[-3000:]
        return self

    def kill(self, number=signal.SIGKILL, pid=None):
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(pid or self.pid, number)

    def worker(self, rank):
        """Process id of a rank of this torchrun: the process that has this run's folder and that rank."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.run_dir).encode() not in (folder / "cmdline").read_bytes().split(b"\0"):
                    continue
                if f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    return int(folder.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        raise AssertionError(f"no process of rank {rank}")

    def end(self):
        if self.code is None:
            self.kill(signal.SIGTERM if isinstance(self.process, subprocess.Popen) else signal.SIGKILL)  # torchrun ends its own
            self.until(lambda: self.code is not None)


@pytest.fixture(scope="session")
def start_job(material, tmp_path_factory):
    """Start a run on the small material: `start_job(run_dir, launcher=None, **arguments)`; what still runs is ended."""
    if not hasattr(os, "fork") or not Path("/proc").is_dir():
        pytest.skip("needs Linux")
    server, folder, jobs = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("output"), []
    server.set_forkserver_preload(["baseline_mtp", "datasets", "filelock", "tqdm", "test_faults"])

    def start(run_dir, launcher=None, **changes):
        words = flags(material, run_dir, **(dict(max_steps=STEPS, keep_last=0) | changes))
        jobs.append(Job(server, words, folder / str(len(jobs)), launcher))
        return jobs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield start
    for job in jobs:
        job.end()


@pytest.fixture
def start(start_job):
    started = []
    yield lambda *args, **changes: started.append(start_job(*args, **changes)) or started[-1]
    for job in started:
        job.end()


@pytest.fixture(scope="session")
def straight(start_job, tmp_path_factory):
    """The folder of a run that nothing happened to, with a checkpoint of every fourth update."""
    return start_job(tmp_path_factory.mktemp("straight") / "run").ok().run_dir


@pytest.fixture(scope="session")
def straight_two(start_job, tmp_path_factory):
    return start_job(tmp_path_factory.mktemp("straight_two") / "run", **TWO).ok().run_dir


def assert_equal(run_dir, other):
    assert metrics_of(run_dir) == metrics_of(other)
    assert_same_weights(weights_of(run_dir), weights_of(other))


def unfinished(straight, run_dir):
    """A copy of the straight run that was killed just before its end, with the last two checkpoints."""
    shutil.copytree(straight, run_dir)
    shutil.rmtree(run_dir / "model")
    for old in sorted((run_dir / "checkpoints").iterdir())[:-2]:
        shutil.rmtree(old)
    return run_dir


def bytes_of(folder):
    names = {runs.LOCK, runs.OWNER}
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*") if p.name not in names}


# ----------------------------------------------------------------------------------------------------------------- kill -9
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_as_the_straight_run(start, straight, tmp_path, kills):
    """Half of the moments anywhere in the run, half within a save; each next start takes the lock over."""
    random, run_dir, done, in_save, began = np.random.default_rng(kills), tmp_path / "run", 0, 0, time.monotonic()
    start(tmp_path / "timed").ok()
    seconds = time.monotonic() - began
    for _ in range(5 * kills):
        job = start(run_dir)
        if done % 2:
            wait = random.uniform(0, 0.02) * (done > 1)
            job.until(lambda job=job, wait=wait: job.updates() > 8 and job.halted_in_save(wait), or_ended=True)
        else:
            moment = time.monotonic() + random.uniform(0, seconds)
            job.until(lambda moment=moment: time.monotonic() > moment, or_ended=True)
        job.kill()
        if job.wait() == 0:  # it was faster
            assert_equal(run_dir, straight)
            shutil.rmtree(run_dir)
            continue
        assert job.code == -signal.SIGKILL
        done, in_save = done + 1, in_save + job.saving()
        if done == kills:
            break
    assert done == kills and in_save >= kills // 2, f"{done} kills, {in_save} of them in a save"
    last = start(run_dir).ok()
    assert re.search(rf"was left by process {job.pid} on \S+, since .*, which has gone; taken over", last.stdout)
    assert "resume    from" in last.stdout
    assert_equal(run_dir, straight)


# ------------------------------------------------------------------------------------------------------------ stop signals
def stopped_after(job, name):
    """Number of updates after which it says to have stopped; all of it is there for the next start."""
    (number,) = re.findall(rf"^stopped   {name} after update (\d+) of \d+, saved; the same command", job.stdout, re.MULTILINE)
    assert (job.run_dir / f"checkpoints/step_{int(number):06d}/meta.json").exists()
    assert not (job.run_dir / runs.OWNER).exists() and not (job.run_dir / "model").exists()
    assert job.updates() == int(number)
    return int(number)


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGUSR1", "SIGINT"))])
def test_a_stop_signal_saves_and_leaves_with_0(start, straight, tmp_path, name):
    job = start(tmp_path / "run")
    job.until(lambda: job.updates() >= 9)
    job.kill(signal.Signals[name])
    sent = job.updates()
    job.ok()
    assert sent <= stopped_after(job, name) <= sent + 2  # it may arrive after the flag of this update was taken
    assert_equal(start(tmp_path / "run").ok().run_dir, straight)


@pytest.mark.slow
def test_a_second_sigint_ends_at_once_and_what_is_there_resumes(start, straight, tmp_path):
    job = start(tmp_path / "run")
    job.until(lambda: job.updates() >= 9)
    while job.code is None:
        job.kill(signal.SIGINT)
        time.sleep(0.001)
    assert job.code == -signal.SIGINT
    assert_equal(start(tmp_path / "run").ok().run_dir, straight)


# --------------------------------------------------------------------------------------------------------- damaged on disk
def flip(file, place=0.5):
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size - 100)


SHARD = "__0_0.distcp"
DAMAGE = {
    "meta.json missing": (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
    "shard missing": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "shard truncated": (lambda folder: truncate(folder / SHARD), f"{SHARD} has [0-9,]+ bytes, not [0-9,]+"),
    "flip in shard": (lambda folder: flip(folder / SHARD), rf"{SHARD} is not as it was written \(SHA-256\)"),
    "flip in .metadata": (lambda folder: flip(folder / ".metadata"), r".metadata is not as it was written \(SHA-256\)"),
    "flip in meta.json": (lambda folder: flip(folder / "meta.json"), "meta.json (is not as it was written|cannot be read)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(start, straight, tmp_path, kind):
    run_dir, (damage, why) = unfinished(straight, tmp_path / "run"), DAMAGE[kind]
    damage(run_dir / f"checkpoints/step_{STEPS:06d}")
    job = start(run_dir).ok()
    assert re.search(rf"^checkpoint \S+/step_{STEPS:06d} is bad: {why}$", job.stdout, re.MULTILINE), job.stdout
    assert f"checkpoints/step_{STEPS - 4:06d}\n" in re.search("^resume .*\n", job.stdout, re.MULTILINE)[0]
    assert_equal(run_dir, straight)
    again = bytes_of(run_dir / f"checkpoints/step_{STEPS:06d}")  # it was made anew
    assert {p.name for p in again} == {"meta.json", ".metadata", SHARD}


def test_a_flipped_bit_anywhere_in_meta_json_is_seen(straight, tmp_path):
    """A bit of each byte in turn: refused, or (white space) the same content."""
    shutil.copytree(straight / f"checkpoints/step_{STEPS:06d}", tmp_path / "step")
    reader = checkpoints.Checkpoints(tmp_path, {}, 0, common.Ranks())
    whole, content = reader._read_meta(str(tmp_path / "step")), (tmp_path / "step/meta.json").read_bytes()
    assert whole[0] and not whole[1]
    for place, bit in enumerate(np.random.default_rng(0).integers(0, 8, len(content))):
        changed = bytearray(content)
        changed[place] ^= 1 << int(bit)
        (tmp_path / "step/meta.json").write_bytes(changed)
        found = reader._read_meta(str(tmp_path / "step"))
        assert found == whole or (found[0] is None and found[1]), (place, bit)


def test_where_no_checkpoint_is_whole_nothing_is_touched(start, straight, tmp_path):
    run_dir = unfinished(straight, tmp_path / "run")
    flip(run_dir / f"checkpoints/step_{STEPS:06d}/__0_0.distcp")
    truncate(run_dir / f"checkpoints/step_{STEPS - 4:06d}/.metadata")
    before = bytes_of(run_dir)
    job = start(run_dir)
    assert job.wait() == 2
    (line,) = job.stderr.splitlines()
    assert line.startswith("error: ") and "none of its checkpoints is whole" in line
    assert f"step_{STEPS:06d}: __0_0.distcp" in line and f"step_{STEPS - 4:06d}: .metadata has" in line
    assert bytes_of(run_dir) == before


# --------------------------------------------------------------------------------------------------------------- disk full
@pytest.fixture
def small_disk(tmp_path):
    """Mount a small disk, or give it another size: `small_disk("3m")` returns its folder."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size):
        again = ["remount,"] if os.path.ismount(place) else [""]
        command = ["mount", "-t", "tmpfs", "-o", f"{again[0]}size={size}", "none", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs root that may mount a small tmpfs")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_training_goes_on_when_the_disk_of_the_checkpoints_is_full(start, straight, tmp_path, small_disk):
    words = dict(checkpoint_dir=small_disk("3m"))  # room for two
    job = start(tmp_path / "run", **words)
    job.until(lambda: "could not be written" in job.stderr)
    there = job.updates()
    job.until(lambda: job.updates() > there + 4)
    job.kill(signal.SIGTERM)
    assert job.wait() == 1 and "not saved; the same command goes on from the one before" in job.stdout
    for line in job.stderr.splitlines():
        assert line.startswith(f"checkpoint {tmp_path}/disk/run/step_") and "No space left on device" in line
        assert line.endswith("training goes on, step_000008 is complete")
    small_disk("100m")
    assert f"resume    from {tmp_path}/disk/run/step_000008\n" in start(tmp_path / "run", **words).ok().stdout
    assert_equal(tmp_path / "run", straight)


def test_a_full_disk_under_the_run_stops_it_and_with_room_it_goes_on(start, straight, tmp_path, small_disk):
    run_dir = small_disk("20m") / "run"
    job = start(run_dir)
    job.until(lambda: (run_dir / "checkpoints/step_000008/meta.json").exists())
    with open(tmp_path / "disk/ballast", "wb", buffering=0) as ballast, pytest.raises(OSError) as full:
        while True:
            ballast.write(bytes(4096))
    assert full.value.errno == errno.ENOSPC
    assert job.wait() == 1
    *before, line = job.stderr.splitlines()
    assert line.startswith("error: rank 0: ") and "No space left on device" in line and "make room, start again" in line
    assert all(text.startswith("checkpoint ") for text in before), job.stderr
    (tmp_path / "disk/ballast").unlink()
    again = start(run_dir).ok()
    assert "resume    from" in again.stdout and "is bad" not in again.stdout
    assert_equal(run_dir, straight)


@pytest.mark.parametrize("size", [pytest.param("4k", marks=pytest.mark.slow), "8k"])  # no room for args.json; for no more
def test_a_disk_full_from_the_start_leaves_a_folder_that_starts_again(start, straight, tmp_path, small_disk, size):
    run_dir = small_disk(size) / "run"
    job = start(run_dir)
    assert job.wait() in (1, 2)
    assert job.stderr.count("\n") == 1 and "error: " in job.stderr and "No space left on device" in job.stderr, job.stderr
    small_disk("100m")
    assert_equal(start(run_dir).ok().run_dir, straight)


# ---------------------------------------------------------------------------------------------------------------- snapshot
@pytest.mark.slow
def test_a_checkpoint_is_a_snapshot_while_training_goes_on(start, material, tmp_path):
    """A state so large that several updates pass while it is written; what is read from it ends as the straight run."""
    (material / "wide.json").write_text(json.dumps(CONFIG | dict(hidden_size=256, intermediate_size=2048)))
    words = dict(model=material / "wide.json", batch_size=1, max_steps=12)
    whole = start(tmp_path / "straight", save_every=0, **words).ok().run_dir
    job, overlapping = start(tmp_path / "run", save_every=4, **words), 0
    while job.code is None:
        overlapping = max(overlapping, job.updates() - 4 if (tmp_path / "run/checkpoints/step_000004.tmp").exists() else 0)
        time.sleep(0.001)
    job.ok()
    assert overlapping > 0, "no update was done during the save: this test shows nothing"
    shutil.rmtree(tmp_path / "run/model")
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:06d}")
    assert "step_000004" in start(tmp_path / "run", save_every=4, **words).ok().stdout
    assert_equal(tmp_path / "run", whole)


# ----------------------------------------------------------------------------------------------------------------- refusals
def test_other_arguments_data_or_tokenizer_are_refused(start, material, tmp_path):
    folder, run_dir = tmp_path / "model", tmp_path / "run"
    test_data.fast_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 1000}))
    shutil.copy(material / "text.jsonl", tmp_path / "text.jsonl")
    words = dict(model=folder / "config.json", data=tmp_path / "text.jsonl", max_steps=8)
    start(run_dir, **words).ok()
    finished = shutil.copytree(run_dir, tmp_path / "finished")
    shutil.rmtree(run_dir / "model")
    before = bytes_of(run_dir)

    def refused(**changes):
        job = start(run_dir, **(words | changes))
        assert job.wait() == 2
        (line,) = job.stderr.splitlines()
        assert bytes_of(run_dir) == before
        return line

    assert "lr 0.003 there, 0.001 here" in refused(lr=1e-3)
    test_data.fast_tokenizer(lowercase=True).save_pretrained(folder)
    assert re.search(rf"--model {folder}/config.json: not the tokenizer .* \(\w+ there, \w+ here\)", refused())
    test_data.fast_tokenizer().save_pretrained(folder)
    text = (tmp_path / "text.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text(text.replace("return", "yield"))
    assert re.search(rf"--data {tmp_path}/text.jsonl: not the data .* \(\w+ there, \w+ here\)", refused())
    (tmp_path / "text.jsonl").write_text(text)
    start(run_dir, **words).ok()
    assert_equal(run_dir, finished)


# -------------------------------------------------------------------------------------------------------------------- lock
def test_a_second_job_is_refused_at_once_and_the_first_is_undisturbed(start, straight, tmp_path):
    first = start(tmp_path / "run")
    first.until(lambda: first.updates() >= 1)
    second = start(tmp_path / "run")
    assert second.wait() == 2 and "model " not in second.stdout
    assert first.code is None, "the first ended too early to show anything"
    (line,) = second.stderr.splitlines()
    assert f"in use by process {first.pid} on {socket.gethostname()}, since 2" in line
    assert_equal(first.ok().run_dir, straight)


@pytest.mark.parametrize("alive", [False, True])
def test_the_mark_of_another_machine_counts_while_it_is_touched(monkeypatch, tmp_path, capsys, alive):
    monkeypatch.setattr(runs, "BEAT_S", 0.1)
    monkeypatch.setattr(runs, "PATIENCE_S", 2)
    mark, ranks = tmp_path / runs.OWNER, common.Ranks()
    mark.write_text(json.dumps(dict(host="far", pid=7, since="2020-01-01 00:00:00", machine="another")))
    ended = threading.Event()

    def touch():
        while not ended.wait(0.05):
            os.utime(mark)

    toucher = threading.Thread(target=touch)
    if alive:
        toucher.start()
        try:
            with pytest.raises(common.UsageError, match="in use by process 7 on far, since 2020"):
                runs.lock_run(tmp_path, ranks)
        finally:
            ended.set()
            toucher.join()
        assert json.loads(mark.read_text())["host"] == "far"
    runs.lock_run(tmp_path, ranks)
    said = capsys.readouterr().out
    assert "was held by process 7 on far" in said and "which has gone; taken over" in said
    assert json.loads(mark.read_text())["pid"] == os.getpid()
    runs.end_run(tmp_path, ranks)
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------------------- two ranks
@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both(start, straight_two, tmp_path):
    job = start(tmp_path / "run", **TWO)
    job.until(lambda: job.updates() >= 9)
    sent = job.updates()
    job.kill(signal.SIGTERM, job.worker(1))
    job.ok()
    number = stopped_after(job, "another rank")
    assert sent <= number <= sent + 2
    one = shutil.copytree(tmp_path / "run", tmp_path / "one")
    assert_equal(start(tmp_path / "run", **TWO).ok().run_dir, straight_two)

    # the same checkpoint on one rank, stopped there, and on two again
    job = start(one, **TWO | dict(launcher=None))
    job.until(lambda: job.updates() >= number + 9)
    job.kill(signal.SIGTERM)
    stopped_after(job.ok(), "SIGTERM")
    start(one, **TWO).ok()
    np.testing.assert_allclose(losses_of(one), losses_of(straight_two), rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_torchrun_and_a_killed_rank_end_as_the_straight_run(start, straight_two, tmp_path):
    job = start(tmp_path / "run", **TWO)
    job.until(lambda: job.updates() >= 9)
    job.kill(signal.SIGTERM)
    assert job.wait() == 1  # torchrun's own way to say that it was stopped
    number = stopped_after(job, "SIGTERM")

    job = start(tmp_path / "run", **TWO | dict(launcher=("--max-restarts", "1")))
    job.until(lambda: job.updates() >= number + 9)
    job.kill(signal.SIGKILL, job.worker(1))
    job.ok()
    resumed = re.findall(r"^resume    from \S+step_(\d+)$", job.stdout, re.MULTILINE)
    assert len(resumed) == 2 and int(resumed[0]) == number < int(resumed[1])
    assert_equal(tmp_path / "run", straight_two)
