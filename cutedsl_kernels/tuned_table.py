"""Tuned tables: the file format, and the lookup memory -> user folder -> shipped. Nothing here tunes or writes files.

One JSON file per GPU, shape and dtype, ``<folder>/<gpu>/E=256,H=2048,I=512,k=8,bf16.json``:

    {"format": "cutedsl-kernels-tuned/1",
     "shape": {"num_experts": 256, "top_k": 8, "hidden_size": 2048, "intermediate_size": 512}, "dtype": "bf16",
     "metadata": {"gpu": "NVIDIA H200", "driver": "580.95.05", "library": "0.1.0", "dsl": "4.8.1", "date": "2026-11-23",
                  "dense": "vllm", "timing": "how it was timed"},
     "entries": [{"num_tokens": 8, "sparsity": 0.85, "pair_skip": 0.0,
                  "chosen": {"kind": "fused", "config": {...}}, "us": 41.2,
                  "tried": [{"plan": {...}, "us": 41.2}, {"plan": {...}, "failure": "why"}]}]}

``sparsity`` is the share of inactive neurons over all pairs, ``pair_skip`` the share of pairs skipped whole.
``dense`` is what a dense plan ran: ``vllm`` (its Triton kernel) or ``library`` (torch's grouped product).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .configs import Plan, illegal_reason
from .cost_model import Gpu
from .environment import dsl_version, user_dir
from .shapes import MoEShape

FORMAT = "cutedsl-kernels-tuned/1"
METADATA = ("gpu", "driver", "library", "dsl", "date", "dense", "timing")
REACH = 0.1  # how far an entry's sparsity and pair_skip may lie from what is asked
SHIPPED_DIR = Path(__file__).parent / "tuned"


class TunedTableWarning(UserWarning):
    """A tuned table is not used, or is used although it was made under other versions."""


@dataclass(frozen=True)
class Measurement:
    """One plan that was tried: microseconds of a layer, or why it has none."""

    plan: Plan
    us: float | None = None
    failure: str | None = None

    def __post_init__(self) -> None:
        if (self.us is None) == (self.failure is None):
            raise ValueError(f"a measurement has either us or failure, got us={self.us!r}, failure={self.failure!r}")

    def to_json(self) -> dict[str, Any]:
        result = {"us": self.us} if self.failure is None else {"failure": self.failure}
        return {"plan": self.plan.to_json(), **result}


@dataclass(frozen=True)
class Entry:
    """What was found for one bucket of tokens and one bin of sparsity."""

    num_tokens: int
    sparsity: float
    pair_skip: float
    chosen: Plan
    us: float
    tried: tuple[Measurement, ...]

    def is_near(self, sparsity: float, pair_skip: float) -> bool:
        """Whether the entry says something about these shares: both within REACH."""
        return abs(self.sparsity - sparsity) <= REACH and abs(self.pair_skip - pair_skip) <= REACH

    def to_json(self) -> dict[str, Any]:
        return {
            "num_tokens": self.num_tokens,
            "sparsity": self.sparsity,
            "pair_skip": self.pair_skip,
            "chosen": self.chosen.to_json(),
            "us": self.us,
            "tried": [measurement.to_json() for measurement in self.tried],
        }


@dataclass(frozen=True)
class TunedTable:
    """One file. metadata holds the strings named in METADATA."""

    shape: MoEShape
    dtype: str
    metadata: Mapping[str, str]
    entries: tuple[Entry, ...]

    def lookup(self, num_tokens: int, sparsity: float, pair_skip: float = 0.0) -> Plan | None:
        """Plan of the nearest bucket at or above ``num_tokens``; None if every bucket is smaller.

        In the bucket, the entry of the nearest sparsity and pair_skip counts, the sparser of two equally near last;
        None if it is further than REACH away in either.
        """
        buckets = {entry.num_tokens for entry in self.entries if entry.num_tokens >= num_tokens}
        if not buckets:
            return None
        rows = [entry for entry in self.entries if entry.num_tokens == min(buckets)]
        best = min(rows, key=lambda row: (abs(row.sparsity - sparsity) + abs(row.pair_skip - pair_skip), row.sparsity))
        return best.chosen if best.is_near(sparsity, pair_skip) else None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "shape": asdict(self.shape),
            "dtype": self.dtype,
            "metadata": dict(self.metadata),
            "entries": [entry.to_json() for entry in self.entries],
        }

    @classmethod
    def from_json(cls, data: Any) -> TunedTable:
        """ValueError saying what is wrong: not a table of this format, or a chosen plan that cannot run."""
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format is {data['format']!r}, must be {FORMAT!r}")
            shape = MoEShape(**data["shape"])
            metadata = {name: str(data["metadata"][name]) for name in METADATA}
            entries = tuple(_entry(raw, shape) for raw in data["entries"])
            return cls(shape, str(data["dtype"]), metadata, entries)
        except KeyError as error:
            raise ValueError(f"field {error.args[0]!r} is missing") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a field has the wrong type: {error}") from None


def _entry(raw: Any, shape: MoEShape) -> Entry:
    tried = tuple(Measurement(Plan.from_json(row["plan"]), row.get("us"), row.get("failure")) for row in raw["tried"])
    chosen, num_tokens = Plan.from_json(raw["chosen"]), int(raw["num_tokens"])
    if chosen.kind == "cpu":
        raise ValueError(f"the plan chosen for {num_tokens} tokens is a cpu plan")
    if reason := illegal_reason(chosen, shape, num_tokens):
        raise ValueError(f"the plan chosen for {num_tokens} tokens cannot run: {reason}")
    return Entry(num_tokens, float(raw["sparsity"]), float(raw["pair_skip"]), chosen, float(raw["us"]), tried)


def gpu_folder(gpu_name: str) -> str:
    """Name of the folder of a GPU's tables: ``NVIDIA H200`` -> ``NVIDIA_H200``."""
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu_name).strip("_")


def table_path(folder: Path, shape: MoEShape, gpu_name: str, dtype: str = "bf16") -> Path:
    """Where ``folder`` (user_dir("tuned"), or the shipped one) keeps the table of a shape on a GPU."""
    return folder / gpu_folder(gpu_name) / f"{shape.key},{dtype}.json"


_loaded: dict[tuple[MoEShape, Gpu, str], TunedTable | None] = {}
_warned: set[str] = set()


def find_table(shape: MoEShape, gpu: Gpu, dtype: str = "bf16") -> TunedTable | None:
    """The table for ``shape`` on ``gpu``: from memory, the user's folder, or the shipped ones; None if there is none.

    Never fails: a damaged table, or one of another GPU, is passed over with a TunedTableWarning; one made under another
    driver or DSL version is used, with one TunedTableWarning.
    """
    key = (shape, gpu, dtype)
    if key not in _loaded:
        folders = (user_dir("tuned"), SHIPPED_DIR)
        tables = (_read(table_path(folder, shape, gpu.name, dtype), shape, gpu, dtype) for folder in folders)
        _loaded[key] = next((table for table in tables if table is not None), None)
    return _loaded[key]


def forget_tables() -> None:
    """Drops what is in memory, so that the next lookup reads the files again."""
    _loaded.clear()
    _warned.clear()


def _read(path: Path, shape: MoEShape, gpu: Gpu, dtype: str) -> TunedTable | None:
    try:
        table = TunedTable.from_json(json.loads(path.read_text()))
        if (table.shape, table.dtype) != (shape, dtype):
            raise ValueError(f"it is for {table.shape.key},{table.dtype}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _warn(f"{path}: tuned table ignored: {error}: tune this shape again or delete the file")
        return None
    if table.metadata["gpu"] != gpu.name:
        _warn(f"{path}: tuned table ignored: made on {table.metadata['gpu']!r}, this GPU is {gpu.name!r}")
        return None
    for name, now in (("driver", gpu.driver), ("dsl", dsl_version())):
        if now and table.metadata[name] != now:
            _warn(f"{path}: tuned under {name} {table.metadata[name]}, running {now}: used, but tuning again may pay")
            break
    return table


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, TunedTableWarning, stacklevel=2)
