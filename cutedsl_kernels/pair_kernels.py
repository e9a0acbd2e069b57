"""PairKernels: the kernels between and behind the two grouped products of a dense layer, compiled for one kind of layer
and launched on torch's current stream. kernels/kept_pairs.py says what they compute.
"""

from __future__ import annotations

import torch

from .compile import compile_kernel
from .compile.specs import pair_specs
from .configs import KERNEL_ACTIVATIONS
from .launch import why_no_kernels
from .shapes import MoEShape
from .weights import ExpertWeights


def why_no_pair_kernels(weights: ExpertWeights, activation: str) -> str | None:
    """Why these kernels cannot run for a layer, or None."""
    if weights.dtype != torch.bfloat16:
        return f"the kernels take bfloat16, the weights are {weights.dtype}"
    for name, size in (("hidden_size", weights.hidden_size), ("intermediate_size", weights.intermediate_size)):
        if size % 8:
            return f"{name} {size} is not a multiple of 8"
    if activation not in KERNEL_ACTIVATIONS:
        return f"activation {activation} is not one of {', '.join(KERNEL_ACTIVATIONS)}"
    return why_no_kernels(weights)


class PairKernels:
    """Both kernels for layers of one shape and activation.

    Compiles or loads on construction, so not while a CUDA graph is captured; RuntimeError where the DSL refuses.
    """

    def __init__(self, shape: MoEShape, activation: str) -> None:
        self._activate, self._sum = (compile_kernel(spec) for spec in pair_specs(shape, activation))

    def activate(
        self, gate_up: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out [P, I] = act(gate) * up from gate_up [P, 2I], both bf16 and contiguous, for pairs whose expert topk_ids
        [P] int32 is here: not negative, and sent to one that is not by expert_map [E_global] int32.
        Rows of other pairs are neither read nor written.
        """
        self._activate(gate_up, topk_ids, expert_map, out)

    def sum(self, pairs: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, H] = the sum of the rows of pairs [T, k, H] whose expert topk_ids [T, k] is here, both bf16."""
        self._sum(pairs, topk_ids, expert_map, out)
