"""Checkpoints: written beside training, complete or not there, checked before they are read; local or on any fsspec URL.

A save copies the state and returns; a thread of every rank writes the copy with `torch.distributed.checkpoint`, over a
process group of its own so that its messages never meet those of training. `meta.json`, written last, makes it count.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
import time
import warnings

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from common import UsageError, first_line
from runs import differences, versions

META = "meta.json"
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that one process saves for itself is what is meant


class StorageError(Exception):
    """A file could not be written or read, on whichever rank; raised on all."""


class Checkpoints:
    """The checkpoints of one run, under `folder` (a path or an fsspec URL).

    Args:
        run: what a checkpoint must have been taken of to be this run's: arguments, fingerprints of data and tokenizer.
        keep_last: how many to keep; 0: all.

    `step_000100/` holds a file of every rank, `.metadata` and `meta.json`: step, run, versions, number of ranks, size of
    metrics.jsonl, size and SHA-256 of each file. Learning rate, data position and random numbers are functions of (seed,
    step, rank): the step is all of their state. On a local disk it is written as `step_000100.tmp` and renamed; object
    stores cannot rename, so there an empty object of that name stands beside it until it is complete.
    """

    def __init__(self, folder, run, keep_last, ranks):
        self.folder, self.run, self.keep_last, self.ranks = str(folder).rstrip("/"), run, keep_last, ranks
        try:
            if self.folder.startswith(("s3:", "s3a:")):  # else each PUT waits for "100 Continue", aiohttp without a limit
                from botocore import handlers

                asks = handlers.add_expect_header
                handlers.BUILTIN_HANDLERS[:] = [h for h in handlers.BUILTIN_HANDLERS if h[1] is not asks]
            self.fs, self.root = url_to_fs(self.folder, skip_instance_cache=True)
        except (ValueError, ImportError) as error:
            raise UsageError(f"--checkpoint-dir {self.folder}: {first_line(error)}") from None
        self.local = isinstance(self.fs, LocalFileSystem)
        self.group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        on_gpu = ranks.device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))  # pinned, shared, asynchronous, non-blocking
        self.thread, self.failure, self.complete, self.bad = None, None, None, set()

    # ------------------------------------------------------------------------------------------------------------- save
    def save(self, step, model, optimizer, metrics_size):
        """Copy the state and write it in the background; waits first for the save before this one.

        A save that fails is said on stderr and training goes on: `wait` tells.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        if waited > 1:
            self.ranks.say(f"checkpoint waited {waited:.0f} s for the one before: a larger --save-every would not")
        state = self.stager.stage(_state(model, optimizer))
        meta = dict(step=step, run=self.run, versions=versions(), world_size=self.ranks.world_size, metrics_size=metrics_size)
        self.thread = threading.Thread(target=self._write, args=(f"step_{step:06d}", state, meta), daemon=True)
        self.thread.start()

    def wait(self):
        """Wait for the save that is under way; True if the last one is complete."""
        if self.thread:
            self.thread.join()
        self.thread = None
        return self.failure is None

    def _write(self, name, state, meta):
        target = f"{self.root}/{name}"
        place = f"{target}.tmp" if self.local else target
        writer = FsspecWriter(self.fs.unstrip_protocol(place), sync_files=self.local)
        writer.fs = HashedFiles(self.fs)

        def prepare():
            for old in (target, f"{target}.tmp") if not self.local else (f"{target}.tmp",):
                self._remove(old)
            self._make_root()
            if not self.local:
                self.fs.pipe_file(f"{target}.tmp", b"")

        def finish():
            files = {k: v for part in digests for k, v in part.items()}
            text = json.dumps(meta | {"files": files})
            text = json.dumps(meta | {"files": files, "sha256": _sha256(text.encode())}, indent=1)
            with self.fs.open(f"{place}/{META}", "wb") as f:
                f.write(text.encode())
                if self.local:
                    f.flush()
                    os.fsync(f.fileno())
            if self.local:
                self._remove(target)  # one that was found bad
                self.fs.mv(place, target)
            else:
                self._remove(f"{target}.tmp")
            self.bad.discard(name)

        try:
            self._together(prepare, on=0)
            options = dict(storage_writer=writer, process_group=self.group, no_dist=not self.group)
            self._together(lambda: dcp.save(state, **options))
            digests = self._together(lambda: writer.fs.digests)
            self._together(finish, on=0)
            self.failure, self.complete = None, name
        except Exception as error:  # whatever storage or a peer does, it must not end training from a thread
            self.failure = first_line(error)
            if self.ranks.rank == 0:
                kept = f"{self.complete} is complete" if self.complete else "none is complete yet"
                text = f"checkpoint {self.folder}/{name} could not be written: {self.failure}; training goes on, {kept}"
                print(text, file=sys.stderr, flush=True)
                with contextlib.suppress(Exception):  # make room
                    self._remove(place)
            return
        try:
            if self.ranks.rank == 0:
                self._prune()
        except Exception as error:  # this one is complete all the same
            text = f"checkpoint {self.folder}: those before {name} could not be removed: {first_line(error)}"
            print(text, file=sys.stderr, flush=True)

    def _prune(self):
        whole = [n for n in self._names() if n not in self.bad and self.fs.exists(f"{self.root}/{n}/{META}")]
        for old in reversed(whole[: -self.keep_last] if self.keep_last else []):  # one that cannot be removed keeps no other
            self._remove(f"{self.root}/{old}")

    def _together(self, work, on=None):
        """Do `work` on every rank, or on rank `on` alone; the results of all, or the first failure, raised on all alike."""
        result, failure = None, None
        try:
            if on in (None, self.ranks.rank):
                result = work()
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
            inner = [e for e, _ in getattr(error, "failures", {}).values()]  # of a CheckpointException
            failure = (
                f"{type(inner[0]).__name__}: {first_line(inner[0])}" if inner else f"{type(error).__name__}: {first_line(error)}"
            )
        everyone = [(result, failure)]
        if self.group:
            everyone = [None] * self.ranks.world_size
            dist.all_gather_object(everyone, (result, failure), group=self.group)
        for rank, (_, failed) in enumerate(everyone):
            if failed:
                raise StorageError(failed if not self.group else f"rank {rank}: {failed}")
        return [result for result, _ in everyone]

    def _remove(self, path):
        self.fs.invalidate_cache()
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)

    def _names(self):
        """Names `step_000100` in order of their steps, complete or not."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.root):
            return []
        names = [path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False)]
        begun = {name.removesuffix(".tmp") for name in names if name.endswith(".tmp")} if not self.local else set()
        names = [name for name in names if name.removeprefix("step_").isdigit() and name not in begun]
        return sorted(names, key=lambda name: int(name.removeprefix("step_")))

    # ------------------------------------------------------------------------------------------------------------- load
    def load(self, model, optimizer):
        """Read the last complete checkpoint in place; returns its step and size of metrics.jsonl, or 0, 0 if there is none.

        Each file is read through and compared with its SHA-256 first. What is not whole is named and the one before it
        is taken.

        Raises:
            UsageError: the folder cannot be read or written; it holds checkpoints, but none is whole; or of another run.
        """
        try:
            self._together(self._probe, on=0)
            return self._load(model, optimizer)
        except StorageError as error:
            raise UsageError(f"--checkpoint-dir {self.folder}: cannot be read or written ({error})") from None

    def _make_root(self):
        if not self.folder.startswith(("s3:", "s3a:", "gs:", "gcs:", "az:", "abfs")):  # no folders; s3fs would make the bucket
            self.fs.makedirs(self.root, exist_ok=True)

    def _probe(self):
        """Find out now, not at the first save, that nothing can be written here."""
        self._make_root()
        self.fs.pipe_file(f"{self.root}/.writable", b"")
        self.fs.rm_file(f"{self.root}/.writable")

    def _load(self, model, optimizer):
        why = []
        for name in reversed(self._together(self._names, on=0)[0]):
            path = f"{self.root}/{name}"
            meta, damage = self._together(lambda path=path: self._read_meta(path), on=0)[0]
            if not damage:
                mine = sorted(meta["files"])[self.ranks.rank :: self.ranks.world_size]
                found = self._together(lambda path=path, meta=meta, mine=mine: self._damage(path, meta["files"], mine))
                damage = next(filter(None, found), None)
            if damage:
                self.bad.add(name)
                why.append(f"{name}: {damage}")
                self.ranks.say(f"checkpoint {self.folder}/{name} is bad: {damage}")
                continue
            if differ := differences(meta["run"], self.run):
                raise UsageError(f"--checkpoint-dir {self.folder}: {name} is of a run with other arguments or data ({differ})")
            reader, state = FsspecReader(self.fs.unstrip_protocol(path)), _state(model, optimizer)
            options = dict(storage_reader=reader, process_group=self.group, no_dist=not self.group)
            self._together(functools.partial(dcp.load, state, **options))
            self.complete = name
            self.ranks.say(f"resume    from {self.folder}/{name}")
            if differ := differences(meta["versions"], versions()):
                self.ranks.say(f"resume    with other versions, so not bit for bit what a straight run gives: {differ}")
            return meta["step"], meta["metrics_size"]
        if why:
            raise UsageError(
                f"--checkpoint-dir {self.folder}: none of its checkpoints is whole ({'; '.join(why)}); "
                "nothing was overwritten; move them away to start from the beginning"
            )
        return 0, 0

    def _read_meta(self, path):
        try:
            meta = json.loads(self.fs.cat_file(f"{path}/{META}"))
            said = meta.pop("sha256")
            return (meta, None) if said == _sha256(json.dumps(meta).encode()) else (None, f"{META} is not as it was written")
        except FileNotFoundError:
            return None, f"{META} is missing"
        except (ValueError, KeyError, AttributeError):
            return None, f"{META} cannot be read"

    def _damage(self, path, files, names):
        """What is wrong with these files, or None."""
        for name in names:
            size, digest = files[name]
            try:
                there = self.fs.size(f"{path}/{name}")
                if there != size:
                    return f"{name} has {there:,} bytes, not {size:,}"
                found = hashlib.sha256()
                with self.fs.open(f"{path}/{name}", "rb") as f:
                    while block := f.read(1 << 24):
                        found.update(block)
            except FileNotFoundError:
                return f"{name} is missing"
            if found.hexdigest() != digest:
                return f"{name} is not as it was written (SHA-256)"
        return None


class HashedFiles(FileSystem):
    """The writer's file system, which takes size and SHA-256 of every file while its bytes pass."""

    def __init__(self, fs):
        super().__init__()
        self.fs, self.digests = fs, {}

    @contextlib.contextmanager
    def create_stream(self, path, mode):
        with super().create_stream(path, mode) as stream:
            hashed = _Hashed(stream)
            yield hashed
        name = os.path.basename(path).removesuffix(".tmp")
        self.digests[name] = [hashed.size, hashed.digest.hexdigest()]


class _Hashed:
    def __init__(self, stream):
        self.stream, self.digest, self.size = stream, hashlib.sha256(), 0

    def write(self, data):
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.stream.write(data)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _state(model, optimizer):
    named = dict(model.named_parameters())
    return {"model": {n: p.detach() for n, p in named.items()}, "optimizer": {n: optimizer.state[p] for n, p in named.items()}}
