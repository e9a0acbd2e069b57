"""Where tuning results are kept: a table per shape, and beside it a journal of single measurements for --resume.

Every change is made under a lock on ``<table>.lock`` and ends in an atomic replacement, so several tuners may share a
folder and one that is killed leaves a whole table and a journal of what it had measured.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cutedsl_kernels import UserError
from cutedsl_kernels.configs import Plan
from cutedsl_kernels.shapes import MoEShape
from cutedsl_kernels.tuned_table import Entry, Measurement, TunedTable, table_path

from .space import Bin

SAME_RUN = ("gpu", "driver", "library", "dsl", "timing")  # metadata that must agree for results to be put together


class Store:
    """The table of one shape on one GPU in ``folder``. UserError if the folder cannot be written."""

    def __init__(
        self,
        folder: Path,
        shape: MoEShape,
        metadata: Mapping[str, str],
        dtype: str = "bf16",
        report: Callable[[str], None] = print,
    ) -> None:
        self.path = table_path(folder, shape, metadata["gpu"], dtype)
        self._journal = self.path.with_name(self.path.name + ".partial")
        self._shape, self._dtype, self._report = shape, dtype, report
        self._metadata = dict(metadata)
        text = json.dumps({name: metadata[name] for name in SAME_RUN}, sort_keys=True)
        self._run = hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise UserError(f"{folder}: cannot keep tuned tables there ({error.strerror}): give --out DIR") from None

    def finished(self) -> dict[Bin, Entry]:
        """Entries of the table that were made under the same metadata."""
        table = self._read()
        if table is None or not self._same(table):
            return {}
        return {Bin(entry.num_tokens, entry.sparsity, entry.pair_skip): entry for entry in table.entries}

    def started(self) -> dict[Bin, dict[Plan, Measurement]]:
        """What interrupted runs under the same metadata had measured of bins they did not finish."""
        found: dict[Bin, dict[Plan, Measurement]] = {}
        for line in self._journal_lines():
            try:
                raw = json.loads(line)
                if raw["run"] != self._run:
                    continue
                where = Bin(int(raw["num_tokens"]), float(raw["sparsity"]), float(raw["pair_skip"]))
                plan = Plan.from_json(raw["plan"])
                found.setdefault(where, {})[plan] = Measurement(plan, raw.get("us"), raw.get("failure"))
            except (ValueError, TypeError, KeyError):  # the line a killed tuner was writing
                continue
        return found

    def add(self, where: Bin, measured: Measurement) -> None:
        """Appends one measurement to the journal."""
        line = {
            "run": self._run,
            "num_tokens": where.num_tokens,
            "sparsity": where.sparsity,
            "pair_skip": where.pair_skip,
            **measured.to_json(),
        }
        with self._locked(), self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, entry: Entry) -> None:
        """Puts an entry into the table, in place of one for the same bin, and takes the bin out of the journal."""
        where = Bin(entry.num_tokens, entry.sparsity, entry.pair_skip)
        with self._locked():
            table = self._read()
            kept = () if table is None else table.entries
            if table is not None and not self._same(table):
                self._report(f"{self.path}: made under other versions: started anew")
                kept = ()
            others = [e for e in kept if Bin(e.num_tokens, e.sparsity, e.pair_skip) != where]
            entries = sorted([*others, entry], key=lambda e: (e.num_tokens, e.sparsity, e.pair_skip))
            made = TunedTable(self._shape, self._dtype, self._metadata, tuple(entries))
            _replace(self.path, json.dumps(made.to_json(), indent=1) + "\n")
            self._forget(where)

    def forget(self) -> None:
        """Empties the journal of this run's kind, for a start from scratch."""
        with self._locked():
            self._forget(None)

    def _forget(self, where: Bin | None) -> None:
        kept = []
        for line in self._journal_lines():
            try:
                raw = json.loads(line)
                mine = where is None or where == Bin(raw["num_tokens"], raw["sparsity"], raw["pair_skip"])
                if raw["run"] != self._run or not mine:
                    kept.append(line)
            except (ValueError, TypeError, KeyError):
                continue
        if kept:
            _replace(self._journal, "\n".join(kept) + "\n")
        else:
            self._journal.unlink(missing_ok=True)

    def _journal_lines(self) -> list[str]:
        try:
            return self._journal.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _same(self, table: TunedTable) -> bool:
        return all(table.metadata[name] == self._metadata[name] for name in SAME_RUN)

    def _read(self) -> TunedTable | None:
        """The table on disk, None if there is none; a damaged one is put aside with a line that says so."""
        try:
            table = TunedTable.from_json(json.loads(self.path.read_text()))
            if (table.shape, table.dtype) != (self._shape, self._dtype):
                raise ValueError(f"it is for {table.shape.key},{table.dtype}")
            return table
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            aside = self.path.with_name(self.path.name + ".damaged")
            with contextlib.suppress(FileNotFoundError):  # another tuner was first
                os.replace(self.path, aside)
                self._report(f"{self.path}: damaged table ({error}): kept as {aside.name}, a new one is begun")
            return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_name(self.path.name + ".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
