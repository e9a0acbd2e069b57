"""IntraExpertSparseConfig: what vLLM builds for `--quantization intra_expert_sparse`; picks a method for each
layer.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ...errors import UserError
from ...quality.scores import NeuronParts
from ...sparsity import SparsityProfile
from . import compat
from .neurons import load_parts
from .options import METHOD_NAME, OVERRIDES_KEY, Options, choose_target, find_profile, load_profile, served_identity
from .state import LayerState
from .stats import SparsityStats

logger = logging.getLogger("vllm.cutedsl_kernels")


class MethodError(RuntimeError):
    """A UserError inside vLLM's configuration, where pydantic would bury a ValueError in a report of its own."""


class IntraExpertSparseConfig(QuantizationConfig):
    """Built once per process that holds a model configuration. ``inner``: the checkpoint's own quantization, if it
    has one.
    """

    def __init__(self, overrides: dict[str, Any] | None = None, inner: QuantizationConfig | None = None) -> None:
        super().__init__()
        self.overrides = overrides or {}
        self.inner = inner
        self.model = ""
        self.options = Options()
        self.profile: SparsityProfile | None = None
        self.no_profile = ""  # why there is none, for a quantized checkpoint: it needs one only if a layer can use it
        self.neurons: dict[str, NeuronParts] = {}
        self.target = 0.0
        self.expected: list[str] = []  # layers that will use this method
        self.fallbacks: dict[str, str] = {}  # layers that will not, and why
        self.stats: SparsityStats | None = None
        self.compiled_at_load = 0  # kernels compiled by this process when its last layer was loaded

    def get_name(self) -> str:
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # the profile is looked for in maybe_update_config, where the model's name is known

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IntraExpertSparseConfig:
        """``config``: hf_config.quantization_config: our own options, or a quantized checkpoint's entry."""
        name = config.get("quant_method", METHOD_NAME)
        if name == METHOD_NAME:
            return cls({key: value for key, value in config.items() if key != "quant_method"})
        return cls(inner=get_quantization_config(name).from_config(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Asked for by name on a quantized checkpoint: take it; its layers go to its own method, with a warning."""
        return METHOD_NAME if user_quant == METHOD_NAME else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Reads the options and the profile. MethodError, one line, where there is none or it does not fit."""
        del revision
        self.model = model_name
        try:
            self.options = Options.collect(self.overrides, getattr(hf_config, OVERRIDES_KEY, None))
            if self.options.without_profile:
                return
            try:
                find_profile(self.options, model_name)
            except UserError as error:
                if self.inner is None:
                    if hf_config is not None:
                        served_identity(model_name, hf_config, 1)  # says so if it is no Mixture-of-Experts model
                    raise
                self.no_profile = str(error)
                return
            self.profile = load_profile(self.options, model_name, hf_config)
            self.target = choose_target(self.options, self.profile)
            self.neurons = load_parts(self.profile, find_profile(self.options, model_name))
        except UserError as error:
            raise MethodError(str(error)) from None

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if self.inner is not None:
            method = self.inner.get_quant_method(layer, prefix)
            if isinstance(layer, compat.routed_experts_class()):
                if method is not None and not isinstance(method, compat.stock_method_class()):
                    self._fall_back(prefix, f"experts quantized with {self.inner.get_name()} are not supported")
                    return method
                return self._sparse_method(layer, prefix) or method
            return method
        if isinstance(layer, compat.routed_experts_class()):
            return self._sparse_method(layer, prefix)
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _sparse_method(self, layer: Any, prefix: str) -> Any:
        """Our method for a routed-expert layer, or None for vLLM's own."""
        from .method import IntraExpertSparseMethod, why_unsupported

        if layer.moe_config.moe_parallel_config.enable_eplb:
            raise MethodError(
                "expert load balancing (--enable-eplb) is not supported: vLLM moves experts between ranks as [E, H, I] "
                f"blocks, and {METHOD_NAME} keeps them re-laid; switch it off"
            )
        reason = why_unsupported(layer)
        if reason is None and self.no_profile:
            raise MethodError(self.no_profile)
        if reason is None and self.profile is not None and prefix not in self.profile.layers:
            if not _is_draft(prefix):
                first = next(iter(self.profile.layers))
                raise MethodError(
                    f"the sparsity profile has no layer {prefix!r} (it has {first!r}, ...): calibrate this model again"
                )
            reason = "the profile does not cover the layers of a draft model"
        if reason is not None:
            self._fall_back(prefix, reason)
            return None
        self.expected.append(prefix)
        if self.options.sparsity_stats:  # not before: this object is pickled on its way to the workers
            self.stats = self.stats or SparsityStats()
            self.stats.add_layer(prefix)
        return IntraExpertSparseMethod(layer.moe_config, self, prefix)

    def _fall_back(self, prefix: str, reason: str) -> None:
        self.fallbacks[prefix] = reason
        logger.warning("%s: layer %s runs dense with vLLM's own method: %s", METHOD_NAME, prefix, reason)

    def loaded(self, prefix: str, state: LayerState) -> None:
        """Told by each layer when it is ready; after the last one, the line for the operator."""
        if prefix != self.expected[-1]:
            return
        if state.weights.device.type == "cuda":
            from ...compile import compile_count

            self.compiled_at_load = compile_count()
        if self.profile is None:
            logger.info("%s: %d layers, dense until thresholds are set", METHOD_NAME, len(self.expected))
            return
        logger.info(
            "%s: %s: %d of %d MoE layers, target sparsity %g (score %s; in the last layer tau %.3g, pairs below %.3g "
            "skipped), profile of %d tokens made %s; %s",
            METHOD_NAME,
            self.model,
            len(self.expected),
            len(self.expected) + len(self.fallbacks),
            self.target,
            self.profile.score,
            float(state.tau.max()),
            state.rho,
            self.profile.calibration.tokens,
            self.profile.created.date,
            state.plan_summary(),
        )


def _is_draft(prefix: str) -> bool:
    return any(part in ("mtp", "draft_model", "eagle") for part in prefix.split("."))


def register_method() -> None:
    """Registers the method with vLLM; a second call does nothing."""
    if METHOD_NAME not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD_NAME)(IntraExpertSparseConfig)
