"""Two hosts: network namespaces on a bridge, each with its own host name, name table and boot id; torchrun over both.

Only the processes' kernel is shared, so this shows rendezvous, addresses, lost hosts and resume, not speed. Needs root.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid

import pytest
import test_run
from test_run import ROOT, assert_same_weights, flags, metrics_of, run_apart, weights_of

LACKING = "root" if os.geteuid() else next((tool for tool in ("ip", "unshare", "mount") if not shutil.which(tool)), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(LACKING), reason=f"two hosts by network namespaces need {LACKING}")]
material = test_run.material

STEPS, PATIENCE_S = 40, 300
APART = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a new store for every round, see the tests of restarts
ADDRESS = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
RESOLVED = "".join(f"{address} {name}\n" for name, address in ADDRESS.items())
BOOT = (
    'mount --bind "$1" /etc/hosts && mount --bind "$2" /proc/sys/kernel/random/boot_id && hostname "$3" && shift 3 && exec "$@"'
)


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def wait_for(condition, *hosts, deadline_s=PATIENCE_S):
    """Seconds until `condition()` holds; fails with the hosts' last words if torchrun failed or ended, or the time is over."""
    began = time.monotonic()
    while not condition():
        codes = [host.process.poll() for host in hosts]
        ended = any(codes) or (codes and None not in codes)
        if (ended and not condition()) or time.monotonic() - began > deadline_s:
            why = f"torchrun ended with {codes}" if ended else f"waited {deadline_s} s in vain"
            pytest.fail(why + "".join(f"\n{host.name}: {host.said()[-2000:]}" for host in hosts))
        time.sleep(0.05)
    return time.monotonic() - began


class Host:
    """A network namespace on the switch, what it needs lying in `folder`."""

    def __init__(self, name, switch, folder):
        self.name, self.switch, self.folder = name, switch, folder
        self.space, self.process, self.log = f"{switch}-{name}", None, folder / f"{name}.log"
        self.table, self.boot_id = folder / f"{name}.hosts", folder / f"{name}.boot_id"
        self.resolve(RESOLVED)

    def resolve(self, lines):
        self.table.write_text("127.0.0.1 localhost\n" + lines)

    def boot(self):
        """The host is new to the network and to its peers, its sockets of before unknown."""
        self.boot_id.write_text(f"{uuid.uuid4()}\n")
        ip("netns", "add", self.space)
        port = ("type", "veth", "peer", "name", self.name, "netns", self.switch)
        ip("link", "add", "eth0", "netns", self.space, *port)
        ip("-n", self.switch, "link", "set", self.name, "master", "switch", "up")
        ip("-n", self.space, "addr", "add", f"{ADDRESS[self.name]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.space, "link", "set", device, "up")

    def give_up_connections_after(self, retries):
        line = f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2"
        ip("netns", "exec", self.space, "sh", "-c", line)

    def torchrun(self, words, *options, script=ROOT / "baseline_mtp.py", **env):
        """Start the line that is the same on both hosts, but for `options` and `env`."""
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node-a:29500", "--rdzv-id", "x"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous, *options]
        inside = [
            "ip",
            "netns",
            "exec",
            self.space,
            "unshare",
            "--uts",
            "sh",
            "-c",
            BOOT,
            "sh",
            self.table,
            self.boot_id,
            self.name,
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
        with open(self.log, "ab") as log:
            line = [*inside, *command, script, *words]
            self.process = subprocess.Popen(line, env=env, stdout=log, stderr=subprocess.STDOUT)

    def said(self):
        return self.log.read_text(errors="replace")

    def kill_workers(self):
        workers = {int(pid) for pid in ip("netns", "pids", self.space).split()} - {self.process.pid}
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGKILL)

    def die(self):
        """Power off: the cable falls silent first, so that no peer hears of a closed connection."""
        for change in (["set", self.name, "down"], ["del", self.name]):
            subprocess.run(["ip", "-n", self.switch, "link", *change], capture_output=True)  # not there if booting failed
            self.clear()
        ip("netns", "del", self.space)

    def clear(self):
        for pid in ip("netns", "pids", self.space).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if self.process:
            self.process.wait()
        wait_for(lambda: not ip("netns", "pids", self.space).split(), deadline_s=30)


@pytest.fixture
def hosts(tmp_path):
    switch = f"wmtp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", switch], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"two hosts by network namespaces: {made.stderr.strip()}")
    pair = [Host(name, switch, tmp_path) for name in ADDRESS]
    try:
        ip("-n", switch, "link", "add", "name", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for host in pair:
            host.boot()
        yield pair
    finally:
        there = {line.split()[0] for line in ip("netns", "list").splitlines()}
        for host in pair:
            if host.space in there:
                host.die()
        ip("netns", "del", switch)


@pytest.fixture(scope="module")
def one_host(material, tmp_path_factory):
    """The run of 2 ranks on one host that all runs here must equal bit for bit."""
    run_dir = tmp_path_factory.mktemp("one_host") / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_apart(flags(material, run_dir, max_steps=STEPS), launcher)
    assert done.returncode == 0, done.stderr
    return run_dir


def start(hosts, words, *options, **env):
    for host in hosts:
        host.torchrun(words, *options, **env)


def wait_until_interrupted_hurts(run_dir, *hosts):
    """Past a checkpoint, and updates after it."""

    def far_enough():
        metrics = run_dir / "metrics.jsonl"
        complete = list(run_dir.glob("checkpoints/step_*/meta.json"))
        return complete and metrics.exists() and metrics.read_bytes().count(b"\n") >= 9

    wait_for(far_enough, *hosts)


def wait_for_the_end(run_dir, *hosts):
    """torchrun ends with 0 on both."""
    wait_for(lambda: all(host.process.poll() is not None for host in hosts), *hosts)
    assert [host.process.returncode for host in hosts] == [0, 0], "\n".join(host.said()[-2000:] for host in hosts)
    assert (run_dir / "model").is_dir()


def assert_equals(run_dir, one_host):
    assert metrics_of(run_dir) == metrics_of(one_host)
    assert_same_weights(weights_of(run_dir), weights_of(one_host))


# What two hosts need to find one another: name tables of each, options of each, environment of both
NETWORKS = {
    "host names resolve": (RESOLVED, RESOLVED, [[], []], {}),
    "own host name at 127.0.1.1": (
        RESOLVED.replace("10.77.0.1", "127.0.1.1"),
        RESOLVED.replace("10.77.0.2", "127.0.1.1"),
        [[], []],
        dict(GLOO_SOCKET_IFNAME="eth0"),
    ),
    "no host name resolves": (
        "",
        "",
        [
            ["--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-conf", f"is_host={int(name == 'node-a')}", "--local-addr", address]
            for name, address in ADDRESS.items()
        ],
        dict(GLOO_SOCKET_IFNAME="eth0"),
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_two_hosts_equal_one_bit_for_bit(material, hosts, one_host, tmp_path, network):
    run_dir = tmp_path / "run"
    *tables, options, env = NETWORKS[network]
    for host, table, own in zip(hosts, tables, options):
        host.resolve(table)
        host.torchrun(flags(material, run_dir, max_steps=STEPS), *own, **env)
    wait_for_the_end(run_dir, *hosts)
    assert "2 rank(s)" in hosts[0].said()
    assert_equals(run_dir, one_host)


@pytest.mark.parametrize("number", [0, 1], ids=["rank 0", "rank 1"])
def test_killed_workers_of_a_host_start_again_by_themselves(material, hosts, one_host, tmp_path, number):
    """torchrun lives on both hosts; rank 0 leaves its lock behind.

    By default torchrun 2.13 keeps one store for all rounds: a rank that is back first takes the address that its peer had in
    the round before, and is refused there until no restart is left.
    """
    run_dir = tmp_path / "run"
    start(hosts, flags(material, run_dir, max_steps=STEPS), "--max-restarts", "2", **APART)
    wait_until_interrupted_hurts(run_dir, *hosts)
    hosts[number].kill_workers()
    assert not (run_dir / "model").exists(), "the run ended before it could be killed"
    seconds = wait_for(lambda: "resume    from" in hosts[0].said(), *hosts)
    print(f"workers of {hosts[number].name} killed; resumed after {seconds:.1f} s")
    wait_for_the_end(run_dir, *hosts)
    if number == 0:
        assert "was left by" in hosts[0].said()
    assert_equals(run_dir, one_host)


def test_a_lost_host_comes_back_to_the_one_that_stayed(material, hosts, one_host, tmp_path):
    """No connection is reset, so the other waits; the same line on the host started anew lets both go on.

    By default torchrun's agents share a store whose address the newcomer never learns (60 s, then both end with 1).
    """
    run_dir = tmp_path / "run"
    words, options = flags(material, run_dir, max_steps=STEPS), ("--max-restarts", "2")
    start(hosts, words, *options, **APART)
    wait_until_interrupted_hurts(run_dir, *hosts)
    stayed, lost = hosts
    lost.die()
    assert not (run_dir / "model").exists(), "the run ended before the host was lost"
    lost.boot()
    lost.torchrun(words, *options, **APART)
    seconds = wait_for(lambda: "resume    from" in stayed.said(), *hosts)
    print(f"host of rank 1 back; resumed {seconds:.1f} s after its start")
    wait_for_the_end(run_dir, *hosts)
    assert_equals(run_dir, one_host)


def test_without_the_host_of_the_rendezvous_the_other_ends_and_both_go_on(material, hosts, one_host, tmp_path):
    """The host with rank 0, the rendezvous and the lock is lost: torchrun on the other one gives up by itself.

    It does so when the system gives the connection up: after 16 minutes by default, here after 5 retries.
    """
    run_dir = tmp_path / "run"
    for host in hosts:
        host.give_up_connections_after(retries=5)
    words = flags(material, run_dir, max_steps=STEPS)
    start(hosts, words, "--max-restarts", "2", **APART)
    wait_until_interrupted_hurts(run_dir, *hosts)
    lost, stayed = hosts
    lost.die()
    assert not (run_dir / "model").exists(), "the run ended before the host was lost"
    seconds = wait_for(lambda: stayed.process.poll() is not None, stayed)
    assert stayed.process.returncode == 1
    print(f"host of rank 0 lost; torchrun on the other ended after {seconds:.1f} s")
    lost.boot()
    start(hosts, words, "--max-restarts", "2", **APART)
    seconds = wait_for(lambda: "resume    from" in lost.said(), *hosts)
    print(f"both lines again; resumed after {seconds:.1f} s")
    assert "waiting 40 s for a sign of life" in lost.said() and "which has gone; taken over" in lost.said()
    wait_for_the_end(run_dir, *hosts)
    assert_equals(run_dir, one_host)


def test_a_rank_does_not_wait_for_a_lost_host_longer_than_its_patience(material, hosts, tmp_path):
    """10 minutes within the updates, here 15 s; 2 hours (here 3 minutes) before and after them."""
    run_dir, script = tmp_path / "run", tmp_path / "impatient.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import baseline_mtp, common
whole = common.Ranks.patience
common.Ranks.patience = lambda self, minutes: whole(self, minutes / 40)
common.run_script(baseline_mtp.main, baseline_mtp.Args, "")
""")
    start(hosts, flags(material, run_dir, max_steps=STEPS), script=script)
    wait_until_interrupted_hurts(run_dir, *hosts)
    stayed, lost = hosts
    lost.die()
    assert not (run_dir / "model").exists(), "the run ended before the host was lost"
    seconds = wait_for(lambda: stayed.process.poll() is not None, stayed, deadline_s=60)
    assert stayed.process.returncode == 1 and "Timed out waiting 15000ms" in stayed.said()
    print(f"host of rank 1 lost; the other ended after {seconds:.1f} s")
