"""Faults around asynchronous copies and mbarriers are reported; the correct twin of each program is clean."""

from __future__ import annotations

import numpy as np
import pytest

from .ptx_snippets import HEAD, RACE_RAW, kinds, run_ptx_text

pytestmark = pytest.mark.execute


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


# ------------------------------------------------------------------ bulk stores
BULK = """st.shared.b32 [%r5], %r4; {fence} bar.sync 0; @!%p1 bra E;
cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r3], 256; {commit} {wait} {then} E: mov.b32 %r40, 0;"""


@pytest.mark.parametrize(
    ("fence", "wait", "then", "found"),
    [
        ("fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group 0;", "ld.global.b32 %r20, [%d1];", set()),
        ("fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;", "st.shared.b32 [%r3], %r1;", set()),
        ("fence.proxy.async.shared::cta;", "", "", set()),
        ("", "cp.async.bulk.wait_group 0;", "",
         {"bulk copy reads shared memory without fence.proxy.async after the write"}),
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
