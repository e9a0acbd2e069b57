"""Deliberate faults in PTX text: every synchronisation, copy, fence and guard removed or loosened, one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .parser import Instruction, Module


@dataclass(frozen=True)
class Mutant:
    """`kind` of change, the instruction it hits, and the changed text."""

    kind: str
    kernel: str
    line: int
    instruction: str
    source: tuple[str, int] | None
    text: str
    probe: str = ""  #: for a shifted comparison: a text that traps where the two sides are equal

    def __str__(self) -> str:
        place = f"{self.source[0].rsplit('/', 1)[-1]}:{self.source[1]}" if self.source else f"PTX line {self.line}"
        return f"{self.kind} at {place}: {self.instruction[:90]}"


_LOOSER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi"}


def _changes(x: Instruction, statement: str) -> Iterator[tuple[str, str]]:
    """-> (kind, replacement of the statement)."""
    op, mods = x.op, x.mods
    name = ".".join([op, *mods])
    if op in ("bar", "barrier"):
        yield "barrier removed", ""
    elif name.startswith(("cp.async.wait", "wgmma.wait_group")):
        yield "wait removed", ""
        if x.args:
            yield "wait loosened", re.sub(r"(\d+)\s*;$", lambda m: f"{int(m[1]) + 1};", statement)
    elif name.startswith(("cp.async.commit", "wgmma.commit")):
        yield "commit removed", ""
    elif op in ("fence", "membar") or name.startswith("wgmma.fence"):
        yield "fence removed", ""
    elif name.startswith("cp.async.bulk.prefetch"):
        return
    elif op == "cp" or op in ("stmatrix",):
        yield "copy removed", ""
    elif op == "mbarrier":
        if mods[0] == "try_wait":
            yield (
                "wait removed",
                re.sub(r"mbarrier\.try_wait\S*\s+(\S+?),.*;", r"setp.eq.u32 \1, 0, 0;", statement, flags=re.S),
            )
        else:
            yield f"mbarrier {mods[0]} removed", ""
    elif op == "griddepcontrol" and mods[0] == "wait":
        yield "wait removed", ""
    elif op == "st":
        yield "store removed", ""
    elif op == "atom":
        plain = re.search(r"\.([a-z]\d+)\s", statement)
        if plain and "add" in mods:
            address = next(a for a in x.args if a.startswith("["))
            ty = f"b{plain[1][1:]}"
            yield (
                "atomic made plain",
                (
                    f"{{ .reg .{ty} mutant; ld.global.{ty} {x.args[0]}, {address}; "
                    f"add.{plain[1]} mutant, {x.args[0]}, {x.args[2]}; st.global.{ty} {address}, mutant; }}"
                ),
            )
    if x.pred and op in ("ld", "st", "red", "atom", "cp"):
        yield "predicate removed", re.sub(r"^\s*@!?\S+\s+", "", statement)
    if op == "setp" and mods[0] in _LOOSER and mods[-1] != "f32":
        yield "comparison shifted by one", statement.replace(f"setp.{mods[0]}", f"setp.{_LOOSER[mods[0]]}", 1)
    if op == "red" and mods[-1] == "f32" and not any(m.startswith("v") for m in mods):
        yield "reduction made plain", re.sub(r"red\.[\w.]+?\.f32", "st.global.f32", statement, count=1)


def mutants(text: str, module: Module) -> list[Mutant]:
    """All mutants of a PTX text."""
    out = []
    for kernel in module.kernels.values():
        for x in kernel.code:
            if not isinstance(x, Instruction) or x.span == (0, 0):
                continue
            start, end = x.span
            for kind, new in _changes(x, text[start:end]):
                changed = text[:start] + new + text[end:]
                probe = ""
                if kind.startswith("comparison"):
                    equal = f"{{ .reg .pred same; setp.eq.{x.mods[-1]} same, {x.args[1]}, {x.args[2]}; @same trap; }}"
                    probe = text[:start] + equal + text[start:]
                if changed != text:
                    out.append(Mutant(kind, kernel.name, x.line, x.text, x.source, changed, probe))
    return out
