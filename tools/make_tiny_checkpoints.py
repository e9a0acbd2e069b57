"""Writes tiny random Mixture-of-Experts checkpoints, one per architecture, for tests of the serving path.

    python tools/make_tiny_checkpoints.py OUT [NAME ...]

Weights are normal with standard deviation 0.2, so that activations have ordinary magnitudes (vLLM's dummy weights are
about 1e-3, where any threshold silences every neuron). Each folder holds config.json, model.safetensors (bf16) and a
byte-level tokenizer of 258 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 258
STANDARD_DEVIATION = 0.2

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "initializer_range": STANDARD_DEVIATION,
    "tie_word_embeddings": False,
}


def _olmoe() -> tuple[Any, Any]:
    config = transformers.OlmoeConfig(**_COMMON, intermediate_size=96, num_experts=8, num_experts_per_tok=3)
    return config, transformers.OlmoeForCausalLM


def _mixtral() -> tuple[Any, Any]:
    config = transformers.MixtralConfig(**_COMMON, intermediate_size=96, num_local_experts=6, num_experts_per_tok=2)
    return config, transformers.MixtralForCausalLM


def _qwen3_moe() -> tuple[Any, Any]:
    config = transformers.Qwen3MoeConfig(
        **_COMMON,
        intermediate_size=128,
        moe_intermediate_size=88,
        num_experts=8,
        num_experts_per_tok=4,
        head_dim=32,
        norm_topk_prob=True,
    )
    return config, transformers.Qwen3MoeForCausalLM


def _qwen2_moe() -> tuple[Any, Any]:
    config = transformers.Qwen2MoeConfig(
        **_COMMON,
        intermediate_size=128,
        moe_intermediate_size=80,
        shared_expert_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=4,
    )
    return config, transformers.Qwen2MoeForCausalLM


def _granite_moe() -> tuple[Any, Any]:
    config = transformers.GraniteMoeConfig(
        **_COMMON, intermediate_size=96, num_local_experts=8, num_experts_per_tok=4, residual_multiplier=0.5
    )
    return config, transformers.GraniteMoeForCausalLM


def _deepseek_v2() -> tuple[Any, Any]:
    common = {**_COMMON, "num_hidden_layers": 3}
    config = transformers.DeepseekV2Config(
        **common,
        intermediate_size=128,
        moe_intermediate_size=88,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        kv_lora_rank=512,  # the latent attention kernels know 512 + 64 only
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
    )
    return config, transformers.DeepseekV2ForCausalLM


def _gpt_oss() -> tuple[Any, Any]:
    config = transformers.GptOssConfig(
        **_COMMON,
        intermediate_size=96,
        num_local_experts=8,
        num_experts_per_tok=4,
        head_dim=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    return config, transformers.GptOssForCausalLM


_LINEAR_ATTENTION = {
    "moe_intermediate_size": 88,
    "shared_expert_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "head_dim": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}


def _qwen3_next() -> tuple[Any, Any]:
    config = transformers.Qwen3NextConfig(**_COMMON, intermediate_size=128, norm_topk_prob=True, **_LINEAR_ATTENTION)
    return config, transformers.Qwen3NextForCausalLM


def _qwen35_moe() -> tuple[Any, Any]:
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 16,
    }
    config = transformers.Qwen3_5MoeConfig(text_config={**_COMMON, **_LINEAR_ATTENTION}, vision_config=vision)
    return config, transformers.Qwen3_5MoeForConditionalGeneration


def _llama4() -> tuple[Any, Any]:
    config = transformers.Llama4TextConfig(
        **_COMMON,
        intermediate_size=96,
        intermediate_size_mlp=128,
        num_local_experts=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        head_dim=32,
        attention_chunk_size=128,
    )
    return config, transformers.Llama4ForCausalLM


ARCHITECTURES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "qwen3-moe": _qwen3_moe,
    "qwen2-moe": _qwen2_moe,
    "granite-moe": _granite_moe,
    "deepseek-v2": _deepseek_v2,
    "gpt-oss": _gpt_oss,
    "llama4": _llama4,
    "qwen3-next": _qwen3_next,
    "qwen3.5-moe": _qwen35_moe,
}


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer with one token per byte, then <bos> and <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.save_pretrained(folder)


def make(name: str, out: Path, seed: int) -> Path:
    """Writes checkpoint ``name`` to out/name and returns that folder."""
    torch.manual_seed(seed)
    config, kind = ARCHITECTURES[name]()
    model = kind(config)
    with torch.no_grad():  # some models do not initialise every tensor from initializer_range
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in key or "sinks" in key:
                parameter.normal_(0.0, STANDARD_DEVIATION)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", choices=[*ARCHITECTURES, []], metavar="NAME", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.names or ARCHITECTURES:
        print(make(name, args.out, args.seed))


if __name__ == "__main__":
    main()
