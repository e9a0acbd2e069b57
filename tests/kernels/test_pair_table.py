"""PairTable's shares of the CTAs: every item in one share, and all shares of equal work, executed on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass")
pytestmark = pytest.mark.execute


def shares(run_ptx, topk_ids: torch.Tensor, experts: int, tiles: int, ctas: int, threads: int) -> np.ndarray:
    """[ctas, 2]: the items of each CTA, first and end, as a kernel that only builds the table finds them."""
    import cuda.bindings.driver as cuda
    from cutlass.cute.runtime import from_dlpack

    from .shares_kernel import Shares

    weights, out = torch.ones(topk_ids.shape), torch.empty(ctas, 2, dtype=torch.int32)
    tensors = [from_dlpack(tensor) for tensor in (topk_ids, weights, out)]
    program = run_ptx.compile(Shares(experts, topk_ids.shape[1], tiles, ctas, threads), *tensors, cuda.CUstream(0))
    run_ptx(program, run_ptx.ReadOnly(topk_ids), run_ptx.ReadOnly(weights), run_ptx.Uninit(out), 0)
    return out.numpy()


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "ctas", "threads"),
    [
        (1, 2, 4, 5, 128),
        (4, 8, 64, 7, 128),
        (40, 8, 64, 13, 128),
        (100, 8, 300, 132, 256),
        (3, 30, 700, 132, 384),
        (512, 8, 200, 132, 384),  # as many pairs as a launch may have
    ],
)
@pytest.mark.parametrize("crowded", [False, True])
def test_shares_cover_all_items_and_are_equal_in_work(
    run_ptx, seed: int, tokens: int, top_k: int, experts: int, ctas: int, threads: int, crowded: bool
) -> None:
    generator, tiles = np.random.default_rng(seed), 6
    popular = generator.random(experts) ** (6 if crowded else 0)
    ids = [generator.choice(experts, top_k, replace=False, p=popular / popular.sum()) for _ in range(tokens)]
    topk_ids = torch.tensor(np.array(ids), dtype=torch.int32)
    found = shares(run_ptx, topk_ids, experts, tiles, ctas, threads)

    pairs = np.bincount(topk_ids.flatten().numpy(), minlength=experts)
    if topk_ids.numel() <= 32:  # numbered in the order of their first pairs
        flat = topk_ids.flatten().numpy()
        pairs = pairs[flat[np.sort(np.unique(flat, return_index=True)[1])]]
    blocks = [min(8, count - rank) for count in pairs for rank in range(0, count, 8)]
    # in whole units, of which an item without active rows has 32: each item may differ from the formula by 1/64
    work = np.repeat([round(32 * (1 + 0.8 * (1 - 0.845**size))) for size in blocks], tiles)
    assert found[0, 0] == 0
    assert found[-1, 1] == len(work)
    assert (found[1:, 0] == found[:-1, 1]).all()
    done = np.array([work[first:end].sum() for first, end in found])
    # A share begins with the item in which its part of all work begins, so each end is off by less than an item, in the
    # same direction; one unit more for the division, which is in fp32.
    assert abs(done - work.sum() / ctas).max() < work.max() + 1


def test_no_pair_no_share(run_ptx) -> None:
    for tokens in (1, 40):
        nowhere = torch.full((tokens, 2), -1, dtype=torch.int32)
        assert (shares(run_ptx, nowhere, 8, 4, 3, 128) == 0).all()
