"""Shapes of routed experts: MoEShape, and the table of models whose shapes are known.

Sources of the table: the published configurations of the models. ``cutoff`` is the largest total sparsity at which the
paper's rule (arXiv 2605.08575) keeps 95 % of the dense five-task mean; None where no figure is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class MoEShape:
    """One routed-expert layer on one rank.

    num_experts: experts held by this rank (E); top_k: experts per token (k); hidden_size: model width (H);
    intermediate_size: neurons of one expert on this rank (I).
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")

    def shard(self, tensor_parallel: int = 1, expert_parallel: int = 1) -> MoEShape:
        """The layer as one of ``tensor_parallel`` x ``expert_parallel`` ranks holds it. ValueError: does not divide."""
        if self.intermediate_size % tensor_parallel:
            raise ValueError(
                f"intermediate_size {self.intermediate_size} does not divide by tensor_parallel {tensor_parallel}"
            )
        if self.num_experts % expert_parallel:
            raise ValueError(f"num_experts {self.num_experts} does not divide by expert_parallel {expert_parallel}")
        return MoEShape(
            self.num_experts // expert_parallel, self.top_k, self.hidden_size, self.intermediate_size // tensor_parallel
        )

    @property
    def key(self) -> str:
        """Stable text form, used in file names: ``E=256,H=2048,I=512,k=8``."""
        return f"E={self.num_experts},H={self.hidden_size},I={self.intermediate_size},k={self.top_k}"

    @classmethod
    def parse(cls, text: str) -> MoEShape:
        """``E,H,I,k``, as on the command line. ValueError: not four positive integers, or k more than E."""
        try:
            experts, hidden, inter, top_k = (int(part) for part in text.split(","))
            shape = cls(experts, top_k, hidden, inter)
        except ValueError:
            raise ValueError(f"must be E,H,I,k as four positive integers, got {text!r}") from None
        if top_k > experts:
            raise ValueError(f"must be E,H,I,k with k at most E, got {text!r}")
        return shape

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MoEShape:
        """Shape of the routed experts of a Hugging Face ``config.json`` (as a dict). UserError if it is not an MoE."""
        text = config.get("text_config") or config
        experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        top_k = _first(text, "num_experts_per_tok", "num_experts_per_token", "top_k", "moe_top_k", "moe_k")
        hidden = _first(text, "hidden_size")
        inter = _first(text, "moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
        if experts is None or top_k is None or hidden is None or inter is None:
            values = {"experts": experts, "experts per token": top_k, "hidden_size": hidden, "intermediate_size": inter}
            missing = ", ".join(name for name, value in values.items() if value is None)
            kind = config.get("model_type") or config.get("architectures") or "unknown"
            raise UserError(f"config of type {kind} is not a Mixture-of-Experts model: no value for {missing}")
        return cls(experts, top_k, hidden, inter)


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, list):  # a few configurations give one value per layer
            value = value[0] if value else None
        if isinstance(value, int) and value > 0:
            return value
    return None


@dataclass(frozen=True)
class KnownModel:
    """A published model: its routed-expert shape, the number of MoE layers, and what is particular about it."""

    name: str
    architecture: str
    shape: MoEShape
    moe_layers: int
    cutoff: float | None
    shared_expert: bool = False
    activation: str = "silu"
    router_weight_on_input: bool = False
    biases: bool = False
    expert_dtype: str = "bf16"


def _table(*models: KnownModel) -> dict[str, KnownModel]:
    return {model.name: model for model in models}


KNOWN_MODELS: dict[str, KnownModel] = _table(
    KnownModel("granite-1b-a400m", "GraniteMoeForCausalLM", MoEShape(32, 8, 1024, 512), 24, 0.265),
    KnownModel("olmoe-1b-7b", "OlmoeForCausalLM", MoEShape(64, 8, 2048, 1024), 16, 0.712),
    KnownModel("deepseek-v2-lite", "DeepseekV2ForCausalLM", MoEShape(64, 6, 2048, 1408), 26, 0.75, shared_expert=True),
    KnownModel(
        "gpt-oss-20b",
        "GptOssForCausalLM",
        MoEShape(32, 4, 2880, 2880),
        24,
        None,
        activation="swigluoai",
        biases=True,
        expert_dtype="mxfp4",
    ),
    KnownModel(
        "qwen3.5-35b-a3b",
        "Qwen3_5MoeForConditionalGeneration",
        MoEShape(256, 8, 2048, 512),
        40,
        0.845,
        shared_expert=True,
    ),
    KnownModel(
        "qwen3.5-122b-a10b",
        "Qwen3_5MoeForConditionalGeneration",
        MoEShape(256, 8, 3072, 1024),
        48,
        0.874,
        shared_expert=True,
    ),
    KnownModel(
        "qwen3.5-397b-a17b",
        "Qwen3_5MoeForConditionalGeneration",
        MoEShape(512, 10, 4096, 1024),
        60,
        0.88,
        shared_expert=True,
    ),
    KnownModel(
        "llama-4-maverick",
        "Llama4ForConditionalGeneration",
        MoEShape(128, 1, 5120, 8192),
        24,
        0.908,
        shared_expert=True,
        router_weight_on_input=True,
    ),
    KnownModel("qwen3-30b-a3b", "Qwen3MoeForCausalLM", MoEShape(128, 8, 2048, 768), 48, None),
    KnownModel("mixtral-8x7b", "MixtralForCausalLM", MoEShape(8, 2, 4096, 14336), 32, None),
)
