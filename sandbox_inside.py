"""What runs inside the sandboxes: the program's side and the tests' side, two processes that share one socket.

The tests never enter the program's process. `judge` runs them and asks the program's process for one value at a time:
"call this with these arguments". What comes back is data (numbers, text, containers of them, or a handle on an object
that stays where it is), decoded and compared here, so an object with its own `__eq__`, a patched `assert`, an early
`sys.exit(0)` or a printed marker decide nothing, and neither the tests nor the values they expect can be read.

`sandbox.py` sends this module as compiled code to `python -I -S`, so it imports only what a bare interpreter has at hand.
Messages are 4 bytes of length, then: to the program a marshalled expression (it may trust the tests' side), back JSON.
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


# ----------------------------------------------------------------------------------------------------- the program's side
def _limit(limits):
    """Soft and hard limits of this process, for good: `(name in resource, value)`."""
    import resource

    for name, value in limits:
        more = 1 if name == "RLIMIT_CPU" else 0  # SIGXCPU first, which names the cause
        try:
            resource.setrlimit(getattr(resource, name), (value, value + more))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise  # elsewhere some are not to be had (RLIMIT_AS on macOS)


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


def answer(fd, limits, most):
    """The program's process: evaluate what the tests' side asks for, until it closes; the first request is the program."""
    import builtins

    class Names(dict):
        def __missing__(self, name):
            module = __import__(LIBRARY[name] or name)
            return getattr(module, name) if LIBRARY[name] else module

    handles = []
    known = Names(G=_module("candidate"), H=handles.__getitem__, inf=float("inf"), nan=float("nan"))
    clean = {"__builtins__": dict(builtins.__dict__)}
    _limit(limits)
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


def program(fd, limits):
    """A program that reads standard input and writes standard output: its source comes over `fd`, its exception goes back."""
    source = receive(fd).decode("utf-8", "surrogatepass")
    names = _module("__main__")
    _limit(limits)
    try:
        exec(compile(source, "candidate.py", "exec", dont_inherit=True), names)
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        send(fd, f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace"))
        raise SystemExit(1) from None


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
    """The tests' process: judge what comes over `fd`, each job with a socket to its program, and answer with the verdict."""
    import json
    import os
    import socket

    for name in ("collections", "copy", "functools", "itertools", "math", "random", "re", "string", "typing"):
        __import__(name)  # as most prompts do
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
