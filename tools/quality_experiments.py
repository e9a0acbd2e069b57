"""Measures scores, budgets, pair skipping and mask overlap on trained models; one CSV row per measurement.

    python tools/quality_experiments.py CHECKPOINT... --out bench/results [--tokens 32768] [--device auto]

Writes OUT/quality_NAME.csv for each checkpoint folder NAME. Thresholds come from the calibration split of
tools/corpus.py, figures from its held-out split, or from --text FILE (calibration from its first half). A fifth of the
calibration text is kept apart: budgets and shares of skipped pairs are chosen on it, and thresholds are learned on the
rest. Plain torch (cutedsl_kernels.quality.hf), fp32.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus

from cutedsl_kernels.quality import LEARN_STEPS, budgets
from cutedsl_kernels.quality.hf import MoEModel
from cutedsl_kernels.quality.learned import learn_thresholds
from cutedsl_kernels.quality.metrics import Quality, byte_gain_batch_1
from cutedsl_kernels.quality.scores import SCORES, row_norms
from cutedsl_kernels.quality.search import (
    Evaluator,
    Scored,
    joint_for_bytes,
    joint_for_kl,
    record_fisher,
    record_moments,
    record_weighted_moments,
    spread_sequences,
)
from cutedsl_kernels.quality.traffic import overlap, record_pairs

TARGETS = (0.5, 0.7, 0.8, 0.85, 0.9)
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
MARGIN = 0.15  # of the bar, kept free when searching on validation text
GAINS = (2.0, 2.3, 2.8, 3.3, 3.8)  # dense bytes over sparse ones, one token
BATCH_GAINS = (1.1, 1.2, 1.4, 1.7)  # the same for 64 tokens
QUICK_SCORES = ("gate", "gate-routed", "down-routed", "up-down-routed", "moments", "moments-routed", "learned-routed")
AVERAGES = [round(0.01 * i, 2) for i in range(1, 100)]
COLUMNS = [
    "date",
    "model",
    "experiment",
    "score",
    "budget",
    "batch",
    "target",
    "skip_pairs_asked",
    "sparsity",
    "skipped_pairs",
    "kl_mean",
    "kl_p99",
    "flip_rate",
    "perplexity",
    "byte_gain_batch_1",
    "union",
    "iou",
    "validation_kl",
    "layer_sparsities",
    "calibration_tokens",
    "learning_tokens",
    "evaluation_tokens",
    "device",
]


class Study:
    """One model, its texts, and the rows measured so far."""

    def __init__(
        self,
        path: Path,
        learning: list[list[int]],
        validation: list[list[int]],
        held_out: list[list[int]],
        device: str,
    ) -> None:
        self.name = path.name
        self.model = MoEModel.load(path, device)
        self.learning = learning
        self.calibration = spread_sequences(learning, sum(map(len, held_out)))
        self.evaluator = Evaluator(self.model, held_out)
        self.tuner = Evaluator(self.model, validation)
        self.learned: dict[str, budgets.Budget] = {}
        self.rows: list[dict[str, Any]] = []
        self.fixed = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "model": self.name,
            "calibration_tokens": sum(map(len, self.calibration)),
            "learning_tokens": sum(map(len, learning)),
            "evaluation_tokens": sum(map(len, held_out)),
            "device": torch.cuda.get_device_name() if self.model.device.type == "cuda" else "cpu",
        }
        self.scored: dict[str, Scored] = {}

    def record(self, names: Sequence[str] | None = None, steps: int = LEARN_STEPS) -> None:
        """Every score (or those of SCORES named), from one recording of each kind of moment."""
        model, text = self.model, self.calibration
        moments = record_moments(model, text)
        for name in names or SCORES:
            if SCORES[name].weight != "learned":
                self.scored[name] = Scored.record(model, text, SCORES[name], moments)
                continue
            start = time.perf_counter()
            found = learn_thresholds(model, self.learning, router_weighted=SCORES[name].router_weighted, steps=steps)
            self.scored[name], self.learned[name] = found.scored, found.budget
            print(f"{self.name} {name}: {steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
        if names is not None:
            self.scored["oracle-routed"] = Scored.record_oracle(model, text)
            return
        weighted, fisher = record_weighted_moments(model, text), record_fisher(model, text)
        down = {name: row_norms(layer.weights)[1] for name, layer in model.layers.items()}
        self.scored["gated-moments-routed"] = Scored.with_weights(model, text, {n: down[n] * weighted[n] for n in down})
        for name in ("fisher", "fisher-routed"):
            weights: dict[str, torch.Tensor | None] = dict(fisher)
            self.scored[name] = Scored.with_weights(model, text, weights, router_weighted=name.endswith("routed"))
        for name in ("oracle", "oracle-routed"):
            self.scored[name] = Scored.record_oracle(model, text, router_weighted=name.endswith("routed"))

    def add(self, experiment: str, score: str, budget: str, quality: Quality, **values: Any) -> None:
        sparsity, skipped = self.evaluator.realised()
        layers = " ".join(f"{layer.counters.sparsity:.3f}" for layer in self.model.layers.values())
        row = {
            **self.fixed,
            "experiment": experiment,
            "score": score,
            "budget": budget,
            "sparsity": round(sparsity, 4),
            "skipped_pairs": round(skipped, 4),
            "kl_mean": round(quality.kl_mean, 6),
            "kl_p99": round(quality.kl_p99, 4),
            "flip_rate": round(quality.flip_rate, 5),
            "perplexity": round(quality.perplexity, 4),
            "byte_gain_batch_1": round(byte_gain_batch_1(sparsity, skipped), 3),
            "layer_sparsities": layers,
            **values,
        }
        self.rows.append(row)
        shown = {
            k: row.get(k) for k in ("target", "sparsity", "skipped_pairs", "kl_mean", "flip_rate", "byte_gain_batch_1")
        }
        print(f"{self.name} {experiment} {score} {budget} {shown}", flush=True)

    def scores(self) -> None:
        """Every score, the same sparsity in each layer."""
        self.add("dense", "", "", self.evaluator.quality(None), target=0.0)
        for name, scored in self.scored.items():
            for target in TARGETS:
                self.add("score", name, "uniform", self.evaluator.quality(scored.rules(target)), target=target)

    def budget(self, name: str, kind: str) -> budgets.Budget:
        """A budget for a score; costs are KL on calibration text, one layer sparse at a time."""
        scored = self.scored[name]

        def costs(layer: str, grid: list[float]) -> list[float]:
            alone = [{other: s if other == layer else 0.0 for other in self.model.layers} for s in grid]
            return [self.tuner.quality(scored.rules(targets)).kl_mean for targets in alone]

        if kind == "uniform":
            return budgets.Budget({a: dict.fromkeys(self.model.layers, a) for a in AVERAGES})
        if kind == "learned":
            return self.learned[name]
        routed = scored.router_weighted
        if kind == "shared":
            return budgets.Budget(budgets.shared_threshold(scored.histograms, AVERAGES, router_weighted=routed))
        measured = budgets.Measurements(None, {})
        grid = budgets.GREEDY_GRID if kind == "greedy" else (budgets.FISHER_POINT,)
        measured.measure(self.model.layers, grid, costs)
        if kind == "greedy":
            curves = {layer: budgets.measured_curve(points) for layer, points in measured.costs.items()}
        else:
            curves = budgets.fisher_curves(scored.histograms, measured.costs, router_weighted=routed)
        return budgets.Budget(budgets.allocate(curves, AVERAGES))

    def all_budgets(
        self, names: Sequence[str], kinds: Sequence[str] = budgets.BUDGETS
    ) -> dict[tuple[str, str], budgets.Budget]:
        """Every kind of budget for every score (learned only for those that have one)."""
        found = {}
        for name in names:
            for kind in (k for k in kinds if k != "learned" or name in self.learned):
                budget = found[name, kind] = self.budget(name, kind)
                if kind == "uniform":
                    continue
                for target in TARGETS:
                    quality = self.evaluator.quality(self.scored[name].rules(budget.at(target)))
                    self.add("budget", name, kind, quality, target=target)
        return found

    def joint(
        self,
        made: dict[tuple[str, str], budgets.Budget],
        *,
        shares: Sequence[float] = SHARES,
        gains: Sequence[float] = GAINS,
        batch_gains: Sequence[float] = BATCH_GAINS,
    ) -> None:
        """Pairs skipped and sparsity together, for every score and budget of ``made``: least bytes at the KL of gate at
        85 %, less MARGIN, and least KL at given bytes. The last one also for 64 tokens at once.
        """
        bar = (1 - MARGIN) * self.tuner.quality(self.scored["gate"].rules(0.85)).kl_mean
        quality = self.evaluator.quality(self.scored["gate"].rules(0.85))
        self.add("joint-kl-bar", "gate", "uniform", quality, target=0.85)
        for (name, kind), budget in made.items():
            scored = self.scored[name]

            def limits(sparsity: float, share: float, scored: Scored = scored, budget: budgets.Budget = budget) -> Any:
                return scored.thresholds(budget.at(sparsity), share)

            for point in joint_for_kl(self.tuner, scored, bar, shares, thresholds=limits, tolerance=0.008):
                found = self.evaluator.quality(scored.as_rules(limits(point.sparsity, point.skip_pairs)))
                values = {"target": point.sparsity, "skip_pairs_asked": point.skip_pairs, "batch": 1}
                values["validation_kl"] = round(point.quality.kl_mean, 6)
                self.add("joint-kl", name, kind, found, **values)
            for gain in gains:
                for point in joint_for_bytes(self.tuner, scored, 1 / gain, shares, thresholds=limits):
                    found = self.evaluator.quality(scored.as_rules(limits(point.sparsity, point.skip_pairs)))
                    values = {"target": point.sparsity, "skip_pairs_asked": point.skip_pairs, "batch": 1}
                    self.add("joint-bytes", name, kind, found, **values)
        (name, kind), budget = list(made.items())[-1]
        scored = self.scored[name]
        pairs = record_pairs(self.model, self.calibration[:4], scored.weights, router_weighted=scored.router_weighted)

        def best(sparsity: float, share: float) -> Any:
            return scored.thresholds(budget.at(sparsity), share)

        for gain in batch_gains:
            for point in joint_for_bytes(self.tuner, scored, 1 / gain, shares, thresholds=best, batch=64, pairs=pairs):
                found = self.evaluator.quality(scored.as_rules(best(point.sparsity, point.skip_pairs)))
                values = {"target": point.sparsity, "skip_pairs_asked": point.skip_pairs, "batch": 64}
                self.add("joint-bytes", name, kind, found, **values)

    def overlaps(self, names: Sequence[str]) -> None:
        """Union and intersection over union of the masks of 2, 4, 8, 16 tokens on one expert, mean over layers."""
        for name in names:
            scored = self.scored[name]
            pairs = record_pairs(
                self.model, self.calibration[:4], scored.weights, router_weighted=scored.router_weighted
            )
            for target in TARGETS:
                quality = self.evaluator.quality(scored.rules(target))
                limits = scored.thresholds(target)
                for m in (2, 4, 8, 16):
                    generator = torch.Generator().manual_seed(0)
                    found = [overlap(p.masks(*limits[layer]), m, generator) for layer, p in pairs.items()]
                    kept = [o for o in found if o is not None]
                    values = {
                        "target": target,
                        "batch": m,
                        "union": round(sum(o.union for o in kept) / len(kept), 4),
                        "iou": round(sum(o.iou for o in kept) / len(kept), 4),
                    }
                    self.add("overlap", name, "uniform", quality, **values)


def sequences(text: bytes, tokens: int, length: int = 512) -> list[list[int]]:
    """Windows of ``length`` bytes at even distances, about ``tokens`` in all."""
    windows = [list(text[i : i + length]) for i in range(0, len(text) - length + 1, length)]
    count = min(len(windows), max(1, tokens // length))
    return [windows[int((i + 0.5) * len(windows) / count)] for i in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures scores, budgets and pair skipping on trained models.")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV files")
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens; as many for calibration")
    parser.add_argument("--text", type=Path, help="evaluate on this file's second half, calibrate on its first")
    parser.add_argument("--learn-tokens", type=int, default=65536, help="calibration tokens to learn from")
    parser.add_argument("--steps", type=int, default=LEARN_STEPS, help="steps of learning")
    parser.add_argument("--quick", action="store_true", help="fewer scores, budgets and goals: minutes on a CPU")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.text is not None:
        data = arguments.text.read_bytes()
        halves = data[: len(data) // 2], data[len(data) // 2 :]
    else:
        halves = b"\n".join(corpus.read_split("calibration")), b"\n".join(corpus.read_split("held-out"))
    windows = sequences(halves[0], arguments.learn_tokens * 5 // 4)
    learning = [window for i, window in enumerate(windows) if i % 5 != 2]
    validation = spread_sequences(windows[2::5], max(4096, arguments.tokens // 2))
    held_out = sequences(halves[1], arguments.tokens)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.checkpoints:
        start = time.perf_counter()
        study = Study(path, learning, validation, held_out, device)
        out = arguments.out / f"quality_{path.name}.csv"
        try:
            study.record(QUICK_SCORES if arguments.quick else None, arguments.steps)
            study.scores()
            if arguments.quick:
                made = study.all_budgets(("moments-routed",))
                made |= study.all_budgets(("learned-routed",), ("learned",))
                kept = {key: made[key] for key in (("moments-routed", "uniform"), ("learned-routed", "learned"))}
                study.joint(kept, gains=(3.3,), batch_gains=(1.2,), shares=(0.0, 0.2, 0.35, 0.5))
                study.overlaps(("learned-routed",))
            else:
                names = ("gate", "gate-routed", "moments-routed", "fisher-routed", "learned-routed")
                made = study.all_budgets(names, (*budgets.BUDGETS, "learned"))
                used = (("gate-routed", "uniform"), ("moments-routed", "uniform"), ("moments-routed", "fisher"))
                study.joint({key: made[key] for key in (*used, ("learned-routed", "learned"))})
                study.overlaps(("gate", "moments-routed", "learned-routed"))
        finally:
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(study.rows)
        print(f"{out}: {len(study.rows)} rows, {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
