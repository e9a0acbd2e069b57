"""`cutedsl-kernels autotune`: hands its arguments to the autotune package, which also runs without typer."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    @app.command(
        "autotune",
        help="Find the fastest plan for every batch size of a layer on this GPU.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )
    def command(context: typer.Context) -> None:
        from ..autotune.command import main

        raise SystemExit(main(context.args, prog="cutedsl-kernels autotune"))
