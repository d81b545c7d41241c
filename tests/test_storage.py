"""Checkpoints on an object store: the same code against a server of the S3 protocol (moto)."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

import baseline_mtp
from conftest import refused, run_main
from test_run import Runs, at_update, kill, same_run

boto3 = pytest.importorskip("boto3")
s3fs = pytest.importorskip("s3fs")
MOTO = Path(sys.executable).with_name("moto_server")
pytestmark = pytest.mark.skipif(not MOTO.exists(), reason="pip install 'moto[s3,server]'")


class Server:
    """moto_server in a process of its own; its objects end with it."""

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start(self, objects=()):
        """Serve a bucket with these objects, names and contents."""
        command = [str(MOTO), "-p", str(self.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            except OSError:
                time.sleep(0.05)
        self.client = boto3.client("s3")  # not the one of the run
        self.client.create_bucket(Bucket="bucket")
        for name, content in objects:
            self.client.put_object(Bucket="bucket", Key=name, Body=content)

    def objects(self):
        names = [o["Key"] for o in self.client.list_objects_v2(Bucket="bucket")["Contents"]]
        return {n: self.client.get_object(Bucket="bucket", Key=n)["Body"].read() for n in names}

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    once = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", once)
    s3fs.S3FileSystem.clear_instance_cache()  # they keep the address of their start
    server.start()
    yield server
    server.end()


@pytest.fixture(scope="module")
def runs(material, tmp_path_factory):
    return Runs(material, tmp_path_factory.mktemp("runs"))


def test_killed_and_resumed_on_s3_equals_straight(runs, server, tmp_path, capsys):
    args = runs.args("baseline", tmp_path / "run", checkpoint_dir="s3://bucket/a", keep_last=2)
    kill(baseline_mtp, args, after=5)
    objects = server.objects()
    files = ("__0_0.distcp", ".metadata", "metrics.jsonl", "meta.json")
    assert objects.keys() == {f"a/run/step_{n:06d}/{file}" for n in (2, 4) for file in files}
    name = "a/run/step_000004/__0_0.distcp"
    server.client.put_object(Bucket="bucket", Key=name, Body=objects[name][:-1])  # a byte less
    assert run_main(baseline_mtp, args) == 0
    output = capsys.readouterr().out
    assert "a/run/step_000004 is bad: __0_0.distcp" in output
    assert "resume    from s3://bucket/a/run/step_000002" in output
    assert same_run(tmp_path / "run", runs.straight("baseline"))
    assert {key[:17] for key in server.objects()} == {"a/run/step_000004", "a/run/step_000006"}


def test_a_store_that_cannot_be_reached_is_refused_in_one_line(runs, server, tmp_path):
    def run(name):
        runs.main("baseline", tmp_path / name, checkpoint_dir=f"s3://{name}/a")

    refused(lambda: run("nowhere"), "--checkpoint-dir s3://nowhere/a", "bucket")
    server.end()
    refused(lambda: run("bucket"), "--checkpoint-dir s3://bucket/a", "connect")


def test_a_store_that_dies_costs_one_save(runs, server, tmp_path, monkeypatch, capsys):
    """It answers no more in the save of update 4, and is gone before that of update 6."""
    before = {}

    def stall(run):
        run.checkpoints.wait()
        before.update(server.objects())
        server.process.send_signal(signal.SIGSTOP)

    args = runs.args("baseline", tmp_path / "run", checkpoint_dir="s3://bucket/a", keep_last=2)
    with monkeypatch.context() as patch:
        at_update(patch, 3, stall)
        at_update(patch, 5, lambda run: server.end())
        assert run_main(baseline_mtp, args) == 0
    errors = capsys.readouterr().err
    for step in (4, 6):
        said = f"checkpoint s3://bucket/a/run/step_{step:06d} failed: Could not connect"
        assert errors.count(said) == 1, errors
    assert same_run(tmp_path / "run", runs.straight("baseline"))

    shutil.rmtree(tmp_path / "run/model")
    server.start(before.items())
    assert run_main(baseline_mtp, args) == 0
    assert "resume    from s3://bucket/a/run/step_000002" in capsys.readouterr().out
    assert same_run(tmp_path / "run", runs.straight("baseline"))
