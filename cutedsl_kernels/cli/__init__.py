"""The command line `cutedsl-kernels`. Each command is a module of this package with a function `register(app)`.

This package stands above the rest: it may import autotune, bench and integration, and nothing imports it. Command
modules import what is heavy inside the command, so that `--help` stays fast.
"""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from ..errors import UserError

COMMANDS: tuple[str, ...] = ("evaluate", "generate")


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="cutedsl-kernels",
        help="Intra-expert activation sparsity for Mixture-of-Experts models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in COMMANDS:
        import_module(f".{command}", __name__).register(app)
    return app


def main() -> None:
    """Entry point. Bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        build_app()()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
