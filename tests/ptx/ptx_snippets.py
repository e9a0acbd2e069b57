"""Runs a few lines of PTX on vectors: one thread for each element, operands in %a, %b, %c, result in %d."""

from __future__ import annotations

import numpy as np

from .codegen import Program
from .machine import Launch, Machine, layout
from .memory import GLOBAL_BASE, GUARD, INIT, SLOT_BITS, Buffer
from .parser import parse
from .reports import Report
from .scheduler import execute

_HEAD = """.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry snippet(.param .u64 p0, .param .u64 p1)
{{
.reg .b64 %pi, %po, %t, %wide_a, %wide_b, %wide_c, %wide_d;
.reg .b32 %lin, %blk, %dim;
.reg .b{w} %a, %b, %c, %d;
ld.param.u64 %pi, [p0];
ld.param.u64 %po, [p1];
mov.u32 %lin, %tid.x;
mov.u32 %blk, %ctaid.x;
mov.u32 %dim, %ntid.x;
mad.lo.u32 %lin, %blk, %dim, %lin;
mad.wide.u32 %pi, %lin, 24, %pi;
mad.wide.u32 %po, %lin, 8, %po;
ld.global.b64 %wide_a, [%pi];
ld.global.b64 %wide_b, [%pi+8];
ld.global.b64 %wide_c, [%pi+16];
cvt.u{w}.u64 %a, %wide_a;
cvt.u{w}.u64 %b, %wide_b;
cvt.u{w}.u64 %c, %wide_c;
{{ {body} }}
{tail}
st.global.b64 [%po], %wide_d;
ret;
}}
"""


def run_ptx_text(
    text: str, arrays: list[np.ndarray], grid: int = 1, block: int = 32, shared: int = 0, cluster: int = 1
) -> list[Report]:
    """Run a kernel whose parameters are pointers to `arrays`, which are updated. -> reports."""
    module = parse(text)
    (kernel,) = module.kernels.values()
    symbols, static, local = layout(kernel, module, {})
    buffers, params = [], []
    for i, a in enumerate(arrays):
        base = GLOBAL_BASE + (i << SLOT_BITS) + (1 << (SLOT_BITS - 1))
        b = Buffer(f"p{i}", a.nbytes, base)
        b.data[b.inner], b.flags[b.inner] = a.view(np.uint8).ravel(), 1 | INIT
        buffers.append(b)
        params.append(base.to_bytes(8, "little"))
    launch = Launch(kernel.name, (grid, 1, 1), (block, 1, 1), shared, params, (cluster, 1, 1))
    machine = Machine(Program(kernel, symbols), launch, buffers, (static, local), True)
    execute(machine, 20_000)
    for a, b in zip(arrays, buffers, strict=True):
        a[...] = b.data[GUARD : GUARD + a.nbytes].view(a.dtype).reshape(a.shape)
    return machine.reports.list()


def run_snippet(body: str, width: int, *operands: np.ndarray, wide: bool = False) -> np.ndarray:
    """`body` computes %d from %a, %b, %c of `width` bits (or, `wide`, %wide_d). Operands and result are u64."""
    n = len(operands[0])
    rows = -(-n // 32) * 32
    data = np.zeros((rows, 3), np.uint64)
    for i, v in enumerate(operands):
        data[:n, i] = v
    out = np.zeros(rows, np.uint64)
    tail = "" if wide else f"cvt.u64.u{width} %wide_d, %d;"
    reports = run_ptx_text(_HEAD.format(w=width, body=body, tail=tail), [data, out], grid=rows // 32)
    assert not reports, "\n".join(map(str, reports))
    return out[:n]


#: Start of a kernel on two arrays: thread number %r1, CTA %r2, shared memory %r3; the thread's word in shared memory
#: %r5, another warp's %r7, the neighbour lane's %r9; the thread's word of the arrays %d4 and %d5; %p1: thread 0.
HEAD = """.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry test(.param .u64 p0, .param .u64 p1)
{
.reg .pred %p<20>;
.reg .b32 %r<60>;
.reg .b64 %d<40>;
.reg .b16 %h<4>;
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, dynamic;
ld.param.u64 %d1, [p0];
ld.param.u64 %d2, [p1];
shl.b32 %r4, %r1, 2;
add.u32 %r5, %r3, %r4;
cvt.u64.u32 %d3, %r4;
add.u64 %d4, %d1, %d3;
add.u64 %d5, %d2, %d3;
xor.b32 %r6, %r4, 128;
add.u32 %r7, %r3, %r6;
xor.b32 %r8, %r4, 4;
add.u32 %r9, %r3, %r8;
setp.eq.u32 %p1, %r1, 0;
"""


def kinds(
    body: str, *, grid: int = 1, block: int = 64, shared: int = 1024, sizes: tuple[int, int] = (256, 256)
) -> set[str]:
    """Run `body` (thread's words: shared [%r5], other warp's [%r7], neighbour lane's [%r9], global [%d4], [%d5])."""
    arrays = [np.arange(s, dtype=np.uint32) for s in sizes]
    reports = run_ptx_text(HEAD + body + "\nret;\n}\n", arrays, grid=grid, block=block, shared=shared)
    for r in reports:
        assert r.line > 0
        assert str(r)
    return {r.kind for r in reports}


RACE_RAW = "race: read after unsynchronised write"
RACE_WAR = "race: write after unsynchronised read"
RACE_WAW = "race: write after unsynchronised write"
