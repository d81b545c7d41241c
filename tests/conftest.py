"""What the tests share: small material, short runs in this process, ranks in forked processes.

Nothing is looked up on a hub: a name that does not exist must fail at once. One thread a process:
the models are tiny, and threads of several processes on two cores wait for each other.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import pickle
import random
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one

# Five layers: with four heads a trunk of one is left
CONFIG = dict(model_type="llama", vocab_size=259, hidden_size=32, intermediate_size=64)
CONFIG.update(num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
CONFIG.update(max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.1)
CONFIG.update(pad_token_id=0, eos_token_id=1, bos_token_id=None)
SHORT_RUN = dict(seq_len=32, batch_size=8, lr=3e-3, warmup_steps=2, max_steps=6, save_every=0)
SHORT_RUN.update(mtp_schedule="constant", value_steps=5, tracker="none", device="cpu", dtype="fp32")


def write_lines(file, records):
    """Write one JSON object a line; returns the file."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def small_texts(number, seed):
    """Documents of 4 to 24 lines of words as in code."""
    words = "def return for in if x y total ( ) : + = 0 1".split()
    choose = random.Random(seed)
    texts = []
    for _ in range(number):
        lines = [choose.choices(words, k=5) for _ in range(choose.randint(4, 24))]
        texts.append("".join(" ".join(line) + "\n" for line in lines))
    return texts


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """Folder with `config.json` (a small model), `text.jsonl` (60 documents) and the data cache."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_lines(folder / "text.jsonl", [{"text": text} for text in small_texts(60, seed=0)])
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return folder


@pytest.fixture
def chunked(monkeypatch):
    """`chunked(n)` makes the loss take n tokens at a time; None: as many as it takes by itself."""
    import common

    token_losses = common.token_losses

    def set_chunk(chunk):
        chunks = functools.partial(token_losses, chunk=chunk)
        monkeypatch.setattr(common, "token_losses", chunks)

    return set_chunk


def short_args(script_module, material, run_dir, **changes):
    """`Args` of a script for a short run on the small material; `changes` are fields of them."""
    values = SHORT_RUN | {"run_dir": run_dir, "model": material / "config.json"}
    values |= {"data": material / "text.jsonl"} | changes
    fields = {field.name for field in dataclasses.fields(script_module.Args)}
    unknown = changes.keys() - fields
    assert not unknown, f"{script_module.__name__}.Args has no field {unknown}"
    values = {name: value for name, value in values.items() if name in fields}
    values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    return script_module.Args(**values)


def run_main(script_module, args):
    """Run `main(args)` in this process; returns its exit code. A `UsageError` passes through."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kinds = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(kind) for kind in kinds]
    try:
        script_module.main(args)
    except SystemExit as stop:
        return stop.code
    finally:
        for kind, handler in zip(kinds, handlers):
            signal.signal(kind, handler)
    return 0


def metrics_of(run_dir, without=("perf/",)):
    """Lines of `metrics.jsonl`, without what begins so: speeds differ from run to run."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(without)}
        for line in lines
    ]


def weights_of(run_dir):
    """All tensors that the run left in `model/`."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted((Path(run_dir) / "model").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_tensors(one, other):
    """The same names, and the same bits in each tensor."""
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(call, *words):
    """`call` raises a `UsageError` of one line that holds every word."""
    import common

    with pytest.raises(common.UsageError) as caught:
        call()
    message = str(caught.value)
    del caught  # its frames hold the lock of the refused run
    assert "\n" not in message
    assert all(word in message for word in words), message


def slow_bounded(powers, epsilon, max_weight):
    """Powers times the factor with which their clipped mean is 1, by scipy's root finder."""
    import numpy as np
    from scipy.optimize import brentq

    def clipped(log_factor):
        return np.clip(np.exp(log_factor) * np.asarray(powers, float), epsilon, max_weight)

    return clipped(brentq(lambda c: clipped(c).mean() - 1, -60, 60, xtol=1e-12)).tolist()


def data_args(data, **changes):
    """Arguments of `load_data`."""
    defaults = dict(heldout_data="", seq_len=32, seed=0, noise_frac=0.0, noise_by="line")
    return SimpleNamespace(data=str(data), **{**defaults, **changes})


def bytes_tokenizer():
    import transformers

    return transformers.ByT5Tokenizer(extra_ids=0)


def make_small_model(folder, num_labels, kind="LlamaForSequenceClassification"):
    """Save a small model with random weights and the bytes tokenizer; returns the folder's name."""
    import torch
    import transformers

    torch.manual_seed(num_labels)
    config = transformers.LlamaConfig(**CONFIG, num_labels=num_labels)
    getattr(transformers, kind)(config).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return str(folder)


def on_ranks(function, *arguments, world_size=2):
    """What `function(ranks, *arguments)` returns on each rank: forked processes in one gloo group.

    No backward pass inside: torch's autograd does not survive a fork.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results, processes = [], []
    for rank in range(world_size):
        receiver, sender = fork.Pipe(duplex=False)
        work = (sender, rank, world_size, port, function, arguments)
        processes.append(fork.Process(target=_work_on_rank, args=work, daemon=True))
        results.append(receiver)
        processes[-1].start()
        sender.close()  # so that a rank that dies is the end of the pipe here
    try:
        return [pickle.loads(receiver.recv_bytes()) for receiver in results]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def _work_on_rank(sender, rank, world_size, port, function, arguments):
    import common

    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    result = function(common.setup_ranks("cpu", "fp32"), *arguments)
    sender.send_bytes(pickle.dumps(result))  # tensors would be shared, and end with this process
    sender.close()
