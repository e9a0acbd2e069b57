"""A small random model opened by quality/hf.py, and random texts for it."""

from __future__ import annotations

import torch

from cutedsl_kernels.quality.hf import MoEModel


def small_model(seed: int, architecture: str = "olmoe") -> MoEModel:
    import transformers

    torch.manual_seed(seed)
    common = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    if architecture == "mixtral":
        config = transformers.MixtralConfig(**common, intermediate_size=24, num_local_experts=4)
        return MoEModel(transformers.MixtralForCausalLM(config))
    config = transformers.OlmoeConfig(**common, intermediate_size=24, num_experts=4)
    return MoEModel(transformers.OlmoeForCausalLM(config))


def texts(seed: int, count: int = 8, length: int = 48) -> list[list[int]]:
    return torch.randint(40, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
