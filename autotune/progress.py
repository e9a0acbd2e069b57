"""One line of progress: done of all, time left, best so far against dense, failures by cause. To stderr."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TextIO

from cutedsl_kernels.configs import Plan
from cutedsl_kernels.tuned_table import Entry

from .space import Bin

BAR = 24


class Progress:
    """Redrawn in place on a terminal; elsewhere one line per finished bin."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet, self._live = quiet, not quiet and self._stream.isatty()
        self._total = self._done = 0
        self._failures: Counter[str] = Counter()
        self._where: Bin | None = None
        self._best = self._dense = 0.0

    def start(self, total: int) -> None:
        self._total, self._done, self._began = max(1, total), 0, time.monotonic()

    def step(self) -> None:
        self._done += 1
        self._draw()

    def measured(self, where: Bin, plan: Plan, us: float) -> None:
        if where != self._where:
            self._where, self._best, self._dense = where, us, 0.0
        self._best = min(self._best, us)
        self._dense = us if plan.kind == "dense" else self._dense
        self.step()

    def failed(self, cause: str) -> None:
        self._failures[cause] += 1
        self.step()

    def finished(self, where: Bin, entry: Entry, dense_us: float | None) -> None:
        ratio = f", dense {dense_us:.1f} us, {dense_us / entry.us:.2f}x" if dense_us else ""
        self.note(f"{where}: {entry.chosen} {entry.us:.1f} us{ratio}")

    def note(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._write(("\r\x1b[K" if self._live else "") + text + "\n")
            self._draw()

    def stop(self) -> None:
        if self._live:
            self._write("\r\x1b[K")

    def line(self) -> str:
        """The line as it is now."""
        share = min(1.0, self._done / self._total)
        bar = "#" * round(share * BAR)
        left = (time.monotonic() - self._began) * (1 - share) / share if share else 0.0
        text = f"[{bar:<{BAR}}] {self._done}/{self._total} {left:.0f} s left"
        if self._where is not None:
            text += f"  {self._where} best {self._best:.1f} us"
            text += f" ({self._dense / self._best:.2f}x dense)" if self._dense else ""
        if self._failures:
            text += "  failed: " + ", ".join(f"{n} {cause}" for cause, n in sorted(self._failures.items()))
        return text

    def _draw(self) -> None:
        if self._live:
            self._write("\r\x1b[K" + self.line()[:118])

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
