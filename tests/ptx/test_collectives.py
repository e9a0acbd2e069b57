"""Warp collectives, atomics, barrier reductions, clusters, generic and local memory: values."""

from __future__ import annotations

import numpy as np
import pytest

from .collectives import check_mma, mma
from .ptx_snippets import HEAD, RACE_RAW, run_ptx_text

pytestmark = pytest.mark.execute


@pytest.mark.parametrize("wait", [True, False])
def test_cluster_exchange_through_shared_memory(wait: bool) -> None:
    sync = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    body = f"""mad.lo.u32 %r20, %r2, 64, %r1; st.shared.b32 [%r5], %r20; {sync if wait else ""}
    mov.u32 %r21, %cluster_ctarank; xor.b32 %r22, %r21, 1; mapa.shared::cluster.u32 %r23, %r5, %r22;
    ld.shared::cluster.b32 %r24, [%r23]; mul.wide.u32 %d20, %r20, 4; add.u64 %d21, %d1, %d20; st.global.b32 [%d21],
    %r24;
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
    body = """mov.u64 %d20, spill; st.local.b32 [%d20+4], %r1; ld.local.b32 %r20, [%d20+4];
    st.global.b32 [%d4], %r20; ret; }"""
    arrays = [np.zeros(64, np.uint32), np.zeros(1, np.uint32)]
    assert {r.kind for r in run_ptx_text(local + body, arrays, block=64)} == {"local memory is used"}
    assert (arrays[0] == np.arange(64)).all()


def test_barrier_reductions() -> None:
    body = """setp.lt.u32 %p2, %r1, 10; bar.red.popc.u32 %r20, 0, %p2; bar.red.or.pred %p3, 0, %p2;
    bar.red.and.pred %p4, 0, %p2;
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
        ("add.u32", 5, 5 + int(values.sum())), ("min.u32", 50, min(50, int(values.min()))),
        ("max.s32", 50, max(50, int(values.max()))),
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
        + "atom.global.cas.b32 %r20, [%d2], 3, 77; atom.global.inc.u32 %r21, [%d2], 100;"
        + "st.global.b32 [%d4], %r20; ret; }"
    )
    assert run_ptx_text(text, arrays, block=64) == []
    assert arrays[0][0] == 3
    assert (arrays[0][1:] == 77).all()


def test_vector_reductions() -> None:
    arrays = [np.zeros(8, np.float32), np.zeros(1, np.uint32)]
    body = """cvt.rn.f32.u32 %r10, %r1; mov.b32 %r11, 0f3F800000;
    red.global.add.v4.f32 [%d1], {%r10, %r11, %r10, %r11}; ret; }"""
    assert run_ptx_text(HEAD + body, arrays, block=64) == []
    assert arrays[0].tolist() == [2016, 64, 2016, 64, 0, 0, 0, 0]
    halves = [np.zeros(8, np.uint32), np.zeros(1, np.uint32)]
    body = "mov.b32 %r10, 0x3F803F80; red.global.add.noftz.v2.bf16x2 [%d1], {%r10, %r10}; ret; }"
    assert run_ptx_text(HEAD + body, halves, block=32) == []
    assert halves[0].tolist()[:2] == [0x42004200] * 2


@pytest.mark.parametrize(
    ("form", "per_word"),
    [
        ("m16n8k16.row.col.f32.bf16.bf16.f32", 2),
        ("m16n8k8.row.col.f32.f16.f16.f32", 2),
        ("m16n8k32.row.col.f32.e4m3.e5m2.f32", 4),
        ("m16n8k16.row.col.s32.s8.u8.s32", 4),
        ("m16n8k32.row.col.s32.u8.s8.s32", 4),
        ("m16n8k8.row.col.f32.tf32.tf32.f32", 1),
    ],
)
def test_mma_against_the_fragment_formulas_of_the_isa(form: str, per_word: int, seed) -> None:
    """Fragments built element by element from the formulas of PTX ISA 9.7.14.5, for all element types."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "f16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
              "s8": torch.int8, "u8": torch.uint8, "tf32": torch.float32}  # fmt: skip
    shape, _, _, out, ta, tb, _ = form.split(".")
    k, words = int(shape.split("k")[1]), int(shape.split("k")[1]) // (4 * per_word)
    g = torch.Generator().manual_seed(seed)
    low = 0 if "u8" in (ta, tb) else -4
    a, b = (torch.randint(low, 5, (n, k), generator=g).to(dtypes[t]) for n, t in ((16, ta), (8, tb)))
    raw_a, raw_b = (v.contiguous().view(torch.uint8).numpy().reshape(len(v), -1) for v in (a, b))
    size = 4 // per_word
    fa, fb = np.zeros((2 * words, 32, 4), np.uint8), np.zeros((words, 32, 4), np.uint8)
    for lane in range(32):
        group, quad = lane // 4, lane % 4
        for w in range(2 * words):
            column = (w // 2) * 4 * per_word + quad * per_word
            fa[w, lane] = raw_a[group + 8 * (w % 2), column * size : (column + per_word) * size]
        for w in range(words):
            row = w * 4 * per_word + quad * per_word
            fb[w, lane] = raw_b[group, row * size : (row + per_word) * size]
    c = [np.zeros(32, np.uint32)] * 4
    check_mma(form, 2 * words, words, 4)
    d = mma(form, list(fa.view(np.uint32)[..., 0]), list(fb.view(np.uint32)[..., 0]), c, 32)
    want = a.double() @ b.double().T
    for lane in range(32):
        for i in range(4):
            assert d[i][lane] == want[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2], (out, lane, i)
