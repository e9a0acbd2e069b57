"""Which rows of benchmark CSVs a table or a plot shows: one measurement for each model, rule and number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cutedsl_kernels import MoEShape
from cutedsl_kernels.cost_model import dense_bytes, layer_bytes

CHOICES = ("asked", "auto", "serving")  # of rows for the same case, those of the last count


@dataclass(frozen=True, order=True)
class Case:
    """A line of a plot: sparsity and share of skipped pairs as asked for, threshold times routing weight or not."""

    sparsity: float
    pair_skip: float
    router_weighted: bool

    @property
    def label(self) -> str:
        text = f"{self.sparsity * 100:g} %"
        return f"{text}, {self.pair_skip * 100:.0f} % of pairs skipped" if self.pair_skip else text


@dataclass(frozen=True)
class Measured:
    """The row that counts for a case at one number of tokens."""

    case: Case
    shape: MoEShape
    num_tokens: int
    plan: str
    us: float
    gbps: float
    copy_share: float
    baseline: str
    baseline_us: float
    source: Mapping[str, str] = field(repr=False, compare=False)  # the row itself

    @property
    def ratio(self) -> float:
        return self.baseline_us / self.us

    @property
    def byte_cap(self) -> float:
        """Bytes of the dense layer over bytes of the sparse one, for independent masks."""
        s, skip = self.case.sparsity, self.case.pair_skip
        return dense_bytes(self.shape, self.num_tokens).total / layer_bytes(self.shape, self.num_tokens, s, skip).total


def measured(
    rows: Iterable[Mapping[str, str]], model: str, *, routing: str = "uniform", iou: str = ""
) -> dict[Case, list[Measured]]:
    """By case, ordered by tokens. Of several rows for a case and T: the latest of the choice made inside vLLM, or of
    the library's own, or the fastest of the plans asked for."""
    found: dict[tuple[Case, int], tuple[tuple[int, float, str], Measured]] = {}
    for row in rows:
        wanted = (row["model"], row["routing"], row["iou_target"]) == (model, routing, iou)
        if not wanted or row["choice"] == "baseline" or not row["baseline_us"]:
            continue
        weighted = row["router_weighted"] == "1"
        case = Case(float(row["sparsity_target"]), float(row["pair_skip_target"]), weighted)
        shape = MoEShape(*(int(row[name]) for name in ("experts", "top_k", "hidden", "intermediate")))
        one = Measured(
            case,
            shape,
            int(row["num_tokens"]),
            row["plan"],
            float(row["us"]),
            float(row["gbps"]),
            float(row["copy_share"]),
            row["baseline"],
            float(row["baseline_us"]),
            row,
        )
        level = CHOICES.index(row["choice"])
        rank = (level, 0.0, row["date"]) if level else (0, -one.us, "")
        key = (case, one.num_tokens)
        if key not in found or rank > found[key][0]:
            found[key] = (rank, one)
    cases: dict[Case, list[Measured]] = {}
    for (case, _), (_, one) in sorted(found.items(), key=lambda item: item[0]):
        cases.setdefault(case, []).append(one)
    return cases


def by_gpu(rows: Iterable[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """Rows of each GPU, the one measured last first: figures of two GPUs never share a table or a plot."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault(row["gpu"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: max(row["date"] for row in item[1]), reverse=True))


def models(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Names in the order of their first row."""
    return list(dict.fromkeys(row["model"] for row in rows))
