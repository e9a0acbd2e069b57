"""Warp collectives on vectors of whole warps (PTX ISA 9.7.9.6 shfl, 9.7.13.7-13 vote / match / redux / elect,
9.7.14 ldmatrix, stmatrix, mma). The scheduler hands over complete warps, or, for partial member masks, the lanes that
take part; those are spread over full warps first."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .floats import DECODE, FP8, from_f16, pack, to_f16, unpack
from .scalars import Unsupported

if TYPE_CHECKING:
    from .machine import Machine

u1, u2, u4, i8, f4 = np.uint8, np.uint16, np.uint32, np.int64, np.float32


def _spread(ids: np.ndarray) -> np.ndarray | None:
    """Positions of the lanes in an array of full warps; None when ids already are full warps."""
    if len(ids) % 32 == 0 and not (ids[::32] & 31).any() and (ids[31::32] - ids[::32] == 31).all():
        return None
    warps, rank = np.unique(ids // 32, return_inverse=True)
    del warps
    return rank * 32 + (ids & 31)


def _expand(v: np.ndarray, at: np.ndarray | None, fill: int = 0) -> np.ndarray:
    if at is None:
        return v
    out = np.full((int(at.max()) // 32 + 1) * 32, fill, v.dtype)
    out[at] = v
    return out


def _pick(v: np.ndarray, at: np.ndarray | None) -> np.ndarray:
    return v if at is None else v[at]


def shuffle(mode: str, v: np.ndarray, b: np.ndarray, c: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """shfl.sync: (value, predicate); a source lane out of range gives the lane's own value and false."""
    at = _spread(ids)
    v, b, c = _expand(v, at), _expand(b, at).astype(i8) & 31, _expand(c, at).astype(i8)
    n = len(v)
    lane = np.arange(n) & 31
    bound, segment = c & 31, (c >> 8) & 31
    top, low = (lane & segment) | (bound & ~segment), lane & segment
    if mode == "up":
        j = lane - b
        p = j >= top
    elif mode == "down":
        j = lane + b
        p = j <= top
    elif mode == "bfly":
        j = lane ^ b
        p = j <= top
    else:
        j = low | (b & ~segment)
        p = j <= top
    j = np.where(p, j, lane)
    return _pick(v[(np.arange(n) & ~31) + j], at), _pick(p, at)


def _ballot(p: np.ndarray) -> np.ndarray:
    """(warps, 32) bool -> u32 per warp."""
    return np.packbits(p, axis=1, bitorder="little").view(u4).ravel()


def _members(ids: np.ndarray, at: np.ndarray | None, n: int) -> np.ndarray:
    present = np.zeros(n, bool)
    present[slice(None) if at is None else at] = True
    return present.reshape(-1, 32)


def vote(mode: str, p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    at = _spread(ids)
    q = _expand(p, at).reshape(-1, 32)
    here = _members(ids, at, q.size)
    if mode == "ballot":
        return _pick(np.repeat(_ballot(q & here), 32), at)
    some, every = (q & here).any(1), (q | ~here).all(1)
    r = {"any": some, "all": every, "uni": every | ~some}[mode]
    return _pick(np.repeat(r, 32), at)


def match(mode: str, v: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """match.any: mask of lanes with the same value; match.all: all lanes or 0, and whether all are equal."""
    at = _spread(ids)
    w = _expand(v, at).reshape(-1, 32)
    here = _members(ids, at, w.size)
    same = (w[:, :, None] == w[:, None, :]) & here[:, None, :]
    masks = np.packbits(same, axis=2, bitorder="little").view(u4)[..., 0]
    every = _ballot(here)
    all_equal = (masks == every[:, None]) | ~here
    if mode == "any":
        return _pick(masks.ravel(), at), _pick(here.ravel(), at)
    ok = all_equal.all(1)
    return _pick(np.repeat(np.where(ok, every, u4(0)), 32), at), _pick(np.repeat(ok, 32), at)


def reduce(mode: str, v: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """redux.sync on integers."""
    at = _spread(ids)
    q = _expand(v, at).reshape(-1, 32)
    here = _members(ids, at, q.size)
    info = np.iinfo(v.dtype)
    fn, neutral = {
        "add": (np.add, 0), "min": (np.minimum, info.max), "max": (np.maximum, info.min),
        "and": (np.bitwise_and, info.max if info.min == 0 else -1),
        "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    }[mode]  # fmt: skip
    q = np.where(here, q, v.dtype.type(neutral))
    return _pick(np.repeat(fn.reduce(q, axis=1, dtype=v.dtype), 32), at)


def elect(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """elect.sync: (leader lane, am I the leader); the lowest member is elected."""
    warp = ids // 32
    _, first, inverse = np.unique(warp, return_index=True, return_inverse=True)
    leader = (ids[first] & 31)[inverse]
    return leader.astype(u4), (ids & 31) == leader


# ------------------------------------------------------------------ matrices
def ldmatrix(
    m: Machine, addr: np.ndarray, ids: np.ndarray, count: int, trans: bool, pm: np.ndarray | None, idx: int
) -> list[np.ndarray]:
    """`count` 8x8 matrices of 16-bit elements; lane 8q + r holds the address of row r of matrix q."""
    warps = len(ids) // 32
    rows, who = addr.reshape(warps, 32)[:, : 8 * count].ravel(), ids.reshape(warps, 32)[:, : 8 * count].ravel()
    mask = None if pm is None else pm.reshape(warps, 32)[:, : 8 * count].ravel()
    v = m.load("shared", rows, who, 8, 2, mask, idx)
    h = np.ascontiguousarray(v.T).view(u2).reshape(warps, count, 8, 8)
    if trans:
        h = h.transpose(0, 1, 3, 2)
    words = np.ascontiguousarray(h).view(u4).reshape(warps, count, 32)
    return [np.ascontiguousarray(words[:, q]).ravel() for q in range(count)]


def stmatrix(
    m: Machine, addr: np.ndarray, ids: np.ndarray, regs: list[np.ndarray], trans: bool, pm: np.ndarray | None, idx: int
) -> None:
    """Inverse of ldmatrix."""
    warps, count = len(ids) // 32, len(regs)
    words = np.stack([r.reshape(warps, 32) for r in regs], 1)
    h = np.ascontiguousarray(words).view(u2).reshape(warps, count, 8, 8)
    if trans:
        h = h.transpose(0, 1, 3, 2)
    rows = np.ascontiguousarray(h).view(np.uint64).reshape(-1, 2)
    a, who = addr.reshape(warps, 32)[:, : 8 * count].ravel(), ids.reshape(warps, 32)[:, : 8 * count].ravel()
    mask = None if pm is None else pm.reshape(warps, 32)[:, : 8 * count].ravel()
    m.store("shared", a, who, 8, [rows[:, 0], rows[:, 1]], mask, idx)


_MMA = re.compile(
    r"m16n8k(\d+)\.row\.col\.(f32|f16|s32)\.(bf16|f16|tf32|e4m3|e5m2|s8|u8)\.(bf16|f16|tf32|e4m3|e5m2|s8|u8)\.\2"
)
_BITS = {"bf16": 16, "f16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


def check_mma(form: str, a: int, b: int, c: int) -> None:
    """Raise `Unsupported` unless mma can run `form` with that many fragment registers."""
    m = _MMA.fullmatch(form)
    if not m or (m[2] == "s32") != (m[3] in ("s8", "u8")) or (m[2] == "f16" and m[3] != "f16"):
        raise Unsupported(f"mma form {form}")
    words = int(m[1]) * _BITS[m[3]] // 128
    if words not in (1, 2) or _BITS[m[3]] != _BITS[m[4]] or (a, b, c) != (2 * words, words, 2 if m[2] == "f16" else 4):
        raise Unsupported(f"mma form {form} with {a}, {b}, {c} registers")


def _elements(words: np.ndarray, ty: str) -> np.ndarray:
    """Fragment words (..., u32) as numbers: f32, or f64 for integers (exact)."""
    if ty in DECODE:
        return DECODE[ty](words.view(u2))
    if ty in ("e4m3", "e5m2"):
        return FP8[ty + "x2"][words.view(u1)]
    if ty == "tf32":  # the hardware ignores the low 13 bits
        return (words & u4(0xFFFFE000)).view(f4)
    return words.view(np.int8 if ty == "s8" else u1).astype(np.float64)


def mma(form: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], n: int) -> list[np.ndarray]:
    """mma.sync.m16n8k*.row.col: D = A B + C. Products and sums in f32, or exact for integers (the hardware's order of
    summation is unspecified)."""
    m = _MMA.fullmatch(form)
    assert m is not None
    k, warps, words = int(m[1]), n // 32, len(b)
    # lane = 4 * group + quad; A word 2 * i + half: row group + 8 * half, the quad's share of the i-th 16 bytes of k
    av = np.stack(a).reshape(words, 2, warps, 8, 4).transpose(2, 1, 3, 0, 4)
    am = _elements(np.ascontiguousarray(av), m[3]).reshape(warps, 16, k)
    bv = np.stack(b).reshape(words, warps, 8, 4).transpose(1, 2, 0, 3)
    bm = _elements(np.ascontiguousarray(bv), m[4]).reshape(warps, 8, k)
    d = np.matmul(am, bm.transpose(0, 2, 1))
    regs = d.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, n)
    if m[2] == "f32":
        return [regs[i] + c[i].view(f4) for i in range(4)]
    if m[2] == "s32":
        return [(regs[i].astype(i8) + c[i].view(np.int32)).astype(np.int32) for i in range(4)]
    halves = [half for word in c for half in unpack(word)]
    sums = [to_f16(regs[i] + from_f16(halves[i])) for i in range(4)]
    return [pack(sums[0], sums[1]), pack(sums[2], sums[3])]
