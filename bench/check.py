"""Checks a prepared measurement against the definition before any number of it is taken.

The error is the relative L2 distance to the fp32 reference over sampled tokens, and may be twice that of plain torch in
the weights' dtype (plus 1e-5), the tolerance of the tests. The thresholds of a benchmark problem keep clear of the
scores of the tokens that are checked (problems.py), so back ends differ by rounding only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cutedsl_kernels import sparse_moe_ref
from cutedsl_kernels.reference import gate_activation, up_transform

from .problems import Batch, Cutoffs, LayerInputs
from .timing import PreparedCalls


class WrongResult(RuntimeError):
    """A path whose output differs from the definition. It gets no timing."""


def reference_error(output: torch.Tensor, batch: Batch, call: LayerInputs, cutoffs: Cutoffs) -> tuple[float, float]:
    """(error, error of the same-dtype reference) of one call's output [T, H], relative L2 over the
    batch's checked tokens. WrongResult if the output has another shape or holds NaN or
    infinity anywhere.
    """
    if output.shape != call.hidden_states.shape:
        raise WrongResult(f"output has shape {tuple(output.shape)}, expected {tuple(call.hidden_states.shape)}")
    bad = int((~torch.isfinite(output)).sum())
    if bad:
        raise WrongResult(f"{bad} of {output.numel()} output values are NaN or infinite")
    rows = torch.tensor(batch.checked_tokens, device=output.device)
    part = LayerInputs(call.hidden_states[rows], call.topk_weights[rows], call.topk_ids[rows], call.weights)
    expected = torch.empty(part.hidden_states.shape, dtype=torch.float32, device=output.device)
    sparse_moe_ref(
        part.hidden_states,
        part.weights,
        part.topk_weights,
        part.topk_ids,
        cutoffs.thresholds,
        router_weighted=cutoffs.rule.router_weighted,
        pair_threshold=cutoffs.pair_threshold,
        activation=batch.activation,
        apply_router_weight_on_input=batch.router_weight_on_input,
        out=expected,
    )
    rounded = _same_dtype_reference(part, batch, cutoffs)
    scale = expected.norm().clamp(min=1e-20)
    return float((output[rows].float() - expected).norm() / scale), float((rounded.float() - expected).norm() / scale)


def check(prepared: PreparedCalls, batch: Batch, cutoffs: Cutoffs) -> float:
    """Poisons all outputs, runs all calls once, and compares the counted ones with the reference.

    Returns the largest error. WrongResult if one is beyond the tolerance.
    """
    prepared.poison()
    prepared.run()
    worst = 0.0
    for i in batch.counted:
        error, same_dtype = reference_error(prepared.outputs[i], batch, batch.calls[i], cutoffs)
        allowed = 2 * same_dtype + 1e-5
        if not error <= allowed:
            raise WrongResult(f"relative error {error:.2e} in call {i}, allowed {allowed:.2e}")
        worst = max(worst, error)
    return worst


def _same_dtype_reference(part: LayerInputs, batch: Batch, cutoffs: Cutoffs) -> torch.Tensor:
    """The computation as plain torch does it in the weights' dtype: gate, up, h and each pair's y rounded. [T, H]."""
    weights, inter = part.weights, part.weights.intermediate_size
    keep = part.topk_weights >= cutoffs.pair_threshold
    result = torch.zeros(part.hidden_states.shape, dtype=torch.float32, device=part.hidden_states.device)
    for e in torch.unique(part.topk_ids[keep]).tolist():
        token, slot = torch.nonzero(keep & (part.topk_ids == e), as_tuple=True)
        r = part.topk_weights[token, slot].unsqueeze(1)
        x = part.hidden_states[token]
        if batch.router_weight_on_input:
            x = (x.float() * r).to(x.dtype)
        gate_up = F.linear(x, weights.w13[e])
        a = gate_activation(gate_up[:, :inter], batch.activation)
        score = a.abs().float() * r if cutoffs.rule.router_weighted else a.abs().float()
        h = torch.where(score < cutoffs.thresholds[e], 0, a * up_transform(gate_up[:, inter:], batch.activation))
        y = h @ weights.w2_rows[e]
        result.index_add_(0, token, y.float() if batch.router_weight_on_input else (y * r).to(y.dtype).float())
    return result.to(part.hidden_states.dtype)
