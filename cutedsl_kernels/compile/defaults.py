"""The kernels that the default plans of the known models need: what is inspected, and worth compiling ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..configs import FusedConfig, Plan
from ..cost_model import Gpu
from ..plan import plan_for
from ..shapes import KNOWN_MODELS, KnownModel, MoEShape
from ..tuned_table import find_table
from .specs import KernelSpec, pair_specs, plan_spec

TOKENS = (1, 8, 32, 128, 512)
SPARSITIES = (0.0, 0.5, 0.7, 0.85, 0.9)
TUNED_GPUS = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")


def known_shapes() -> Iterator[tuple[str, MoEShape, KnownModel]]:
    """(name, shape, model) of every known model, at tensor parallel sizes 1, 2, 4 and 8 that divide it."""
    for model in KNOWN_MODELS.values():
        for size in (1, 2, 4, 8):
            if model.shape.intermediate_size % size == 0:
                yield f"{model.name} TP{size}", model.shape.shard(size), model


def default_plans(shape: MoEShape, activation: str) -> list[Plan]:
    """Every plan with a kernel that plan_for chooses on an H200 for some of TOKENS and SPARSITIES, or that is tuned."""
    plans = {plan_for(shape, tokens, s, Gpu(), 0.0, activation) for tokens in TOKENS for s in SPARSITIES}
    for name in TUNED_GPUS:
        table = find_table(shape, Gpu(name=name))
        if table is not None:
            plans |= {entry.chosen for entry in table.entries}
    return sorted((plan for plan in plans if plan.config is not None), key=str)


def default_specs(hidden_size: int | None = None, every: bool = False) -> dict[KernelSpec, list[str]]:
    """Kernel -> names of the layers that use it; of one hidden size, or of all.

    Unless ``every``, one kernel stands for all that differ in E, k, I and the capacity for pairs only, constants that
    no choice in the code depends on; whether the last tile of an expert is short is such a choice.
    """
    found: dict[KernelSpec, list[str]] = {}
    stands_for: dict[object, KernelSpec] = {}
    for name, shape, model in known_shapes():
        if hidden_size not in (None, shape.hidden_size):
            continue
        for plan in default_plans(shape, model.activation):
            spec = plan_spec(plan, shape, activation=model.activation, has_bias=model.biases)
            config, tile = plan.config, 64
            if isinstance(config, FusedConfig):
                config, tile = replace(config, max_pairs=0), config.tile_neurons
            short = shape.intermediate_size % tile != 0
            same = spec if every else (shape.hidden_size, short, config, model.activation, model.biases)
            names = found.setdefault(stands_for.setdefault(same, spec), [])
            if name not in names:
                names.append(name)
    return found


def dense_path_specs() -> dict[KernelSpec, list[str]]:
    """Kernel -> names of the layers whose dense path uses it."""
    found: dict[KernelSpec, list[str]] = {}
    for name, shape, model in known_shapes():
        for spec in pair_specs(shape, model.activation):
            found.setdefault(spec, []).append(name)
    return found
