"""What the benchmarks count with, against arithmetic by hand."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

import common

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # last: it has a decoding.py too
from flops import counted_flops  # noqa: E402


@pytest.mark.parametrize("tile", [(8, 100), (1024, 2048)])
def test_counted_flops_are_those_of_the_formula(tile):
    B, T, D, I, L, V, H = 2, 16, 32, 48, 4, 259, 3  # noqa: E741
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=I, num_hidden_layers=L, num_attention_heads=4, tie_word_embeddings=False
    )
    model = common.from_config(config, H).train()
    model.tile = tile
    x_BT, targets_KBT = torch.randint(0, V, (B, T)), torch.randint(0, V, (H, B, T))
    layers = L * (6 * B * T * (4 * D * D + 3 * D * I) + 7 * B * T * T * D)  # causal attention: 2 forward, 5 backward
    loss = (6 if tile == (1024, 2048) else 8) * H * B * T * D * V  # three products, four where the logits are made again
    assert counted_flops(lambda: model(x_BT, targets_KBT).sum().backward()) == layers + loss
