"""Evaluation results as a table, as JSON, and as a plot of quality over sparsity."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from .metrics import Quality, byte_gain_batch_1

if TYPE_CHECKING:
    from .details import Details


@dataclass(frozen=True)
class LayerRealised:
    """What one layer did: shares in 0..1 over all of its pairs; neurons of skipped pairs count as inactive."""

    sparsity: float
    skipped_pairs: float


@dataclass(frozen=True)
class Row:
    """One setting: what was asked (0 = dense), its quality, and what each layer did. ``extra``: further named
    numbers.
    """

    target: float
    quality: Quality
    layers: dict[str, LayerRealised]
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        return _mean([layer.sparsity for layer in self.layers.values()])

    @property
    def skipped_pairs(self) -> float:
        return _mean([layer.skipped_pairs for layer in self.layers.values()])

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            **asdict(self.quality),
            "sparsity": self.sparsity,
            "skipped_pairs": self.skipped_pairs,
            "byte_gain_batch_1": byte_gain_batch_1(self.sparsity, self.skipped_pairs),
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            **self.extra,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def print_rows(console: Console, title: str, rows: Sequence[Row], extra_columns: dict[str, str] | None = None) -> None:
    """The main table, 80 columns wide. ``extra_columns``: {key of Row.extra: heading}."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["target", "sparsity", "skipped", "perplexity", "KL mean", "KL p99", "flips", "bytes"]
    for heading in [*headings, *(extra_columns or {}).values()]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        q = row.quality
        cells = ["dense", "", "", f"{q.perplexity:.3f}", "", "", "", ""]
        if row.target != 0:
            cells = [
                f"{row.target:.1%}",
                f"{row.sparsity:.1%}",
                f"{row.skipped_pairs:.1%}",
                f"{q.perplexity:.3f}",
                f"{q.kl_mean:.4f}",
                f"{q.kl_p99:.3f}",
                f"{q.flip_rate:.1%}",
                f"1/{byte_gain_batch_1(row.sparsity, row.skipped_pairs):.2f}",
            ]
        table.add_row(*cells, *("" if key not in row.extra else f"{row.extra[key]:.3g}" for key in extra_columns or {}))
    console.print(table)


def print_layers(console: Console, rows: Sequence[Row]) -> None:
    """Realised sparsity of every layer, one column per target."""
    sparse = [row for row in rows if row.target != 0]
    if not sparse:
        return
    names = list(sparse[0].layers)
    head, tail = _shared_ends(names)
    title = f"Realised sparsity per layer (pairs skipped): {head}*{tail}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for row in sparse:
        table.add_column(f"{row.target:.1%}", justify="right", no_wrap=True)
    for name in names:
        cells = (row.layers[name] for row in sparse)
        short = name[len(head) : len(name) - len(tail)]
        table.add_row(short, *(f"{cell.sparsity:.1%} ({cell.skipped_pairs:.0%})" for cell in cells))
    console.print(table)


def print_details(console: Console, found: Sequence[Details]) -> None:
    """Spread, overlap and agreement, one line per target."""
    table = Table(title="Details (plain torch, fp32)", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["target", "KL", "oracle", "std tok", "std exp", "IoU 2/4/8/16", "agree", "lost"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            f"{one.target:.0%}",
            f"{one.kl_mean:.4f}",
            "" if one.oracle_kl is None else f"{one.oracle_kl:.4f}",
            f"{one.spread_tokens:.1%}",
            f"{one.spread_experts:.1%}",
            " ".join(f"{value:.2f}".lstrip("0") for value in one.iou.values()),
            f"{one.agreement:.0f}",
            f"{one.lost_tokens:.1%}",
        )
    console.print(table)
    console.print("[dim]std: of sparsity over tokens and experts; IoU: masks of 2..16 tokens on one expert[/dim]")
    console.print("[dim]agree: equal first tokens of greedy generations, of 64; lost: tokens without expert[/dim]")


def _shared_ends(names: Sequence[str]) -> tuple[str, str]:
    """What all names begin and end with, cut at dots; empty for a single name."""
    if len(names) < 2:
        return "", ""
    parts = [name.split(".") for name in names]
    same = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    head = next((i for i, equal in enumerate(same) if not equal), 0)
    backward = [len(set(column)) == 1 for column in zip(*(part[::-1] for part in parts), strict=False)]
    tail = next((i for i, equal in enumerate(backward) if not equal), 0)
    return "".join(f"{part}." for part in parts[0][:head]), "".join(f".{part}" for part in parts[0][-tail:] if tail)


def write_json(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """UserError if the file cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def check_writable(option: str, path: str | os.PathLike[str] | None, endings: Sequence[str] = ()) -> None:
    """UserError, before any work, if a file cannot be written there, or its ending is not one of ``endings``."""
    if path is None:
        return
    target = Path(path)
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot make its folder: {error.strerror}") from None
    if target.is_dir() or not os.access(target if target.exists() else folder, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written")
    if endings and target.suffix.lower() not in endings:
        raise UserError(f"{option} {path}: must end in one of {', '.join(endings)}")


def plot_quality(path: str | os.PathLike[str], series: Mapping[str, Sequence[Row]], title: str) -> None:
    """KL and changed predictions over realised sparsity, one line per named series. The format follows the file's
    ending.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name, rows in series.items():
        rows = sorted((row for row in rows if row.target != 0), key=lambda row: row.sparsity)
        x = [100 * row.sparsity for row in rows]
        axes[0].plot(x, [max(row.quality.kl_mean, 1e-7) for row in rows], marker="o", label=f"{name}: mean")
        colour = axes[0].lines[-1].get_color()
        axes[0].plot(
            x,
            [max(row.quality.kl_p99, 1e-7) for row in rows],
            marker=".",
            ls="--",
            color=colour,
            label=f"{name}: 99th percentile",
        )
        axes[1].plot(x, [100 * row.quality.flip_rate for row in rows], marker="o", color=colour, label=name)
    axes[0].set(yscale="log", xlabel="realised sparsity (%)", ylabel="KL to the dense model (nats)")
    axes[1].set(xlabel="realised sparsity (%)", ylabel="changed top-1 predictions (%)", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=140)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: cannot be written: {error}") from None
    finally:
        plt.close(figure)
