"""What runs inside the sandboxes: the nursery that starts programs, the program's side, and the tests' side.

The tests never enter the program's process. `judge` runs them in another one and asks the program for one value at a time:
"call this with these arguments". What comes back is data (numbers, text, containers of them, or a handle on an object
that stays where it is), decoded and compared by the judge, so an object with its own `__eq__`, a patched `assert`, an
early `sys.exit(0)` or a printed marker decide nothing, and neither the tests nor the values they expect can be read.

`sandbox.py` sends this module as compiled code to `python -I -S`, so it imports only what a bare interpreter has at hand.
Messages are 4 bytes of length, then: to the program a marshalled expression (it may trust the judge), back JSON.
"""

import marshal
import posix
import sys

LIBRARY = {"Decimal": "decimal", "Fraction": "fractions", "datetime": None, "deque": "collections", "Counter": "collections",
           "OrderedDict": "collections"}  # fmt: skip  # names that `repr` writes and `eval` must know
REBUILT = {"Decimal": "decimal", "Fraction": "fractions", "date": "datetime", "datetime": "datetime", "time": "datetime",
           "timedelta": "datetime", "timezone": "datetime"}  # fmt: skip  # classes made anew from the arguments they reduce to


class Gone(Exception):
    """The other end closed the socket."""


def send(fd, data):
    view = memoryview(len(data).to_bytes(4, "little") + data)
    while view:
        view = view[posix.write(fd, view) :]


def read(fd, count):
    parts = []
    while count:
        part = posix.read(fd, min(count, 1 << 20))
        if not part:
            raise Gone
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def receive(fd, most=1 << 32):
    length = int.from_bytes(read(fd, 4), "little")
    if length > most:
        raise OverflowError(f"a result of more than {most} bytes")
    return read(fd, length)


# ------------------------------------------------------------------------------------------------------------ the nursery
def _limit(limits):
    """Limits of this process, for good: pairs of a name in the module resource and a value."""
    import resource

    for name, value in limits:
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise  # elsewhere some are not to be had (RLIMIT_AS on macOS)


def nursery(fd, clone, filter, tmpfs, limits, most):
    """An interpreter that runs no program but forks itself for each, in namespaces of its own: no start-up to wait for.

    One byte over `fd`: `a` (see `answer`) or `p` (see `program`) with the descriptors that become 3, 0 and 1 of the fork;
    `k` ends the fork, and its exit code and CPU seconds come back. clone: number of that system call, 0 for a plain fork.
    """
    import gc
    import os
    import signal
    import socket

    for name in (
        "bisect",
        "collections",
        "copy",
        "functools",
        "heapq",
        "itertools",
        "math",
        "re",
        "resource",
        "string",
        "typing",
    ):
        __import__(name)  # most programs do, and it takes as long as starting the interpreter
    if clone:
        import ctypes

        libc = ctypes.PyDLL(None, use_errno=True)  # does not release the lock of the interpreter
    server, child = socket.socket(fileno=fd), 0
    gc.freeze()
    while True:
        what, fds, _, _ = socket.recv_fds(server, 1, 3)
        if child and what in (b"k", b""):
            (os.kill if clone else os.killpg)(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            child = 0
            if what:
                send(fd, f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}".encode())
        if not what:
            return
        if what == b"k":
            continue
        ready, unready = os.pipe()
        # every namespace there is, each new: cgroup, uts, ipc, user, pid, net and mount; SIGCHLD at the end
        if clone:
            ctypes.pythonapi.PyOS_BeforeFork()
            child = libc.syscall(clone, 0x7E020000 | signal.SIGCHLD, 0, 0, 0, 0)
            ctypes.pythonapi.PyOS_AfterFork_Parent() if child else ctypes.pythonapi.PyOS_AfterFork_Child()
        else:
            child = os.fork()
        if child == 0:
            try:
                os.dup2(unready, 99)
                if clone:
                    _confine(libc, ctypes, tmpfs)
                os.setsid()
                null = os.open(os.devnull, os.O_RDWR)
                for to, one in enumerate([*(fds[1:] or (null, null)), null, fds[0]]):
                    os.dup2(one, 100 + to)
                for to in range(4):
                    os.dup2(100 + to, to)
                os.closerange(4, 99)
                os.closerange(100, 4096)
                _limit(limits)
                if clone:
                    _filter(libc, ctypes, filter)
                os.write(99, b"ready")
                os.close(99)
            except BaseException as error:
                os.write(99, f"{type(error).__name__}: {error}".encode())
                os._exit(1)
            answer(3, most) if what == b"a" else program(3)
        os.close(unready)
        said = os.read(ready, 500).decode() if child > 0 else os.strerror(ctypes.get_errno())
        if said != "ready":  # nothing runs unless it is confined
            sys.exit(f"no program can be confined: {said}")
        for one in (ready, *fds):
            os.close(one)


def _confine(libc, ctypes, tmpfs):
    """In the new namespaces: uid of nobody, an own /tmp, no /proc; then no capability."""

    def done(result):
        if result != 0:
            raise OSError(ctypes.get_errno(), "the sandbox cannot confine a program")

    for file, text in (("setgroups", b"deny"), ("uid_map", b"65534 65534 1"), ("gid_map", b"65534 65534 1")):
        fd = posix.open(f"/proc/self/{file}", posix.O_WRONLY)
        posix.write(fd, text)
        posix.close(fd)
    nosuid_nodev, read_only = 6, 1
    done(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", nosuid_nodev, tmpfs.encode()))
    # Where root started us, nobody owns root's files: of /proc, kernel.core_pattern, a command that the kernel runs.
    done(libc.mount(b"tmpfs", b"/proc", b"tmpfs", nosuid_nodev | read_only, b"size=4k"))
    posix.chdir("/tmp")
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    done(libc.capset(header, nothing))


def _filter(libc, ctypes, filter):
    """Install a system call filter (bubblewrap has seen to no_new_privs)."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("rows", ctypes.c_char_p)]

    if libc.prctl(22, 2, ctypes.byref(Program(len(filter) // 8, filter)), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "no system call filter")


# ----------------------------------------------------------------------------------------------------- the program's side
def _module(name):
    """An empty module for the program, known by its name, as dataclasses and pickle want it."""
    import builtins

    builtins.exit = builtins.quit = sys.exit  # the site module, which is not loaded, would make them
    sys.argv = [name]
    sys.modules[name] = type(sys)(name)
    return sys.modules[name].__dict__


def quote(text):
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    from _json import encode_basestring_ascii  # most programs do without

    return encode_basestring_ascii(text)


def encode(value, handles):
    """JSON of a value: subclasses as what they derive from, anything unknown as the number of a handle."""
    kind = type(value)
    if value is None or kind is bool:
        return {None: "null", True: "true", False: "false"}[value]
    if issubclass(kind, int):
        if abs(value) < 1 << 64:
            return int.__repr__(value)
        return f'{{"i":"{int(value):x}"}}'  # hexadecimal has no limit on digits
    if issubclass(kind, float):
        text = float.__repr__(value)
        return {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(text, text)
    if issubclass(kind, str):
        return quote(value)
    if issubclass(kind, dict):
        parts = [f"[{encode(k, handles)},{encode(v, handles)}]" for k, v in dict.items(value)]
        return f'{{"d":[{",".join(parts)}]}}'
    if kind in (type({}.keys()), type({}.items())):
        kind, value = set, set(value)  # they equal sets
    for base, form in ((list, "[{}]"), (tuple, '{{"t":[{}]}}'), (set, '{{"s":[{}]}}'), (frozenset, '{{"f":[{}]}}')):
        if issubclass(kind, base):
            return form.format(",".join([encode(v, handles) for v in base.__iter__(value)]))
    if kind in (bytes, bytearray):
        return f'{{"b":{quote(value.decode("latin-1"))}}}'
    if kind is complex:
        return f'{{"c":[{encode(value.real, handles)},{encode(value.imag, handles)}]}}'
    if REBUILT.get(kind.__name__) == kind.__module__:
        return f'{{"x":[{quote(kind.__name__)},{encode(list(value.__reduce__()[1]), handles)}]}}'
    handles.append(value)
    return f'{{"h":{len(handles) - 1}}}'


def answer(fd, most):
    """The program's process: evaluate what the judge asks for, until it closes; the first request runs the program."""
    import builtins

    class Names(dict):
        def __missing__(self, name):
            module = __import__(LIBRARY[name] or name)
            return getattr(module, name) if LIBRARY[name] else module

    handles = []
    known = Names(G=_module("candidate"), H=handles.__getitem__, inf=float("inf"), nan=float("nan"))
    clean = {"__builtins__": dict(builtins.__dict__)}
    while True:
        try:
            request = receive(fd)
        except Gone:
            posix._exit(0)  # nothing left to tidy up
        try:
            reply = encode(eval(marshal.loads(request), clean, known), handles)
            if len(reply) > most:
                raise OverflowError(f"a result of more than {most} bytes")
        except BaseException as error:
            try:
                text = str(error)[:500]
            except BaseException:
                text = ""
            reply = f'{{"e":[{quote(type(error).__name__)},{quote(text)}]}}'
        send(fd, reply.encode())


def program(fd):
    """A program that reads standard input and writes standard output: its source comes over `fd`, its exception goes back."""
    source = receive(fd).decode("utf-8", "surrogatepass")
    names, code = _module("__main__"), 0
    try:
        exec(compile(source, "candidate.py", "exec", dont_inherit=True), names)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        send(fd, f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace"))
        code = 1
    import threading

    threading._shutdown()  # waits for the threads it left
    sys.stdout.flush()
    posix._exit(code & 255)


# ------------------------------------------------------------------------------------------------------- the tests' side
class CannotSend(Exception):
    """The tests pass a value that has no written form, such as a function of their own."""


def judge(fd, source, given, names, tests, most):
    """Run the tests against the program behind `fd`: (passed, why); `why` is None where its process is gone."""
    import builtins
    import json

    def written(value):
        name = getattr(value, "__name__", None)
        return name if name and getattr(builtins, name, None) is value else repr(value)  # `int`, `len`

    class Handle:
        """An object that stays in the program's process. It equals nothing: only data is compared."""

        def __init__(self, number):
            object.__setattr__(self, "_number", number)

        def __repr__(self):
            return f"H({self._number})"

        def __call__(self, *args, **named):
            parts = [*map(written, args), *(f"{name}={written(value)}" for name, value in named.items())]
            return ask(f"{self!r}({', '.join(parts)})")

        def __getattr__(self, name):
            return ask(f"getattr({self!r}, {name!r})")

        def __setattr__(self, name, value):
            ask(f"setattr({self!r}, {name!r}, {value!r})")

        def __getitem__(self, key):
            return ask(f"{self!r}[{key!r}]")

        def __iter__(self):
            return iter(ask(f"list({self!r})"))

        def __len__(self):
            return ask(f"len({self!r})")

        def __bool__(self):
            return ask(f"bool({self!r})") is True

        def __eq__(self, other):
            return False

        __hash__ = None

    def data(pairs):
        ((kind, value),) = pairs
        if kind in "tsf":
            return {"t": tuple, "s": set, "f": frozenset}[kind](value)
        if kind == "x":
            name, args = value
            return getattr(__import__(REBUILT[name]), name)(*args)
        return {"d": dict, "i": lambda v: int(v, 16), "b": lambda v: v.encode("latin-1"), "c": lambda v: complex(*v),
                "h": Handle, "e": Failed}[kind](value)  # fmt: skip

    class Failed:
        def __init__(self, value):
            self.name, self.text = map(str, value)

    def ask(expression):
        try:
            code = compile(expression, "request", "eval")
        except SyntaxError:
            raise CannotSend(expression) from None
        try:
            send(fd, marshal.dumps(code))
            reply = receive(fd, most)
        except OSError:
            raise Gone from None
        value = json.loads(reply, object_pairs_hook=data)
        if isinstance(value, Failed):
            kind = getattr(builtins, value.name, None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = Exception
            try:
                error = kind(value.text)
            except TypeError:  # UnicodeDecodeError and its like want more
                error = Exception(value.text)
            error.raised = f"raised {value.name}: {value.text}" if value.text else f"raised {value.name}"
            raise error
        return value

    space = {"__name__": "tests"}
    try:
        ask(f"exec(compile({source!r}, 'candidate.py', 'exec', dont_inherit=True), G)")
        exec(compile(given, "given", "exec"), space)
        for name in names:
            space.pop(name, None)
            if ask(f"{name!r} in G") is True:
                space[name] = ask(f"G[{name!r}]")
        exec(compile(tests, "tests", "exec"), space)
        return True, "passed"
    except Gone:
        return False, None
    except BaseException as error:
        if isinstance(error, MemoryError):
            return False, "ran out of memory"
        if hasattr(error, "raised"):
            return False, error.raised
        if isinstance(error, AssertionError):
            return False, "wrong answer"
        if isinstance(error, CannotSend):
            return False, f"not scored: the tests pass a value that cannot be sent ({error})"
        return False, f"wrong answer ({type(error).__name__}: {error})"


def serve(fd, limits, most):
    """The judge's process: judge what comes over `fd`, each job with a socket to its program, and answer with the verdict."""
    import json
    import os
    import socket

    _limit(limits)
    server = socket.socket(fileno=fd)
    while True:
        head, fds, _, _ = socket.recv_fds(server, 4, 1)
        if not head:
            return
        job = json.loads(read(fd, int.from_bytes(head, "little")))
        passed, why = judge(fds[0], most=most, **job)
        os.close(fds[0])
        send(fd, json.dumps([passed, why and why[:500]]).encode())
