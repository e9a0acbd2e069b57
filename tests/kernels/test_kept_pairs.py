"""ActivatePairs and SumPairs, executed on the CPU, against their definition: rows of pairs that are not computed here
hold NaN, must not be read, and stay as they are."""

from __future__ import annotations

import functools

import pytest
import torch

from cutedsl_kernels.compile.specs import fake_arguments, pair_specs
from cutedsl_kernels.configs import KERNEL_ACTIVATIONS
from cutedsl_kernels.reference import gate_activation, up_transform
from cutedsl_kernels.shapes import MoEShape

pytest.importorskip("cutlass")
pytestmark = pytest.mark.execute

SHAPE = MoEShape(6, 3, 192, 72)  # T=5: neither kernel's last CTA is full


@functools.cache
def build(run_ptx, spec):
    return run_ptx.compile(spec.build(), *fake_arguments(spec, env_stream=False))


def case(seed: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """topk_ids [T, k], expert_map, and which pairs are here: ids of no expert, remote ones, a token without any."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, SHAPE.num_experts + 1, (num_tokens, SHAPE.top_k), generator=g, dtype=torch.int32)
    ids[0] = -1
    expert_map = torch.tensor([0, -1, 1, 2, -1, 3], dtype=torch.int32)
    known = (ids >= 0) & (ids < SHAPE.num_experts)
    return ids, expert_map, known & (expert_map[ids.clamp(0, SHAPE.num_experts - 1).long()] >= 0)


@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_activate_pairs(run_ptx, seed: int, activation: str) -> None:
    ids, expert_map, here = case(seed, 40)
    ids, here, inter = ids.flatten(), here.flatten(), SHAPE.intermediate_size
    gate_up = 2 * torch.randn(len(ids), 2 * inter, generator=torch.Generator().manual_seed(seed)).bfloat16()
    gate_up[~here] = float("nan")
    out = torch.full((len(ids), inter), float("nan"), dtype=torch.bfloat16)
    arguments = [run_ptx.ReadOnly(tensor) for tensor in (gate_up, ids, expert_map)]
    run_ptx(build(run_ptx, pair_specs(SHAPE, activation)[0]), *arguments, run_ptx.Uninit(out))
    gate, up = gate_up.float().split(inter, 1)
    want = gate_activation(gate, activation) * up_transform(up, activation)
    assert out[~here].isnan().all()
    torch.testing.assert_close(out[here].float(), want[here], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 5, 43])
def test_sum_pairs(run_ptx, seed: int, num_tokens: int) -> None:
    ids, expert_map, here = case(seed, num_tokens)
    g = torch.Generator().manual_seed(seed)
    pairs = torch.randn(num_tokens, SHAPE.top_k, SHAPE.hidden_size, generator=g).bfloat16()
    pairs[~here] = float("nan")
    out = torch.full((num_tokens, SHAPE.hidden_size), float("nan"), dtype=torch.bfloat16)
    arguments = [run_ptx.ReadOnly(tensor) for tensor in (pairs, ids, expert_map)]
    run_ptx(build(run_ptx, pair_specs(SHAPE, "silu")[1]), *arguments, run_ptx.Uninit(out))
    want = torch.where(here.unsqueeze(2), pairs.float(), 0.0).sum(1)
    assert not want[0].any()
    torch.testing.assert_close(out.float(), want, rtol=2**-8, atol=1e-5)
