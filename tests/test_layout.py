"""The layout: which files there are, how long they are, and what the scripts share."""

import ast
import dataclasses
import difflib
import inspect
import math
import re
from pathlib import Path

import pytest

import baseline_mtp
import critic_wmtp
import grad_wmtp
import grpo_wmtp
import rho1_wmtp

ROOT = Path(__file__).parents[1]
CEILINGS = {"baseline_mtp.py": 250, "rho1_wmtp.py": 439, "critic_wmtp.py": 560}  # lines
CEILINGS.update({"grad_wmtp.py": 380, "grpo_wmtp.py": 480, "evaluate.py": 950})
CEILINGS.update({"common.py": 2393, "README.md": 250})
OTHERS = ".ci .gitignore LICENSE benchmarks pyproject.toml requirements.txt tests".split()


def test_the_top_level_is_this_list():
    ignored = (ROOT / ".gitignore").read_text().replace("/", "").split()
    names = {p.name for p in ROOT.iterdir()} - {".git", *ignored}
    assert names == {*CEILINGS, *OTHERS}


def test_no_file_is_longer_than_its_ceiling_and_no_line_than_100_columns():
    files = [ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    lines = {f: f.read_text().splitlines() for f in files}
    too_long = {f.name for f in lines if len(lines[f]) > CEILINGS.get(f.name, math.inf)}
    too_wide = {f.name for f in lines if f.suffix == ".py" and max(map(len, lines[f])) > 100}
    assert not too_long and not too_wide, (too_long, too_wide)


def test_scripts_import_nothing_of_ours_but_common():
    ours = {p.stem for p in ROOT.rglob("*.py")}
    for file in ROOT.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        modules += [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        imports = {name.split(".")[0] for name in modules} & ours
        assert imports == (set() if file.stem == "common" else {"common"}), file.name


def shared_arguments(script):
    """Source of the arguments before the algorithm's own; the default of --data may differ."""
    text = inspect.getsource(script.Args).partition("# Algorithm specific arguments")[0]
    return re.sub(r"    data: str = .*\n.*\n", "", text)


LIMITS = [(rho1_wmtp, 16), (grad_wmtp, 16), (critic_wmtp, 20), (grpo_wmtp, 40)]


@pytest.mark.parametrize("script, limit", LIMITS)
def test_only_the_algorithm_differs_from_the_baseline(script, limit):
    """Shared arguments are equal word for word; `main` has few lines of its own.

    Indentation does not count: grpo makes several passes over a batch.
    """
    assert shared_arguments(script) == shared_arguments(baseline_mtp)
    sources = [inspect.getsource(module.main) for module in (baseline_mtp, script)]
    mains = [[line.strip() for line in source.splitlines()] for source in sources]
    lines = [line for line in difflib.ndiff(*mains) if line[2:]]
    assert 5 < sum(line[0] == "+" for line in lines) <= limit, lines


def test_the_flags_stand_in_the_order_of_the_contract():
    flags = """run_dir seed tracker device model num_heads mtp_schedule train data heldout_data
            seq_len noise_frac noise_by batch_size micro_batch_size lr heads_lr warmup_steps
            max_steps weight_decay grad_clip dtype compile recompute eval_every eval_rows
            save_every keep_last checkpoint_dir""".split()
    for script in (baseline_mtp, rho1_wmtp, grad_wmtp, critic_wmtp, grpo_wmtp):
        names = [field.name for field in dataclasses.fields(script.Args)]
        assert names[: len(flags)] == flags
        assert script.Args.mtp_schedule == "constant"  # all heads in every update, as in the paper
