"""A transformers MoE model whose routed experts run by this package's rule in plain torch, with every intermediate in
reach.

For research and for the parts of an evaluation that a serving engine does not show: the oracle, mask overlap, traffic
of batches. Any causal LM of transformers whose experts are held as gate_up_proj [E, 2I, H] and down_proj [E, H, I]
(OLMoE, Mixtral, Qwen-MoE, ...).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch

from ..calibration import LayerCounters
from ..errors import UserError
from ..reference import gate_activation
from ..weights import ExpertWeights
from .scores import row_norms

BATCH_TOKENS = 16384 if torch.cuda.is_available() else 4096


@dataclass(frozen=True)
class Rule:
    """tau: a number, or fp32 broadcastable to [E, I]; rho: pair threshold; oracle: judge by |act(gate) * up|."""

    tau: float | torch.Tensor = 0.0
    rho: float = 0.0
    router_weighted: bool = True
    oracle: bool = False


# Called with every expert's tokens in a forward pass: expert, token [m], r [m], a [m, I], u [m, I], active bool [m, I].
Tap = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class Layer:
    """One routed-expert layer: its weights, the rule in force (None: dense), counters of what it did, a tap,
    and the least routing weight that any token gave its best expert.
    """

    name: str
    weights: ExpertWeights
    activation: str
    top_k: int
    rule: Rule | None = None
    counters: LayerCounters = field(default_factory=LayerCounters)
    tap: Tap | None = None
    least_best_weight: float = math.inf
    probing: bool = False
    num_tokens: int = 0
    new_call: bool = False
    probe: torch.Tensor | None = None
    override: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    down_norms: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.down_norms = row_norms(self.weights)[1]

    def forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], topk_* [T, k] -> [T, H]. fp32 inside. ``override``, where set, is called instead."""
        if self.override is not None:
            return self.override(hidden_states, topk_ids, topk_weights)
        weights, inter = self.weights, self.weights.intermediate_size
        self.num_tokens, self.new_call = hidden_states.shape[0], True
        rule = self.rule
        tau: torch.Tensor | None = None
        if rule is not None:
            tau = torch.as_tensor(rule.tau, dtype=torch.float32, device=hidden_states.device)
            tau = tau.expand(weights.num_experts, inter)
        result = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        self.least_best_weight = min(self.least_best_weight, float(topk_weights.detach().amax(dim=1).min()))
        flat = topk_ids.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=weights.num_experts).tolist()
        start = 0
        for e, count in enumerate(counts):
            chosen = order[start : start + count]
            start += count
            if not count:
                continue
            token = chosen // topk_ids.shape[1]
            r = topk_weights.flatten()[chosen].float()
            if rule is not None and rule.rho > 0:
                keep = r >= rule.rho
                self.counters.skipped_pairs += count - int(keep.sum())
                token, r = token[keep], r[keep]
            gate_up = hidden_states[token].float() @ weights.w13[e].float().t()
            a, u = gate_activation(gate_up[:, :inter], self.activation), gate_up[:, inter:]
            self.counters.pairs += count
            self.counters.neurons += count * inter
            h = a * u
            if tau is None or rule is None:
                active = torch.ones_like(a, dtype=torch.bool)
                self.counters.active_neurons += active.numel()
            else:
                score = (h if rule.oracle else a).abs()
                active = ~((score * r.unsqueeze(1) if rule.router_weighted else score) < tau[e])
                self.counters.active_neurons += int(active.sum())
                h = torch.where(active, h, 0.0)
            if self.tap is not None:
                self.tap(e, token, r, a, u, active)
            result.index_add_(0, token, (h @ weights.w2_rows[e].float()) * r.unsqueeze(1))
        if self.probing:
            self.probe = torch.zeros_like(result).requires_grad_()
            result = result + self.probe
        return result.to(hidden_states.dtype)


class MoEModel:
    """A causal LM with its routed-expert layers opened up. ``layers``: in model order, by module name."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        config = model.config
        activation = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}.get(
            config.hidden_act
        )
        if activation is None:
            raise UserError(f"activation {config.hidden_act} is not supported")
        self.layers: dict[str, Layer] = {}
        for name, module in model.named_modules():
            if not isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
                continue
            w2_rows = module.down_proj.detach().transpose(1, 2).contiguous()
            weights = ExpertWeights(module.gate_up_proj.detach().contiguous(), w2_rows)
            layer = Layer(name, weights, activation, config.num_experts_per_tok)
            module.forward = MethodType(lambda _, *args, layer=layer: layer.forward(*args), module)
            self.layers[name] = layer
        if not self.layers:
            raise UserError(
                f"{type(model).__name__} has no routed experts in the layout this needs (gate_up_proj, down_proj)"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu", dtype: torch.dtype = torch.float32) -> MoEModel:
        """A checkpoint folder or cached hub name. UserError if transformers cannot load it."""
        import transformers

        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(os.fspath(path), dtype=dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"model {path}: transformers cannot load it: {str(error).splitlines()[0]}") from None
        return cls(model.to(device))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def set_rules(self, rules: dict[str, Rule] | None) -> None:
        """A rule per layer (None: dense everywhere); counters start at zero."""
        for name, layer in self.layers.items():
            layer.rule = None if rules is None else rules[name]
            layer.counters = LayerCounters()
            layer.least_best_weight = math.inf

    def set_taps(self, make: Callable[[Layer], Tap] | None) -> None:
        for layer in self.layers.values():
            layer.tap = None if make is None else make(layer)

    @torch.no_grad()
    def log_probs(self, batch: torch.Tensor) -> torch.Tensor:
        """Next-token log-probabilities, fp32 [B, L, V], of token ids [B, L]."""
        logits = self.model(input_ids=batch.to(self.device), use_cache=False).logits
        return torch.log_softmax(logits.float(), dim=-1)

    def output_gradients(self, batch: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Per layer, gradients of -log p(label) by the layer's output, fp32 [B * L, H], labels drawn from the model's
        own prediction.

        Their second moments are the Fisher information, to second order twice the KL that an error of the output
        causes.
        """
        for layer in self.layers.values():
            layer.probing = True
        try:
            with torch.enable_grad():
                logits = self.model(input_ids=batch.to(self.device), use_cache=False).logits.float()
                flat = logits.flatten(0, 1)
                chosen = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).to(flat.device)
                (-torch.log_softmax(flat, dim=-1).gather(1, chosen).sum()).backward()
            found = {}
            for name, layer in self.layers.items():
                gradient = None if layer.probe is None else layer.probe.grad
                if gradient is None:
                    raise ValueError(f"layer {name} has no influence on the prediction: it was not run")
                found[name] = gradient
            return found
        finally:
            for layer in self.layers.values():
                layer.probing, layer.probe = False, None

    def batches(self, sequences: Sequence[Sequence[int]], tokens: int = BATCH_TOKENS) -> Iterator[torch.Tensor]:
        """Sequences of equal length stacked as [B, L], about ``tokens`` at a time."""
        pending: list[Sequence[int]] = []
        for sequence in sequences:
            if pending and (len(pending[0]) != len(sequence) or (len(pending) + 1) * len(sequence) > tokens):
                yield torch.tensor(pending)
                pending = []
            pending.append(sequence)
        if pending:
            yield torch.tensor(pending)
