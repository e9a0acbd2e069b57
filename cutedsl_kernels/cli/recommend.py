"""`cutedsl-kernels recommend`: the highest sparsity that keeps a quality bar, found by bisection on given text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

BATCHES = (1, 8, 32, 128)


def register(app: typer.Typer) -> None:
    app.command()(recommend)


def recommend(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name.")],
    text: Annotated[list[Path], typer.Option("--text", help="Text file, UTF-8; may be given several times.")],
    max_kl: Annotated[float | None, typer.Option(help="Bar: mean KL to the dense model, nats.")] = None,
    max_flips: Annotated[float | None, typer.Option(help="Bar: share of changed top-1 predictions, 0..1.")] = None,
    min_tasks: Annotated[
        float | None, typer.Option(help="Bar: mean of --tasks over the dense model's, for example 0.95; needs lm-eval.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks for --min-tasks, or `paper`: the paper's five.")] = "paper",
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Sparsity profile. Default: the one beside the checkpoint.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Profile to write, in the same folder. Default: the profile read.")
    ] = None,
    precision: Annotated[float, typer.Option(help="Stop when the sparsity is known this well.")] = 0.01,
    max_tokens: Annotated[int, typer.Option(help="Tokens to judge by, spread over the text.")] = 8192,
    max_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks to shard the model over.")] = 1,
) -> None:
    """Find the highest sparsity within a quality bar, and make it the profile's default target."""
    from rich.console import Console

    from ..integration.vllm.options import Options, find_profile
    from ..quality.engine_eval import compare_targets, setting_qualities, start_engine
    from ..quality.report import print_rows
    from ..quality.search import highest_within
    from ..quality.tasks import prepare_tasks
    from ..quality.text import cut_sequences, read_texts
    from ..sparsity import SparsityProfile
    from .evaluate import check_counts

    bars = {"kl_mean": max_kl, "flip_rate": max_flips}
    _check_bars(max_kl, max_flips, min_tasks, precision)
    names = [] if min_tasks is None else prepare_tasks(tasks)
    check_counts(max_tokens=max_tokens, max_len=max_len, tensor_parallel_size=tensor_parallel_size)
    words, text_hash = read_texts(text)
    path = profile if profile is not None else find_profile(Options.collect(None), model)
    target_path = out or path
    if target_path.resolve().parent != path.resolve().parent:
        raise UserError(f"--out {target_path}: must lie in the folder of the profile read, {path.parent}")
    console = Console()
    ceiling = SparsityProfile.load(path).max_target
    task_figures: dict[str, float] = {}
    if min_tasks is not None:
        ceiling = _within_tasks(model, path, names, min_tasks, ceiling, precision, task_figures, console)
    engine = start_engine(model, path, [], max_len=max_len, tensor_parallel_size=tensor_parallel_size)
    try:
        sequences = cut_sequences(
            words, engine.tokenizer.encode, max_tokens=max_tokens, max_len=min(max_len, engine.max_model_len - 1)
        )
        found_profile = engine.profile
        if found_profile is None:
            raise UserError(f"{path}: no sparsity profile was loaded")

        def holds(target: float) -> bool:
            quality = setting_qualities(engine, sequences, [target])[0]
            kept = all(bar is None or getattr(quality, name) <= bar for name, bar in bars.items())
            verdict = "holds" if kept else "fails"
            console.print(f"{target:6.1%}  KL {quality.kl_mean:.4f}  flips {quality.flip_rate:.1%}  {verdict}")
            return kept

        best = ceiling
        if max_kl is not None or max_flips is not None:
            best = highest_within(holds, 0.0, ceiling, precision)
        if best == 0:
            raise UserError(f"no sparsity of at least {precision:g} holds the bar on this text: relax it")
        row = compare_targets(engine, sequences, [best])[1]
        shape_of = engine.identity
    finally:
        engine.shutdown()
    print_rows(console, f"{model}: recommended target {best:.1%} (text {text_hash[:12]})", [row])
    gains = expected_gains(shape_of, row.sparsity, row.skipped_pairs)
    console.print(
        "Weight bytes of the dense layer over those of the sparse one, uniform routing and independent masks: "
        + ", ".join(f"batch {batch}: {gain:.2f}x" for batch, gain in gains.items())
    )
    times = tuned_gains(shape_of, row.sparsity, row.skipped_pairs)
    if times:
        console.print(
            "Time of the dense layer over that of the sparse one, from the tuned table: "
            + ", ".join(f"batch {batch}: {gain:.2f}x" for batch, gain in times.items())
        )
    else:
        console.print("No tuned table has this shape, GPU and sparsity: no measured times (`cutedsl-kernels autotune`)")
    quality = {
        "target_sparsity": best,
        "sparsity": row.sparsity,
        "skipped_pairs": row.skipped_pairs,
        "kl_mean": row.quality.kl_mean,
        "flip_rate": row.quality.flip_rate,
        **{f"bar_{name}": bar for name, bar in bars.items() if bar is not None},
        **({} if min_tasks is None else {"bar_tasks": min_tasks, **task_figures}),
        **{f"byte_gain_batch_{batch}": gain for batch, gain in gains.items()},
        **{f"tuned_gain_batch_{batch}": gain for batch, gain in times.items()},
    }
    found_profile.with_quality(quality).save(target_path)
    console.print(f"{target_path}: default target {best:.1%}")


def expected_gains(identity: Any, sparsity: float, skipped_pairs: float) -> dict[int, float]:
    """{batch: bytes of the dense layer / bytes of the sparse one} by the cost model."""
    from ..cost_model import dense_bytes, layer_bytes
    from ..shapes import MoEShape

    shape = MoEShape(identity.num_experts, identity.top_k, identity.hidden_size, identity.intermediate_size)
    return {
        batch: round(dense_bytes(shape, batch).total / layer_bytes(shape, batch, sparsity, skipped_pairs).total, 3)
        for batch in BATCHES
    }


def tuned_gains(identity: Any, sparsity: float, skipped_pairs: float) -> dict[int, float]:
    """{batch: time of the dense layer / time of the sparse one} by the tuned table of this shape and GPU (without a
    GPU: an H200's); empty without a table. A batch without an entry near this sparsity and share is left out;
    of several the least gain counts.

    Both times are in the table: that of the chosen plan, and that of the dense one it was tuned against.
    """
    from ..environment import gpu_of
    from ..shapes import MoEShape
    from ..tuned_table import find_table

    shape = MoEShape(identity.num_experts, identity.top_k, identity.hidden_size, identity.intermediate_size)
    table = find_table(shape, gpu_of("cuda"))
    found: dict[int, float] = {}
    for entry in () if table is None else table.entries:
        dense = [m.us for m in entry.tried if m.plan.kind == "dense" and m.us is not None]
        if entry.is_near(sparsity, skipped_pairs) and dense and entry.num_tokens in BATCHES:
            gain = round(min(dense) / entry.us, 3)
            found[entry.num_tokens] = min(gain, found.get(entry.num_tokens, gain))
    return found


def _within_tasks(
    model: str,
    profile: Path,
    tasks: list[str],
    bar: float,
    ceiling: float,
    precision: float,
    figures: dict[str, float],
    console: Console,
) -> float:
    """The highest target whose task mean is at least ``bar`` of the dense model's; ``figures`` gets both means."""
    from ..quality.search import highest_within
    from ..quality.tasks import task_accuracies

    dense = task_accuracies(model, None, 0.0, tasks)["mean"]
    figures["tasks_dense"] = dense

    def holds(target: float) -> bool:
        mean = task_accuracies(model, profile, target, tasks)["mean"]
        kept = mean >= bar * dense
        if kept:
            figures["tasks_mean"] = mean
        console.print(f"{target:6.1%}  tasks {mean:.4f}, {mean / dense:.1%} of dense  {'holds' if kept else 'fails'}")
        return kept

    return highest_within(holds, 0.0, ceiling, precision)


def _check_bars(max_kl: float | None, max_flips: float | None, min_tasks: float | None, precision: float) -> None:
    if max_kl is None and max_flips is None and min_tasks is None:
        raise UserError(
            "no quality bar: give --max-kl (for example 0.02), --max-flips (for example 0.05) or --min-tasks 0.95"
        )
    if min_tasks is not None and not 0 < min_tasks <= 1:
        raise UserError(f"--min-tasks must lie in 0..1, got {min_tasks:g}")
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise UserError(f"--max-kl must be above 0, got {max_kl:g}")
    if max_flips is not None and not 0 < max_flips < 1:
        raise UserError(f"--max-flips must lie between 0 and 1, got {max_flips:g}")
    if not 0.001 <= precision <= 0.2:
        raise UserError(f"--precision must lie in 0.001..0.2, got {precision:g}")
