"""Runs of the training scripts: files, kills and resumes, ranks, refusals, trackers."""

import difflib
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
import torch.distributed as dist

import baseline_mtp
import common
import critic_wmtp
import evaluate
import grad_wmtp
import rho1_wmtp
from conftest import metrics_of, refused, run_main, same_tensors, short_args, weights_of
from conftest import write_lines

ROOT = Path(__file__).parents[1]
SCRIPTS = {"baseline": baseline_mtp, "rho1": rho1_wmtp, "critic": critic_wmtp}
SCRIPTS["grad"] = grad_wmtp
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Killed(BaseException):
    pass


class Runs:
    """Short runs of the scripts on the small material, each done once for all tests."""

    def __init__(self, material, folder):
        self.material, self.folder = material, folder
        choose, records = random.Random(0), []
        for number in range(60):
            words = choose.choices("ab cd ef gh ij".split(), k=choose.randint(2, 4))
            records.append(dict(prompt=f"{number}:", completion=" ".join(words), reward=1.0))
            records.append(dict(prompt=f"{number}:", completion="!".join(words), reward=0.0))
        write_lines(folder / "records.jsonl", records)

    def args(self, name, run_dir, **changes):
        values = dict(save_every=2, keep_last=0, checkpoint_dir="")
        if name == "baseline":
            values.update(mtp_schedule="forward", micro_batch_size=2)
        elif name == "rho1":
            values.update(ref_model=self.straight("baseline"))
        elif name == "grad":  # killed after update 3: between two clean batches
            values.update(target=self.folder / "records.jsonl", target_every=2, start=3)
        else:
            values.update(data=self.folder / "records.jsonl", value_batches=1)
        values.update(changes)
        return short_args(SCRIPTS[name], self.material, run_dir, **values)

    def main(self, name, run_dir, **changes):
        """Exit code of a run in this process."""
        return run_main(SCRIPTS[name], self.args(name, run_dir, **changes))

    @functools.cache  # noqa: B019
    def straight(self, name):
        """Folder of a run to which nothing happened, with all its checkpoints."""
        assert self.main(name, self.folder / name) == 0
        return self.folder / name

    @functools.cache  # noqa: B019
    def interrupted(self, name):
        """Folder of a run that was killed and resumed, the critic three times."""
        run_dir = self.folder / "tracked" / name
        tracker = "mlflow" if name == "critic" else "none"
        args = self.args(name, run_dir, tracker=tracker)
        for stage, after in (("value", 3), ("", 1), ("", 3)):
            if name == "critic" or (stage, after) == ("", 3):
                kill(SCRIPTS[name], args, after, stage)
        assert run_main(SCRIPTS[name], args) == 0
        return run_dir

    def unfinished(self, run_dir, last=6):
        """Copy of the baseline's run as if it was killed after the checkpoint of update `last`."""
        shutil.copytree(self.straight("baseline"), run_dir)
        shutil.rmtree(run_dir / "model")
        for step in range(last + 2, 7, 2):
            shutil.rmtree(run_dir / f"checkpoints/step_{step:06d}")
        return run_dir


@pytest.fixture(scope="session")
def runs(material, tmp_path_factory):
    result = Runs(material, tmp_path_factory.mktemp("runs"))
    result.straight("baseline")  # now, not under what a test patches
    return result


def at_update(monkeypatch, step, action, stage=""):
    """Call `action(run)` once the line of metrics of update `step` is written."""
    log = common.Run.log

    def log_and_act(run, number, metrics):
        log(run, number, metrics)
        if (run.name, number) == (stage, step) and metrics.keys() & {"train/lr", "value/lr"}:
            action(run)

    monkeypatch.setattr(common.Run, "log", log_and_act)


def kill(script, args, after, stage=""):
    """Run `main(args)` and leave it after an update, as SIGKILL does: nothing is closed."""

    def die(run):
        run.checkpoints.wait()  # a process takes its threads with it
        run.lock.release()
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_update(patch, after, die, stage)
        run_main(script, args)
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].end_run()


def same_run(one, other):
    """The same metrics and weights, bit for bit, and the same weights of tokens."""
    assert metrics_of(one) == metrics_of(other)
    assert same_tensors(weights_of(one), weights_of(other))
    assert Path(one, "weights.json").read_text() == Path(other, "weights.json").read_text()
    return True


def words_of(args):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items()]
    return [word for word in words if not word.endswith(("=False", "="))]


def import_of(file):
    """The module of an edited script, read anew."""
    spec = importlib.util.spec_from_file_location("fork", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content(folder):
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock")
    return {p: p.read_bytes() for p in files}


# ------------------------------------------------------------------------------------- the files
def test_a_run_leaves_the_files_of_the_contract(runs):
    run_dir = runs.straight("baseline")
    names = "args.json metrics.jsonl weights.json baseline_mtp.py common.py checkpoints model"
    assert {p.name for p in run_dir.iterdir()} - {".lock"} == set(names.split())
    steps = [f"step_{step:06d}" for step in (2, 4, 6)]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == steps
    record = json.loads((run_dir / "args.json").read_text())
    assert record["script"] == "baseline_mtp" and record["args"]["batch_size"] == 8
    assert record["versions"]["torch"] and record["products"] == "float32"
    for name in ("baseline_mtp.py", "common.py"):
        assert (run_dir / name).read_bytes() == (ROOT / name).read_bytes()

    *updates, end = metrics_of(run_dir, without=("never",))
    shared = {"step", "train/loss", "train/grad_norm", "train/lr", "perf/tokens_per_s"}
    shared |= {f"weights/{name}" for name in ("mean", "max", "ess_frac")}
    for number, (line, num_heads) in enumerate(zip(updates, [1, 1, 2, 3, 3, 4], strict=True)):
        heads = [f"train/loss_head_{k}" for k in range(1, num_heads + 1)]  # --mtp-schedule forward
        assert line.keys() == shared | set(heads) and line["step"] == number + 1
        assert line["weights/mean"] == line["weights/max"] == 1
    figures = {f"eval/{name}_head_{k}" for name in ("loss", "acc") for k in range(1, 5)}
    assert end.keys() == figures | {"step", "eval/bits_per_byte"} and end["step"] == 6
    for row in json.loads((run_dir / "weights.json").read_text()):
        assert len(row["ids"]) == len(row["weight"]) == 32 and set(row["weight"]) == {1.0, None}


# ------------------------------------------------------------------------ killed, stopped, resumed
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_equals_straight(runs, name):
    """Heads 3 and 4 of the baseline have no gradient yet. The critic: in stage 1, 2 and between."""
    assert same_run(runs.interrupted(name), runs.straight(name))
    if name == "critic":
        files = [run(name) / "value_head.safetensors" for run in (runs.interrupted, runs.straight)]
        assert files[0].read_bytes() == files[1].read_bytes()
        lines = [line for line in metrics_of(runs.straight(name)) if "value/loss" in line]
        assert [(e["step"], e["value/step"]) for e in lines] == [(0, n) for n in range(1, 6)]


@pytest.mark.slow
def test_a_process_killed_five_times_ends_as_the_straight_run(runs, tmp_path):
    changes = dict(max_steps=60, save_every=4, keep_last=2)
    assert runs.main("baseline", tmp_path / "straight", **changes) == 0
    words = words_of(runs.args("baseline", tmp_path / "run", **changes))
    command = [sys.executable, str(ROOT / "baseline_mtp.py"), *words]
    metrics = tmp_path / "run/metrics.jsonl"
    for num_lines in (1, 9, 18, 33, 49):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < num_lines:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "resume    from" in done.stdout
    assert same_run(tmp_path / "run", tmp_path / "straight")


STOPS = [("SIGHUP", "baseline", "", "update 3 of 6")]
STOPS += [("SIGTERM", "critic", "value", "value update 3 of 5")]


@pytest.mark.parametrize("kind, name, stage, update", STOPS)
def test_a_stop_signal_saves_and_exits_with_0(runs, tmp_path, capsys, kind, name, stage, update):
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 3, lambda run: os.kill(os.getpid(), getattr(signal, kind)), stage)
        assert runs.main(name, tmp_path) == 0
    stopped = f"stopped   by {kind} after {update}; saved"
    assert stopped in capsys.readouterr().out and not (tmp_path / "model").exists()
    assert runs.main(name, tmp_path) == 0
    assert "/step_000003\n" in capsys.readouterr().out
    assert same_run(tmp_path, runs.straight(name))


def test_a_run_under_nohup_goes_on_when_the_terminal_closes(runs, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 3, lambda run: os.kill(os.getpid(), signal.SIGHUP))
        assert runs.main("baseline", tmp_path) == 0
    signal.signal(signal.SIGHUP, before)
    assert same_run(tmp_path, runs.straight("baseline"))


def test_a_closed_stdout_does_not_end_a_run(runs, tmp_path):
    words = words_of(runs.args("baseline", tmp_path / "run", max_steps=2))
    command = [sys.executable, str(ROOT / "baseline_mtp.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()  # `| head -n 1`
    assert process.wait() == 0 and (tmp_path / "run/model").is_dir()


def test_arguments_are_tidied_and_ctrl_c_is_one_line(monkeypatch, capfd):
    """`~` is a home, and a folder needs no slash, in lists too; then Ctrl-C before any update."""
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--compare", "~/a/", "b//", "--data", "s3://c/", "--run-dir", "/"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])

    def interrupted(args):
        assert args.compare == ["/home/me/a", "b"]
        assert (args.data, args.run_dir) == ("s3://c", "/")
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        common.run_script(interrupted, evaluate.Args, "manual")
    assert stop.value.code == 130
    assert capfd.readouterr().err == "stopped   by SIGINT\n"


def test_a_loss_that_is_not_finite_stops_before_the_step(runs, tmp_path, capsys):
    changes = dict(lr=1e15, warmup_steps=0, grad_clip=0, save_every=1)
    assert runs.main("baseline", tmp_path, **changes) == 1
    updates = metrics_of(tmp_path)
    assert all(math.isfinite(value) for line in updates for value in line.values())
    assert f"stopped   update {len(updates) + 1}: " in capsys.readouterr().out
    last = max((tmp_path / "checkpoints").glob("*/meta.json"))
    assert last.parent.name == f"step_{len(updates):06d}" and not (tmp_path / "model").exists()


# ---------------------------------------------------------------------------- weights in the data
def weighted_file(runs, folder, name="text.jsonl", **changes):
    """The runs' texts or records: an `e` weighs 3, and all twice that begins with "d" or "1"."""
    source, rows = (runs.folder if name == "records.jsonl" else runs.material) / name, []
    for row in map(json.loads, source.read_text().splitlines()):
        text = row.get("text") or row["completion"]
        row["weights"] = [[place, place + 1, 3] for place, c in enumerate(text) if c == "e"]
        row["weight"] = 1 + row.get("text", row.get("prompt")).startswith(("d", "1"))
        rows.append(row | changes)
    return write_lines(folder / name, rows)


def test_equal_weights_in_the_data_change_no_bit(runs, tmp_path):
    """Every text weighs 2, which is divided by the mean."""
    file = weighted_file(runs, tmp_path, weight=2, weights=[])
    assert runs.main("baseline", tmp_path / "run", data=file) == 0
    assert same_run(tmp_path / "run", runs.straight("baseline"))


def test_the_objective_with_weights_in_the_data_equals_a_slow_loop(runs, tmp_path):
    """And their mean over all targets of head 1 in the training data is 1."""
    file, options = weighted_file(runs, tmp_path), dict(mtp_schedule="constant", max_steps=1)
    args = runs.args("baseline", tmp_path / "run", data=file, **options)
    assert run_main(baseline_mtp, args) == 0
    torch.manual_seed(args.seed)
    model, tokenizer = common.build_model(args.model, 4)
    rows = common.load_data(args, tokenizer, common.Ranks()).train
    ids, document = (rows[:][column].ravel().tolist() for column in ("input_ids", "document"))
    raw, first = [], {}
    for token, number in zip(ids, document):
        doubled = 1 + (first.setdefault(number, token) in (ord("d") + 3, ord("1") + 3))
        raw.append(doubled * (3 if token == ord("e") + 3 else 1))
    places = [j for j in range(len(ids)) if j % 32 and document[j] == document[j - 1] >= 0]
    mean = sum(raw[j] for j in places) / len(places)
    assert 1.1 < mean and max(raw) == 6
    batch = common.load_batch(rows, common.batch_rows(len(rows), 8, args.seed, 0), 4, "cpu")
    loss_KBT, objective, count = model(batch.x_BT, batch.targets_KBT), 0.0, 0
    for k, b, t in map(tuple, (batch.targets_KBT != common.IGNORE).nonzero().tolist()):
        j = 32 * int(batch.rows_B[b]) + t + k + 1
        objective += raw[j] / mean * loss_KBT[k, b, t].item()
        count += k == 0
    assert metrics_of(tmp_path / "run")[0]["train/loss"] == pytest.approx(objective / count)


@pytest.mark.parametrize("name", ["rho1", "critic", "grad"])
def test_weights_in_the_data_multiply_those_of_the_algorithm(runs, tmp_path, name):
    """Three runs that learn nothing: of the algorithm with and without them, and the baseline's."""
    changes = dict(max_steps=2, lr=0.0)
    own = dict(score="norm", start=1) if name == "grad" else {}
    args = runs.args(name, tmp_path / "own", **changes, **own)
    file = weighted_file(runs, tmp_path, Path(args.data).name)
    assert run_main(SCRIPTS[name], args) == 0
    assert runs.main(name, tmp_path / "both", data=file, **changes, **own) == 0
    options = dict(data=file, mtp_schedule="constant", micro_batch_size=0, **changes)
    assert runs.main("baseline", tmp_path / "data", **options) == 0
    samples = [tmp_path / d / "weights.json" for d in ("own", "both", "data")]
    rows = [json.loads(file.read_text().replace("null", "NaN")) for file in samples]
    own, both, data = (torch.tensor([row["weight"] for row in part]) for part in rows)
    torch.testing.assert_close(both, own * data, equal_nan=True)
    assert data.nan_to_num(1).max() > 2 and own.nan_to_num(1).max() > 1


# ------------------------------------------------------------------------------------- two ranks
STOPPED = ("baseline", "critic")  # the critic in stage 2, where V runs without gradient


@pytest.fixture(scope="session")
def two_ranks(runs, tmp_path_factory):
    """Folder of runs on two ranks, in one torchrun with a data cache of its own."""
    folder = tmp_path_factory.mktemp("two_ranks")
    cases = {name: vars(runs.args(name, folder / name)) for name in SCRIPTS}
    env = dict(os.environ, HF_DATASETS_CACHE=str(folder / "cache"), PYTHONPATH=str(ROOT))
    command = [sys.executable, *TORCHRUN, __file__, json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


def run_on_a_rank(cases):
    """What each rank of that torchrun does; rank 1 alone gets a signal in two of the runs."""
    dist.init_process_group = functools.cache(dist.init_process_group)  # once for all runs
    for name, values in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "rho1":  # every layer is sharded by itself, as in large models
                patch.setattr(common, "SMALL_LAYER", 0)
            if name in STOPPED and os.environ["RANK"] == "1":
                at_update(patch, 3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
            assert run_main(SCRIPTS[name], SCRIPTS[name].Args(**values)) == 0
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_ranks_train_as_one(runs, two_ranks, name):
    """Two of them accumulate, are stopped by a signal to rank 1, and go on on one rank."""
    folder, output = two_ranks
    if name in STOPPED:
        assert output.count("stopped   by a signal to another rank after update 3 of 6; saved") == 2
        files = {p.name for p in (folder / name / "checkpoints/step_000003").iterdir()}
        assert {"__0_0.distcp", "__1_0.distcp"} <= files
        assert runs.main(name, folder / name) == 0
    lines, expected = metrics_of(folder / name), metrics_of(runs.straight(name))
    for line, one in zip(lines, expected, strict=True):
        assert line == pytest.approx(one, rel=1e-5, abs=1e-7)
    for key, value in weights_of(runs.straight(name)).items():
        torch.testing.assert_close(weights_of(folder / name)[key], value, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------ identity of a run
def test_a_finished_run_is_left_as_it_is(runs, capsys):
    before = content(runs.straight("baseline"))
    assert runs.main("baseline", runs.straight("baseline")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert content(runs.straight("baseline")) == before


def test_max_steps_may_be_raised(runs, tmp_path, capsys):
    """On a finished run and again after a kill; with a constant rate and all heads the same."""
    long, changes = tmp_path / "long", dict(mtp_schedule="constant", warmup_steps=10**9)
    for run_dir, max_steps in ((long, 8), (tmp_path / "run", 6)):
        assert runs.main("baseline", run_dir, max_steps=max_steps, **changes) == 0
    assert "warning   --warmup-steps 1000000000 is not below" in capsys.readouterr().out
    args = runs.args("baseline", tmp_path / "run", max_steps=8, **changes)
    kill(baseline_mtp, args, after=7)
    output = capsys.readouterr().out
    assert "checkpoints/step_000006\n" in output and "not what a straight run gives" in output
    assert run_main(baseline_mtp, args) == 0
    assert same_run(tmp_path / "run", long)
    record = json.loads((tmp_path / "run/args.json").read_text())
    assert record["args"]["max_steps"] == 8
    assert (tmp_path / "run/model_step_000006").is_dir()

    before = content(long)
    lower = functools.partial(runs.main, "baseline", long, max_steps=7, **changes)
    refused(lower, "--max-steps 7", "8 updates are done", "--run-dir")
    assert content(long) == before


def test_other_arguments_or_data_are_refused_by_name(runs, tmp_path):
    """And a folder in use, until it is free."""
    run_dir = runs.unfinished(tmp_path / "run")
    before = content(run_dir)
    other = functools.partial(runs.main, "baseline", run_dir)
    with filelock.FileLock(run_dir / ".lock"):
        refused(other, f"--run-dir {run_dir}", "in use")
    refused(lambda: other(lr=1e-3), "--run-dir", "lr 0.003 there, 0.001 here")
    refused(lambda: runs.main("rho1", run_dir), "script baseline_mtp there, rho1_wmtp here")
    assert content(run_dir) == before

    text = tmp_path / "text.jsonl"
    shutil.copy(runs.material / "text.jsonl", text)
    args = runs.args("baseline", tmp_path / "other", data=text)
    kill(baseline_mtp, args, after=3)
    before = content(tmp_path / "other")
    text.write_text(text.read_text().replace("total", "sum"))
    refused(lambda: run_main(baseline_mtp, args), "--checkpoint-dir", "data_fingerprint")
    assert content(tmp_path / "other") == before


def test_arguments_without_effect_may_change_on_resume(runs, tmp_path):
    """An incomplete checkpoint counts for nothing, neither on resume nor for --keep-last."""
    run_dir = runs.unfinished(tmp_path / "run", last=2)
    (run_dir / "checkpoints/step_000999").mkdir()
    changes = dict(recompute="all", eval_every=2, save_every=3, keep_last=1)
    assert runs.main("baseline", run_dir, **changes) == 0
    assert same_tensors(weights_of(run_dir), weights_of(runs.straight("baseline")))
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    names = {p.name for p in (run_dir / "checkpoints").iterdir()}
    assert names == {"step_000006", "step_000999"}


def test_edited_sources_are_another_run(runs, tmp_path, monkeypatch):
    """An edited copy of the script or of common.py has another default folder, and is refused."""
    monkeypatch.chdir(tmp_path)
    sources = [Path(shutil.copy(ROOT / f"{n}.py", tmp_path)) for n in ("baseline_mtp", "common")]
    monkeypatch.setattr(common, "__file__", str(sources[1]))

    script = sources[0]
    kill(import_of(script), runs.args("baseline", ""), after=3)
    (first,) = Path("runs").iterdir()
    for number, source in enumerate(sources, start=2):
        source.write_text(source.read_text() + "# edited\n")
        kill(import_of(script), runs.args("baseline", ""), after=1)
        assert len(list(Path("runs").glob("baseline_mtp-s0-*"))) == number
        args = runs.args("baseline", first)
        remedy = f"to resume under the new one: cp {source} {first}"
        call = functools.partial(run_main, import_of(script), args)
        refused(call, f"{source.name} differs", remedy)
        shutil.copy(source, first)
    assert run_main(import_of(script), args) == 0
    assert same_run(first, runs.straight("baseline"))


# ------------------------------------------------------------------------------------ checkpoints
def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = [("__0_0.distcp", flip), ("__0_0.distcp", Path.unlink), (".metadata", flip)]
DAMAGES += [("metrics.jsonl", flip), ("meta.json", truncate)]


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_a_bad_checkpoint_is_named_and_the_one_before_taken(runs, tmp_path, capsys, name, damage):
    run_dir = runs.unfinished(tmp_path / "run")
    damage(run_dir / "checkpoints/step_000006" / name)
    assert runs.main("baseline", run_dir) == 0
    output = capsys.readouterr().out
    assert "checkpoints/step_000006 is bad" in output
    assert "resume    from" in output and "checkpoints/step_000004\n" in output
    assert same_run(run_dir, runs.straight("baseline"))
    names = {file.name for file in (run_dir / "checkpoints/step_000006").iterdir()}
    assert len(names - {"meta.bad"}) == 4  # written anew


def test_where_no_checkpoint_is_good_nothing_is_touched(runs, tmp_path):
    run_dir = runs.unfinished(tmp_path / "run", last=4)
    for folder in (run_dir / "checkpoints").iterdir():
        flip(folder / "__0_0.distcp")
    before = content(run_dir)
    refused(lambda: runs.main("baseline", run_dir), "--checkpoint-dir", "no checkpoint is good")
    assert content(run_dir) == before


def test_a_checkpoint_store_alone_resumes_and_refuses_another_run(runs, tmp_path):
    """The run folder is gone, as on a replaced machine."""
    store = dict(checkpoint_dir=f"file://{tmp_path}/store")
    args = runs.args("baseline", tmp_path / "a/run", **store)
    kill(baseline_mtp, args, after=5)
    shutil.rmtree(tmp_path / "a")
    assert run_main(baseline_mtp, args) == 0
    assert same_run(tmp_path / "a/run", runs.straight("baseline"))

    before = content(tmp_path / "store")
    other = functools.partial(runs.main, "baseline", tmp_path / "b/run", max_steps=2)
    refused(lambda: other(seed=1, **store), "--checkpoint-dir", "another run", "seed 0 there")
    assert content(tmp_path / "store") == before
    assert other() == 0  # nothing was trained in b/run yet, so it is free


def test_a_snapshot_is_not_changed_by_later_updates(tmp_path):
    model = torch.nn.Linear(500, 500)
    args = SimpleNamespace(lr=0.1, heads_lr=0.1, weight_decay=0.0)
    optimizer = common.make_optimizer(model, args)
    checkpoints = common.Checkpoints(tmp_path, {}, 0, common.Ranks())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    checkpoints.save(1, model, optimizer, b"line\n")
    model(torch.ones(500)).sum().backward()
    optimizer.step()  # while it is being written
    assert checkpoints.wait() and not torch.equal(model.weight, before["weight"])
    assert checkpoints.load(model, optimizer) == (1, b"line\n")
    assert same_tensors({name: p.detach() for name, p in model.named_parameters()}, before)
    assert all(not state["exp_avg"].any() for state in optimizer.state.values())


# --------------------------------------------------------------------------------------- trackers
def test_mlflow_holds_the_metrics_of_both_stages_in_one_record(runs):
    """Of a run that was killed and resumed three times."""
    from mlflow import MlflowClient

    run_dir = runs.interrupted("critic")
    client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("wmtp")
    (record,) = client.search_runs([experiment.experiment_id])
    assert record.info.status == "FINISHED" and record.data.params["value_steps"] == "5"
    points = {}
    for line in metrics_of(run_dir):
        for name, value in line.items():
            step = line.get("value/step", line["step"])
            points.setdefault(name, set()).add((step, value))
    assert {"value/loss", "value/auc", "train/loss", "eval/bits_per_byte"} <= points.keys()
    for name, expected in points.items():
        history = client.get_metric_history(record.info.run_id, name)
        assert {(point.step, point.value) for point in history} == expected, name


def test_runs_that_start_together_in_a_new_folder_all_have_a_record(tmp_path, monkeypatch):
    import mlflow  # noqa: F401 (once for all three)

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it for its children
    names = ["a", "b", "c"]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.map(start_and_end, [tmp_path / name for name in names], chunksize=1)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    records = client.search_runs([client.get_experiment_by_name("wmtp").experiment_id])
    assert sorted(record.info.run_name for record in records) == names


def start_and_end(folder):
    folder.mkdir()
    common.Tracker("mlflow", folder, {"seed": 0}).finish([])


def test_a_tracker_that_fails_stops_no_training(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    assert runs.main("baseline", tmp_path / "run", tracker="mlflow") == 0
    assert capsys.readouterr().err.count("tracker   mlflow failed") == 1
    assert same_run(tmp_path / "run", runs.straight("baseline"))


def test_wandb_works_offline(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs.main("baseline", tmp_path / "run", tracker="wandb", max_steps=2) == 0
    output = capsys.readouterr()
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert f"look      wandb sync {file.parent}" in output.out and "failed" not in output.err


# -------------------------------------------------------------------------------------- bad input
BAD = [
    ("--batch-size 10 --micro-batch-size 4", "not divisible by 1 rank(s) x --micro-batch-size 4"),
    ("--max-steps 0", "from 1"),
    ("--num-heads 0", "from 1"),
    ("--lr nan", "from 0"),
    ("--run-dir {folder}/text.jsonl/run", "cannot be read or written"),
    ("--run-dir {folder}", "name a new folder"),
    ("--checkpoint-dir {folder}/text.jsonl", "cannot be read or written"),
]


@pytest.mark.parametrize("flags, word", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(runs, tmp_path, monkeypatch, capfd, flags, word):
    words = words_of(runs.args("baseline", tmp_path / "run"))
    flags = flags.format(folder=runs.material)
    monkeypatch.setattr(sys, "argv", ["baseline_mtp.py", *words, *flags.split()])
    before = set(runs.material.iterdir()) - {runs.material / ".lock"}
    with pytest.raises(SystemExit) as stop:
        common.run_script(baseline_mtp.main, baseline_mtp.Args, "manual")
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    assert flags.rpartition("--")[2].split()[0] in line and word in line
    assert not {p.name for p in content(tmp_path)} - {"args.json", "baseline_mtp.py", "common.py"}
    assert set(runs.material.iterdir()) - {runs.material / ".lock"} == before


def test_the_weighting_in_readme_runs_as_a_fork(material, tmp_path):
    """README's changes to the baseline, at most 15 lines: weights in the order of the entropies."""
    readme = (ROOT / "README.md").read_text()
    diff, function = (readme.partition(f"```{kind}\n")[2].partition("```")[0] for kind in KINDS)
    baseline = (ROOT / "baseline_mtp.py").read_text()
    source = baseline.replace("import torch\n", "import torch\n\nimport common\n", 1)
    lines = diff.splitlines()
    for old, new in zip(lines[::2], lines[1::2], strict=True):
        assert source.count(old[1:]) == 1 and (old[0], new[0]) == ("-", "+")
        source = source.replace(old[1:], new[1:])
    before, _, after = source.partition("def token_weights(")
    source = before + function + "\n\n# ---" + after.partition("\n# ---")[2]
    changed = difflib.unified_diff(baseline.splitlines(), source.splitlines(), n=0)
    assert sum(line.startswith("+") for line in changed) - 1 <= 15
    (tmp_path / "mine_wmtp.py").write_text(source)
    mine = import_of(tmp_path / "mine_wmtp.py")
    assert run_main(mine, short_args(mine, material, tmp_path / "run", max_steps=2)) == 0
    for line in metrics_of(tmp_path / "run")[:2]:
        assert line["weights/mean"] == pytest.approx(1, abs=1e-5) and line["weights/max"] <= 3
    targets_KBT = torch.tensor([[[5, 6, common.IGNORE, 7, common.IGNORE]]])
    entropy_KBT = torch.tensor([[[0.3, 2.0, 9.0, 1.0, 9.0]]])
    weight_BT = mine.token_weights(SimpleNamespace(targets_KBT=targets_KBT), entropy_KBT)
    assert weight_BT[0, 1] < weight_BT[0, 4] < weight_BT[0, 2]
    assert weight_BT[0, [0, 3]].tolist() == [1, 1]


KINDS = ("diff", "python")  # of the two blocks in README

if __name__ == "__main__":
    run_on_a_rank(json.loads(sys.argv[1]))
