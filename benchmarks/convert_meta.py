"""Convert a checkpoint in Meta's release layout into a folder that `--model` reads.

    python benchmarks/convert_meta.py META_FOLDER OUT
    python baseline_mtp.py --model OUT --data my.jsonl ...

META_FOLDER holds `consolidated.pth` and `params.json` as in facebook/multi-token-prediction:
LLaMA-1 names, rotary pairs interleaved, `extra_heads`. A `tokenizer.json` beside them is copied.
OUT/model gets trunk and head 1 as a plain Hugging Face model, and `mtp_heads.safetensors`.
The file is read as tensors only: it cannot run code.
"""

import json
import sys
from pathlib import Path

import tools
import torch
import transformers

from common import MTPModel, Ranks, load_tokenizer, save_model

NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def config_of(params, tensors):
    vocab_size, width = tensors["output.weight"].shape
    sizes = dict(vocab_size=vocab_size, hidden_size=width, num_hidden_layers=params["n_layers"])
    sizes["intermediate_size"] = tensors["layers.0.feed_forward.w1.weight"].shape[0]
    sizes["num_attention_heads"] = params["n_heads"]
    sizes["num_key_value_heads"] = params.get("n_kv_heads") or params["n_heads"]
    sizes["max_position_embeddings"] = params.get("max_seq_len", 4096)
    sizes |= dict(rms_norm_eps=params["norm_eps"], rope_theta=params.get("rope_theta", 10000.0))
    sizes |= dict(tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaConfig(**sizes)


def layer_state(tensors, prefix, num_attention_heads):
    """One layer's tensors under the names of `transformers`."""
    state = {}
    for old, new in NAMES.items():
        value = tensors[f"{prefix}.{old}.weight"].float()
        if old in ("attention.wq", "attention.wk"):
            # rotary pairs are (2i, 2i+1) there, (i, i + size/2) in transformers
            width = value.shape[1]
            pairs = width // num_attention_heads // 2
            value = value.view(-1, pairs, 2, width).transpose(1, 2).reshape(-1, width)
        state[f"{new}.weight"] = value
    return state


def load_meta(folder):
    """The checkpoint as an `MTPModel`, fp32."""
    params = json.loads((folder / "params.json").read_text())
    file = folder / "consolidated.pth"
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    num_heads = params.get("n_future_tokens", 1)
    num_kept = params["n_layers"] - num_heads + 1  # trunk and head 1
    causal_lm = transformers.LlamaForCausalLM(config_of(params, tensors))
    prefixes = [f"layers.{n}" for n in range(num_kept)]
    prefixes += [f"extra_heads.{n}" for n in range(num_heads - 1)]
    for layer, prefix in zip(causal_lm.model.layers, prefixes, strict=True):
        layer.load_state_dict(layer_state(tensors, prefix, params["n_heads"]))
    modules = dict(tok_embeddings=causal_lm.model.embed_tokens, norm=causal_lm.model.norm)
    modules["output"] = causal_lm.lm_head
    for name, module in modules.items():
        module.load_state_dict({"weight": tensors[f"{name}.weight"].float()})
    extra_heads = list(causal_lm.model.layers[num_kept:])
    causal_lm.model.layers = causal_lm.model.layers[:num_kept]
    causal_lm.config.num_hidden_layers = num_kept
    return MTPModel(causal_lm, extra_heads)


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("meta_folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if (args.out / "model").exists():
        sys.exit(f"error: OUT {args.out}: holds a model already; name a new folder")
    model, tokenizer = load_meta(args.meta_folder), load_tokenizer(args.meta_folder)
    args.out.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, args.out / "model", Ranks())
    num_heads, num_layers = len(model.heads.layers), len(model.trunk_layers)
    print(f"{args.out}/model: {num_heads} heads, {num_layers} trunk layers")


if __name__ == "__main__":
    main()
