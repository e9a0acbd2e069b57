"""PTX text -> `Module`: kernels as flat lists of labels and instructions (PTX ISA 4 "Syntax", 5 "State spaces").

Names declared inside inline-asm braces are renamed per scope. `.loc` lines become the source position of the
instructions that follow. Anything not understood raises `PtxError` or `Unsupported` with its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .scalars import PtxError, Unsupported, size_of


@dataclass
class Instruction:
    """One PTX instruction. `line` counts in the PTX text; `source` is (file, line) of the DSL program, or None."""

    op: str
    mods: list[str]
    pred: tuple[str, bool] | None
    args: list[str]
    text: str
    line: int
    source: tuple[str, int] | None
    span: tuple[int, int] = (0, 0)  #: of the statement with its semicolon in the PTX text


@dataclass
class Label:
    name: str


@dataclass
class Param:
    name: str
    size: int
    align: int


@dataclass
class Variable:
    """A variable in shared, local, global or constant space. `data` is the initial contents of global variables."""

    name: str
    size: int
    align: int
    data: bytes | None = None


@dataclass
class Kernel:
    name: str
    params: list[Param]
    reqntid: tuple[int, ...] | None
    code: list[Instruction | Label] = field(default_factory=list)
    families: dict[str, str] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    shared: list[Variable] = field(default_factory=list)
    dynamic_shared: str | None = None
    local: list[Variable] = field(default_factory=list)

    def register_type(self, name: str) -> str | None:
        """The declared type of register `name`; None when it is no register."""
        if name in self.registers:
            return self.registers[name]
        m = re.fullmatch(r"(%\D*?)\d+", name)
        return self.families.get(m[1]) if m else None


@dataclass
class Module:
    kernels: dict[str, Kernel]
    globals: list[Variable]


_IDENT = re.compile(r"%?[A-Za-z_$][\w$]*(?:\.[xyzw]\b)?")
_VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+)?(?:\.visible\s+|\.weak\s+)?\.(?P<space>shared|global|const|local)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[bufs]\d+)\s+(?P<name>[\w$]+)(?P<dims>(?:\s*\[\s*\d*\s*\])*)"
    r"(?:\s*=\s*(?P<init>\{[^}]*\}|[^;]+))?$"
)


def split_list(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    out, depth, cur = [], 0, ""
    for ch in text:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


def _without_comments(text: str) -> str:
    """Comments become blanks, so positions stay."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    return re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), text)


def _variable(statement: str, line: int) -> tuple[str, bool, Variable] | None:
    m = _VARIABLE.match(statement)
    if not m:
        return None
    size = size_of(m["type"])
    dims = re.findall(r"\[\s*(\d*)\s*\]", m["dims"] or "")
    total = size
    for d in dims:
        total *= int(d or 0)
    data = None
    if m["init"]:
        values = [v.strip() for v in m["init"].strip("{} ").split(",")]
        try:
            data = b"".join((int(v, 0) & ((1 << 8 * size) - 1)).to_bytes(size, "little") for v in values)
        except ValueError:
            raise Unsupported(f"PTX line {line}: initial value {m['init'][:60]!r} of {m['name']}") from None
        data = data.ljust(total, b"\0")
    return m["space"], bool(m["extern"]), Variable(m["name"], total, int(m["align"] or size), data)


def _parse_params(text: str, line: int) -> list[Param]:
    params = []
    for p in split_list(text):
        m = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+[\w. ]+?)?([\w$]+)\s*(?:\[(\d+)\])?$", p.strip()
        )
        if not m:
            raise Unsupported(f"PTX line {line}: kernel parameter {p!r}")
        size = int(m[4]) * size_of(m[2]) if m[4] else size_of(m[2])
        params.append(Param(m[3], size, int(m[1]) if m[1] else size_of(m[2])))
    return params


class _Body:
    """Parser of one kernel's body, from just behind its opening brace."""

    def __init__(self, kernel: Kernel, text: str, pos: int, files: dict[int, str]):
        self.kernel, self.text, self.pos, self.files = kernel, text, pos, files
        self.line = text.count("\n", 0, pos) + 1
        self.scopes: list[dict[str, str]] = [{}]
        self.count = 0
        self.source: tuple[str, int] | None = None

    def rename(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def open_scope(self) -> None:
        """Enter an inline-asm block; its labels are visible before their definition."""
        self.count += 1
        depth, end = 1, self.pos
        while depth:
            end += 1
            if end >= len(self.text):
                raise PtxError(f"PTX line {self.line}: brace never closed")
            depth += {"{": 1, "}": -1}.get(self.text[end], 0)
        inner = self.text[self.pos + 1 : end]
        labels = re.findall(r"(?:^|[;{}\s])([\w$]+)\s*:(?!:)", inner)
        self.scopes.append({name: f"{name}@{self.count}" for name in labels})

    def run(self) -> int:
        white, label = re.compile(r"\s*"), re.compile(r"([\w$]+)\s*:(?!:)")
        while True:
            w = white.match(self.text, self.pos)
            assert w is not None
            self.line += w[0].count("\n")
            self.pos = w.end()
            if self.pos >= len(self.text):
                raise PtxError(f"kernel {self.kernel.name} has no closing brace")
            ch = self.text[self.pos]
            if ch == "{":
                self.open_scope()
                self.pos += 1
            elif ch == "}":
                self.pos += 1
                self.scopes.pop()
                if not self.scopes:
                    return self.pos
            elif self.text.startswith((".loc ", ".loc\t", ".file"), self.pos):
                end = self.text.index("\n", self.pos)
                self.location(self.text[self.pos : end])
                self.pos = end
            elif m := label.match(self.text, self.pos):
                self.kernel.code.append(Label(self.rename(m[1])))
                self.pos = m.end()
            else:
                end = self.text.index(";", self.pos)
                raw = self.text[self.pos : end]
                self.statement(" ".join(raw.split()), (self.pos, end + 1))
                self.line += raw.count("\n")
                self.pos = end + 1

    def location(self, text: str) -> None:
        m = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        if m and len(self.scopes) == 1:  # inside inline asm the numbers count the lines of the asm text
            self.source = (self.files.get(int(m[1]), f"file {m[1]}"), int(m[2])) if int(m[2]) else None

    def statement(self, text: str, span: tuple[int, int]) -> None:
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".param"):
            why = "calls of device functions (cute.printf, assertions) are not supported: build the kernel without"
            raise Unsupported(f"PTX line {self.line}: {why}")
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith("."):
            found = _variable(text, self.line)
            if not found or found[0] not in ("shared", "local"):
                raise Unsupported(f"PTX line {self.line}: {text!r}")
            space, _, var = found
            (self.kernel.shared if space == "shared" else self.kernel.local).append(var)
        else:
            self.instruction(text, span)

    def declare(self, text: str) -> None:
        m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if not m:
            raise PtxError(f"PTX line {self.line}: {text!r}")
        for name in split_list(m[2]):
            if "<" in name:
                self.kernel.families[name[: name.index("<")]] = m[1]
                continue
            unique = name
            if len(self.scopes) > 1:
                unique = f"{name}@{self.count}"
                self.scopes[-1][name] = unique
            self.kernel.registers[unique] = m[1]

    def instruction(self, text: str, span: tuple[int, int]) -> None:
        pred = None
        if m := re.match(r"@(!?)\s*(\S+)\s+", text):
            pred = (self.rename(m[2]), bool(m[1]))
            text = text[m.end() :]
        op, _, rest = text.partition(" ")
        if len(self.scopes) > 1:
            rest = _IDENT.sub(lambda m: self.rename(m[0]), rest)
        name, *mods = op.split(".")
        mods = [m for m in mods if m]
        full = ("" if pred is None else f"@{'!' if pred[1] else ''}{pred[0]} ") + f"{op} {rest}".strip()
        self.kernel.code.append(Instruction(name, mods, pred, split_list(rest), full, self.line, self.source, span))


def parse(text: str) -> Module:
    """Parse a PTX module. Device functions are not supported: a call raises `Unsupported` where it stands."""
    clean = _without_comments(text)
    files = {int(n): f for n, f in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', clean, re.M)}
    entry = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)
    module = Module({}, [])
    shared: list[Variable] = []
    dynamic, pos, outside = None, 0, ""
    while m := entry.search(clean, pos):
        outside += clean[pos : m.start()] + ";"
        line = clean.count("\n", 0, m.start()) + 1
        req = re.search(r"\.reqntid\s+([\d, ]+)", m[3])
        dims = tuple(int(x) for x in req[1].split(",")) if req else None
        kernel = Kernel(m[1], _parse_params(m[2] or "", line), dims)
        pos = _Body(kernel, clean, m.end(), files).run()
        module.kernels[kernel.name] = kernel
    outside += clean[pos:]
    outside = outside.split(".section")[0]
    for statement in outside.split(";"):
        text1 = " ".join(statement.split())
        found = _VARIABLE.search(text1) and _variable(text1[_VARIABLE.search(text1).start() :], 0)  # type: ignore[union-attr]
        if not found:
            if re.search(r"\.(shared|global|const)\b", text1):
                raise Unsupported(f"declaration {text1[:80]!r}")
            continue
        space, extern, var = found
        if space == "shared" and (extern or var.size == 0):
            dynamic = var.name
        elif space == "shared":
            shared.append(var)
        else:
            module.globals.append(var)
    if not module.kernels:
        raise PtxError("no .entry in the PTX text")
    for kernel in module.kernels.values():
        kernel.shared = shared + kernel.shared
        kernel.dynamic_shared = dynamic
    return module
