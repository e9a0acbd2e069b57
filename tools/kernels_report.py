"""python tools/kernels_report.py: what the kernels of the default plans use, as a table.

For every known model, at tensor parallel sizes 1, 2, 4 and 8, and the plans chosen for 1 to 512 tokens. Kernels that
differ only in numbers which the code does not branch on are shown once unless --all. No GPU needed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from cutedsl_kernels.compile import KernelSpec
from cutedsl_kernels.compile.defaults import default_specs, dense_path_specs
from cutedsl_kernels.compile.inspect import KernelFacts, inspect_in_parallel
from cutedsl_kernels.configs import SMEM_LIMIT

COLUMNS = {
    "bulk": ("UBLKCP",),
    "LDGSTS.128": ("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128"),
    "LDG.128": ("LDG.E.128",),
    "LDSM": ("LDSM",),
    "HMMA": ("HMMA",),
    "HGMMA": ("HGMMA",),
    "red": ("RED", "REDG"),
    "barriers": ("BAR", "SYNCS"),
    "setmaxnreg": ("USETMAXREG",),
}


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
    layers = default_specs(every=options.all)
    dense = list(dense_path_specs().items())
    layers |= dict(dense if options.all else dense[:2])
    print_table(inspect_in_parallel(layers, options.processes), layers)


if __name__ == "__main__":
    main()
