"""Plots the CSV files of tools/quality_experiments.py: KL over sparsity for each score, and KL over byte gain with
pairs skipped.

    python tools/plot_quality.py bench/results/quality_*.csv --out docs/images/thresholds.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

SHOWN = ("gate", "gate-routed", "down-routed", "up-down-routed", "moments", "moments-routed", "oracle-routed")


def main() -> int:
    parser = argparse.ArgumentParser(description="Plots measurements of scores and pair skipping.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="image to write")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(arguments.files)
    figure, axes = plt.subplots(2, count, figsize=(5 * count, 8), constrained_layout=True, squeeze=False)
    for column, path in enumerate(arguments.files):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        upper, lower = axes[0][column], axes[1][column]
        for index, score in enumerate(SHOWN):
            points = sorted(
                (float(row["sparsity"]), float(row["kl_mean"]))
                for row in rows
                if row["experiment"] == "score" and row["score"] == score
            )
            if points:
                style = {"color": f"C{index}", "ls": "--" if score.startswith("oracle") else "-"}
                upper.plot([100 * x for x, _ in points], [y for _, y in points], marker="o", ms=4, label=score, **style)
        for index, (name, test) in enumerate(_series(rows).items()):
            points = sorted((float(row["byte_gain_batch_1"]), float(row["kl_mean"])) for row in test)
            marker = "o-" if index < 2 else "s"
            lower.plot(*zip(*points, strict=True), marker, ms=4, label=name)
        upper.set(title=path.stem.removeprefix("quality_"), xlabel="realised sparsity (%)", ylabel="mean KL (nats)")
        lower.set(xlabel="dense bytes / sparse bytes, one token", ylabel="mean KL (nats)")
        for axis in (upper, lower):
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)
    print(arguments.out)
    return 0


def _series(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows of the lower plots by their label."""
    found: dict[str, list[dict[str, str]]] = {}
    for score in ("gate", "moments-routed"):
        found[f"{score}, no pairs skipped"] = [r for r in rows if r["experiment"] == "score" and r["score"] == score]
    for row in rows:
        joint = row["experiment"] in ("joint-kl", "joint-bytes") and row["batch"] == "1"
        if joint and row["score"] == "moments-routed" and row["budget"] == "uniform":
            found.setdefault(f"moments-routed, {float(row['skip_pairs_asked']):.0%} asked", []).append(row)
    return {name: found[name] for name in [*list(found)[:2], *sorted(list(found)[2:])] if found[name]}


if __name__ == "__main__":
    sys.exit(main())
