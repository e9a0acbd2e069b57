"""`cutedsl-kernels bench`: hands its arguments to a module of the bench package, each of which reads them itself.

The modules use argparse because they also run as `python -m bench.NAME` on a machine where neither this package nor
typer is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import typer

SUBCOMMANDS = {
    "layer": "One sparse MoE layer against dense baselines on this machine's device.",
    "suite": "A grid of layer measurements under a time budget.",
    "compaction": "What gating and compaction cost, with no neuron active.",
    "launch": "Host microseconds of a call and of the choice of a plan.",
    "compile": "Seconds until a kernel is ready, cold and warm.",
    "e2e": "Decoding through vLLM, dense against sparse.",
    "roofline": "What a shape can gain at best.",
    "plot": "Plots and the README's table from CSV files.",
}
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Benchmarks. Without a subcommand: `layer` with its defaults.",
        invoke_without_command=True,
        add_completion=False,
    )

    @group.callback()
    def default(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            raise SystemExit(run("layer", []))

    for name, text in SUBCOMMANDS.items():
        group.command(name, help=text, context_settings=_FORWARD, add_help_option=False)(_forward(name))
    app.add_typer(group, name="bench")


def _forward(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        raise SystemExit(run(name, context.args))

    return command


def run(name: str, argv: list[str]) -> int:
    """Exit code of ``bench NAME argv``."""
    module = import_module(f"cutedsl_kernels.bench.{name}")
    code: int = module.main(argv, prog=f"cutedsl-kernels bench {name}")
    return code
