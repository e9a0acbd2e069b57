"""Tile configs of the kernels, Plan, and the one legality function that defaults, tuner, tests and messages all ask.

Imports neither torch nor cutlass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .shapes import MoEShape

SMEM_LIMIT = 227 * 1024  # shared memory one CTA may have on sm_90, bytes
ROW_PAD = (
    16  # bytes between the end of a row in shared memory and the next: rows H*2 + 16 bytes apart are conflict-free
)
MAX_PAIRS = (256, 1024, 4096)  # capacities of the pair list a fused kernel is compiled with
KERNEL_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # what the Hopper kernels compute; others take the dense path


@dataclass(frozen=True)
class FusedConfig:
    """How one launch of the fused kernel cuts a layer; the fields are compile-time constants of the kernel.

    tile_neurons: gate rows of one work item. stage_rows x gate_stages: rows of the ring the gate reads through.
    row_slots: rows of the ring for gathered up and down rows. gate_warps, updown_warps: warps of the two phases.
    token_block: tokens of one expert handled at once. max_pairs: capacity for T*k.
    """

    tile_neurons: int = 32
    stage_rows: int = 8
    gate_stages: int = 2
    row_slots: int = 16
    gate_warps: int = 4
    updown_warps: int = 8
    token_block: int = 8
    max_pairs: int = 256

    @property
    def num_threads(self) -> int:
        """Threads of a CTA: gate and up/down warps, and one warp that issues the copies."""
        return 32 * (self.gate_warps + self.updown_warps + 1)

    def smem_bytes(self, hidden_size: int) -> int:
        """Shared memory of one CTA, bytes: the two rings, the token block, and the small buffers."""
        row = 2 * hidden_size + ROW_PAD
        rows = self.stage_rows * self.gate_stages + self.row_slots + self.token_block
        per_pair = 4 + 4  # token and routing weight
        per_tile = self.tile_neurons * (4 + 4 * self.token_block + 2 * self.token_block)  # list, a, h
        reduction = 4 * self.updown_warps * self.token_block * 16
        return rows * row + self.max_pairs * per_pair + per_tile + reduction + 1024


TileConfig = FusedConfig


@dataclass(frozen=True)
class Plan:
    """Which kernels run. ``fused`` and ``staged`` carry their tile config; ``dense`` and ``cpu`` have none."""

    kind: Literal["fused", "staged", "dense", "cpu"]
    config: TileConfig | None = None

    def __post_init__(self) -> None:
        wanted = CONFIG_TYPES.get(self.kind)
        if self.kind not in PLAN_KINDS:
            raise ValueError(f"kind must be one of {', '.join(PLAN_KINDS)}, got {self.kind!r}")
        if wanted is None and self.config is not None:
            raise TypeError(f"config must be None for a {self.kind} plan, got {self.config!r}")
        if wanted is not None and not isinstance(self.config, wanted):
            raise TypeError(f"config must be a {wanted.__name__} for a {self.kind} plan, got {self.config!r}")

    def to_json(self) -> dict[str, Any]:
        """``{"kind": ..., "config": {...}}``, the form of the tuned tables; from_json reads it."""
        return {"kind": self.kind, "config": None if self.config is None else asdict(self.config)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of to_json. ValueError / TypeError for anything else: missing or unknown fields, wrong types."""
        if not isinstance(data, Mapping) or set(data) - {"kind", "config"} or "kind" not in data:
            raise ValueError(f"a plan must be an object with kind and config, got {data!r}")
        config_type, raw = CONFIG_TYPES.get(data["kind"]), data.get("config")
        if config_type is None or raw is None:
            return cls(data["kind"], raw)
        names = {field.name for field in fields(config_type)}
        if not isinstance(raw, Mapping) or set(raw) != names:
            raise ValueError(
                f"config of a {data['kind']} plan must have exactly the fields {sorted(names)}, got {raw!r}"
            )
        wrong = {name: value for name, value in raw.items() if type(value) is not int}
        if wrong:
            raise TypeError(f"config of a {data['kind']} plan must hold integers, got {wrong}")
        return cls(data["kind"], config_type(**raw))

    def __str__(self) -> str:
        """Short text for tables and file names, e.g. ``fused[tile_neurons=32,stage_rows=8,...]``."""
        if self.config is None:
            return self.kind
        return f"{self.kind}[{','.join(f'{name}={value}' for name, value in asdict(self.config).items())}]"


PLAN_KINDS = ("fused", "staged", "dense", "cpu")
CONFIG_TYPES: dict[str, type[FusedConfig]] = {"fused": FusedConfig}


def illegal_reason(plan: Plan, shape: MoEShape, num_tokens: int | None = None, activation: str = "silu") -> str | None:
    """Why ``plan`` cannot run ``shape`` (at ``num_tokens`` tokens, where given), or None if it can.

    Pure arithmetic: about what fits the hardware and what the kernels are written for, never about what is fast.
    """
    if plan.config is None:
        return None
    if activation not in KERNEL_ACTIVATIONS:
        return f"activation {activation} is not one of {', '.join(KERNEL_ACTIVATIONS)}"
    if shape.hidden_size % 64:
        return f"hidden_size {shape.hidden_size} is not a multiple of 64"
    return _illegal_fused(plan.config, shape, num_tokens)


def _illegal_fused(config: FusedConfig, shape: MoEShape, num_tokens: int | None) -> str | None:
    choices = {
        "stage_rows": (8, 16),
        "gate_warps": (4, 8),
        "updown_warps": (8,),
        "token_block": (8, 16),
        "max_pairs": MAX_PAIRS,
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            return f"{name} is {getattr(config, name)}, must be one of {allowed}"
    if not 8 <= config.tile_neurons <= 128 or config.tile_neurons % config.stage_rows:
        return f"tile_neurons is {config.tile_neurons}, must be 8..128 and a multiple of stage_rows {config.stage_rows}"
    if config.gate_stages < 1:
        return f"gate_stages is {config.gate_stages}, must be at least 1"
    if config.row_slots < 8 or config.row_slots % 8:
        return f"row_slots is {config.row_slots}, must be a multiple of 8"
    if config.num_threads > 1024:
        return f"{config.num_threads} threads, a CTA has at most 1024"
    smem = config.smem_bytes(shape.hidden_size)
    if smem > SMEM_LIMIT:
        return f"{smem} bytes of shared memory, a CTA has at most {SMEM_LIMIT}"
    if num_tokens is not None and num_tokens * shape.top_k > config.max_pairs:
        return f"{num_tokens} tokens x {shape.top_k} experts exceed max_pairs {config.max_pairs}"
    return None


def legal_plans(shape: MoEShape, num_tokens: int) -> Iterator[Plan]:
    """Every plan of the search space that can run ``num_tokens`` tokens on a GPU; ``dense`` first.

    The space: tile size, token block, gate warps and stage rows freely; for the rings, every split of the shared
    memory that is left which leaves less than one stage unused.
    """
    yield Plan("dense")
    capacity = next((pairs for pairs in MAX_PAIRS if num_tokens * shape.top_k <= pairs), None)
    if capacity is None:
        return
    for tile in (8, 16, 32, 64, 128):
        for stage_rows in (8, 16):
            for token_block in (8, 16):
                for gate_warps in (4, 8):
                    for row_slots in (8, 16, 24, 32):
                        config = _fill_gate_ring(
                            FusedConfig(tile, stage_rows, 1, row_slots, gate_warps, 8, token_block, capacity), shape
                        )
                        plan = Plan("fused", config)
                        if illegal_reason(plan, shape, num_tokens) is None:
                            yield plan


def _fill_gate_ring(config: FusedConfig, shape: MoEShape) -> FusedConfig:
    free = SMEM_LIMIT - config.smem_bytes(shape.hidden_size)
    more = max(0, free) // (config.stage_rows * (2 * shape.hidden_size + ROW_PAD))
    values = asdict(config) | {"gate_stages": min(8, 1 + more)}
    return FusedConfig(**values)
