"""Plots the CSV files of tools/quality_experiments.py: KL over sparsity for scores and budgets, and KL over byte gain
with pairs skipped.

    python tools/plot_quality.py bench/results/quality_*.csv --out docs/images/thresholds.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

SHOWN = (  # score, budget, colour, line
    ("gate", "uniform", "C0", "-"),
    ("moments", "uniform", "C4", "-"),
    ("gate-routed", "uniform", "C1", "-"),
    ("moments-routed", "uniform", "C2", "--"),
    ("moments-routed", "fisher", "C2", "-"),
    ("learned-routed", "uniform", "C3", "--"),
    ("learned-routed", "learned", "C3", "-"),
    ("oracle-routed", "uniform", "0.5", ":"),
)
GAIN = "byte_gain_batch_1"
COMPARED = (("moments-routed", "uniform"), ("learned-routed", "learned"))  # with pairs skipped


def main() -> int:
    parser = argparse.ArgumentParser(description="Plots measurements of scores and pair skipping.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="image to write")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(arguments.files)
    figure, axes = plt.subplots(2, count, figsize=(4 * count + 3, 8), constrained_layout=True, squeeze=False)
    for column, path in enumerate(arguments.files):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        upper, lower = axes[0][column], axes[1][column]
        for score, budget, color, line in SHOWN:
            points = _points(rows, ("score", "budget"), score, budget, "sparsity")
            if points:
                label = score if budget == "uniform" else f"{score}, budget {budget}"
                upper.plot(
                    [100 * x for x, _ in points], [y for _, y in points], line, c=color, marker="o", ms=4, label=label
                )
        lower.plot(
            *zip(*_points(rows, ("score",), "gate", "uniform", GAIN), strict=True), "o-", c="C0", ms=4, label="gate"
        )
        for (score, budget), color in zip(COMPARED, ("C2", "C3"), strict=True):
            alone = _points(rows, ("score", "budget"), score, budget, GAIN)
            lower.plot(*zip(*alone, strict=True), "o-", c=color, ms=4, label=f"{score}, no pairs skipped")
            skipping = [row for row in rows if float(row["skip_pairs_asked"] or 0) > 0]
            joint = _points(skipping, ("joint-kl", "joint-bytes"), score, budget, GAIN)
            lower.plot(*zip(*joint, strict=True), "s", c=color, ms=5, mfc="none", label=f"{score}, pairs skipped")
        bar = next((float(row["kl_mean"]) for row in rows if row["experiment"] == "joint-kl-bar"), None)
        if bar is not None:
            lower.axhline(bar, c="C0", ls=":", lw=1, label="KL of gate at 85 %")
        upper.set(title=path.stem.removeprefix("quality_"), xlabel="realised sparsity (%)", ylabel="mean KL (nats)")
        lower.set(xlabel="dense bytes / sparse bytes, one token", ylabel="mean KL (nats)")
        for axis in (upper, lower):
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if column == count - 1:
                axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)
    print(arguments.out)
    return 0


def _points(
    rows: list[dict[str, str]], experiments: tuple[str, ...], score: str, budget: str, axis: str
) -> list[tuple[float, float]]:
    """(value of the column ``axis``, mean KL) of the rows that match, one token at a time; ascending."""
    return sorted(
        (float(row[axis]), float(row["kl_mean"]))
        for row in rows
        if row["experiment"] in experiments
        and (row["score"], row["budget"]) == (score, budget)
        and row["batch"] in ("", "1")
    )


if __name__ == "__main__":
    sys.exit(main())
