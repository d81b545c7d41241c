"""Any number of ranks: the same curve, gradients, collectives of plain training, a share of the bytes.

Run as a script, this file imports torch once and forks the ranks of every job below; the tests judge what they leave.
"""

import gc
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # as a script

import baseline_mtp  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import runs  # noqa: E402

SEQ_LEN, HEADS = 32, 4
CONFIG = dict(  # 259 rows of the vocabulary divide by no number of ranks
    model_type="llama", vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    bos_token_id=None, initializer_range=0.1,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------- what the ranks compute
def train(folder, name, steps, **changes):
    """The training command; `metrics.jsonl` is its result."""
    values = dict(
        run_dir=folder / name, model=folder / "train.json", data=folder / "records.jsonl", seq_len=SEQ_LEN, batch_size=8,
        lr=3e-3, warmup_steps=5, max_steps=steps, mtp_schedule="constant", tracker="none", device="cpu", dtype="fp32",
    )  # fmt: skip
    values |= changes
    sys.argv = ["baseline_mtp.py", *(str(w) for k, v in values.items() for w in (f"--{k.replace('_', '-')}", v))]
    common.run_script(baseline_mtp.main, baseline_mtp.Args, "test")


def heldout(folder, name):
    """The held-out rows of those runs."""
    loaded = data.load_data(str(folder / "records.jsonl"), common.load_tokenizer(None), SEQ_LEN, 0, 0.0, common.Ranks())
    return {column: np.array(loaded.heldout[column]) for column in ("document", "is_target")}


def small_model(recompute=False):
    """2 layers of trunk and 4 heads; norms off 1, so that their gradients matter."""
    torch.manual_seed(0)
    model = common.from_config(transformers.LlamaConfig(**CONFIG), HEADS).train()
    for p in model.parameters():
        nn.init.uniform_(p, 0.5, 1.5) if p.ndim == 1 else None
    model.heads.recompute = recompute
    return model


CASES = {  # targets of each micro-step, a word a rank
    "one shard without targets": ["full none"],
    "one shard without targets of heads 2 to 4": ["pairs full"],
    "one shard without targets of heads 2 to 4, one without any": ["pairs none"],
    "one micro-step without targets": ["none none", "none full"],
    "accumulated": ["full pairs", "none full", "full full"],
    "no target at all": ["none none"],
}


def rows_of(case):
    """Tokens, documents, is_target, `[S, R, B, T]` each, and weights `[S, R, K, B, T]` of a case."""
    random, kinds = np.random.default_rng(1), [step.split() for step in CASES[case]]
    shape = (len(kinds), 2, 2, 12)
    x, document = random.integers(3, 259, shape), np.broadcast_to(np.arange(12) // 8, shape).copy()
    is_target = random.random(shape) < 0.8
    for step, rank in np.ndindex(shape[:2]):
        if kinds[step][rank] == "pairs":  # documents of two tokens: head 1 alone can predict within one
            document[step, rank], is_target[step, rank] = np.arange(12) // 2, True
        if kinds[step][rank] == "none":
            is_target[step, rank] = False
    return x, document, is_target, random.uniform(0.5, 1.5, (*shape[:2], HEADS, *shape[2:])).astype(np.float32)


def gradients(folder, name):
    """Gradients of every case on the sharded model, gathered whole."""
    ranks, found, small = common.setup_ranks("cpu", "fp32"), {}, common.SMALL
    for recompute in (False, True, "small"):  # groups of layers, and all in the root's
        common.SMALL = small if recompute == "small" else 0
        model = common.shard(small_model(recompute is True), ranks)
        for case in CASES:
            x, document, is_target, weight = rows_of(case)
            mine = [
                (torch.from_numpy(x[s, r]), torch.from_numpy(data.make_targets(x[s, r], document[s, r], is_target[s, r], HEADS)))
                for s in range(len(x))
                for r in [ranks.rank]
            ]
            count = ranks.gather(sum((targets[0] != common.IGNORE).sum() for _, targets in mine)).sum().clamp(min=1)
            for s, (x_BT, targets_KBT) in enumerate(mine):
                common.set_gradient_sync(model, s == len(mine) - 1)
                loss_KBT = model(x_BT, targets_KBT)
                ((torch.from_numpy(weight[s, ranks.rank]) * loss_KBT).sum() / count).backward()
            found[case, recompute] = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
            model.zero_grad(set_to_none=True)
    return found


class Counted(TorchDispatchMode):
    """Counts the collectives within. (CommDebugMode sees the same ones, but fails at times on recomputed layers.)"""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def collectives(folder, name):
    """Collectives of forward and backward: ours, and a plain model sharded layer by layer with ordinary cross entropy."""
    ranks, found, small, common.SMALL = common.setup_ranks("cpu", "fp32"), {}, common.SMALL, 0
    x = torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(ranks.rank))

    def plain(layers, recompute=False):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG | {"num_hidden_layers": layers})).train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        logits = lambda: model(input_ids=x, use_cache=False).logits[:, :-1]  # noqa: E731
        return counted(lambda: F.cross_entropy(logits().flatten(0, 1), x[:, 1:].flatten()).backward())

    def ours(active=HEADS, recompute=False, micro_steps=1):
        model = common.shard(small_model(recompute), ranks)
        documents, is_target = np.zeros(x.shape, int), np.ones(x.shape, bool)
        targets = torch.from_numpy(data.make_targets(x.numpy(), documents, is_target, active))

        def step():
            for number in range(1, micro_steps + 1):
                common.set_gradient_sync(model, number == micro_steps)
                model(x, targets).sum().backward()

        return counted(step)

    def counted(step):
        with Counted() as seen:
            step()
        return seen.counts

    found = {f"plain {layers}": plain(layers) for layers in (3, 4, 6)} | {"plain recomputed": plain(6, recompute=True)}
    found |= {f"ours {active}": ours(active) for active in (1, 2, 4)}
    found |= {"ours recomputed": ours(recompute=True), "ours accumulated": ours(micro_steps=4)}
    common.SMALL = small
    return found | {"ours small": ours()}


def local_bytes(folder, name):
    """Bytes of this rank after an update: of each of its shards, and of the memory they lie in."""

    def memory(tensors):
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    def alive():
        return [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]

    ranks = common.setup_ranks("cpu", "fp32")
    before = memory(alive())
    model = common.shard(small_model(), ranks)
    optimizer = runs.make_optimizer(model, 1e-3, 0.1)
    x = torch.arange(24).view(2, 12)
    model(x, x.expand(HEADS, -1, -1)).sum().backward()
    optimizer.step()
    kinds = {"parameter": lambda p: p, "gradient": lambda p: p.grad}
    kinds |= {k: lambda p, k=k: optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq", "step")}
    found = {}
    for kind, of in kinds.items():
        tensors = {n: of(p).detach() for n, p in model.named_parameters()}
        local = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in tensors.items()}
        found[kind] = {n: t.nbytes for n, t in local.items()}, sum(memory(local.values()).values())
    gc.collect()
    found["alive"] = sum(v for k, v in memory(alive()).items() if before.get(k) != v)
    return found


SCHEDULES = {"constant": 50, "forward": 8}  # and updates
JOBS = {f"{s} {n}": (n, train, dict(mtp_schedule=s, steps=steps)) for s, steps in SCHEDULES.items() for n in (1, 2, 4)}
JOBS |= {f"16 rows {n}": (n, train, dict(batch_size=16, steps=6)) for n in (1, 2)}
JOBS |= {"16 rows accumulated": (2, train, dict(batch_size=16, micro_batch_size=2, steps=6))}
JOBS |= {
    f"forward accumulated {n}": (n, train, dict(batch_size=16, micro_batch_size=2, mtp_schedule="forward", steps=8))
    for n in (1, 2)
}
JOBS |= {"heldout": (1, heldout, {}), "gradients": (2, gradients, {}), "collectives": (2, collectives, {})}
JOBS |= {f"bytes {n}": (n, local_bytes, {}) for n in (2, 4)}


def run_rank(folder, name, rank, port):
    size, job, options = JOBS[name]
    if size > 1:  # the environment that torchrun gives
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost")
        os.environ |= dict(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    result = job(folder, name, **options)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    torch.save(result, folder / f"{name}.{rank}")


def hold_store(port):
    """Serve the store that the ranks of a job meet at until killed.

    In a process of its own: where the forking process served it, a rank could inherit a lock that the server's thread held.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    signal.pause()


def run_jobs(folder, names):
    """Run the jobs one after the other; `exit.json` holds the exit codes of their ranks, None for one that hung."""
    import datasets  # noqa: F401  once, not in every rank, as what a model needs

    common.build_model(str(folder / "train.json"), HEADS)
    context, codes = multiprocessing.get_context("fork"), {}
    for name in names:
        received, port = context.Pipe(duplex=False)
        store = context.Process(target=hold_store, args=(port,))
        store.start()
        at = received.recv()
        processes = [context.Process(target=run_rank, args=(folder, name, rank, at)) for rank in range(JOBS[name][0])]
        for process in processes:
            process.start()
        deadline = time.time() + 600
        for process in processes:
            process.join(max(0, deadline - time.time()))
        codes[name] = [process.exitcode for process in processes]
        for process in [*processes, store]:
            process.kill()
            process.join()
    (folder / "exit.json").write_text(json.dumps(codes))


# ------------------------------------------------------------------------------------------------------------------- tests
@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A function from the name of a job to what its ranks returned; all jobs run once, before the first test."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 5}))
    random = np.random.default_rng(0)
    text = lambda least, most: "".join(random.choice(list("ab(x)=+ "), random.integers(least, most)))  # noqa: E731
    records = [{"prompt": text(0, 10), "completion": text(1, 20)} for _ in range(310)]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "exit.json").read_text())

    def of(name):
        assert codes[name] == [0] * JOBS[name][0], f"{name}: exit codes {codes[name]}\n{done.stderr[-4000:]}"
        if JOBS[name][1] is train:
            return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in range(JOBS[name][0])]

    return of


def assert_same_curve(a, b, heldout_counts):
    """Every figure within 1e-5, of all updates and held out; of the held-out tokens one may change its most likely token."""
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert one.keys() == other.keys()
        for key in one.keys() - {"perf/tokens_per_s"}:
            where = f"step {one['step']}, {key}"
            if "acc_head" in key:
                assert abs(one[key] - other[key]) * heldout_counts[int(key[-1]) - 1] < 1.5, where
            else:
                assert other[key] == pytest.approx(one[key], rel=1e-5), where


@pytest.fixture(scope="module")
def heldout_counts(outcome):
    """Held-out targets of each head."""
    rows = outcome("heldout")[0]
    assert -len(rows["document"]) % 4 != -len(rows["document"]) % 16, "as many rows past the end of the data on either side"
    same = [rows["document"][:, k:] == rows["document"][:, :-k] for k in range(1, HEADS + 1)]
    return [int((rows["is_target"][:, k:] & s).sum()) for k, s in enumerate(same, start=1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [2, 4])
def test_ranks_train_the_same_curve(outcome, heldout_counts, schedule, n):
    one = outcome(f"{schedule} 1")
    assert_same_curve(one, outcome(f"{schedule} {n}"), heldout_counts)
    heads = [sum(key.startswith("train/loss_head") for key in line) for line in one[:-1]]
    assert heads == ([1, 1, 2, 2, 3, 3, 4, 4] if schedule == "forward" else 50 * [4])


@pytest.mark.parametrize("other", ["16 rows accumulated", "16 rows 1"])
def test_accumulation_on_two_ranks_equals_one_large_batch(outcome, heldout_counts, other):
    """4 micro-steps of 2 rows a rank, 1 of 8 rows, and 16 rows in one process."""
    assert_same_curve(outcome("16 rows 2"), outcome(other), heldout_counts)


def test_a_curriculum_with_accumulation_on_two_ranks_equals_one(outcome, heldout_counts):
    """Heads that have never run stand beside those that keep their gradients from one micro-step to the next."""
    assert_same_curve(outcome("forward accumulated 1"), outcome("forward accumulated 2"), heldout_counts)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_shards_without_targets_equal_a_plain_loop(outcome, case):
    """Against a plain model for each head, target by target in one process."""
    model = small_model()
    config = transformers.LlamaConfig(**CONFIG | {"num_hidden_layers": len(model.trunk_layers) + 1})
    x, document, is_target, weight = rows_of(case)
    losses, count = [], 0
    for k, head in enumerate(model.heads.layers, start=1):
        plain = transformers.LlamaForCausalLM(config)
        plain.model.embed_tokens, plain.lm_head = model.causal_lm.model.embed_tokens, model.causal_lm.lm_head
        plain.model.layers, plain.model.norm = nn.ModuleList([*model.trunk_layers, head]), model.causal_lm.model.norm
        for s, r, b in np.ndindex(x.shape[:3]):
            log_p = plain(input_ids=torch.from_numpy(x[s, r, b])[None], use_cache=False).logits[0].log_softmax(-1)
            for t in range(x.shape[3] - k):
                if is_target[s, r, b, t + k] and document[s, r, b, t] == document[s, r, b, t + k]:
                    losses.append(-weight[s, r, k - 1, b, t].item() * log_p[t, x[s, r, b, t + k]])
                    count += k == 1
    if losses:
        (sum(losses) / count).backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for found in [rank[case, recompute] for rank in outcome("gradients") for recompute in (False, True, "small")]:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            atol = 1e-5 * value.abs().max().item()
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_makes_the_collectives_of_plain_training(outcome):
    for found in outcome("collectives"):
        gather, scatter = "_allgather_base_", "_reduce_scatter_base_"
        assert found["plain 6"] == {gather: 13, scatter: 7}  # 6 layers and the root forward, the layers again backward
        for layers, active in ((6, 4), (4, 2), (3, 1)):  # a head that does not train costs none
            assert found[f"ours {active}"] == found[f"plain {layers}"]
        assert found["ours recomputed"] == found["plain recomputed"] == found["plain 6"]  # gathered once for both
        assert found["ours accumulated"] == {gather: 4 * 13, scatter: 7}  # gradients travel once an update
        assert found["ours small"] == {gather: 1, scatter: 1}


@pytest.mark.parametrize("n", [2, 4])
def test_each_rank_holds_its_share_alone(outcome, n):
    """Of parameters, gradients and moments: 1/n of the rows of the first dimension, rounded up; and nothing whole besides."""
    shapes = {name: p.shape for name, p in small_model().named_parameters()}
    for rank, found in enumerate(outcome(f"bytes {n}")):
        padded = sum(4 * math.ceil(rows / n) * math.prod(rest) for rows, *rest in shapes.values())
        for kind in ("parameter", "gradient", "exp_avg", "exp_avg_sq"):
            own, held = found[kind]
            for name, (rows, *rest) in shapes.items():
                share = math.ceil(rows / n)
                assert own[name] == 4 * max(0, min(share, rows - rank * share)) * math.prod(rest), (kind, name)
            assert sum(own.values()) <= held <= padded, kind
        assert found["step"] == (dict.fromkeys(shapes, 4), 4 * len(shapes))
        assert found["alive"] < 4 * padded + 4 * len(shapes) + 1024  # input and rotary tables; the smallest matrix has 2048


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]), JOBS)
