"""Turns a kernel into NumPy: every basic block becomes one Python function over all threads that run it.

A block function has the signature `block(S, R, act, n, ids)`: S is the machine (`machine.Machine`), R the list of
register arrays, `act` None when all threads of the launch run the block (else an index into R's arrays), n their number
and `ids` their thread numbers. Registers are gathered once on entry and scattered once on exit, and only those that
another block reads. The return value tells the scheduler what the block's last instruction decided.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import blocks as blk
from . import floats, integers
from .parser import Instruction, Kernel, split_list
from .scalars import CODE_NAMES, TYPES, UNSIGNED, PtxError, Unsupported, is_float, is_signed, register_dtype, size_of

Handler = Callable[["Emitter", Instruction, "Mods"], None]
HANDLERS: dict[str, Handler] = {}


def operation(*names: str) -> Callable[[Handler], Handler]:
    """Register the code generator of one or more opcodes."""

    def add(fn: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = fn
        return fn

    return add


class Mods:
    """The modifiers of an instruction, taken one by one. What is left over at the end is an error."""

    def __init__(self, x: Instruction):
        self.x, self.left = x, list(x.mods)

    def flag(self, name: str) -> bool:
        if name in self.left:
            self.left.remove(name)
            return True
        return False

    def pick(self, *names: str, default: str | None = None) -> str | None:
        """Take the first modifier that is one of `names`."""
        for m in self.left:
            if m in names:
                self.left.remove(m)
                return m
        return default

    def need(self, *names: str) -> str:
        got = self.pick(*names)
        if got is None:
            raise Unsupported(where(self.x) + f"none of .{', .'.join(names)}")
        return got

    def type(self, *allowed: str) -> str:
        """Take the last modifier as a PTX type."""
        ty = self.left.pop() if self.left else "none"
        if ty not in (allowed or TYPES):
            raise Unsupported(where(self.x) + f"type .{ty}")
        return ty

    def done(self) -> None:
        if self.left:
            raise Unsupported(where(self.x) + f"modifier .{self.left[0]}")


def where(x: Instruction) -> str:
    return f"PTX line {x.line}: `{x.text}`: unsupported "


class Emitter:
    """Generates the code of one block at a time; handlers call read, write and line."""

    def __init__(self, kernel: Kernel, symbols: dict[str, tuple[str, int]]):
        self.kernel, self.symbols = kernel, symbols
        kernel.registers["%carry"] = "pred"  # the flag of ops_carry
        self.constants: dict[tuple[str, str], tuple[str, Any]] = {}
        self.index: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        words = (re.findall(r"%[\w$.@]+", x.text) for x in kernel.code if isinstance(x, Instruction))
        self.mentions = collections.Counter(itertools.chain.from_iterable(words))
        self.begin()

    def begin(self) -> None:
        self.lines: list[str] = []
        self.used: dict[str, str] = {}
        self.defined: dict[str, tuple[str, type]] = {}
        self.fresh = itertools.count()
        self.mask = "None"
        self.arrays = False

    # ---- registers
    def slot(self, reg: str) -> int:
        return self.index.setdefault(reg, len(self.index))

    def is_register(self, a: str) -> bool:
        return self.kernel.register_type(a) is not None

    def var(self) -> str:
        return f"t{next(self.fresh)}"

    def is_dead(self, reg: str) -> bool:
        """True for a destination that nothing reads."""
        return reg == "_" or (reg.startswith("%") and self.mentions[reg] == 1)

    def line(self, code: str) -> None:
        self.lines.append(code)

    def _current(self, reg: str) -> tuple[str, type]:
        """Local variable and dtype that hold `reg` now."""
        self.arrays = True
        if reg in self.defined:
            return self.defined[reg]
        if reg not in self.used:
            self.used[reg] = f"r{len(self.used)}"
        ty = self.kernel.register_type(reg)
        return self.used[reg], (np.uint32 if ty is None else register_dtype(ty))

    def constant(self, value: Any, dtype: type) -> str:
        key = (repr(value), dtype.__name__)
        if key not in self.constants:
            self.constants[key] = (f"k{len(self.constants)}", dtype(value))
        return self.constants[key][0]

    def immediate(self, a: str, dtype: type) -> str:
        """A literal or the address of a variable."""
        m = re.fullmatch(r"([\w$@]+?)\s*(?:\+\s*(\d+))?", a)
        if m and m[1] in self.symbols:
            return self.constant(self.symbols[m[1]][1] + int(m[2] or 0), dtype)
        try:
            if a[:2] in ("0f", "0F"):
                bits = np.array(int(a[2:], 16), np.uint32)
                value = bits.view(np.float32)[()] if dtype in (np.float32, np.float64) else bits[()]
                return self.constant(value, dtype)
            if a[:2] in ("0d", "0D"):
                return self.constant(np.array(int(a[2:], 16), np.uint64).view(np.float64)[()], dtype)
            v = int(a.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"PTX operand {a!r} is neither register, literal nor variable") from None
        if dtype in (np.float32, np.float64):
            raw = np.array(v & ((1 << 8 * np.dtype(dtype).itemsize) - 1), UNSIGNED[np.dtype(dtype).itemsize])
            return self.constant(raw.view(dtype)[()], dtype)
        bits = np.dtype(dtype).itemsize * 8
        v &= (1 << bits) - 1
        if np.dtype(dtype).kind == "i" and v >> (bits - 1):
            v -= 1 << bits
        return self.constant(v, dtype)

    def read(self, a: str, ty: str) -> str:
        """Expression of operand `a` seen as type `ty`."""
        if ty == "pred":
            if a[0] == "!":
                return f"(~{self.read(a[1:], ty)})"
            return self._current(a)[0] if self.is_register(a) else ("TRUE" if int(a, 0) else "FALSE")
        want = TYPES[ty]
        if not self.is_register(a) and not a.startswith("%"):
            return self.immediate(a, want)
        if not self.is_register(a) and a not in blk.SPECIAL_REGISTERS:
            raise Unsupported(f"register {a}")
        name, have = self._current(a)
        if np.dtype(have).itemsize != np.dtype(want).itemsize:
            narrow = UNSIGNED[np.dtype(want).itemsize]
            if np.dtype(have).kind not in "u":
                name = f"{name}.view({CODE_NAMES[UNSIGNED[np.dtype(have).itemsize]]})"
            name, have = f"{name}.astype({CODE_NAMES[narrow]})", narrow
        return name if have == want else f"{name}.view({CODE_NAMES[want]})"

    def full(self, a: str, ty: str) -> str:
        """Like read, but always an array of n elements."""
        e = self.read(a, ty)
        return e if a.lstrip("!").startswith("%") or self.is_register(a.lstrip("!")) else f"FULL(n, {e})"

    def write(self, dest: str, expr: str, ty: str) -> None:
        """Assign `expr`, of type `ty`, to register `dest`, under the instruction's predicate."""
        if dest == "_":
            return
        rt = self.kernel.register_type(dest)
        if rt is None:
            raise PtxError(f"{dest!r} is not a register")
        dtype = TYPES[ty]
        if ty != "pred" and size_of(ty) != size_of(rt):
            wide = register_dtype(rt)
            if is_signed(ty):
                signed = CODE_NAMES[{2: np.int16, 4: np.int32, 8: np.int64}[size_of(rt)]]
                expr = f"({expr}).astype({signed}).view({CODE_NAMES[wide]})"
            elif is_float(ty):
                expr = f"({expr}).view({CODE_NAMES[UNSIGNED[size_of(ty)]]}).astype({CODE_NAMES[wide]})"
            else:
                expr = f"({expr}).astype({CODE_NAMES[wide]})"
            dtype = wide
        if not self.arrays:
            expr = f"FULL(n, {expr})"
        if self.mask != "None":
            old, have = self._current(dest)
            old = old if have == dtype else f"{old}.view({CODE_NAMES[dtype]})"
            expr = f"WHERE({self.mask}, {expr}, {old})"
        name = self.var()
        self.line(f"{name} = {expr}")
        self.defined[dest] = (name, dtype)

    # ---- operands
    def vector(self, a: str) -> list[str]:
        return split_list(a[1:-1]) if a.startswith("{") else [a]

    def address(self, a: str, ty: str = "u64") -> str:
        """Expression of a bracketed address, as u64 (global, generic) or u32 (shared)."""
        m = re.fullmatch(r"\[\s*([^\s\]+]+)\s*(?:\+\s*(-?\w+))?\s*\]", a)
        if not m:
            raise Unsupported(f"address {a}")
        base, off = m[1], int(m[2] or "0", 0)
        if self.is_register(base):
            e = self.read(base, ty)
            return e if off == 0 else f"({e} + {self.constant(off % (1 << 8 * size_of(ty)), TYPES[ty])})"
        if base in self.symbols:
            return f"FULL(n, {self.constant(self.symbols[base][1] + off, TYPES[ty])})"
        return f"FULL(n, {self.constant(int(base, 0) + off, TYPES[ty])})"

    def symbol_space(self, a: str) -> str | None:
        m = re.match(r"\[\s*([\w$@]+)", a)
        return self.symbols[m[1]][0] if m and m[1] in self.symbols else None

    # ---- one instruction
    def instruction(self, x: Instruction) -> None:
        self.instructions.append(x)
        handler = HANDLERS.get(x.op)
        if handler is None:
            raise Unsupported(f"PTX line {x.line}: `{x.text}`: unsupported opcode {x.op!r}")
        self.mask, self.arrays = "None", False
        if x.pred:
            self.line(f"pm = {'~' if x.pred[1] else ''}{self.read(x.pred[0], 'pred')}")
            self.mask = "pm"
        mods = Mods(x)
        try:
            handler(self, x, mods)
        except PtxError as e:
            raise e if str(e).startswith("PTX line") else type(e)(where(x) + str(e)) from None
        except (IndexError, ValueError, KeyError) as e:
            raise Unsupported(where(x) + f"form ({type(e).__name__}: {e})") from e
        mods.done()

    @property
    def here(self) -> int:
        """Index of the instruction being generated, for reports."""
        return len(self.instructions) - 1


NAMESPACE: dict[str, Any] = {
    "np": np,
    "WHERE": np.where,
    "FULL": lambda n, v: np.full(n, v) if getattr(v, "ndim", 0) == 0 else v,
    "TRUE": np.True_,
    "FALSE": np.False_,
    "F": floats,
    "I": integers,
    **{short: dtype for dtype, short in CODE_NAMES.items()},
}


class Program:
    """A kernel ready to run: block functions with their metadata."""

    def __init__(self, kernel: Kernel, symbols: dict[str, tuple[str, int]]):
        from . import ops_arith, ops_async, ops_carry, ops_convert, ops_memory, ops_sync  # noqa: F401  (fill HANDLERS)

        self.kernel = kernel
        e = Emitter(kernel, symbols)
        raw, labels = blk.split(kernel)
        self.blocks = [self._emit(e, b, labels) for b in raw]
        blk.liveness(self.blocks)
        self.wgmma_registers: frozenset[int] = frozenset()
        if any(b.instructions[0].op == "wgmma" for b in self.blocks):
            self._registers_in_flight(e)
        self.instructions = e.instructions
        self.registers = e.index
        self.register_types = {i: kernel.register_type(r) for r, i in e.index.items()}
        self.source = "\n".join(self._assemble(e, i, b) for i, b in enumerate(self.blocks))
        namespace = dict(NAMESPACE)
        namespace.update(dict(e.constants.values()))
        exec(compile(self.source, f"<{kernel.name}>", "exec"), namespace)
        for i, b in enumerate(self.blocks):
            b.run = namespace[f"block{i}"]
        self.shared_granule = blk.smallest_access(kernel, "shared", 4)
        self.global_granule = blk.smallest_access(kernel, "global", 4)

    @staticmethod
    def _emit(e: Emitter, b: blk.Block, labels: dict[str, int]) -> blk.Block:
        e.begin()
        b.first = len(e.instructions)
        for x in b.instructions:
            if blk.ends_block(x) and x is b.instructions[-1]:
                e.instructions.append(x)
                e.mask, e.arrays = "None", False
                blk.terminate(e, b, x, labels)
            else:
                e.instruction(x)
        if b.head == "warp" and b.mask_operand:
            a = b.mask_operand
            b.mask = int(a, 0) & 0xFFFFFFFF if not e.is_register(a) else None
            b.mask_register = e.slot(a) if e.is_register(a) else None
            if e.is_register(a) and a not in e.defined and a not in e.used:
                e.used[a] = f"r{len(e.used)}"
        b.lines, b.used, b.defined = e.lines, dict(e.used), dict(e.defined)
        b.uses = frozenset(e.slot(r) for r in e.used if e.is_register(r))
        b.defs = frozenset(e.slot(r) for r in e.defined)
        b.names = {e.slot(r): r for r in {*e.used, *e.defined} if e.is_register(r)}
        return b

    def _registers_in_flight(self, e: Emitter) -> None:
        """Which registers each instruction touches, for the rules of wgmma."""
        operands: set[int] = set()
        for b in self.blocks:
            if b.instructions[0].op == "wgmma":
                operands |= {e.slot(r) for r in re.findall(r"%[\w$@]+", b.instructions[0].text) if e.is_register(r)}
        for b in self.blocks:
            for x in b.instructions:
                found = [{e.slot(r) for r in re.findall(r"[%\w$@]+", a) if e.is_register(r)} for a in x.args]
                writes = x.op not in ("st", "red", "cp", "stmatrix", "bar", "barrier", "bra", "mbarrier", "wgmma")
                sources = set().union(*found[writes:]) if found else set()
                b.registers.append((x.op, found[0] if writes and found else set(), sources))
            b.touches = frozenset().union(*(d | s for _, d, s in b.registers))
            if b.instructions[0].op != "wgmma":
                b.wgmma_defs = frozenset(operands).intersection(*[set().union(*(d for _, d, _ in b.registers))])
        self.wgmma_registers = frozenset(operands)

    @staticmethod
    def _assemble(e: Emitter, i: int, b: blk.Block) -> str:
        """The Python source of one block function."""
        out = [f"def block{i}(S, R, act, n, ids):"]

        def source(reg: str) -> str:
            return f"R[{e.slot(reg)}]" if e.is_register(reg) else f"S.special[{reg!r}]"

        if b.used:
            out.append(" if act is None:")
            out += [f"  {v} = {source(r)}" for r, v in b.used.items()]
            out.append(" else:")
            out += [f"  {v} = {source(r)}[act]" for r, v in b.used.items()]
        out += [" " + line for line in b.lines]
        stores = []
        for reg, (name, dtype) in b.defined.items():
            if e.slot(reg) in b.live_out:
                canon = register_dtype(e.kernel.register_type(reg) or "b32")
                stores.append((e.slot(reg), name if dtype == canon else f"{name}.view({CODE_NAMES[canon]})"))
        if stores:
            out.append(" if act is None:")
            out += [f"  R[{k}] = {v}" for k, v in stores]
            out.append(" else:")
            out += [f"  R[{k}][act] = {v}" for k, v in stores]
        out.append(f" return {b.result}")
        return "\n".join(out)
