"""The checker itself, on short PTX: each kind of fault is reported, and the correct twin of each program is clean."""

from __future__ import annotations

import numpy as np
import pytest

from .ptx_snippets import run_ptx_text
from .scalars import PtxError, Unsupported

pytestmark = pytest.mark.execute

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


RACE_RAW, RACE_WAR, RACE_WAW = (
    "race: read after unsynchronised write", "race: write after unsynchronised read", "race: write after unsynchronised write",
)  # fmt: skip


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
    late = "setp.eq.u32 %p2, %r2, 0; @%p2 bra A; ld.global.b32 %r10, [%d4]; bra B; A: st.global.b32 [%d4], %r3; B: bar.sync 0;"
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
            "@%p1 st.shared.b32 [%r3], 0; bar.sync 0; atom.shared.add.u32 %r10, [%r3], 1; bar.sync 0; ld.shared.b32 %r11, [%r3];"
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


# ------------------------------------------------------------------ asynchronous copies
@pytest.mark.parametrize(
    ("wait", "found"),
    [
        ("cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;", set()),
        ("cp.async.wait_all; bar.sync 0;", set()),
        (
            "cp.async.commit_group; cp.async.wait_group 1; bar.sync 0;",
            {"shared load overlaps an incomplete asynchronous copy"},
        ),
        ("cp.async.wait_group 0; bar.sync 0;", {"shared load overlaps an incomplete asynchronous copy"}),
        ("cp.async.commit_group; cp.async.wait_group 0;", {f"shared {RACE_RAW}"}),
    ],
)
def test_cp_async_must_be_waited_for(wait: str, found: set[str]) -> None:
    assert kinds(f"cp.async.ca.shared.global [%r5], [%d4], 4; {wait} ld.shared.b32 %r10, [%r7];") == found


def test_cp_async_zero_fill() -> None:
    arrays = [np.arange(1, 65, dtype=np.uint32), np.zeros(64, np.uint32)]
    body = """setp.lt.u32 %p2, %r1, 10; selp.b32 %r20, 4, 0, %p2; cp.async.ca.shared.global [%r5], [%d4], 4, %r20;
    cp.async.wait_all; ld.shared.b32 %r10, [%r5]; st.global.b32 [%d5], %r10; ret; }"""
    assert run_ptx_text(HEAD + body, arrays, block=64, shared=256) == []
    assert (arrays[1] == np.where(np.arange(64) < 10, np.arange(1, 65), 0)).all()


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


# ------------------------------------------------------------------ mbarriers
MBARRIER = """
@%p1 mbarrier.init.shared.b64 [%r3+512], 64;
{sync}
st.shared.b32 [%r5], %r1;
mbarrier.arrive.shared.b64 %d10, [%r3+512];
WAIT: {wait}
ld.shared.b32 %r10, [%r7];
"""


def test_mbarrier_orders_and_its_faults_are_found() -> None:
    wait = "mbarrier.try_wait.parity.shared.b64 %p4, [%r3+512], 0; @!%p4 bra WAIT;"
    assert kinds(MBARRIER.format(sync="bar.sync 0;", wait=wait)) == set()
    test = wait.replace("try_wait", "test_wait")
    assert kinds(MBARRIER.format(sync="bar.sync 0;", wait=test)) == set()
    assert f"shared {RACE_RAW}" in kinds(MBARRIER.format(sync="bar.sync 0;", wait=""))
    assert kinds(MBARRIER.format(sync="", wait=wait))
    short = MBARRIER.format(sync="bar.sync 0;", wait=wait).replace("], 64;", "], 65;")
    assert kinds(short) == {"deadlock"}
    assert "more arrivals at an mbarrier than its phase expects" in kinds(
        MBARRIER.format(sync="bar.sync 0;", wait=wait).replace("], 64;", "], 63;")
    )


def test_elected_arrival_without_warp_sync() -> None:
    body = """@%p1 mbarrier.init.shared.b64 [%r3+512], 1; bar.sync 0;
    setp.ge.u32 %p2, %r1, 32; @%p2 bra C;
    st.shared.b32 [%r5], %r1; {sync} @%p1 mbarrier.arrive.shared.b64 %d10, [%r3+512]; bra E;
    C: WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [%r3+512], 0; @!%p4 bra WAIT;
    ld.shared.b32 %r10, [%r7]; E: mov.b32 %r11, 0;"""
    assert kinds(body.format(sync="bar.warp.sync -1;")) == set()
    assert kinds(body.format(sync="")) == {f"shared {RACE_RAW}"}


# ------------------------------------------------------------------ clusters, generic addresses, local memory, reductions
@pytest.mark.parametrize("wait", [True, False])
def test_cluster_exchange_through_shared_memory(wait: bool) -> None:
    sync = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    body = f"""mad.lo.u32 %r20, %r2, 64, %r1; st.shared.b32 [%r5], %r20; {sync if wait else ""}
    mov.u32 %r21, %cluster_ctarank; xor.b32 %r22, %r21, 1; mapa.shared::cluster.u32 %r23, %r5, %r22;
    ld.shared::cluster.b32 %r24, [%r23]; mul.wide.u32 %d20, %r20, 4; add.u64 %d21, %d1, %d20; st.global.b32 [%d21], %r24;
    {sync} ret; }}"""
    arrays = [np.zeros(256, np.uint32), np.zeros(1, np.uint32)]
    reports = run_ptx_text(HEAD + body, arrays, grid=4, block=64, shared=256, cluster=2)
    if wait:
        assert reports == []
        assert (arrays[0] == np.arange(256).reshape(4, 64)[[1, 0, 3, 2]].ravel()).all()
    else:
        assert {r.kind for r in reports} & {f"shared {RACE_RAW}", "uninitialised shared load"}


def test_generic_addresses_reach_every_space() -> None:
    body = """cvta.shared.u64 %d20, %d30; cvt.u64.u32 %d21, %r5; cvta.shared.u64 %d22, %d21; st.b32 [%d22], %r4;
    ld.b32 %r20, [%d22]; ld.b32 %r21, [%d4]; add.u32 %r22, %r20, %r21; st.b32 [%d5], %r22; ret; }"""
    arrays = [np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)]
    assert run_ptx_text(HEAD + body, arrays, block=64, shared=256) == []
    assert (arrays[1] == 5 * np.arange(64)).all()


def test_local_memory_is_reported() -> None:
    local = HEAD.replace(".reg .pred", ".local .align 4 .b8 spill[16];\n.reg .pred", 1)
    body = "mov.u64 %d20, spill; st.local.b32 [%d20+4], %r1; ld.local.b32 %r20, [%d20+4]; st.global.b32 [%d4], %r20; ret; }"
    arrays = [np.zeros(64, np.uint32), np.zeros(1, np.uint32)]
    assert {r.kind for r in run_ptx_text(local + body, arrays, block=64)} == {"local memory is used"}
    assert (arrays[0] == np.arange(64)).all()


def test_barrier_reductions() -> None:
    body = """setp.lt.u32 %p2, %r1, 10; bar.red.popc.u32 %r20, 0, %p2; bar.red.or.pred %p3, 0, %p2; bar.red.and.pred %p4, 0, %p2;
    selp.b32 %r21, 100, 0, %p3; selp.b32 %r22, 1000, 0, %p4; add.u32 %r20, %r20, %r21; add.u32 %r20, %r20, %r22;
    st.global.b32 [%d4], %r20; ret; }"""
    arrays = [np.zeros(64, np.uint32), np.zeros(1, np.uint32)]
    assert run_ptx_text(HEAD + body, arrays, block=64) == []
    assert (arrays[0] == 110).all()


def test_warp_collectives(seed) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 5, 64).astype(np.uint32)
    checks = {
        "match.any.sync.b32 %r20, %r10, -1;": lambda w, i: sum(1 << j for j in range(32) if w[j] == w[i]),
        "redux.sync.add.s32 %r20, %r10, -1;": lambda w, i: int(w.sum()),
        "redux.sync.max.u32 %r20, %r10, -1;": lambda w, i: int(w.max()),
        "redux.sync.xor.b32 %r20, %r10, -1;": lambda w, i: int(np.bitwise_xor.reduce(w)),
        "shfl.sync.up.b32 %r20, %r10, 3, 0, -1;": lambda w, i: int(w[i - 3 if i >= 3 else i]),
        "shfl.sync.down.b32 %r20, %r10, 5, 31, -1;": lambda w, i: int(w[i + 5 if i + 5 < 32 else i]),
        "shfl.sync.bfly.b32 %r20, %r10, 9, 31, -1;": lambda w, i: int(w[i ^ 9]),
        "shfl.sync.idx.b32 %r20, %r10, 7, 0x181f, -1;": lambda w, i: int(w[(i & 24) + 7]),
        "setp.gt.u32 %p2, %r10, 2; vote.sync.ballot.b32 %r20, %p2, -1;": lambda w, i: sum(
            1 << j for j in range(32) if w[j] > 2
        ),
        "setp.lt.u32 %p2, %r10, 5; vote.sync.all.pred %p3, %p2, -1; selp.b32 %r20, 1, 0, %p3;": lambda w, i: 1,
        "elect.sync %r21|%p3, -1; selp.b32 %r20, 1, 0, %p3;": lambda w, i: int(i == 0),
    }
    for line, want in checks.items():
        arrays = [values.copy(), np.zeros(64, np.uint32)]
        text = HEAD + f"ld.global.b32 %r10, [%d4]; {line} st.global.b32 [%d5], %r20; ret; }}"
        assert run_ptx_text(text, arrays, block=64) == []
        assert arrays[1].tolist() == [want(values[t // 32 * 32 :][:32], t % 32) for t in range(64)], line


def test_atomics_of_every_kind(seed) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 100, 64).astype(np.uint32)
    for op, start, want in (
        ("add.u32", 5, 5 + int(values.sum())), ("min.u32", 50, min(50, int(values.min()))), ("max.s32", 50, max(50, int(values.max()))),
        ("and.b32", 0xFF, 0xFF & int(np.bitwise_and.reduce(values))), ("or.b32", 0, int(np.bitwise_or.reduce(values))),
        ("xor.b32", 1, 1 ^ int(np.bitwise_xor.reduce(values))), ("exch.b32", 0, int(values[63])),
    ):  # fmt: skip
        arrays = [values.copy(), np.full(1, start, np.uint32)]
        text = HEAD + f"ld.global.b32 %r10, [%d4]; atom.global.{op} %r20, [%d2], %r10; ret; }}"
        assert run_ptx_text(text, arrays, block=64) == []
        assert int(arrays[1][0]) == want, op
    arrays = [values.copy(), np.full(1, 3, np.uint32)]
    text = (
        HEAD
        + "atom.global.cas.b32 %r20, [%d2], 3, 77; atom.global.inc.u32 %r21, [%d2], 100; st.global.b32 [%d4], %r20; ret; }"
    )
    assert run_ptx_text(text, arrays, block=64) == []
    assert arrays[0][0] == 3
    assert (arrays[0][1:] == 77).all()


def test_vector_reductions() -> None:
    arrays = [np.zeros(8, np.float32), np.zeros(1, np.uint32)]
    body = "cvt.rn.f32.u32 %r10, %r1; mov.b32 %r11, 0f3F800000; red.global.add.v4.f32 [%d1], {%r10, %r11, %r10, %r11}; ret; }"
    assert run_ptx_text(HEAD + body, arrays, block=64) == []
    assert arrays[0].tolist() == [2016, 64, 2016, 64, 0, 0, 0, 0]
    halves = [np.zeros(8, np.uint32), np.zeros(1, np.uint32)]
    body = "mov.b32 %r10, 0x3F803F80; red.global.add.noftz.v2.bf16x2 [%d1], {%r10, %r10}; ret; }"
    assert run_ptx_text(HEAD + body, halves, block=32) == []
    assert halves[0].tolist()[:2] == [0x42004200] * 2


# ------------------------------------------------------------------ bulk stores
BULK = """st.shared.b32 [%r5], %r4; {fence} bar.sync 0; @!%p1 bra E;
cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r3], 256; {commit} {wait} {then} E: mov.b32 %r40, 0;"""


@pytest.mark.parametrize(
    ("fence", "wait", "then", "found"),
    [
        ("fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group 0;", "ld.global.b32 %r20, [%d1];", set()),
        ("fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;", "st.shared.b32 [%r3], %r1;", set()),
        ("fence.proxy.async.shared::cta;", "", "", set()),
        ("", "cp.async.bulk.wait_group 0;", "", {"bulk copy reads shared memory without fence.proxy.async after the write"}),
        ("fence.proxy.async.shared::cta;", "", "st.shared.b32 [%r3], %r1;",
         {"shared store to the source of an incomplete asynchronous operation"}),
        ("fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;", "ld.global.b32 %r20, [%d1];",
         {"global load overlaps an incomplete asynchronous copy"}),
        ("fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group 1;", "ld.global.b32 %r20, [%d1];",
         {"global load overlaps an incomplete asynchronous copy"}),
    ],
)  # fmt: skip
def test_bulk_store(fence: str, wait: str, then: str, found: set[str]) -> None:
    arrays = [np.zeros(64, np.uint32), np.zeros(64, np.uint32)]
    body = BULK.format(fence=fence, wait=wait, then=then, commit="cp.async.bulk.commit_group;")
    reports = run_ptx_text(HEAD + body + "ret;\n}\n", arrays, block=64, shared=256)
    assert {r.kind for r in reports} == found
    assert (arrays[0] == np.arange(64) * 4).all()


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
