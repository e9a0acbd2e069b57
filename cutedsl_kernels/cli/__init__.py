"""The command line `cutedsl-kernels`. Each command is a module of this package with a function `register(app)`.

This package stands above the rest: it may import autotune, bench and integration, and nothing imports it. Command
modules import what is heavy inside the command, so that `--help` stays fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import cast

import typer

from ..errors import UserError

COMMANDS = ("calibrate", "evaluate", "generate", "recommend", "doctor", "bench", "autotune", "serve_check")

# The base of all errors about the command line itself. typer has its own copy of click since 0.24 and click's before.
_UsageMistake = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="cutedsl-kernels",
        help="Intra-expert activation sparsity for Mixture-of-Experts models.",
        add_completion=False,
        pretty_exceptions_enable=False,
        invoke_without_command=True,
        callback=_top_level,
    )
    for command in COMMANDS:
        import_module(f".{command}", __name__).register(app)
    return app


def _top_level(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from .. import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        status = build_app()(arguments, standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except _UsageMistake as error:
        _fail(f"{error.format_message()} (cutedsl-kernels --help lists commands and options)")
    except typer.Abort:
        raise SystemExit(130) from None
    except BrokenPipeError:  # a reader such as `head` has gone
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    raise SystemExit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
