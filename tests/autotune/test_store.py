"""The store: atomic, locked, resumable; damaged and foreign files."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from cutedsl_kernels.autotune.space import Bin
from cutedsl_kernels.autotune.store import Store

from cutedsl_kernels import MoEShape, UserError
from cutedsl_kernels.configs import FusedConfig, Plan
from cutedsl_kernels.cost_model import Gpu
from cutedsl_kernels.tuned_table import Entry, Measurement, TunedTable, find_table, forget_tables, table_path

pytestmark = pytest.mark.cpu
SHAPE = MoEShape(8, 2, 512, 128)
METADATA = {
    "gpu": "GPU A",
    "driver": "1",
    "library": "0.1",
    "dsl": "4.8",
    "date": "2026-01-01",
    "dense": "library",
    "timing": "made up",
}
DENSE, FUSED = Plan("dense"), Plan("fused", FusedConfig())


def entry(num_tokens: int, us: float = 10.0, sparsity: float = 0.8) -> Entry:
    tried = (Measurement(FUSED, us=us), Measurement(DENSE, us=2 * us))
    return Entry(num_tokens, sparsity, 0.0, FUSED, us, tried)


def table_of(folder: Path) -> TunedTable:
    return TunedTable.from_json(json.loads(table_path(folder, SHAPE, "GPU A").read_text()))


def test_entries_come_back_and_replace_their_bin(tmp_path: Path) -> None:
    store = Store(tmp_path, SHAPE, METADATA)
    for one in (entry(8), entry(1), entry(8, us=7.0), entry(8, sparsity=0.9)):
        store.finish(one)
    assert [(e.num_tokens, e.sparsity, e.us) for e in table_of(tmp_path).entries] == [
        (1, 0.8, 10.0), (8, 0.8, 7.0), (8, 0.9, 10.0)
    ]  # fmt: skip
    assert set(Store(tmp_path, SHAPE, METADATA).finished()) == {Bin(1, 0.8), Bin(8, 0.8), Bin(8, 0.9)}


def test_the_library_finds_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path, SHAPE, METADATA | {"dsl": ""}).finish(entry(8))
    monkeypatch.setenv("CUTEDSL_KERNELS_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr("cutedsl_kernels.tuned_table.dsl_version", lambda: "")
    forget_tables()
    table = find_table(SHAPE, Gpu(name="GPU A", driver="1"))
    assert table is not None
    assert table.lookup(5, 0.8) == FUSED
    assert table.lookup(9, 0.8) is None
    forget_tables()


def test_the_journal_keeps_what_an_interrupted_bin_had(tmp_path: Path) -> None:
    store = Store(tmp_path, SHAPE, METADATA)
    store.add(Bin(8, 0.8), Measurement(DENSE, us=20.0))
    store.add(Bin(8, 0.8), Measurement(DENSE, us=21.0))
    store.add(Bin(8, 0.8), Measurement(FUSED, failure="wrong: error"))
    store.add(Bin(1, 0.8), Measurement(DENSE, us=5.0))
    found = Store(tmp_path, SHAPE, METADATA).started()
    assert found[Bin(8, 0.8)] == {DENSE: Measurement(DENSE, us=21.0), FUSED: Measurement(FUSED, failure="wrong: error")}
    store.finish(entry(8))
    assert set(Store(tmp_path, SHAPE, METADATA).started()) == {Bin(1, 0.8)}
    store.forget()
    assert store.started() == {}
    assert not list(tmp_path.rglob("*.partial"))


def test_a_journal_cut_off_in_a_line_is_read_up_to_it(tmp_path: Path) -> None:
    store = Store(tmp_path, SHAPE, METADATA)
    store.add(Bin(8, 0.8), Measurement(DENSE, us=20.0))
    (journal,) = tmp_path.rglob("*.partial")
    with journal.open("a") as file:
        file.write('{"run": "x", "num_tok')
    assert store.started() == {Bin(8, 0.8): {DENSE: Measurement(DENSE, us=20.0)}}


@pytest.mark.parametrize("field", ["driver", "dsl", "library", "timing"])
def test_results_of_other_versions_are_not_mixed(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Store(tmp_path, SHAPE, METADATA)
    old.finish(entry(8))
    old.add(Bin(1, 0.8), Measurement(DENSE, us=5.0))
    new = Store(tmp_path, SHAPE, METADATA | {field: "another"})
    assert new.finished() == {}
    assert new.started() == {}
    new.finish(entry(16))
    assert [e.num_tokens for e in table_of(tmp_path).entries] == [16]
    assert "made under other versions: started anew" in capsys.readouterr().out
    assert set(old.started()) == {Bin(1, 0.8)}, "what another version measured stays"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "other/1"}', "\x00\x01", '{"format": 3}'])
def test_a_damaged_table_is_put_aside(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table_path(tmp_path, SHAPE, "GPU A")
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    store = Store(tmp_path, SHAPE, METADATA)
    assert store.finished() == {}
    store.finish(entry(8))
    assert [e.num_tokens for e in table_of(tmp_path).entries] == [8]
    assert path.with_name(path.name + ".damaged").read_text() == damage
    assert "damaged table" in capsys.readouterr().out


def test_a_table_for_another_shape_under_this_name_is_put_aside(tmp_path: Path) -> None:
    other = MoEShape(16, 2, 512, 128)
    Store(tmp_path, other, METADATA).finish(entry(8))
    os.replace(table_path(tmp_path, other, "GPU A"), table_path(tmp_path, SHAPE, "GPU A"))
    assert Store(tmp_path, SHAPE, METADATA).finished() == {}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot keep tuned tables there"):
        Store(file, SHAPE, METADATA)


def _many(folder: str, first: int, count: int) -> None:
    store = Store(Path(folder), SHAPE, METADATA)
    for num_tokens in range(first, first + count):
        store.add(Bin(num_tokens, 0.8), Measurement(DENSE, us=1.0))
        store.finish(entry(num_tokens))


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_many, args=(str(tmp_path), 1 + 20 * i, 20)) for i in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):  # a reader never sees half a table
        if table_path(tmp_path, SHAPE, "GPU A").exists():
            table_of(tmp_path)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [e.num_tokens for e in table_of(tmp_path).entries] == list(range(1, 81))
    assert Store(tmp_path, SHAPE, METADATA).started() == {}
