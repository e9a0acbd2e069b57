"""python tools/kernels_report.py: what the kernels of the default plans use, as a table.

For every known model, at tensor parallel sizes 1, 2, 4 and 8, and the plans chosen for 1 to 512 tokens. Kernels that
differ only in the number of experts, experts per token or tiles are shown once unless --all. No GPU needed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import astuple

from rich.console import Console
from rich.table import Table

from cutedsl_kernels import KNOWN_MODELS, MoEShape, Plan, plan_for
from cutedsl_kernels.compile import KernelSpec, plan_spec
from cutedsl_kernels.compile.inspect import KernelFacts, inspect_in_parallel
from cutedsl_kernels.configs import SMEM_LIMIT
from cutedsl_kernels.cost_model import Gpu

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SPARSITIES = (0.0, 0.5, 0.7, 0.85, 0.9)
COLUMNS = {
    "bulk": ("UBLKCP",),
    "LDGSTS.128": ("LDGSTS.E.BYPASS.128", "LDGSTS.E.128"),
    "LDG.128": ("LDG.E.128",),
    "LDSM": ("LDSM",),
    "HMMA": ("HMMA",),
    "HGMMA": ("HGMMA",),
    "red": ("RED", "REDG"),
    "barriers": ("BAR", "SYNCS"),
}


def known_shapes() -> Iterator[tuple[str, MoEShape, str]]:
    """(name, shape, activation) of every known model at the tensor parallel sizes that divide its experts."""
    for model in KNOWN_MODELS.values():
        for size in (1, 2, 4, 8):
            if model.shape.intermediate_size % size == 0:
                yield f"{model.name} TP{size}", model.shape.shard(size), model.activation


def default_plans(shape: MoEShape, activation: str) -> Iterator[Plan]:
    """Every plan with a kernel that plan_for chooses on an H200."""
    plans = {plan_for(shape, tokens, s, Gpu(), 0.0, activation) for tokens in TOKENS for s in SPARSITIES}
    yield from sorted((plan for plan in plans if plan.config is not None), key=str)


def default_specs(every: bool = False) -> dict[KernelSpec, list[str]]:
    """Kernels to inspect -> names of the layers that use them. Without ``every``, one for each (H, tail, config)."""
    found: dict[KernelSpec, list[str]] = {}
    stands_for: dict[object, KernelSpec] = {}
    for name, shape, activation in known_shapes():
        for plan in default_plans(shape, activation):
            assert plan.config is not None
            spec = plan_spec(plan, shape, activation=activation)
            tail = shape.intermediate_size % 128
            same = spec if every else (shape.hidden_size, tail, plan.kind, astuple(plan.config), activation)
            names = found.setdefault(stands_for.setdefault(same, spec), [])
            if name not in names:
                names.append(name)
    return found


def print_table(facts: Iterable[KernelFacts], layers: dict[KernelSpec, list[str]]) -> None:
    table = Table("kernel", "first of its layers", "threads", "registers", "shared memory", "local", *COLUMNS, "all")
    for fact in facts:
        counts = [str(fact.count(*prefixes)) for prefixes in COLUMNS.values()]
        names = layers[fact.spec]
        table.add_row(
            fact.spec.name if fact.kernel == fact.spec.kernel else f"{fact.spec.name} {fact.kernel}",
            names[0] + (f" (+{len(names) - 1})" if len(names) > 1 else ""),
            str(fact.threads),
            f"{fact.registers}/{fact.register_limit}",
            f"{fact.smem}/{SMEM_LIMIT}",
            str(fact.local_accesses),
            *counts,
            str(sum(fact.instructions.values())),
        )
    Console(width=220).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every shape, also where only its sizes differ")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    layers = default_specs(options.all)
    print_table(inspect_in_parallel(layers, options.processes), layers)


if __name__ == "__main__":
    main()
