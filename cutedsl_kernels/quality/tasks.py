"""Multiple-choice tasks through lm-eval's vLLM back end, at several sparsities."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import UserError

PAPER_TASKS = ("arc_challenge", "arc_easy", "hellaswag", "winogrande", "truthfulqa_mc2")
# Folder names of the data sets in the cache of the `datasets` package.
CACHED_AS = {
    "arc_challenge": "allenai___ai2_arc",
    "arc_easy": "allenai___ai2_arc",
    "hellaswag": "Rowan___hellaswag",
    "winogrande": "winogrande",
    "truthfulqa_mc2": "truthfulqa___truthful_qa",
}


def prepare_tasks(names: str) -> list[str]:
    """Task names, after checking that lm-eval is there and, offline, that their data is. UserError says what is
    missing.
    """
    tasks = list(PAPER_TASKS) if names == "paper" else [name.strip() for name in names.split(",") if name.strip()]
    if not tasks:
        raise UserError(f"--tasks must name at least one lm-eval task, or `paper`, got {names!r}")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-eval, which is not installed: pip install 'cutedsl-kernels[eval]'")
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        missing = missing_data(tasks)
        if missing:
            raise UserError(
                f"--tasks: offline, and no cached data for {', '.join(missing)}: fetch it with a connection first"
            )
    return tasks


def missing_data(tasks: Sequence[str]) -> list[str]:
    """Those of the paper's tasks whose data set is not in the local cache; other tasks are not known here and not
    listed.
    """
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    present = {path.name.lower() for path in cache.iterdir()} if cache.is_dir() else set()
    return [task for task in tasks if task in CACHED_AS and CACHED_AS[task].lower() not in present]


def run_tasks(
    model: str, profile: Path | None, targets: Sequence[float], tasks: Sequence[str], console: Console
) -> dict[str, dict[str, float]]:
    """{target: {task: accuracy, "mean": mean}}; 0 = dense. Prints a table with each mean relative to the first
    target's.
    """
    results: dict[str, dict[str, float]] = {}
    table = Table(title="Tasks", title_justify="left")
    for heading in ("target", *tasks, "mean", "of dense"):
        table.add_column(heading, justify="right")
    for target in targets:
        row = task_accuracies(model, profile, target, tasks)
        results[f"{target:g}"] = row
        base = next(iter(results.values()))["mean"]
        table.add_row(
            "dense" if target == 0 else f"{target:.0%}",
            *(f"{v:.3f}" for v in row.values()),
            f"{row['mean'] / base:.1%}",
        )
    console.print(table)
    return results


def task_accuracies(model: str, profile: Path | None, target: float, tasks: Sequence[str]) -> dict[str, float]:
    """{task: accuracy, "mean": mean} at one target sparsity; 0 = dense."""
    import lm_eval

    answer = lm_eval.simple_evaluate(model="vllm", model_args=vllm_arguments(model, profile, target), tasks=list(tasks))
    row = {task: _accuracy(answer["results"][task]) for task in tasks}
    row["mean"] = sum(row.values()) / len(row)
    return row


def vllm_arguments(model: str, profile: Path | None, target: float) -> dict[str, Any]:
    """Arguments of lm-eval's vLLM model for a target sparsity; 0: the stock dense model."""
    arguments: dict[str, Any] = {"pretrained": model, "dtype": "auto", "enable_prefix_caching": False}
    if target > 0:
        options: dict[str, Any] = {"target_sparsity": target}
        if profile is not None:
            options["profile"] = os.fspath(profile)
        arguments |= {"quantization": "intra_expert_sparse", "hf_overrides": {"intra_expert_sparsity": options}}
    return arguments


def _accuracy(result: dict[str, Any]) -> float:
    """Normalised accuracy where the task has one, accuracy otherwise."""
    for name in ("acc_norm,none", "acc,none"):
        if name in result:
            return float(result[name])
    raise UserError(f"--tasks: lm-eval gave no accuracy, only {', '.join(map(str, result))}")
