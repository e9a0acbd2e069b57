"""Options of the vLLM method, and where they come from: hf_overrides, then environment, then the profile file beside
the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...shapes import MoEShape
from ...sparsity import PROFILE_FILENAME, ModelIdentity, SparsityProfile

METHOD_NAME = "intra_expert_sparse"
OVERRIDES_KEY = "intra_expert_sparsity"
ENV_PROFILE = "CUTEDSL_KERNELS_SPARSITY_PROFILE"
ENV_TARGET = "CUTEDSL_KERNELS_TARGET_SPARSITY"
ENV_STATS = "CUTEDSL_KERNELS_SPARSITY_STATS"
DEFAULT_TARGET = 0.7


@dataclass(frozen=True)
class Options:
    """profile: path, None = look beside the checkpoint. target_sparsity: None = DEFAULT_TARGET, capped by the profile.
    without_profile: run dense until thresholds are set (calibration). sparsity_stats: sample the realised sparsity
    while serving."""

    profile: str | None = None
    target_sparsity: float | None = None
    without_profile: bool = False
    sparsity_stats: bool = False

    @classmethod
    def collect(cls, *overrides: Any) -> Options:
        """From the hf_overrides entries (dicts, or None; later ones count) and the environment. UserError for an
        unknown key or a bad value.
        """
        given: dict[str, Any] = {}
        for entry in overrides:
            if entry is not None and not isinstance(entry, Mapping):
                raise UserError(
                    f'hf_overrides: {OVERRIDES_KEY} must be an object such as {{"target_sparsity": 0.8}}, got {entry!r}'
                )
            given |= dict(entry or {})
        given.pop("quant_method", None)
        known = {"profile", "target_sparsity", "without_profile", "sparsity_stats"}
        for key in given:
            if key not in known:
                raise UserError(
                    f"hf_overrides: {OVERRIDES_KEY}.{key} is not an option; known are {', '.join(sorted(known))}"
                )
        options = cls()
        profile = given.get("profile") or os.environ.get(ENV_PROFILE) or None
        if profile is not None:
            options = replace(options, profile=str(profile))
        target, source = given.get("target_sparsity"), f"hf_overrides: {OVERRIDES_KEY}.target_sparsity"
        if target is None and os.environ.get(ENV_TARGET):
            target, source = os.environ[ENV_TARGET], ENV_TARGET
        if target is not None:
            options = replace(options, target_sparsity=_share(target, source))
        stats: tuple[Any, str] = (os.environ.get(ENV_STATS) or False, ENV_STATS)
        if "sparsity_stats" in given:
            stats = (given["sparsity_stats"], f"hf_overrides: {OVERRIDES_KEY}.sparsity_stats")
        return replace(
            options,
            without_profile=_flag(given.get("without_profile", False), f"{OVERRIDES_KEY}.without_profile"),
            sparsity_stats=_flag(*stats),
        )


def _share(value: Any, source: str) -> float:
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 1:
        raise UserError(f"{source} must be a number in 0..1 (0 = dense), got {value!r}")
    return number


def _flag(value: Any, source: str) -> bool:
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off", ""):
        return False
    raise UserError(f"{source} must be true or false, got {value!r}")


def find_profile(options: Options, model: str) -> Path:
    """Path of the profile to use for ``model`` (folder or hub name). UserError, one line, that says how to make
    one.
    """
    if options.profile is not None:
        return Path(options.profile)
    beside = Path(model) / PROFILE_FILENAME
    if beside.is_file():
        return beside
    if not Path(model).is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, PROFILE_FILENAME)
        if isinstance(cached, str):
            return Path(cached)
    raise UserError(
        f"{METHOD_NAME}: no sparsity profile for {model}: make one with "
        f"`cutedsl-kernels calibrate {model} --text FILE --out {beside}`, or name one with {ENV_PROFILE} or "
        f'hf_overrides {{"{OVERRIDES_KEY}": {{"profile": PATH}}}}'
    )


def served_identity(model: str, hf_config: Any, num_layers: int) -> ModelIdentity:
    """Identity of a model from its Hugging Face configuration. UserError if it is not a Mixture-of-Experts model."""
    config = hf_config.to_dict() if hasattr(hf_config, "to_dict") else dict(hf_config)
    try:
        shape = MoEShape.from_config(config)
    except ValueError as error:
        raise UserError(f"{model}: {error}") from None
    architectures = config.get("architectures") or [type(hf_config).__name__]
    return ModelIdentity(
        name=str(model).rstrip("/").rsplit("/", 1)[-1],
        architecture=architectures[0],
        num_layers=num_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )


def load_profile(options: Options, model: str, hf_config: Any) -> SparsityProfile:
    """Finds, reads and checks the profile for ``model``. The number of MoE layers is checked layer by layer while
    loading.
    """
    path = find_profile(options, model)
    profile = SparsityProfile.load(path)
    profile.check_model(served_identity(model, hf_config, profile.model.num_layers), path)
    return profile


def choose_target(options: Options, profile: SparsityProfile) -> float:
    """The target to serve at. UserError if the one asked for lies beyond the profile."""
    if options.target_sparsity is None:
        recommended = (profile.quality or {}).get("target_sparsity", DEFAULT_TARGET)
        return min(recommended, profile.max_target)
    if options.target_sparsity > profile.max_target:
        raise UserError(
            f"target_sparsity must lie in 0..{profile.max_target:g} (the profile's largest target), "
            f"got {options.target_sparsity:g}"
        )
    return options.target_sparsity
