"""Checkpoints and data on object stores, against a server that speaks S3 on this machine (moto)."""

import os
import queue
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import boto3
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

import test_run
from test_run import ROOT, assert_same_weights, flags, metrics_of, run_apart, run_here, weights_of

material, straight = test_run.material, test_run.straight
MOTO = Path(sys.executable).with_name("moto_server")
pytestmark = pytest.mark.skipif(not MOTO.exists(), reason=f"no {MOTO}: pip install 'moto[s3,server]'")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Server(socketserver.ThreadingTCPServer):
    """moto_server in a process of its own, and a wire to it on which a request can be held half sent.

    moto holds objects in memory. With `recording` it writes down each request it has received whole and, started anew
    after its death, takes them all in again.
    """

    daemon_threads = True

    def __init__(self, recording=None):
        super().__init__(("127.0.0.1", 0), Wire)
        self.env = dict(MOTO_ENABLE_RECORDING="1", MOTO_RECORDER_FILEPATH=str(recording)) if recording else {}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.ready, self.refuses = threading.Event(), True
        self.hold(None)
        self.up()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def up(self):
        command = [MOTO, "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self.answers, self.process)
        if self.env and Path(self.env["MOTO_RECORDER_FILEPATH"]).exists():
            self.post("recorder/replay-recording")
        self.ready.set()

    def down(self, refuses=True):
        """Kill moto; from now on connections are refused, or get no answer until it is up again."""
        self.refuses = refuses
        self.ready.clear()
        self.process.kill()
        self.process.wait()

    def answers(self):
        try:
            return socket.create_connection(("127.0.0.1", self.port)).close() is None
        except OSError:
            return False

    def post(self, path, body=b""):
        address, plain = f"http://127.0.0.1:{self.port}/moto-api/{path}", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, body, plain, method="POST"), timeout=60).close()

    def hold(self, word):
        """The next request that begins with this word stops halfway until `go` is told to let it on (True) or cut it off."""
        self.word, self.held, self.go = word, threading.Event(), queue.SimpleQueue()


class Wire(socketserver.BaseRequestHandler):
    def handle(self):
        server = self.server
        if not server.ready.wait(0 if server.refuses else 60):
            return
        with socket.create_connection(("127.0.0.1", server.port)) as onward:
            threading.Thread(target=pass_on, args=(onward, self.request), daemon=True).start()
            try:
                while block := self.request.recv(1 << 16):
                    if server.word and block.startswith(server.word.encode()):
                        server.word, go = None, server.go
                        onward.sendall(block[: len(block) // 2])
                        block = block[len(block) // 2 :]
                        server.held.set()
                        if not go.get():
                            return
                    onward.sendall(block)
            except OSError:  # one side has gone; the other learns of it by the end of its connection
                pass


def pass_on(source, sink):
    try:
        while block := source.recv(1 << 16):
            sink.sendall(block)
        sink.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while True:
        ended = process.poll() is not None  # looked at first: after it has ended, the condition is as it stays
        if condition():
            return
        assert not ended and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def env():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{name}", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("HF_HUB_OFFLINE", raising=False)  # `datasets` would not open s3:// either
        import datasets

        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        yield patch


@pytest.fixture(scope="module")
def server(env, material):
    server = Server()
    use(env, server)
    boto3.client("s3").create_bucket(Bucket="bucket")
    boto3.client("s3").upload_file(str(material / "text.jsonl"), "bucket", "text.jsonl")
    yield server
    server.down()
    server.shutdown()


def use(env, server):
    env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    s3fs.S3FileSystem.clear_instance_cache()  # they keep the address they were made with


def objects(prefix):
    """Name and content of every object below, as another client than the run's sees them."""
    s3 = boto3.client("s3")
    found = s3.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return {o["Key"].removeprefix(prefix): s3.get_object(Bucket="bucket", Key=o["Key"])["Body"].read() for o in found}


def put(prefix, files):
    s3 = boto3.client("s3")
    for name in objects(prefix):
        s3.delete_object(Bucket="bucket", Key=prefix + name)
    for name, content in files.items():
        s3.put_object(Bucket="bucket", Key=prefix + name, Body=content)


@pytest.fixture
def start(tmp_path):
    """Starts a run in the background that writes to `out`; ends it with the test."""
    processes = []

    def start(words):
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(tmp_path / "out", "w") as file:
            command = [sys.executable, str(ROOT / "baseline_mtp.py"), *words]
            processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def held(server, process):
    until(server.held.is_set, process)


def assert_same_run(a, b):
    assert metrics_of(a) == metrics_of(b)
    assert_same_weights(weights_of(a), weights_of(b))


@pytest.fixture(scope="module")
def on_s3(server, material, tmp_path_factory):
    """A run with data and checkpoints on S3, the words that start it, and its checkpoints."""
    run_dir = tmp_path_factory.mktemp("s3") / "run"
    words = dict(data="s3://bucket/text.jsonl", checkpoint_dir="s3://bucket/whole", keep_last=2)
    done = run_apart(flags(material, run_dir, **words))
    assert done.returncode == 0, done.stderr
    return run_dir, words, objects("whole/run/")


# ------------------------------------------------------------------------------------------------------- save and resume
def test_a_run_on_s3_equals_one_on_disk(straight, on_s3):
    run_dir, _, there = on_s3
    assert_same_run(run_dir, straight[0])
    assert not (run_dir / "checkpoints").exists()
    files = ("__0_0.distcp", ".metadata", "meta.json")  # of the last two, and nothing beside them
    assert there.keys() == {f"step_{step:06d}/{file}" for step in (8, 10) for file in files}


@pytest.mark.slow
def test_stopped_and_started_again_equals_straight(material, server, straight, start, tmp_path):
    words = flags(material, tmp_path / "run", checkpoint_dir="s3://bucket/stopped")
    server.hold("PUT /bucket/stopped/run/step_000004/meta.json")
    process = start(words)
    held(server, process)
    until(lambda: (tmp_path / "run/metrics.jsonl").read_bytes().count(b"\n") == 8, process)  # step 8 waits for step 4
    process.send_signal(signal.SIGTERM)
    server.go.put(True)
    assert process.wait(120) == 0
    assert "SIGTERM after update 9 of 10, saved" in (tmp_path / "out").read_text()
    resumed = run_apart(words)
    assert resumed.returncode == 0 and "resume    from s3://bucket/stopped/run/step_000009" in resumed.stdout, resumed.stderr
    assert_same_run(tmp_path / "run", straight[0])


@pytest.mark.slow
def test_killed_during_uploads_goes_on_from_what_is_complete(material, server, straight, start, monkeypatch, tmp_path, capsys):
    words = flags(material, tmp_path / "run", checkpoint_dir="s3://bucket/killed")
    for unfinished, rest in (("step_000004/meta.json", {"__0_0.distcp", ".metadata"}), ("step_000008/__0_0.distcp", set())):
        server.hold(f"PUT /bucket/killed/run/{unfinished}")
        process = start(words)
        held(server, process)
        process.kill()
        process.wait()
        server.go.put(False)
        step = unfinished[:11]
        there = objects("killed/run/")
        assert there[f"{step}.tmp"] == b"" and {n[12:] for n in there if n.startswith(f"{step}/")} == rest
        assert "resume" not in (tmp_path / "out").read_text()  # the first time nothing was complete
    capsys.readouterr()
    assert run_here(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert "resume    from s3://bucket/killed/run/step_000004" in said and "is bad" not in said
    assert_same_run(tmp_path / "run", straight[0])
    assert {name.partition("/")[0] for name in objects("killed/run/")} == {"step_000008", "step_000010"}


def flip(content):
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


DAMAGE = [
    ("__0_0.distcp", flip, "__0_0.distcp is not as it was written"),
    ("__0_0.distcp", lambda content: content[:-1], "__0_0.distcp has 1,"),
    (".metadata", lambda content: None, ".metadata is missing"),
    ("meta.json", lambda content: None, "meta.json is missing"),
    ("meta.json", lambda content: content.replace(b'"step": 10', b'"step": 11'), "meta.json is not as it was written"),
]


@pytest.mark.parametrize("file, damage, word", DAMAGE, ids=[d[2] for d in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    material, on_s3, monkeypatch, tmp_path, capsys, file, damage, word
):
    run_dir, words, there = on_s3
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    content = damage(there[f"step_000010/{file}"])
    damaged = {k: v for k, v in there.items() if k != f"step_000010/{file}"}
    put("whole/run/", damaged | ({} if content is None else {f"step_000010/{file}": content}))
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", **words)) == 0
    said = capsys.readouterr().out
    assert f"checkpoint s3://bucket/whole/run/step_000010 is bad: {word}" in said
    assert "resume    from s3://bucket/whole/run/step_000008" in said
    assert_same_run(tmp_path / "run", run_dir)
    assert objects("whole/run/").keys() == there.keys()  # the bad one was written again
    assert run_again(monkeypatch, material, tmp_path / "run", words, capsys) == 10


def run_again(monkeypatch, material, run_dir, words, capsys):
    """Start a finished run whose model is gone once more; returns the step it resumed from."""
    shutil.rmtree(run_dir / "model")
    capsys.readouterr()
    assert run_here(monkeypatch, *flags(material, run_dir, **words)) == 0
    return int(capsys.readouterr().out.partition("resume    from ")[2].partition("step_")[2][:6])


def test_a_complete_checkpoint_stays_where_an_old_one_cannot_be_removed(material, monkeypatch, tmp_path, capsys):
    def refuse(self, path, **options):
        if path.endswith("step_000004"):
            raise PermissionError("Access Denied")
        return remove(self, path, **options)

    remove = MemoryFileSystem.rm
    monkeypatch.setattr(MemoryFileSystem, "rm", refuse)
    words = dict(checkpoint_dir="memory://kept", keep_last=1)
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", **words)) == 0
    assert "Access Denied" in capsys.readouterr().err
    assert MemoryFileSystem().glob("/kept/run/*/meta.json") == [f"/kept/run/step_{n:06d}/meta.json" for n in (4, 10)]
    assert run_again(monkeypatch, material, tmp_path / "run", words, capsys) == 10


# --------------------------------------------------------------------------------------------------- a server that goes
@pytest.fixture
def mortal(env, server, monkeypatch, tmp_path):
    """A server of its own, whose objects outlive it."""
    mortal = Server(tmp_path / "recording")
    use(env, mortal)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # for each of the five of s3fs
    monkeypatch.setenv("FSSPEC_S3", '{"config_kwargs": {"read_timeout": 3}}')
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield mortal
    mortal.down()
    mortal.shutdown()
    use(env, server)


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_that_stalls_and_then_dies_during_a_save(
    material, mortal, straight, start, monkeypatch, tmp_path, capsys, comes_back
):
    words = dict(checkpoint_dir="s3://bucket/mortal")
    mortal.hold("PUT /bucket/mortal/run/step_000004/__0_0.distcp")
    process = start(flags(material, tmp_path / "run", **words))
    held(mortal, process)
    mortal.hold("PUT /bucket/mortal/run/step_000008/__0_0.distcp")  # and the one of step 4 is never answered
    held(mortal, process)
    mortal.down(refuses=not comes_back)
    if comes_back:
        mortal.up()
    mortal.go.put(True)
    assert process.wait(300) == 0
    if not comes_back:
        mortal.up()
    said = (tmp_path / "out").read_text()
    assert ("step_000008 could not be written" in said) != comes_back
    assert_same_run(tmp_path / "run", straight[0])
    assert run_again(monkeypatch, material, tmp_path / "run", words, capsys) == (10 if comes_back else 4)
    assert_same_run(tmp_path / "run", straight[0])


# -------------------------------------------------------------------------------------------------------------- bad input
BAD = [
    (dict(checkpoint_dir="foo://x"), ["--checkpoint-dir foo://x", "foo"]),
    (dict(checkpoint_dir="s3://nowhere/path"), ["--checkpoint-dir s3://nowhere/path", "bucket"]),
    (dict(checkpoint_dir="s3://"), ["--checkpoint-dir s3://"]),
    (dict(data="s3://bucket/none.jsonl"), ["--data s3://bucket/none.jsonl"]),
    (dict(data="s3://nowhere/text.jsonl"), ["--data s3://nowhere/text.jsonl"]),
    (dict(data="foo://x/text.jsonl"), ["--data foo://x/text.jsonl"]),
]


def assert_refused(material, monkeypatch, run_dir, capsys, changes, words):
    """One line that says these words, exit code 2, and not one update."""
    assert run_here(monkeypatch, *flags(material, run_dir, **changes)) == 2
    said = capsys.readouterr()
    error = said.err.strip()
    assert error.startswith("error: ") and "\n" not in error, error
    assert all(word in error for word in words), error
    assert "step " not in said.out and not (run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("changes, words", BAD, ids=[" ".join(f"{k}={v}" for k, v in c.items()) for c, _ in BAD])
def test_a_bad_url_is_one_line_and_exit_code_2(material, server, monkeypatch, tmp_path, capsys, changes, words):
    before = boto3.client("s3").list_buckets()["Buckets"]
    assert_refused(material, monkeypatch, tmp_path / "run", capsys, changes, words)
    assert boto3.client("s3").list_buckets()["Buckets"] == before


@pytest.mark.parametrize("changes", [dict(checkpoint_dir="s3://bucket/x"), dict(data="s3://bucket/text.jsonl")])
@pytest.mark.parametrize("why, word", [("wrong credentials", ""), ("no server", "Could not connect")])
def test_a_store_that_refuses_is_one_line_and_exit_code_2(
    material, env, server, monkeypatch, tmp_path, capsys, changes, why, word
):
    (key, value) = next(iter(changes.items()))
    words = [f"--{key.replace('_', '-')} {value}", word]
    try:
        if why == "wrong credentials":
            server.post("reset-auth", b"0")  # from now on moto knows its users, and there are none
        else:
            env.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        assert_refused(material, monkeypatch, tmp_path / "run", capsys, changes, words)
    finally:
        server.post("reset-auth", b"inf")
        use(env, server)


# --------------------------------------------------------------------------------------------------- other stores, ranks
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_urls_save_and_resume(material, straight, monkeypatch, tmp_path, capsys, scheme):
    words = dict(checkpoint_dir=f"{scheme}://{tmp_path}/there")
    assert run_here(monkeypatch, *flags(material, tmp_path / "run", **words)) == 0
    assert_same_run(tmp_path / "run", straight[0])
    assert (tmp_path / "there/run/step_000010/meta.json").exists() == (scheme == "file")
    assert run_again(monkeypatch, material, tmp_path / "run", words, capsys) == 10
    assert_same_run(tmp_path / "run", straight[0])


@pytest.mark.slow
def test_two_ranks_save_and_resume(material, server, tmp_path):
    words = flags(material, tmp_path / "run", checkpoint_dir="s3://bucket/two")
    first = run_apart(words, TORCHRUN)
    assert first.returncode == 0, first.stderr
    there = objects("two/run/")
    files = ("__0_0.distcp", "__1_0.distcp", ".metadata", "meta.json")
    assert there.keys() == {f"step_{step:06d}/{file}" for step in (8, 10) for file in files}
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    shutil.rmtree(tmp_path / "run/model")
    file = "step_000010/__0_0.distcp"  # of three files the second, which rank 1 checks
    put("two/run/", there | {file: flip(there[file])})
    resumed = run_apart(words, TORCHRUN)
    assert resumed.returncode == 0, resumed.stderr
    assert "step_000010 is bad: __0_0.distcp is not as it was written" in resumed.stdout
    assert resumed.stdout.count("resume    from s3://bucket/two/run/step_000008") == 1
    assert_same_run(tmp_path / "run", tmp_path / "first")
