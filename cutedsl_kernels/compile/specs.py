"""KernelSpec: everything that changes a kernel's code; and the fake arguments each kernel is compiled with."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..configs import FusedConfig, Plan, StagedConfig
from ..shapes import MoEShape


@dataclass(frozen=True)
class KernelSpec:
    """One kernel instance. factory: ``module:Class`` of the kernel's host object; arguments: its keyword arguments, the
    complete list of what its code depends on besides sources, DSL version and architecture."""

    factory: str
    arguments: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, factory: str, **arguments: Any) -> KernelSpec:
        return cls(factory, tuple(sorted(arguments.items())))

    @property
    def keywords(self) -> dict[str, Any]:
        return dict(self.arguments)

    @property
    def kernel(self) -> str:
        """Short name of the kernel: the last part of its module."""
        return self.factory.partition(":")[0].rpartition(".")[2]

    @property
    def name(self) -> str:
        """Readable and unique among the specs of one kernel; fit for a file name."""
        parts = [self.kernel]
        for name, value in self.arguments:
            if is_dataclass(value) and not isinstance(value, type):
                parts += [f"{_initials(field)}{number}" for field, number in asdict(value).items()]
            elif isinstance(value, bool):
                parts += [name.replace("_", "")] if value else []
            else:
                parts.append(value if isinstance(value, str) else f"{_initials(name)}{value}")
        return "-".join(parts)

    def build(self) -> Any:
        """The kernel's host object; imports the kernel, and with it the CuTe DSL."""
        module, _, name = self.factory.partition(":")
        return getattr(import_module(module), name)(**self.keywords)


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_"))


FUSED = "cutedsl_kernels.kernels.fused_decode:FusedDecode"


def fused_spec(
    shape: MoEShape,
    config: FusedConfig,
    *,
    activation: str = "silu",
    router_weighted: bool = True,
    weight_on_input: bool = False,
    has_expert_map: bool = False,
    has_bias: bool = False,
) -> KernelSpec:
    """Spec of the fused kernel; the caller has asked illegal_reason."""
    return KernelSpec.of(
        FUSED,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        config=config,
        activation=activation,
        router_weighted=router_weighted,
        weight_on_input=weight_on_input,
        has_expert_map=has_expert_map,
        has_bias=has_bias,
    )


STAGED = "cutedsl_kernels.kernels.staged_moe:StagedMoE"


def staged_spec(
    shape: MoEShape,
    config: StagedConfig,
    *,
    activation: str = "silu",
    router_weighted: bool = True,
    weight_on_input: bool = False,
    has_expert_map: bool = False,
    has_bias: bool = False,
    deterministic: bool = False,
) -> KernelSpec:
    """Spec of the staged path, one object with all its kernels; the caller has asked illegal_reason."""
    return KernelSpec.of(
        STAGED,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        config=config,
        activation=activation,
        router_weighted=router_weighted,
        weight_on_input=weight_on_input,
        has_expert_map=has_expert_map,
        has_bias=has_bias,
        deterministic=deterministic,
    )


def plan_spec(plan: Plan, shape: MoEShape, **flags: Any) -> KernelSpec:
    """Spec of the kernel that ``plan`` runs; flags as of fused_spec. ValueError for a plan without one."""
    if isinstance(plan.config, FusedConfig):
        return fused_spec(shape, plan.config, **flags)
    if isinstance(plan.config, StagedConfig):
        return staged_spec(shape, plan.config, **flags)
    raise ValueError(f"plan must be one with a kernel, got {plan}")


ACTIVATE_PAIRS = "cutedsl_kernels.kernels.kept_pairs:ActivatePairs"
SUM_PAIRS = "cutedsl_kernels.kernels.kept_pairs:SumPairs"


def pair_specs(shape: MoEShape, activation: str) -> tuple[KernelSpec, KernelSpec]:
    """Specs of ActivatePairs and SumPairs."""
    return (
        KernelSpec.of(ACTIVATE_PAIRS, intermediate_size=shape.intermediate_size, activation=activation),
        KernelSpec.of(SUM_PAIRS, hidden_size=shape.hidden_size, top_k=shape.top_k),
    )


class Fakes:
    """Makes fake tensors; ``symbol(name)`` is the same symbolic size wherever it is used."""

    def __init__(self) -> None:
        import cutlass
        from cutlass import cute
        from cutlass.cute import runtime

        self._runtime = runtime
        self.symbol = functools.cache(lambda name: cute.sym_int())
        self.bf16, self.f32, self.i32 = cutlass.BFloat16, cutlass.Float32, cutlass.Int32

    def tensor(self, dtype: Any, *shape: Any, align: int = 16) -> Any:
        """Row-major tensor of sizes (numbers or symbols), its first byte at a multiple of ``align``."""
        order = tuple(reversed(range(len(shape))))
        return self._runtime.make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    def biases(self, spec: Mapping[str, Any]) -> list[Any]:
        """w13_bias [E, 2I] and w2_bias [E, H], bf16; None and None for a kernel without biases."""
        if not spec["has_bias"]:
            return [None, None]
        experts = spec["num_experts"]
        rows = 2 * spec["intermediate_size"]
        return [self.tensor(self.bf16, experts, rows, align=2), self.tensor(self.bf16, experts, spec["hidden_size"])]

    def stream(self, env_stream: bool) -> Any:
        return self._runtime.make_fake_stream(use_tvm_ffi_env_stream=env_stream)


def _fused_arguments(fakes: Fakes, spec: Mapping[str, Any]) -> list[Any]:
    experts, inter, hidden = spec["num_experts"], spec["intermediate_size"], spec["hidden_size"]
    tokens = fakes.symbol("T")
    return [
        fakes.tensor(fakes.bf16, tokens, hidden),
        fakes.tensor(fakes.bf16, experts, 2 * inter, hidden),
        fakes.tensor(fakes.bf16, experts, inter, hidden),
        fakes.tensor(fakes.f32, experts, inter, align=4),
        fakes.tensor(fakes.i32, tokens, spec["top_k"], align=4),
        fakes.tensor(fakes.f32, tokens, spec["top_k"], align=4),
        fakes.tensor(fakes.i32, fakes.symbol("global experts"), align=4),
        *fakes.biases(spec),
        fakes.tensor(fakes.f32, fakes.symbol("sums"), hidden),
        fakes.tensor(fakes.i32, fakes.symbol("counters"), align=4),
        fakes.tensor(fakes.bf16, tokens, hidden),
        fakes.f32(0.0),
        fakes.i32(1),
    ]


def _staged_arguments(fakes: Fakes, spec: Mapping[str, Any]) -> list[Any]:
    experts, inter, hidden, top_k = (
        spec[name] for name in ("num_experts", "intermediate_size", "hidden_size", "top_k")
    )
    shape, config = MoEShape(experts, top_k, hidden, inter), spec["config"]
    tokens = fakes.symbol("T")
    dtypes = {"int32": fakes.i32, "float32": fakes.f32, "bfloat16": fakes.bf16}
    # Only the first size of a buffer depends on T; buffers that share it share the symbol.
    first = {"sorted_pairs": "pairs", "kept": "pairs", "scaled": "scaled", "total": "total"}
    buffers = []
    for name, (sizes, dtype) in config.workspace(shape, 1, spec["deterministic"], spec["weight_on_input"]).items():
        symbolic = fakes.symbol(first.get(name, "items"))
        buffers.append(fakes.tensor(dtypes[dtype], symbolic, *sizes[1:], align=4 if len(sizes) == 1 else 16))
    return [
        fakes.tensor(fakes.bf16, tokens, hidden),
        fakes.tensor(fakes.bf16, experts, 2 * inter, hidden),
        fakes.tensor(fakes.bf16, experts, inter, hidden),
        fakes.tensor(fakes.f32, experts, inter, align=4),
        fakes.tensor(fakes.i32, tokens, top_k, align=4),
        fakes.tensor(fakes.f32, tokens, top_k, align=4),
        fakes.tensor(fakes.i32, fakes.symbol("global experts"), align=4),
        *fakes.biases(spec),
        fakes.f32(0.0),
        *buffers,
        fakes.tensor(fakes.bf16, tokens, hidden),
    ]


def _activate_arguments(fakes: Fakes, spec: Mapping[str, Any]) -> list[Any]:
    pairs, inter = fakes.symbol("pairs"), spec["intermediate_size"]
    return [
        fakes.tensor(fakes.bf16, pairs, 2 * inter),
        fakes.tensor(fakes.i32, pairs, align=4),
        fakes.tensor(fakes.i32, fakes.symbol("global experts"), align=4),
        fakes.tensor(fakes.bf16, pairs, inter),
    ]


def _sum_arguments(fakes: Fakes, spec: Mapping[str, Any]) -> list[Any]:
    tokens, top_k, hidden = fakes.symbol("T"), spec["top_k"], spec["hidden_size"]
    return [
        fakes.tensor(fakes.bf16, tokens, top_k, hidden),
        fakes.tensor(fakes.i32, tokens, top_k, align=4),
        fakes.tensor(fakes.i32, fakes.symbol("global experts"), align=4),
        fakes.tensor(fakes.bf16, tokens, hidden),
    ]


# Per kernel: its arguments up to the stream. Tests add theirs.
SIGNATURES: dict[str, Callable[[Fakes, Mapping[str, Any]], list[Any]]] = {
    FUSED: _fused_arguments,
    STAGED: _staged_arguments,
    ACTIVATE_PAIRS: _activate_arguments,
    SUM_PAIRS: _sum_arguments,
}


def fake_arguments(spec: KernelSpec, env_stream: bool) -> list[Any]:
    """Fake tensors with T symbolic, numbers, and the stream, in the order of the kernel's ``__call__``."""
    fakes = Fakes()
    return [*SIGNATURES[spec.factory](fakes, spec.keywords), fakes.stream(env_stream)]


@functools.cache
def source_fingerprint() -> str:
    """Hash of every source that the code of a kernel can depend on."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in [*sorted((package / "kernels").glob("*.py")), package / "configs.py", Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
