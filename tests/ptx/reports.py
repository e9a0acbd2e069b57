"""What the checker has to say: one `Report` for each kind of fault and instruction, with its first occurrence."""

from __future__ import annotations

from dataclasses import dataclass

from .parser import Instruction


@dataclass
class Report:
    kind: str
    kernel: str
    line: int
    text: str
    source: tuple[str, int] | None
    cta: tuple[int, int, int]
    thread: int
    detail: str
    count: int = 0

    def __str__(self) -> str:
        place = f"{self.source[0]}:{self.source[1]}" if self.source else "source unknown (no line info)"
        x, y, z = self.cta
        return (
            f"{self.kind}: {self.detail or '-'}\n    at {place}, PTX line {self.line} `{self.text[:110]}`\n"
            f"    kernel {self.kernel[:60]}, CTA ({x}, {y}, {z}), thread {self.thread} "
            f"(warp {self.thread // 32}, lane {self.thread % 32}), {self.count} thread(s)"
        )


class Reports:
    """Collects reports of one launch; the same fault at the same instruction is counted, not repeated."""

    def __init__(self, kernel: str, instructions: list[Instruction], grid: tuple[int, int, int], threads: int):
        self.kernel, self.instructions, self.grid, self.threads = kernel, instructions, grid, threads
        self.found: dict[tuple[str, int], Report] = {}

    def add(self, kind: str, idx: int, thread: int, count: int, detail: str) -> None:
        """`thread` is the launch-wide thread number of the first occurrence."""
        key = (kind, idx)
        if key not in self.found:
            x = self.instructions[idx]
            c, (gx, gy, _) = thread // self.threads, self.grid
            cta = (c % gx, c // gx % gy, c // (gx * gy))
            self.found[key] = Report(kind, self.kernel, x.line, x.text, x.source, cta, thread % self.threads, detail)
        self.found[key].count += count

    def list(self) -> list[Report]:
        return list(self.found.values())
