"""grpo_wmtp.py: rollouts against the training forward, weights and losses by hand, exact toys, runs.

Shapes: B batch, T positions, K heads, G completions of a group, N completions.
"""

import pytest
import torch
from test_decoding import CHAINS, NEW, learn_chain
from test_model import make_model

import common
from common import generate, unsharded
from conftest import on_ranks

# ------------------------------------------------------------------------------------- rollouts


def texts_of_a_shard(ranks, model):
    """Twice texts of other lengths on each rank, from a model whose every layer is sharded."""
    common.SMALL_LAYER = 0
    model, texts = common.shard(model, ranks), []
    for _ in range(2):
        with unsharded(model):
            prompts = CHAINS[2 * ranks.rank : 2 * ranks.rank + 2]
            done = generate(model, prompts, NEW // (1 + ranks.rank), None, 3, 1.0)
        texts.append((done.tokens, done.forwards))
    parameters = [type(p).__name__ for p in model.parameters()]
    return texts, parameters


def test_a_sharded_model_generates_what_the_whole_one_does():
    """Two ranks that take other numbers of passes; afterwards every parameter is sharded again."""
    model = learn_chain(make_model("llama", 3, num_hidden_layers=4), 3, 40)
    seen = on_ranks(texts_of_a_shard, model)
    for rank, (texts, parameters) in enumerate(seen):
        done = generate(model, CHAINS[2 * rank : 2 * rank + 2], NEW // (1 + rank), None, 3, 1.0)
        assert texts == [(done.tokens, done.forwards)] * 2
        assert set(parameters) == {"DTensor"}
    assert seen[0][0][0][1] != seen[1][0][0][1]
