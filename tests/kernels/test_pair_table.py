"""PairTable's courses of the CTAs: every item in one, and shares of equal work, executed on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass")
pytestmark = pytest.mark.execute


PAIRED_ITEMS = 8  # for each CTA, from which on neighbours have a common share


def courses(run_ptx, topk_ids: torch.Tensor, experts: int, tiles: int, ctas: int, threads: int) -> np.ndarray:
    """[ctas, 4]: first, step, own and common of each CTA, as a kernel that only builds the table finds them."""
    import cuda.bindings.driver as cuda
    from cutlass.cute.runtime import from_dlpack

    from .shares_kernel import Shares

    weights, out = torch.ones(topk_ids.shape), torch.empty(ctas, 4, dtype=torch.int32)
    tensors = [from_dlpack(tensor) for tensor in (topk_ids, weights, out)]
    program = run_ptx.compile(Shares(experts, topk_ids.shape[1], tiles, ctas, threads), *tensors, cuda.CUstream(0))
    run_ptx(program, run_ptx.ReadOnly(topk_ids), run_ptx.ReadOnly(weights), run_ptx.Uninit(out), 0)
    return out.numpy()


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "ctas", "threads", "tiles"),
    [
        (1, 2, 4, 5, 128, 6),
        (1, 2, 4, 1, 128, 20),
        (4, 8, 64, 7, 128, 6),
        (4, 8, 64, 6, 128, 32),
        (40, 8, 64, 13, 128, 6),
        (100, 8, 300, 132, 256, 6),
        (3, 30, 700, 132, 384, 6),
        (512, 8, 200, 132, 384, 6),  # as many pairs as a launch may have
    ],
)
@pytest.mark.parametrize("crowded", [False, True])
def test_courses_cover_all_items_and_are_equal_in_work(
    run_ptx, seed: int, tokens: int, top_k: int, experts: int, ctas: int, threads: int, tiles: int, crowded: bool
) -> None:
    generator = np.random.default_rng(seed)
    popular = generator.random(experts) ** (6 if crowded else 0)
    ids = [generator.choice(experts, top_k, replace=False, p=popular / popular.sum()) for _ in range(tokens)]
    topk_ids = torch.tensor(np.array(ids), dtype=torch.int32)
    found = courses(run_ptx, topk_ids, experts, tiles, ctas, threads)

    pairs = np.bincount(topk_ids.flatten().numpy(), minlength=experts)
    if topk_ids.numel() <= 32:  # numbered in the order of their first pairs
        flat = topk_ids.flatten().numpy()
        pairs = pairs[flat[np.sort(np.unique(flat, return_index=True)[1])]]
    blocks = [min(8, count - rank) for count in pairs for rank in range(0, count, 8)]
    # in whole units, of which an item without active rows has 32: each item may differ from the formula by 1/64
    work = np.repeat([round(32 * (1 + 0.8 * (1 - 0.845**size))) for size in blocks], tiles)
    shares, end = [], 0
    for cta in range(0, ctas, 2 if len(work) >= PAIRED_ITEMS * ctas else 1):
        first, step, own, common = found[cta]
        begin, members = end, 1
        assert (first, step) == (begin, 1)
        end = begin + own + common
        if len(work) >= PAIRED_ITEMS * ctas and cta + 1 < ctas:
            members, end = 2, end + own
            assert tuple(found[cta + 1]) == (end - 1, -1, own, common)
            assert own >= 3, "a CTA without an item of its own would never ask for a common one"
            assert 0.2 <= common / (end - begin) <= 0.4
        else:
            assert common == 0, "nobody to share with"
        shares.append(work[begin:end].sum() - members * work.sum() / ctas)
    assert end == len(work)
    # A share begins with the item in which its part of all work begins, so each end is off by less than an item, in the
    # same direction; one unit more for the division, which is in fp32.
    assert max(map(abs, shares)) < work.max() + 1


def test_no_pair_no_item(run_ptx) -> None:
    for tokens in (1, 40):
        nowhere = torch.full((tokens, 2), -1, dtype=torch.int32)
        assert (courses(run_ptx, nowhere, 8, 4, 3, 128)[:, 2:] == 0).all()
