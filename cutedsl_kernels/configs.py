"""Tile configs of the kernels, Plan, and the one legality function that defaults, tuner, tests and messages all ask.

Imports neither torch nor cutlass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .shapes import MoEShape

SMEM_LIMIT = 227 * 1024  # shared memory one CTA may have on sm_90, bytes
ROW_PAD = 16  # bytes between two rows in shared memory: ldmatrix of rows 2H + 16 bytes apart has no bank conflicts
MAX_PAIRS = (256, 1024, 4096)  # capacities of the pair list a fused kernel is compiled with
KERNEL_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai")  # what the kernels compute; others take the dense path
WORKING_REGISTERS = 48  # of a thread of the fused kernel besides its fragments of x and its sums
PRODUCER_REGISTERS = 40

TOKEN_BLOCK = 8  # tokens of one expert that the fused kernel handles at once
LIST_QUEUE = 4  # compacted tiles between the fused kernel's gate warps and its up/down warps


def max_blocks(max_pairs: int, num_experts: int) -> int:
    """Most blocks of TOKEN_BLOCK pairs of one expert that ``max_pairs`` pairs can make."""
    return min(max_pairs, num_experts + max_pairs // TOKEN_BLOCK)


@dataclass(frozen=True)
class FusedConfig:
    """How one launch of the fused kernel cuts a layer; the fields are compile-time constants of the kernel.

    tile_neurons: gate rows of one work item. gate_stages x stage_rows: rows of the ring that gate rows stream through.
    row_stages x chunk_rows: rows of the ring for gathered up and down rows. gate_warps, updown_warps: warps of the two
    phases. keep_sums: 1 keeps the down product in registers over all tiles of a token block (needs H/4/updown_warps
    registers), 0 adds it to memory after every chunk. max_pairs: capacity for T*k.
    """

    tile_neurons: int = 16
    stage_rows: int = 8
    gate_stages: int = 2
    chunk_rows: int = 8
    row_stages: int = 4
    gate_warps: int = 4
    updown_warps: int = 8
    keep_sums: int = 1
    max_pairs: int = 256

    @property
    def num_threads(self) -> int:
        """Threads of a CTA: gate and up/down warps, and a warpgroup of which two warps issue the copies."""
        return 32 * (self.gate_warps + self.updown_warps + 4)

    @property
    def start_registers(self) -> int:
        """Registers every thread starts with: an equal share of an SM partition's 16384, in steps of 8."""
        return min(512 // (self.num_threads // 128) // 8 * 8, 248)

    def registers(self, hidden_size: int) -> tuple[int, int] | None:
        """Registers of a thread of the gate and of the up/down warps, or None where the register file is too small.

        All threads start with an equal share of the file; then the producers give up most of theirs (setmaxnreg).
        """
        gate_groups, updown_groups = self.gate_warps // 4, self.updown_warps // 4
        free = self.start_registers * (gate_groups + updown_groups + 1) - PRODUCER_REGISTERS
        units = hidden_size // 32
        gate_units = -(-units // self.gate_warps)
        # Least numbers that were seen to work, and below how what is left over is shared out so that no default plan
        # spills, with CuTe DSL 4.6.0 and 4.8.1 (2026-11-27). At H = 4096 the gate needs all there is.
        gate = WORKING_REGISTERS + (24 if 20 <= gate_units <= 32 else 8) + 4 * gate_units
        updown = WORKING_REGISTERS + (12 if self.keep_sums else 4) * -(-units // self.updown_warps)
        gate, updown = -(-gate // 8) * 8, -(-updown // 8) * 8
        if gate_groups * gate + updown_groups * updown > free or max(gate, updown) > 240:
            return None
        spare = free - gate_groups * gate - updown_groups * updown
        more = 240 if gate_units >= 32 else 64 if self.tile_neurons > 64 else 32 if gate_units > 16 else 48
        gate += min(more, spare // gate_groups)
        updown = min(240, (free - gate_groups * gate) // updown_groups // 8 * 8)
        return min(240, (free - updown_groups * updown) // gate_groups // 8 * 8), updown

    def smem_bytes(self, hidden_size: int, num_experts: int = 512) -> int:
        """Shared memory of one CTA, bytes: the two rings and the small buffers."""
        rows = self.stage_rows * self.gate_stages + self.chunk_rows * self.row_stages
        rings = rows * (2 * hidden_size + ROW_PAD)
        sums = 4 * TOKEN_BLOCK * (self.gate_warps * self.tile_neurons + self.updown_warps * 8)
        queue = LIST_QUEUE * self.tile_neurons * (4 * TOKEN_BLOCK + 4)
        tokens = (8 * TOKEN_BLOCK + 4) * (self.num_threads // 32)  # and a partial sum of the table's
        table = 2 * (self.max_pairs + max_blocks(self.max_pairs, num_experts)) + 4 * (num_experts + 3)
        return rings + sums + queue + tokens + table + 4 * self.gate_stages + 1024


@dataclass(frozen=True)
class StagedConfig:
    """How the staged kernels cut a layer; the fields are compile-time constants. No limit on T.

    token_block: tokens of one expert handled at once. wgmma: 1 for wgmma, 0 for warp MMA. row_stages, row_atoms: tiles
    in the ring of the gate and up products, and 128-byte lines of each row in a tile; row_groups: warp groups, 64 rows
    each, that share the tokens of a tile. up_rows: active rows one CTA of the up product takes at most. down_stages,
    down_atoms: the ring of the down product, whose tile is 64 gathered rows by down_atoms lines. down_tiles: tiles of
    columns one CTA works off in turn. down_splits: CTAs that share the active neurons of one item. overlap: 1 if a
    kernel may start while the last CTAs of the one before it still run (programmatic dependent launch); 2 if the CTAs
    of the up and down products then wait for their own item only, instead of for the whole kernel.
    """

    token_block: int = 16
    wgmma: int = 1
    row_stages: int = 3
    row_atoms: int = 2
    row_groups: int = 1
    up_rows: int = 64
    down_stages: int = 3
    down_atoms: int = 2
    down_tiles: int = 2
    down_splits: int = 1
    overlap: int = 2

    def smem_bytes(self, intermediate_size: int) -> int:
        """Shared memory of the CTA that needs most, bytes: a ring, and up to four bytes for each 64 neurons."""
        row_tile = (64 * self.row_groups + self.token_block) * 128 * self.row_atoms
        down_tile = 64 * 128 * self.down_atoms + self.token_block * 128
        lists = 4 * -(-intermediate_size // 64) + 4 * self.token_block + 512 * self.row_groups + 512
        return max(row_tile * self.row_stages, down_tile * self.down_stages) + lists

    def max_items(self, shape: MoEShape, num_tokens: int) -> int:
        """Most (expert, token block) items that ``num_tokens`` tokens can make."""
        pairs = num_tokens * shape.top_k
        return min(pairs, shape.num_experts + pairs // self.token_block)

    def workspace(
        self, shape: MoEShape, num_tokens: int, deterministic: bool, weight_on_input: bool
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype ("int32", "float32", "bfloat16") of every scratch tensor, in the order of the arguments."""
        pairs, items = num_tokens * shape.top_k, self.max_items(shape, num_tokens)
        tiles = -(-shape.intermediate_size // 64)
        capacity = 64 * tiles
        return {
            "items": ((items, 4), "int32"),
            "sorted_pairs": ((pairs,), "int32"),
            "kept": ((pairs,), "int32"),
            "counts": ((items, tiles), "int32"),
            "neurons": ((items, capacity), "int32"),
            "gates": ((items, capacity, self.token_block), "float32"),
            "active": ((items,), "int32"),
            "slots": ((items, capacity), "int32"),
            "hidden": ((items, self.token_block, capacity), "bfloat16"),
            "scaled": ((pairs if weight_on_input else 1, shape.hidden_size), "bfloat16"),
            "total": ((self.down_splits * pairs if deterministic else num_tokens, shape.hidden_size), "float32"),
        }


TileConfig = FusedConfig | StagedConfig


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
CONFIG_TYPES: dict[str, type[FusedConfig] | type[StagedConfig]] = {"fused": FusedConfig, "staged": StagedConfig}


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
    if isinstance(plan.config, StagedConfig):
        return _illegal_staged(plan.config, shape)
    return _illegal_fused(plan.config, shape, num_tokens)


def _illegal_staged(config: StagedConfig, shape: MoEShape) -> str | None:
    choices = {
        "token_block": (16, 32, 64),
        "wgmma": (0, 1),
        "row_atoms": (1, 2),
        "row_groups": (1, 2),
        "up_rows": (16, 32, 64, 128),
        "down_atoms": (1, 2, 4),
        "overlap": (0, 1, 2),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            return f"{name} is {getattr(config, name)}, must be one of {allowed}"
    for name, least in (("row_stages", 2), ("down_stages", 2), ("down_tiles", 1), ("down_splits", 1)):
        if getattr(config, name) < least:
            return f"{name} is {getattr(config, name)}, must be at least {least}"
    for name in ("row_atoms", "down_atoms"):
        if shape.hidden_size % (64 * getattr(config, name)):
            return (
                f"{name} is {getattr(config, name)}: hidden_size {shape.hidden_size} is not a multiple of 64 times that"
            )
    smem = config.smem_bytes(shape.intermediate_size)
    if smem > SMEM_LIMIT:
        return f"{smem} bytes of shared memory, a CTA has at most {SMEM_LIMIT}"
    return None


def _illegal_fused(config: FusedConfig, shape: MoEShape, num_tokens: int | None) -> str | None:
    choices = {
        "stage_rows": (8, 16),
        "chunk_rows": (4, 8),
        "gate_warps": (4, 8),
        "updown_warps": (4, 8, 16),
        "keep_sums": (0, 1),
        "max_pairs": MAX_PAIRS,
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            return f"{name} is {getattr(config, name)}, must be one of {allowed}"
    multiple = max(config.stage_rows, 2 * config.gate_warps)
    if not 8 <= config.tile_neurons <= 128 or config.tile_neurons % multiple:
        return f"tile_neurons is {config.tile_neurons}, must be 8..128 and a multiple of {multiple}"
    for name in ("gate_stages", "row_stages"):
        if getattr(config, name) < 1:
            return f"{name} is {getattr(config, name)}, must be at least 1"
    if config.registers(shape.hidden_size) is None:
        sums = " and its sums" if config.keep_sums else ""
        return f"hidden_size {shape.hidden_size}: a warp's share of x{sums} exceeds the registers there are"
    smem = config.smem_bytes(shape.hidden_size, shape.num_experts)
    if smem > SMEM_LIMIT:
        return f"{smem} bytes of shared memory, a CTA has at most {SMEM_LIMIT}"
    if num_tokens is not None and num_tokens * shape.top_k > config.max_pairs:
        return f"{num_tokens} tokens x {shape.top_k} experts exceed max_pairs {config.max_pairs}"
    return None


def pair_capacity(shape: MoEShape, num_tokens: int) -> int | None:
    """The smallest max_pairs that holds ``num_tokens`` tokens, None where none does."""
    return next((pairs for pairs in MAX_PAIRS if num_tokens * shape.top_k <= pairs), None)


def legal_plans(shape: MoEShape, num_tokens: int, activation: str = "silu") -> Iterator[Plan]:
    """Every plan of the search space that can run ``num_tokens`` tokens on a GPU; ``dense`` first, then simpler first.

    The space of ``fused``: tile size, warps and sums freely; for each size of the row ring, the gate ring
    takes the memory left. Of ``staged``: token block and rings.
    """
    yield Plan("dense")
    configs: Iterator[TileConfig] = itertools.chain(_fused_space(shape, num_tokens), _staged_space(shape))
    for config in configs:
        plan = Plan("fused" if isinstance(config, FusedConfig) else "staged", config)
        if illegal_reason(plan, shape, num_tokens, activation) is None:
            yield plan


def _fused_space(shape: MoEShape, num_tokens: int) -> Iterator[FusedConfig]:
    capacity = pair_capacity(shape, num_tokens)
    if capacity is None:
        return
    # Tiles of 8 gain where some CTAs have one item of 16 and others two (docs/kernels-fused.md).
    tiles = (16, 8, 32, 64, 128) if num_tokens == 1 else (16, 32, 64, 128)
    for tile, stage_rows, gate_warps, updown_warps, row_stages, keep_sums in itertools.product(
        tiles, (8, 16), (4, 8), (8, 16, 4), (2, 3, 4, 1), (1, 0)
    ):
        config = FusedConfig(
            tile_neurons=tile,
            stage_rows=stage_rows,
            gate_stages=1,
            row_stages=row_stages,
            gate_warps=gate_warps,
            updown_warps=updown_warps,
            keep_sums=keep_sums,
            max_pairs=capacity,
        )
        free = SMEM_LIMIT - config.smem_bytes(shape.hidden_size, shape.num_experts)
        more = max(0, free) // (stage_rows * (2 * shape.hidden_size + ROW_PAD))
        yield replace(config, gate_stages=min(8, 1 + more))


def _staged_space(shape: MoEShape) -> Iterator[StagedConfig]:
    # 64 columns at a time only where 128 do not divide the width (gpt-oss). Of equals by the cost model the first is
    # taken. What is here and what is not: docs/kernels-staged.md.
    down_rings = ((3, 2), (4, 2), (3, 4)) if shape.hidden_size % 128 == 0 else ((6, 1), (8, 1))
    for (token_block, overlap), (row_stages, row_atoms), (down_stages, down_atoms), down_tiles in itertools.product(
        ((16, 2), (32, 2), (64, 1), (16, 1), (32, 1)), ((3, 2), (4, 2), (4, 1)), down_rings, (2, 4)
    ):
        yield StagedConfig(
            token_block=token_block,
            row_stages=row_stages,
            row_atoms=row_atoms,
            down_stages=down_stages,
            down_atoms=down_atoms,
            down_tiles=down_tiles,
            overlap=overlap,
        )
