"""Tables in the package: whole, from a real device, and never slower than dense in their own data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import cutedsl_kernels
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
