"""The checker itself, on short PTX: each kind of fault is reported, and the correct twin of each program is clean."""

from __future__ import annotations

import numpy as np
import pytest

from .ptx_snippets import HEAD, RACE_RAW, RACE_WAR, RACE_WAW, kinds, run_ptx_text
from .scalars import PtxError, Unsupported

pytestmark = pytest.mark.execute


@pytest.mark.parametrize("sync", [True, False])
def test_shared_race_between_warps(sync: bool) -> None:
    bar = "bar.sync 0;" if sync else ""
    assert kinds(f"st.shared.b32 [%r5], %r1; {bar} ld.shared.b32 %r10, [%r7];") == (
        set() if sync else {f"shared {RACE_RAW}"}
    )
    write_after_read = (
        f"st.shared.b32 [%r5], %r1; bar.sync 0; ld.shared.b32 %r10, [%r7]; {bar} st.shared.b32 [%r5], %r2;"
    )
    assert kinds(write_after_read) == (set() if sync else {f"shared {RACE_WAR}"})
    assert kinds(f"st.shared.b32 [%r5], %r1; {bar} st.shared.b32 [%r7], %r1;") == (
        set() if sync else {f"shared {RACE_WAW}"}
    )


@pytest.mark.parametrize("sync", [True, False])
def test_shared_race_inside_a_warp(sync: bool) -> None:
    bar = "bar.warp.sync -1;" if sync else ""
    assert kinds(f"st.shared.b32 [%r5], %r1; {bar} ld.shared.b32 %r10, [%r9];") == (
        set() if sync else {f"shared {RACE_RAW}"}
    )
    body = f"st.shared.b32 [%r5], %r1; bar.warp.sync -1; ld.shared.b32 %r10, [%r9]; {bar} st.shared.b32 [%r5], %r2;"
    assert kinds(body) == (set() if sync else {f"shared {RACE_WAR}"})


def test_a_shuffle_orders_no_memory() -> None:
    shuffle = "shfl.sync.bfly.b32 %r11, %r1, 1, 31, -1;"
    assert kinds(f"st.shared.b32 [%r5], %r1; {shuffle} ld.shared.b32 %r10, [%r9];") == {f"shared {RACE_RAW}"}


@pytest.mark.parametrize("sync", [True, False])
def test_global_race_inside_a_cta(sync: bool) -> None:
    other = "xor.b32 %r20, %r4, 128; cvt.u64.u32 %d10, %r20; add.u64 %d11, %d1, %d10;"
    bar = "bar.sync 0;" if sync else ""
    assert kinds(f"{other} st.global.b32 [%d4], %r1; {bar} ld.global.b32 %r10, [%d11];") == (
        set() if sync else {f"global {RACE_RAW}"}
    )
    assert kinds(f"{other} ld.global.b32 %r10, [%d11]; {bar} st.global.b32 [%d4], %r2;") == (
        set() if sync else {f"global {RACE_WAR}"}
    )
    assert kinds(f"{other} st.global.b32 [%d4], %r1; {bar} st.global.b32 [%d11], %r1;") == (
        set() if sync else {f"global {RACE_WAW}"}
    )


@pytest.mark.parametrize("sync", [True, False])
def test_global_race_inside_a_warp(sync: bool) -> None:
    other = "cvt.u64.u32 %d10, %r8; add.u64 %d11, %d1, %d10;"
    bar = "bar.warp.sync -1;" if sync else ""
    body = f"{other} st.global.b32 [%d4], %r1; {bar} ld.global.b32 %r10, [%d11];"
    assert kinds(body) == (set() if sync else {f"global {RACE_RAW}"})


def test_global_race_between_ctas() -> None:
    assert kinds("bar.sync 0; add.u32 %r10, %r1, %r2; st.global.b32 [%d4], %r10;", grid=3) == {
        "global race: two threads write one address"
    }
    late = "setp.eq.u32 %p2, %r2, 0; @%p2 bra A; ld.global.b32 %r10, [%d4]; bra B; A: st.global.b32 [%d4], %r3; B: ret;"
    got = kinds(late, grid=2)
    assert got & {f"global {RACE_RAW}", f"global {RACE_WAR}"}


def test_equal_values_are_no_write_conflict() -> None:
    assert kinds("mov.b32 %r10, 7; st.global.b32 [%d1], %r10;", grid=2) == set()
    assert kinds("mov.b32 %r10, 7; st.shared.b32 [%r3], %r10;") == set()


def test_atomics_race_with_plain_accesses_only() -> None:
    assert kinds("red.global.add.u32 [%d1], 1;", grid=4) == set()
    assert "global race: read after unsynchronised atomic" in kinds(
        "red.global.add.u32 [%d1], 1; ld.global.b32 %r10, [%d1];", grid=2
    )
    assert (
        kinds(
            "@%p1 st.shared.b32 [%r3], 0; bar.sync 0; atom.shared.add.u32 %r10, [%r3], 1;"
            "bar.sync 0; ld.shared.b32 %r11, [%r3];"
        )
        == set()
    )
    body = "@%p1 st.shared.b32 [%r3], 0; bar.sync 0; atom.shared.add.u32 %r10, [%r3], 1; ld.shared.b32 %r11, [%r3];"
    assert kinds(body) == {"shared race: read after unsynchronised atomic"}


LAST_BLOCK = """
mad.lo.u32 %r30, %r2, 64, %r1;
mul.wide.u32 %d20, %r30, 4;
add.u64 %d21, %d1, %d20;
st.global.b32 [%d21], %r1;
{before}
bar.sync 0;
@!%p1 bra SKIP;
{ticket}
st.shared.b32 [%r3], %r31;
SKIP:
bar.sync 0;
ld.shared.b32 %r32, [%r3];
setp.ne.u32 %p5, %r32, 2;
@%p5 bra END;
{after}
ld.global.b32 %r33, [%d4];
ld.global.b32 %r34, [%d4+256];
ld.global.b32 %r35, [%d4+512];
END:
"""


@pytest.mark.parametrize(
    ("before", "ticket", "clean"),
    [
        ("fence.acq_rel.gpu;", "atom.global.add.u32 %r31, [%d2], 1;", True),
        ("membar.gl;", "atom.relaxed.gpu.global.add.u32 %r31, [%d2], 1;", True),
        ("", "fence.acq_rel.gpu; atom.global.add.u32 %r31, [%d2], 1;", True),
        ("", "atom.acq_rel.gpu.global.add.u32 %r31, [%d2], 1;", True),
        ("", "atom.release.gpu.global.add.u32 %r31, [%d2], 1; fence.acq_rel.gpu;", True),
        ("", "atom.global.add.u32 %r31, [%d2], 1;", False),
        ("fence.acq_rel.cta;", "atom.global.add.u32 %r31, [%d2], 1;", False),
        ("", "atom.acq_rel.cta.global.add.u32 %r31, [%d2], 1;", False),
    ],
)
def test_last_block_needs_a_fence_of_gpu_scope(before: str, ticket: str, clean: bool) -> None:
    arrays = [np.zeros(192, np.uint32), np.zeros(64, np.uint32)]
    text = HEAD + LAST_BLOCK.format(before=before, ticket=ticket, after="") + "ret;\n}\n"
    found = {r.kind for r in run_ptx_text(text, arrays, grid=3, block=64, shared=64)}
    assert found == (set() if clean else {f"global {RACE_RAW}"})


SPIN = """
setp.eq.u32 %p2, %r2, 0;
@!%p2 bra WRITER;
WAIT: {load} %r10, [%d2];
setp.eq.u32 %p3, %r10, 0;
@%p3 bra WAIT;
{fence}
ld.global.b32 %r11, [%d4];
bra DONE;
WRITER: st.global.b32 [%d4], %r1;
bar.sync 0;
@%p1 {store} [%d2], 1;
DONE:
"""


@pytest.mark.parametrize(
    ("load", "fence", "store", "clean"),
    [
        ("ld.acquire.gpu.global.b32", "", "st.release.gpu.global.b32", True),
        ("ld.relaxed.gpu.global.b32", "fence.acq_rel.gpu;", "st.release.gpu.global.b32", True),
        ("ld.acquire.gpu.global.b32", "", "red.release.gpu.global.add.u32", True),
        ("ld.relaxed.gpu.global.b32", "", "st.release.gpu.global.b32", False),
        ("ld.acquire.gpu.global.b32", "", "st.relaxed.gpu.global.b32", False),
    ],
)
def test_spinning_on_a_flag(load: str, fence: str, store: str, clean: bool) -> None:
    arrays = [np.zeros(64, np.uint32), np.zeros(64, np.uint32)]
    text = HEAD + SPIN.format(load=load, fence=fence, store=store) + "ret;\n}\n"
    found = {r.kind for r in run_ptx_text(text, arrays, grid=2, block=64)}
    assert found == (set() if clean else {f"global {RACE_RAW}"})


# ------------------------------------------------------------------ bounds, alignment, initialisation
def test_bounds_of_every_space() -> None:
    assert kinds("ld.global.b32 %r10, [%d4];", sizes=(64, 1)) == set()
    assert kinds("ld.global.b32 %r10, [%d4];", sizes=(63, 1)) == {"out-of-bounds global load"}
    assert kinds("st.global.b32 [%d4], %r1;", sizes=(63, 1)) == {"out-of-bounds global store"}
    assert kinds("red.global.add.u32 [%d4], 1;", sizes=(63, 1)) == {"out-of-bounds global atomic"}
    assert kinds("ld.global.b32 %r10, [%d4+-4];") == {"out-of-bounds global load"}
    far = "mov.b64 %d10, 0x3000000000; add.u64 %d11, %d1, %d10; ld.global.b32 %r10, [%d11];"
    assert kinds(far) == {"out-of-bounds global load"}
    assert kinds("st.shared.b32 [%r5], %r1;", shared=252) == {"out-of-bounds shared store"}
    assert kinds("st.shared.b32 [%r5+-4], %r1;") == {"out-of-bounds shared store"}
    assert kinds("add.u32 %r10, %r5, 0x10000; st.shared.b32 [%r10], %r1;") == {"out-of-bounds shared store"}


def test_alignment() -> None:
    assert kinds("ld.global.b32 %r10, [%d1+2];") == {"misaligned global load"}
    assert kinds(
        "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d1+8]; st.global.v4.b32 [%d2], {%r10, %r11, %r12, %r13};"
    ) == {"misaligned global load"}


def test_uninitialised_reads() -> None:
    assert kinds("ld.shared.b32 %r10, [%r5];") == {"uninitialised shared load"}
    assert kinds("@%p1 st.shared.b32 [%r3], 1; bar.sync 0; ld.shared.b32 %r10, [%r3];") == set()


def test_loads_wider_than_what_is_used() -> None:
    """NVVM widens loads over padding: elements that nothing reads are not checked."""
    fill = "st.shared.v2.b32 [%r3], {%r1, %r1}; bar.sync 0;"
    fill = "@%p1 st.shared.v2.b32 [%r3], {%r1, %r1}; bar.sync 0;"
    assert kinds(fill + "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3]; add.u32 %r14, %r10, %r11;") == set()
    assert kinds(fill + "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3]; add.u32 %r14, %r10, %r12;") == {
        "uninitialised shared load"
    }


# ------------------------------------------------------------------ barriers
def test_barrier_in_part_of_a_warp() -> None:
    body = "setp.lt.u32 %p2, %r1, 7; @%p2 bra A; bar.sync 0; {skip} A: mov.b32 %r10, 0;"
    assert "barrier executed by part of a warp" in kinds(body.format(skip=""))
    assert "barrier executed by part of a warp" in kinds(body.format(skip="bra B;").replace("A:", "A: bar.sync 1; B:"))


def test_missing_threads_at_a_barrier() -> None:
    body = "setp.lt.u32 %p2, %r1, 32; @%p2 bra A; bar.sync 1, 64; A: mov.b32 %r10, 0;"
    assert kinds(body) == {"deadlock"}


def test_barrier_count_mismatch() -> None:
    body = "setp.lt.u32 %p2, %r1, 32; @%p2 bra A; bar.sync 1, 64; bra B; A: bar.sync 1, 32; B: mov.b32 %r10, 0;"
    assert any("is used with" in k for k in kinds(body)) or "deadlock" in kinds(body)


def test_endless_loop_is_reported() -> None:
    assert kinds("A: ld.volatile.global.b32 %r10, [%d1]; setp.eq.u32 %p2, %r10, 0; @%p2 bra A;") == {
        "no end in sight: threads spin or loop for ever"
    }


def test_collective_in_divergent_code() -> None:
    assert "shfl executed by part of a warp" in kinds(
        "setp.lt.u32 %p2, %r1, 7; @%p2 bra A; shfl.sync.idx.b32 %r10, %r1, 0, 31, -1; A: mov.b32 %r11, 0;"
    )
    half = "setp.lt.u32 %p2, %r1, 16; @!%p2 bra A; shfl.sync.idx.b32 %r10, %r1, 0, 31, 0xffff; A: mov.b32 %r11, 0;"
    assert kinds(half, block=32) == set()


# ------------------------------------------------------------------ unknown forms
@pytest.mark.parametrize("line", [
    "foo.b32 %r10, %r1;", "add.wibble.s32 %r10, %r1, %r1;", "ld.const.b32 %r10, [%r1];", "add.f8 %r10, %r1, %r1;",
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r3], [%d1, {%r1, %r1}], [%r3];",
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d1,%d2}, {%d1}, {%d1}, {%d1,%d2};", "mov.b32 %r10, %nonesuch;",
    "call foo;", "tcgen05.wait;",
])  # fmt: skip
def test_unknown_forms_are_errors_that_name_the_line(line: str) -> None:
    with pytest.raises((Unsupported, PtxError), match="PTX line"):
        kinds(line)
