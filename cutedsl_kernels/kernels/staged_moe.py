"""The staged path: route_sort, gate_compact, sparse_up, sparse_down and combine, launched by one host function.

Every grid and buffer size follows from T alone, so the sequence can be captured in a CUDA graph. Weights move once for
each item: gate rows of all neurons, up and down rows of those active for any token of the item.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute

from .gate_compact import GateCompact
from .route_sort import RouteSort
from .sparse_down import Combine, SparseDown
from .sparse_up import SparseUp
from .staged_common import StagedSpec


class StagedMoE:
    """hidden_states [T, H] -> out [T, H], both bf16, through the buffers of StagedConfig.workspace.

    topk_ids, topk_weights [T, k]; w13 [E, 2I, H], w2_rows [E, I, H]; thresholds [E, I] fp32; expert_map [E_global]
    int32, ignored unless the spec has one; w13_bias [E, 2I] and w2_bias [E, H], both None unless the spec has them.
    """

    def __init__(self, **fields: Any):
        self.spec = spec = StagedSpec(**fields)
        self.route_sort = RouteSort(spec)
        self.gate_compact = GateCompact(spec)
        self.sparse_up = SparseUp(spec)
        self.sparse_down = SparseDown(spec)
        self.combine = Combine(spec)

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Tensor,
        w13: cute.Tensor,
        w2_rows: cute.Tensor,
        thresholds: cute.Tensor,
        topk_ids: cute.Tensor,
        topk_weights: cute.Tensor,
        expert_map: cute.Tensor,
        w13_bias: cute.Tensor | None,
        w2_bias: cute.Tensor | None,
        pair_threshold: cutlass.Float32,
        items: cute.Tensor,
        sorted_pairs: cute.Tensor,
        kept: cute.Tensor,
        counts: cute.Tensor,
        neurons: cute.Tensor,
        gates: cute.Tensor,
        active: cute.Tensor,
        slots: cute.Tensor,
        hidden: cute.Tensor,
        scaled: cute.Tensor,
        total: cute.Tensor,
        out: cute.Tensor,
        stream: cuda.CUstream,
    ):
        tokens = scaled if cutlass.const_expr(self.spec.weight_on_input) else hidden_states
        self.route_sort.launch(
            hidden_states,
            topk_ids,
            topk_weights,
            expert_map,
            pair_threshold,
            items,
            sorted_pairs,
            kept,
            scaled,
            total,
            stream,
        )
        routed, lists = (topk_weights, items, sorted_pairs), (counts, neurons, gates)
        found = (active, slots, hidden)
        self.gate_compact.launch(tokens, w13, w13_bias, thresholds, routed, lists, stream)
        self.sparse_up.launch(tokens, w13, w13_bias, routed, lists, found, stream)
        self.sparse_down.launch(w2_rows, routed, found, total, stream)
        self.combine.launch(w2_bias, topk_weights, kept, total, out, stream)
