"""`cutedsl-kernels evaluate`: what sparsity costs in quality, measured on given text through vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError

DEFAULT_TARGETS = (0.5, 0.7, 0.8, 0.9)


def register(app: typer.Typer) -> None:
    app.command()(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name.")],
    text: Annotated[list[Path], typer.Option("--text", help="Text file, UTF-8; may be given several times.")],
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            "--profile", help="Sparsity profile; several are compared. Default: the one beside the checkpoint."
        ),
    ] = None,
    target: Annotated[
        list[float] | None,
        typer.Option(
            "--target", help="Target sparsity, 0..1; may be given several times. Default: 0.5, 0.7, 0.8, 0.9."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, spread over the text.")] = 8192,
    max_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks to shard the model over.")] = 1,
    details: Annotated[
        bool, typer.Option(help="Also: spread, mask overlap, greedy agreement (in plain torch; needs memory for both).")
    ] = False,
    oracle: Annotated[bool, typer.Option(help="With the details: selection by the true contribution.")] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated lm-eval tasks, or `paper` for the paper's five; needs lm-eval.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of quality over sparsity here (png, svg, pdf).")
    ] = None,
) -> None:
    """Perplexity, KL to the dense model, changed predictions and realised sparsity, dense against several targets."""
    from rich.console import Console

    from ..quality.engine_eval import compare_targets, start_engine
    from ..quality.report import Row, check_writable, plot_quality, print_layers, print_rows, write_json
    from ..quality.tasks import prepare_tasks, run_tasks
    from ..quality.text import cut_sequences, read_texts

    targets = check_targets(target or [])
    check_counts(max_tokens=max_tokens, max_len=max_len, tensor_parallel_size=tensor_parallel_size)
    check_writable("--json", json_path)
    check_writable("--plot", plot, (".png", ".svg", ".pdf"))
    wanted_tasks = None if tasks is None else prepare_tasks(tasks)
    words, text_hash = read_texts(text)
    chosen: list[Path | None] = list(profile) if profile else [None]
    targets = targets or _default_targets(model, chosen)
    console = Console()
    more: dict[str, Any] = {}
    series: dict[str, list[Row]] = {}
    for path in chosen:
        engine = start_engine(model, path, targets, max_len=max_len, tensor_parallel_size=tensor_parallel_size)
        try:
            sequences = cut_sequences(
                words, engine.tokenizer.encode, max_tokens=max_tokens, max_len=min(max_len, engine.max_model_len - 1)
            )
            rows = compare_targets(engine, sequences, targets, console)
        finally:
            engine.shutdown()
        name = "profile" if path is None else path.stem
        score = engine.profile.score if engine.profile else ""
        print_rows(console, f"{model}: {name}, score {score}, {rows[0].quality.positions} positions", rows)
        console.print(
            "[dim]skipped: pairs skipped whole; flips: top-1 changed; bytes: expert bytes read for one token[/dim]"
        )
        print_layers(console, rows)
        name = name if name not in series else str(path)
        series[name] = rows
        if details or oracle:
            found = run_details(model, path, sequences, targets, oracle, console)
            more[name] = {"details": [one.as_dict() for one in found]}
        if wanted_tasks is not None:
            scores = run_tasks(model, path, [0.0, *targets], wanted_tasks, console)
            more.setdefault(name, {})["tasks"] = scores
    if json_path is not None:
        figures = {name: [row.as_dict() for row in rows] for name, rows in series.items()}
        write_json(json_path, {"model": model, "text_sha256": text_hash, "profiles": figures, "more": more})
    if plot is not None:
        plot_quality(plot, series, f"Quality over sparsity: {Path(model).name}")
        console.print(f"plot: {plot}")


def _default_targets(model: str, profiles: list[Path | None]) -> list[float]:
    """DEFAULT_TARGETS as far as all profiles reach."""
    from ..quality.engine_eval import open_profile

    reach = min(open_profile(model, path)[1].max_target for path in profiles)
    return [target for target in DEFAULT_TARGETS if target <= reach] or [reach]


def run_details(
    model: str, profile: Path | None, sequences: list[list[int]], targets: list[float], oracle: bool, console: Any
) -> list[Any]:
    """measure_details in plain torch, as a table. Returns its list."""
    import torch

    from ..quality.details import measure_details
    from ..quality.engine_eval import open_profile
    from ..quality.hf import MoEModel
    from ..quality.report import print_details

    path, loaded = open_profile(model, profile)
    opened = MoEModel.load(model, "cuda" if torch.cuda.is_available() else "cpu")
    with console.status("measuring details"):
        found = measure_details(opened, loaded, path, sequences, targets, oracle=oracle)
    print_details(console, found)
    return found


def check_targets(targets: list[float] | tuple[float, ...]) -> list[float]:
    """Sorted, without repeats. UserError for one outside 0..1."""
    for value in targets:
        if not 0 < value < 1:
            raise UserError(f"--target must lie between 0 and 1 (the dense model is always included), got {value:g}")
    return sorted(set(targets))


def check_counts(**values: int) -> None:
    """UserError for an option that must be at least 1 (token counts: at least 16) and is not."""
    for name, value in values.items():
        least = 16 if name in ("max_tokens", "max_len") else 1
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
