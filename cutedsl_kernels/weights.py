"""ExpertWeights: the weights of one rank's routed experts, with the down projection laid out one row per neuron.

A checkpoint (and vLLM) stores the down projection as w2 [E, H, I]: the weights of one neuron are a column, 2*I bytes
apart. Skipping a neuron saves memory traffic only if its weights are contiguous, so w2 is re-laid once at load time as
w2_rows [E, I, H]. w13 [E, 2I, H] already has a row per neuron and is kept as it is: gate rows first, then up rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .shapes import MoEShape

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of E experts.

    w13: [E, 2I, H], gate rows then up rows. w2_rows: [E, I, H]. Both contiguous, of one dtype (bf16, fp16 or fp32) and
    on one device. w13_bias [E, 2I] and w2_bias [E, H] are optional (gpt-oss), of any float dtype.
    """

    w13: torch.Tensor
    w2_rows: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_tensor("w13", self.w13, 3)
        _check_tensor("w2_rows", self.w2_rows, 3)
        experts, rows, hidden = self.w13.shape
        if rows % 2:
            raise ValueError(
                f"w13 must be [E, 2I, H] with gate rows then up rows, got an odd number of rows: {_shape(self.w13)}"
            )
        if tuple(self.w2_rows.shape) != (experts, rows // 2, hidden):
            raise ValueError(
                f"w2_rows must be [E, I, H] = {(experts, rows // 2, hidden)} to match w13 {_shape(self.w13)}, "
                f"got {_shape(self.w2_rows)}"
            )
        _check_same(self.w13, self.w2_rows, "w2_rows")
        _check_biases(self.w13, self.w13_bias, self.w2_bias)

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.w2_rows.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.w13.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.w13.dtype

    @property
    def device(self) -> torch.device:
        return self.w13.device

    def shape(self, top_k: int) -> MoEShape:
        return MoEShape(self.num_experts, top_k, self.hidden_size, self.intermediate_size)

    def copy_(self, other: ExpertWeights) -> None:
        """Overwrites these weights, where they are, by ``other``'s of the same shapes. ValueError if biases are missing
        on one side only."""
        for name in ("w13", "w2_rows", "w13_bias", "w2_bias"):
            mine, new = getattr(self, name), getattr(other, name)
            if (mine is None) != (new is None):
                raise ValueError(f"{name} must be given for both or for neither")
            if mine is not None:
                mine.copy_(new)

    @classmethod
    def from_w13_w2(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        interleaved: bool = False,
    ) -> ExpertWeights:
        """Takes over w13 [E, 2I, H] and w2 [E, H, I]; both must be contiguous.

        w2's storage is reused: it is re-laid in place, one expert at a time, with one expert's copy as the only extra
        memory. **The w2 passed in holds the new layout afterwards and must not be used again.** ``interleaved``: w13's
        rows (and w13_bias) alternate gate, up, gate, up (gpt-oss); they are re-laid in place to gate rows first.

        Raises TypeError / ValueError naming the argument, what it must be and what it was.
        """
        _check_tensor("w13", w13, 3)
        _check_tensor("w2", w2, 3)
        experts, rows, hidden = w13.shape
        if rows % 2:
            raise ValueError(
                f"w13 must be [E, 2I, H] with gate rows then up rows, got an odd number of rows: {_shape(w13)}"
            )
        if tuple(w2.shape) != (experts, hidden, rows // 2):
            hint = ""
            if tuple(w2.shape) == (experts, rows // 2, hidden):
                hint = "; it is already [E, I, H]: use ExpertWeights(w13, w2_rows)"
            raise ValueError(
                f"w2 must be [E, H, I] = {(experts, hidden, rows // 2)} to match w13 {_shape(w13)}, "
                f"got {_shape(w2)}{hint}"
            )
        _check_same(w13, w2, "w2")
        _check_biases(w13, w13_bias, w2_bias)  # before anything is moved: afterwards w2 could not be passed in again
        with torch.no_grad():
            w2_rows = relay_rows(w2.detach())
            if interleaved:
                w13 = w13.detach()
                for e in range(experts):
                    w13[e] = torch.cat([w13[e, 0::2], w13[e, 1::2]])
                if w13_bias is not None:
                    w13_bias = torch.cat([w13_bias[:, 0::2], w13_bias[:, 1::2]], dim=1)
        return cls(w13.detach(), w2_rows, w13_bias, w2_bias)


def relay_rows(w2: torch.Tensor) -> torch.Tensor:
    """[E, A, B] contiguous -> the same storage as [E, B, A], each expert transposed in place through one copy."""
    experts, a, b = w2.shape
    rows = w2.view(experts, b, a)
    for e in range(experts):
        rows[e].copy_(w2[e].t().clone(memory_format=torch.contiguous_format))
    return rows


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_tensor(name: str, tensor: torch.Tensor, dims: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != dims or 0 in tensor.shape:
        raise ValueError(f"{name} must have {dims} non-empty dimensions, got shape {_shape(tensor)}")
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {str(tensor.dtype).removeprefix('torch.')}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {tensor.stride()} for shape {_shape(tensor)}: call .contiguous()"
        )


def _check_biases(w13: torch.Tensor, w13_bias: torch.Tensor | None, w2_bias: torch.Tensor | None) -> None:
    experts, rows, hidden = w13.shape
    for name, bias, shape in (("w13_bias", w13_bias, (experts, rows)), ("w2_bias", w2_bias, (experts, hidden))):
        if bias is None:
            continue
        if not isinstance(bias, torch.Tensor) or not bias.dtype.is_floating_point:
            raise TypeError(f"{name} must be a float tensor, got {getattr(bias, 'dtype', type(bias).__name__)}")
        if tuple(bias.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {_shape(bias)}")
        if bias.device != w13.device:
            raise ValueError(f"{name} must be on {w13.device} like w13, got {bias.device}")


def _check_same(w13: torch.Tensor, other: torch.Tensor, name: str) -> None:
    if other.dtype != w13.dtype:
        raise TypeError(f"{name} must have w13's dtype {w13.dtype}, got {other.dtype}")
    if other.device != w13.device:
        raise ValueError(f"{name} must be on {w13.device} like w13, got {other.device}")
