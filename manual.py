"""`--help` in a tenth of the time: a script that imports this first answers without loading torch and transformers.

Docstring, imports of the standard library and of tyro, and `class Args` with what it names are taken from the source of the
script; tyro prints the same text from them as `common.run_script` does from the whole. Where they do not suffice nothing happens,
and the script goes on to print it the slow way.
"""

import ast
import os
import sys

import tyro


def names_in(node, context=ast.Load):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def parts_of_args(source):
    """The script's docstring, and the statements that `class Args` needs, as code on their own lines; None if it has no Args."""
    tree = ast.parse(source)
    imports, made = [], {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            if all(name.partition(".")[0] in {*sys.stdlib_module_names, "tyro"} for name in modules):
                imports.append(node)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            made[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            made |= {name: node for name in names_in(node, ast.Store) if name not in made}
    wanted, needed = {"Args"}, set()
    while missing := (wanted & made.keys()) - needed:
        needed |= missing
        wanted |= {name for one in missing for name in names_in(made[one])}
    body = [node for node in tree.body if node in imports or any(node is made[name] for name in needed)]
    return ast.get_docstring(tree, clean=False), ast.Module(body, []) if "Args" in needed else None


def answer():
    """Print the manual and leave, if this process is a script that imports this module and was asked for help."""
    main = sys.modules["__main__"]
    if not {"-h", "--help"} & set(sys.argv[1:]) or not getattr(main, "__file__", None):
        return
    try:
        with open(main.__file__, encoding="utf-8") as file:
            source = file.read()
        if "\nimport manual" not in source:  # another program, which imports one of the scripts
            return
        doc, statements = parts_of_args(source)
        names = {"__name__": "__main__", "__file__": main.__file__}
        exec(compile(statements, main.__file__, "exec"), names)
        tyro.cli(names["Args"], description=doc, console_outputs=os.environ.get("RANK", "0") == "0")
    except Exception:  # whatever it was, the slow way tells
        return


answer()
