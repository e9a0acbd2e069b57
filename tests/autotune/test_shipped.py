"""Tables in the package: whole, from a real device, and never slower than dense in their own data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import cutedsl_kernels
from cutedsl_kernels.cost_model import Gpu
from cutedsl_kernels.plan import modelled_us
from cutedsl_kernels.tuned_table import TunedTable, table_path

pytestmark = pytest.mark.cpu
FOLDER = Path(cutedsl_kernels.__file__).parent / "tuned"
TABLES = sorted(FOLDER.glob("*/*.json"))


@pytest.mark.skipif(bool(TABLES), reason="tables are shipped and tested below")
def test_no_table_is_better_than_an_invented_one() -> None:
    assert not list(FOLDER.rglob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_table(path: Path) -> None:
    table = TunedTable.from_json(json.loads(path.read_text()))
    assert path == table_path(FOLDER, table.shape, table.metadata["gpu"], table.dtype), "the library would not find it"
    assert "simulated" not in table.metadata["gpu"]
    assert re.fullmatch(r"\d+(\.\d+)+", table.metadata["driver"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", table.metadata["date"])
    assert table.entries
    for entry in table.entries:
        times = {m.plan: m.us for m in entry.tried if m.us is not None}
        assert entry.us == times[entry.chosen]
        dense = [us for plan, us in times.items() if plan.kind == "dense"]
        assert dense, f"T={entry.num_tokens}: dense was not timed"
        assert entry.us <= 1.02 * dense[0], f"T={entry.num_tokens} s={entry.sparsity}: slower than dense"


def test_the_cost_model_chooses_well_among_what_was_timed() -> None:
    """Without a table the model decides: against these tables nearly always as well as the tuner (the exceptions are in
    docs/autotuning.md), and at most a little slower than dense."""
    regrets, of_dense = [], []
    for path in TABLES:
        table = TunedTable.from_json(json.loads(path.read_text()))
        gpu = Gpu(copy_gbps=4200.0 if "H200" in table.metadata["gpu"] else 2900.0)
        for entry in table.entries:
            where = (table.shape, entry.num_tokens, entry.sparsity, gpu, entry.pair_skip)
            timed = {m.plan: m.us for m in entry.tried if m.us is not None}
            us = timed[min(timed, key=lambda plan, where=where: modelled_us(plan, *where))]
            regrets.append(us / min(timed.values()))
            of_dense.append(min(us for plan, us in timed.items() if plan.kind == "dense") / us)
    assert len(regrets) > 200
    assert sum(regret > 1.05 for regret in regrets) < 0.05 * len(regrets)
    assert max(regrets) < 1.4
    assert min(of_dense) >= 0.97
