"""Checks a prepared measurement against the definition before any number of it is taken.

The error is the relative L2 distance to the fp32 reference over sampled tokens, and may be twice that of plain torch in
the weights' dtype (plus 1e-5), the tolerance of the tests. The thresholds of a benchmark problem keep clear of the
scores of the tokens that are checked (problems.py), so back ends differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cutedsl_kernels import sparse_moe_ref
from cutedsl_kernels.reference import gate_activation, up_transform

from .problems import Batch, Cutoffs, LayerInputs
from .timing import PreparedCalls


class WrongResult(RuntimeError):
    """A path whose output differs from the definition. It gets no timing."""


@dataclass(frozen=True)
class Expectation:
    """What one call must give for the checked tokens ``rows``: fp32 [rows, H], and the relative error allowed."""

    call: int
    rows: torch.Tensor
    expected: torch.Tensor
    allowed: float

    def error(self, output: torch.Tensor) -> float:
        """Relative L2 error of the call's output [T, H]. WrongResult for another shape, or NaN or infinity anywhere."""
        if output.dim() != 2 or output.shape[1] != self.expected.shape[1] or len(output) <= int(self.rows[-1]):
            raise WrongResult(f"output has shape {tuple(output.shape)}, expected [T, {self.expected.shape[1]}]")
        bad = int((~torch.isfinite(output)).sum())
        if bad:
            raise WrongResult(f"{bad} of {output.numel()} output values are NaN or infinite")
        return _distance(output[self.rows], self.expected)


def expectations(batch: Batch, cutoffs: Cutoffs) -> list[Expectation]:
    """References for the checked tokens of the counted calls; good for every path that computes these cutoffs."""
    made = []
    for i in batch.counted:
        call = batch.calls[i]
        rows = torch.tensor(batch.checked_tokens, device=call.hidden_states.device)
        part = LayerInputs(call.hidden_states[rows], call.topk_weights[rows], call.topk_ids[rows], call.weights)
        expected = torch.empty(part.hidden_states.shape, dtype=torch.float32, device=rows.device)
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
        allowed = 2 * _distance(_same_dtype_reference(part, batch, cutoffs), expected) + 1e-5
        made.append(Expectation(i, rows, expected, allowed))
    return made


def check(prepared: PreparedCalls, expected: Sequence[Expectation]) -> float:
    """Poisons all outputs, runs all calls once, compares. The largest error, or WrongResult beyond tolerance."""
    prepared.poison()
    prepared.run()
    worst = 0.0
    for expectation in expected:
        error = expectation.error(prepared.outputs[expectation.call])
        if not error <= expectation.allowed:
            raise WrongResult(
                f"relative error {error:.2e} in call {expectation.call}, allowed {expectation.allowed:.2e}"
            )
        worst = max(worst, error)
    return worst


def _distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values.float() - expected).norm() / expected.norm().clamp(min=1e-20))


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
        gate_up = F.linear(x, weights.w13[e], None if weights.w13_bias is None else weights.w13_bias[e])
        a = gate_activation(gate_up[:, :inter], batch.activation)
        score = a.abs().float() * r if cutoffs.rule.router_weighted else a.abs().float()
        h = torch.where(score < cutoffs.thresholds[e], 0, a * up_transform(gate_up[:, inter:], batch.activation))
        y = h @ weights.w2_rows[e] + (0 if weights.w2_bias is None else weights.w2_bias[e])
        result.index_add_(0, token, y.float() if batch.router_weight_on_input else (y * r).to(y.dtype).float())
    return result.to(part.hidden_states.dtype)
