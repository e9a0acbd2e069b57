"""SparsityProfile: which thresholds give which sparsity, layer by layer, for one model. Made by calibration.

The file is JSON, ``"format": "intra-expert-sparsity/1"``, small enough to read and diff. For every MoE layer it holds a
table from target sparsity (share of inactive neurons over all token-expert pairs, skipped pairs counted as inactive) to
the neuron threshold tau and the pair threshold rho.

Format 2 is format 1 with a budget (how sparsity is spread over layers), the share of the pairs that rho skips where it
skips any, and, for scores with a weight c per neuron, a reference to a safetensors file beside the profile; tau is then
the threshold on the weighted score.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import UserError

FORMAT = "intra-expert-sparsity/1"
FORMAT_2 = "intra-expert-sparsity/2"
PROFILE_FILENAME = "intra_expert_sparsity.json"

# Whether a score counts the routing weight.
ROUTER_WEIGHTED = {
    f"{kind}{suffix}": bool(suffix)
    for kind in ("gate", "down", "up-down", "moments", "learned")
    for suffix in ("", "-routed")
}


class ProfileError(UserError):
    """A profile that cannot be used: the message names file, field and fix."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class ModelIdentity(_Strict):
    """What must agree between the calibrated model and the served one. Sizes are the whole model's, not one
    rank's.
    """

    name: str
    architecture: str
    num_layers: int = Field(gt=0, description="MoE layers")
    num_experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)


class Calibration(_Strict):
    tokens: int = Field(gt=0)
    text_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    max_len: int = Field(gt=0)


class Created(_Strict):
    version: str
    date: str


class NeuronFile(_Strict):
    """The file with a profile's per-neuron parts: its name (in the profile's folder), SHA-256 and size in bytes."""

    file: str = Field(pattern=r"^[^/\\]+$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(gt=0)


class LayerThresholds(NamedTuple):
    """tau (or the numerator of a per-neuron tau) and rho of one layer."""

    threshold: float
    pair_threshold: float


class LayerTable(_Strict):
    """Rows of (target sparsity, neuron threshold, pair threshold, and the share of the pairs below it); all columns
    non-decreasing. Without the last column the share is not known."""

    targets: tuple[float, ...] = Field(min_length=1)
    thresholds: tuple[float, ...]
    pair_thresholds: tuple[float, ...]
    pair_skips: tuple[float, ...] | None = None

    @field_validator("targets", "thresholds", "pair_thresholds", "pair_skips")
    @classmethod
    def _ordered(cls, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if values is None:
            return None
        if any(v < 0 for v in values):
            raise ValueError("has a negative value")
        if any(b < a for a, b in pairwise(values)):
            raise ValueError("must not decrease")
        return values

    @model_validator(mode="after")
    def _same_length(self) -> LayerTable:
        if not len(self.targets) == len(self.thresholds) == len(self.pair_thresholds):
            raise ValueError("targets, thresholds and pair_thresholds differ in length")
        if self.pair_skips is not None and (len(self.pair_skips) != len(self.targets) or self.pair_skips[-1] > 1):
            raise ValueError("pair_skips must be shares in 0..1, one for each target")
        if self.targets[-1] > 1:
            raise ValueError("targets must lie in 0..1")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets has a value twice")
        return self

    def at(self, target: float) -> LayerThresholds:
        """Thresholds for a target: linear between rows, from (0, 0, 0) to the first. ProfileError past the last
        row.
        """
        if not 0 <= target <= self.targets[-1]:
            raise ProfileError(
                f"target_sparsity must lie in 0..{self.targets[-1]:g} (the profile's largest target), got {target:g}"
            )
        if target == 0:
            return LayerThresholds(0.0, 0.0)
        columns = [np.array((0.0, *column)) for column in (self.targets, self.thresholds, self.pair_thresholds)]
        return LayerThresholds(*(float(np.interp(target, columns[0], column)) for column in columns[1:]))

    def pair_skip(self, target: float) -> float | None:
        """Share of the pairs that the pair threshold for a target skips, by linear interpolation; None: not known."""
        if self.pair_skips is None:
            return None
        return float(np.interp(target, (0.0, *self.targets), (0.0, *self.pair_skips)))


class SparsityProfile(_Strict):
    format: str = FORMAT
    model: ModelIdentity
    score: str
    router_weighted: bool
    calibration: Calibration
    layers: dict[str, LayerTable] = Field(min_length=1)
    created: Created
    budget: str = "uniform"
    neurons: NeuronFile | None = None
    quality: dict[str, float] | None = Field(default=None, description="what `recommend` measured")

    @model_validator(mode="after")
    def _consistent(self) -> SparsityProfile:
        if self.score not in ROUTER_WEIGHTED:
            raise ValueError(f"score must be one of {', '.join(ROUTER_WEIGHTED)}, got {self.score!r}")
        if self.quality is not None and not 0 <= self.quality.get("target_sparsity", 0.0) < 1:
            raise ValueError(f"quality.target_sparsity must lie in 0..1, got {self.quality['target_sparsity']:g}")
        weighted = not self.score.startswith("gate")
        if self.format == FORMAT and self.second_format_fields:
            raise ValueError(f"{self.second_format_fields[0]} needs format {FORMAT_2!r}")
        if weighted and self.neurons is None:
            raise ValueError(f"neurons must name the file of per-neuron parts for the score {self.score!r}")
        if self.score.startswith("gate") and self.neurons is not None:
            raise ValueError(f"neurons must be absent for the score {self.score!r}")
        if self.router_weighted != ROUTER_WEIGHTED[self.score]:
            raise ValueError(
                f"router_weighted must be {str(ROUTER_WEIGHTED[self.score]).lower()} for the score {self.score!r}"
            )
        if len(self.layers) != self.model.num_layers:
            raise ValueError(f"layers has {len(self.layers)} entries, model.num_layers says {self.model.num_layers}")
        return self

    @property
    def second_format_fields(self) -> list[str]:
        """Fields in use that format 1 does not have."""
        used = {"budget": self.budget != "uniform", "neurons": self.neurons, "quality": self.quality}
        used["pair_skips"] = any(table.pair_skips is not None for table in self.layers.values())
        return [name for name, present in used.items() if present]

    @property
    def max_target(self) -> float:
        return min(table.targets[-1] for table in self.layers.values())

    def with_quality(self, quality: dict[str, float]) -> SparsityProfile:
        """A copy in format 2 that records what `recommend` measured; its target_sparsity becomes the default
        target.
        """
        return self.model_copy(update={"format": FORMAT_2, "quality": quality})

    def thresholds(self, layer: str, target_sparsity: float) -> LayerThresholds:
        """tau and rho of ``layer`` (a module name, model.layers.0.mlp.experts) at a sparsity in 0..max_target."""
        return self._table(layer).at(target_sparsity)

    def pair_skip(self, layer: str, target_sparsity: float) -> float | None:
        """Share of the pairs that ``layer`` skips at a sparsity in 0..max_target, as calibrated; None: not known."""
        return self._table(layer).pair_skip(target_sparsity)

    def _table(self, layer: str) -> LayerTable:
        table = self.layers.get(layer)
        if table is None:
            known = next(iter(self.layers))
            raise ProfileError(
                f"the sparsity profile has no layer {layer!r} (it has {known!r}, ...): calibrate this model again"
            )
        return table

    def check_model(self, served: ModelIdentity, source: str | os.PathLike[str] = "sparsity profile") -> None:
        """ProfileError unless the profile was made for this architecture and these sizes (names may differ)."""
        for field in ("architecture", "num_layers", "num_experts", "top_k", "hidden_size", "intermediate_size"):
            mine, theirs = getattr(self.model, field), getattr(served, field)
            if mine != theirs:
                raise ProfileError(
                    f"{source}: model.{field} is {mine!r} but the model being served has {theirs!r}: "
                    f"this profile was made for {self.model.name!r}; "
                    "run `cutedsl-kernels calibrate` on the served model"
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: ModelIdentity | None = None) -> SparsityProfile:
        """Reads and checks a profile (against ``model`` if given). ProfileError, one line, for whatever is wrong."""
        path = Path(path)
        try:
            raw = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ProfileError(
                f"{path}: cannot read sparsity profile: {reason}: make one with `cutedsl-kernels calibrate`"
            ) from None
        try:
            data = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ProfileError(
                f"{path}: line {error.lineno}: not valid JSON ({error.msg}), file truncated or damaged: calibrate again"
            ) from None
        profile = cls.from_dict(data, source=path)
        if model is not None:
            profile.check_model(model, path)
        return profile

    @classmethod
    def from_dict(cls, data: Any, source: str | os.PathLike[str] = "sparsity profile") -> SparsityProfile:
        if not isinstance(data, dict):
            raise ProfileError(f"{source}: must be a JSON object, got {type(data).__name__}: calibrate again")
        found = data.get("format")
        if found not in (FORMAT, FORMAT_2):
            raise ProfileError(
                f"{source}: format is {found!r}, this version reads {FORMAT!r} and {FORMAT_2!r}: "
                "calibrate again, or install the version that wrote it"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "profile"
            reason = first["msg"].removeprefix("Value error, ")
            raise ProfileError(f"{source}: {field}: {reason}: correct the field or calibrate again") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, or leaves what was there: never half a file. ProfileError if the place cannot be
        written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            data = self.model_dump(exclude=None if self.format == FORMAT_2 else {"budget", "neurons", "quality"})
            for table in data["layers"].values():
                if table["pair_skips"] is None:
                    del table["pair_skips"]
            temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise ProfileError(f"{path}: cannot write the sparsity profile: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)
