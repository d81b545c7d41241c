"""`--data stdlib-bugs`: functions of this Python's standard library, each with a sibling that one mutation of its AST broke.

A record is a signature (`prompt`) and a body (`completion`), written out by `ast.unparse` without docstring, decorators and
comments, both siblings alike: nothing but the fault tells them apart. `reward` is 1 for the original and 0 for the broken one,
`group` the file, `sibling` the function, `fault_start` and `fault_end` the characters of the completion that hold the fault
(-1 where there is none): those are for evaluation alone.
"""

import ast
import collections
import hashlib
import json
import os
import random
import re
import sys
from pathlib import Path

LONGEST, MOST = 300, 30  # characters of a function, and by how many a mutation may change their number
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
SYMMETRIC = {"min", "max", "gcd", "samefile"}  # swapped arguments change nothing


def stdlib_bugs(texts, folder):
    """Records of these source texts (one a file), as a dict of columns; made once and kept in `folder`."""
    made_of = [Path(__file__).read_text(), sys.version, *texts]
    file = Path(folder) / f"stdlib-bugs-{hashlib.sha256(chr(0).join(made_of).encode('utf-8', 'replace')).hexdigest()[:16]}.json"
    if not file.exists():
        columns = make_records(texts)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(columns))
        temporary.replace(file)
    return json.loads(file.read_text())


def make_records(texts):
    """Two records for every function that has a mutation: the original and a broken sibling. A function of the texts.

    Of two mutations of different kinds the one is taken that keeps the broken siblings as often longer as shorter than their
    originals, and as long on average. So neither a length nor the longer of two siblings tells the outcome.
    """
    functions, seen = [], set()
    for group, text in enumerate(texts):
        for function in functions_of(text):
            whole = ast.unparse(function)
            if len(whole) <= LONGEST and whole not in seen:
                seen.add(whole)
                functions.append((group, function, whole))
    columns, signs, lengths = collections.defaultdict(list), 0, 0
    for sibling, (group, function, whole) in enumerate(functions):
        length = len(whole)

        def imbalance(mutant):
            change = len(mutant[1]) - length  # noqa: B023
            return abs(signs + (change > 0) - (change < 0)), abs(lengths + change)  # noqa: B023

        found = [m for m in mutants(function, random.Random(whole)) if m[1] not in seen and abs(len(m[1]) - length) <= MOST]
        found = (m for m in sorted(found, key=imbalance) if not same_code(whole, m[1]))
        kind, broken = next(found, (None, None))
        if kind is None:
            continue
        change = len(broken) - length
        signs, lengths = signs + (change > 0) - (change < 0), lengths + change
        for text, reward in ((whole, 1.0), (broken, 0.0)):
            prompt, completion = text.split("\n", 1)
            start, end = fault_span(whole.split("\n", 1)[1] + "\n", completion + "\n") if reward == 0 else (-1, -1)
            record = dict(prompt=prompt + "\n", completion=completion + "\n", reward=reward, group=group, sibling=sibling,
                          fault_start=start, fault_end=end, kind=kind)  # fmt: skip
            for name, value in record.items():
                columns[name].append(value)
    return dict(columns)


def functions_of(text):
    """Functions and methods of a source text (no nested ones), of at most 40 lines, without docstring and decorators."""
    try:
        blocks = [ast.parse(text).body]
    except (SyntaxError, ValueError):
        return
    for block in blocks:
        for node in block:
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 40:
                node.decorator_list = []
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:]
                if node.body and node.end_lineno - node.body[0].lineno < 12:
                    yield node
            elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
                blocks += [node.body, getattr(node, "orelse", [])]


def mutants(function, choose):
    """Kind and text of up to 2 broken versions of a function, of different kinds, in random order."""
    by_kind = collections.defaultdict(list)
    for kind, *change in mutations(function):
        by_kind[kind].append(change)
    kinds = sorted(by_kind)
    choose.shuffle(kinds)
    for kind in kinds[:2]:
        holder, field, new = choose.choice(by_kind[kind])
        old = getattr(holder, field)
        setattr(holder, field, new)
        yield kind, ast.unparse(function)
        setattr(holder, field, old)


def mutations(function):
    """Every mutation of the body, as kind, node, field and the field's new value."""
    scope = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
    body = [node for statement in function.body for node in ast.walk(statement)]
    scope = sorted(scope | {n.id for n in body if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)})
    for node in (function, *body):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and len(block) > 1 and isinstance(block[0], ast.stmt):
                yield from (("dropped statement", node, field, block[:i] + block[i + 1 :]) for i in range(len(block)))
        if node is function:
            continue
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
            yield "operator", node, "op", SWAPS[type(node.op)]()
        if isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                yield "comparison", node, "ops", [*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]]
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield from (("wrong name", node, "id", name) for name in scope if name != node.id)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            yield from (("constant", node, "value", value) for value in (node.value - 1, node.value + 1) if value >= 0)
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            negated = isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not)
            yield "negated condition", node, "test", node.test.operand if negated else ast.UnaryOp(ast.Not(), node.test)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) not in SYMMETRIC:
            for i in range(len(node.args) - 1):
                if not any(isinstance(a, ast.Starred) for a in node.args):
                    swapped = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
                    yield "swapped arguments", node, "args", swapped


def same_code(text, other):
    """True where two texts compile to the same, but for line numbers, or one does not compile on its own (nonlocal names)."""

    def parts(code):
        inner = tuple(parts(c) if hasattr(c, "co_code") else (type(c), repr(c)) for c in code.co_consts)
        return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, inner

    try:
        first, second = (parts(compile(t, "", "exec", dont_inherit=True, optimize=0)) for t in (text, other))
    except (SyntaxError, ValueError):
        return True
    return first == second


def fault_span(original, broken):
    """First and last-plus-one character of `broken` that differ from `original`, widened to whole words; one at least.

    Where something is missing it is the character after the gap: the first that a reader could stumble over.
    """
    start = len(os.path.commonprefix([original, broken]))
    rest = len(os.path.commonprefix([original[start:][::-1], broken[start:][::-1]]))
    end = len(broken) - rest
    while start > 0 and re.fullmatch(r"\w\w", broken[start - 1 : start + 1]):
        start -= 1
    while start < end < len(broken) and re.fullmatch(r"\w\w", broken[end - 1 : end + 1]):
        end += 1
    start = min(start, len(broken) - 1)
    return start, max(end, start + 1)
