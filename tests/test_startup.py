"""Start-up: the manual without torch is that of the slow way; the tracker opens behind the first updates."""

import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest

import common
import manual
import runs

ROOT = Path(__file__).parents[1]
SLOW = "import sys; sys.argv = ['{name}.py', '--help']; sys.path.insert(0, '{root}')\n" \
       "import {name} as s; from common import run_script; run_script(s.main, s.Args, s.__doc__)"  # fmt: skip
SCRIPT = '''"""A manual
of two lines."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import manual  # noqa: F401
import tyro
{more}

KINDS = ("a", "b")
NUMBER, OTHER = 7, 8


def made():
    return [OTHER]


@dataclass
class Base:
    seed: int = 0
    """Of everything."""


@dataclass
class Args(Base):
    kind: Literal[KINDS] = "a"
    """One of two."""
    lambda_: Annotated[float | None, tyro.conf.arg(name="lambda")] = None
    """Strength."""
    many: list[int] = field(default_factory=made)
    """Numbers."""
    number: int = NUMBER
    """A constant."""


if __name__ == "__main__":
    import sys

    print("torch" in sys.modules)
    tyro.cli(Args, description=__doc__)
'''


def run(*words, **variables):
    env = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=env, timeout=300, cwd=ROOT)


def assert_same_manual(name):
    fast, slow = run("-X", "importtime", f"{name}.py", "--help"), run("-c", SLOW.format(name=name, root=ROOT))
    assert slow.stdout.startswith(f"usage: {name}.py") and fast.stdout == slow.stdout and fast.returncode == slow.returncode == 0
    assert " torch\n" not in fast.stderr and " transformers\n" not in fast.stderr and " manual\n" not in slow.stdout


def test_the_quick_manual_is_the_slow_one_and_loads_no_torch():
    assert_same_manual("critic_wmtp")


@pytest.mark.slow  # the same for every script
@pytest.mark.parametrize("name", ["baseline_mtp", "rho1_wmtp", "evaluate"])
def test_every_quick_manual_is_the_slow_one(name):
    assert_same_manual(name)


def test_only_the_first_rank_prints_the_manual():
    done = run("baseline_mtp.py", "-h", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_inheritance_annotations_and_constants_are_found_and_the_slow_way_stays(tmp_path):
    """A base class, a constant in an annotation and in a default, a function: quick. A base of another file: the slow way."""
    quick = tmp_path / "quick.py"
    quick.write_text(SCRIPT.format(more="").replace("import manual  # noqa: F401\n", ""))
    slow = run(quick, "--help")
    quick.write_text(SCRIPT.format(more=""))
    fast = run(quick, "--help")
    assert slow.stdout == "False\n" + fast.stdout and fast.returncode == 0
    for words in ("--seed", "--lambda", "--many", "{a,b}", "(default: 7)", "(default: 8)", "of two lines", "Of everything"):
        assert words in fast.stdout
    (tmp_path / "elsewhere.py").write_text("from dataclasses import dataclass\n@dataclass\nclass Far:\n    far: int = 3\n")
    quick.write_text(SCRIPT.format(more="from elsewhere import Far").replace("class Args(Base)", "class Args(Far)"))
    told = run(quick, "--help")
    assert told.returncode == 0 and told.stdout.startswith("False\nusage: ") and "--far" in told.stdout


def test_another_program_that_imports_a_script_prints_its_own_help(tmp_path):
    (tmp_path / "other.py").write_text("import manual\n".replace("import", "if True: import") + "print('mine')\n")
    assert run(tmp_path / "other.py", "--help").stdout == "mine\n"
    assert manual.parts_of_args("x = 1\n") == (None, None)


def test_the_tracker_opens_with_the_first_metrics_that_go_out(tmp_path, monkeypatch):
    """Nothing is made before; then the points of all updates are there, and the record began when training did."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs/one").mkdir(parents=True)
    tracker = runs.Tracker("mlflow", tmp_path / "runs/one", types.SimpleNamespace(seed=3), common.Ranks())
    tracker.log(1, {"loss": 2.5})
    assert not (tmp_path / "runs/mlflow.db").exists()
    tracker.sent -= 11  # as if so many seconds had gone by
    tracker.log(2, {"loss": 1.5})
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as file:
        points = file.execute("select step, value, timestamp from metrics order by step").fetchall()
        ((start, status),) = file.execute("select start_time, status from runs").fetchall()
    assert [point[:2] for point in points] == [(1, 2.5), (2, 1.5)]
    assert status == "RUNNING" and start <= points[0][2]
