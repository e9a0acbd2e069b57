"""The definition, against the routed experts of Hugging Face models and against the rule written out by neuron."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import Problem, random_problem
from torch import nn

from cutedsl_kernels import ExpertWeights, sparse_moe_ref

pytestmark = pytest.mark.reference

SIZES = {"hidden_size": 48, "num_experts_per_tok": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
NUM_TOKENS = 37


class Block(NamedTuple):
    """A Hugging Face MoE block without its shared expert, and the arguments that describe it to sparse_moe_ref."""

    experts: nn.Module
    routed: Callable[[torch.Tensor], torch.Tensor]
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    weights: ExpertWeights
    activation: str = "silu"
    on_input: bool = False

    def ref(self, x: torch.Tensor, thresholds: float, router_weighted: bool = False) -> torch.Tensor:
        return sparse_moe_ref(
            x,
            self.weights,
            self.topk_weights,
            self.topk_ids,
            thresholds,
            router_weighted=router_weighted,
            activation=self.activation,
            apply_router_weight_on_input=self.on_input,
        )


def fill(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def gated_block(kind: str, x: torch.Tensor) -> Block:
    """OLMoE, Mixtral, Qwen2-MoE and Qwen3-MoE: w13 and w2 as vLLM holds them."""
    from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    block: nn.Module
    if kind == "olmoe":
        block = OlmoeSparseMoeBlock(OlmoeConfig(**SIZES, intermediate_size=40, num_experts=7))
    elif kind == "olmoe-gelu":
        block = OlmoeSparseMoeBlock(OlmoeConfig(**SIZES, intermediate_size=40, num_experts=7, hidden_act="gelu"))
    elif kind == "mixtral":
        block = MixtralSparseMoeBlock(MixtralConfig(**SIZES, intermediate_size=40, num_local_experts=7))
    elif kind == "qwen2-moe":
        block = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**SIZES, moe_intermediate_size=40, num_experts=7))
    else:
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**SIZES, moe_intermediate_size=40, num_experts=7))
    fill(block)
    if kind == "qwen2-moe":
        nn.init.zeros_(block.shared_expert.down_proj.weight)  # the shared expert is not part of the definition
    _, topk_weights, topk_ids = block.gate(x)
    weights = ExpertWeights.from_w13_w2(
        block.experts.gate_up_proj.detach().clone(), block.experts.down_proj.detach().clone()
    )
    activation = "gelu" if kind == "olmoe-gelu" else "silu"
    return Block(block.experts, lambda x: block(x.unsqueeze(0)).squeeze(0), topk_weights, topk_ids, weights, activation)


def gpt_oss_block(x: torch.Tensor) -> Block:
    """gpt-oss: gate and up rows alternate, biases, clamped activation."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

    config = GptOssConfig(**SIZES, intermediate_size=40, num_local_experts=7)
    router, experts = GptOssTopKRouter(config), GptOssExperts(config)
    fill(router)
    fill(experts)
    _, topk_weights, topk_ids = router(x)
    weights = ExpertWeights.from_w13_w2(
        experts.gate_up_proj.detach().transpose(1, 2).contiguous(),
        experts.down_proj.detach().transpose(1, 2).contiguous(),
        w13_bias=experts.gate_up_proj_bias.detach(),
        w2_bias=experts.down_proj_bias.detach(),
        interleaved=True,
    )
    return Block(experts, lambda x: experts(x, topk_ids, topk_weights), topk_weights, topk_ids, weights, "swigluoai")


def llama4_block(x: torch.Tensor) -> Block:
    """Llama-4: one expert a token, its sigmoid score multiplies the expert's input."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(**{**SIZES, "num_experts_per_tok": 1}, intermediate_size=40, num_local_experts=7)
    block = Llama4TextMoe(config)
    fill(block)
    nn.init.zeros_(block.shared_expert.down_proj.weight)
    _, logits = block.router(x)
    value, topk_ids = torch.topk(logits, 1, dim=1)
    weights = ExpertWeights.from_w13_w2(
        block.experts.gate_up_proj.detach().transpose(1, 2).contiguous(),
        block.experts.down_proj.detach().transpose(1, 2).contiguous(),
    )
    return Block(block.experts, lambda x: block(x)[0], value.sigmoid(), topk_ids, weights, on_input=True)


MODELS: dict[str, Callable[[torch.Tensor], Block]] = {
    **{
        kind: lambda x, kind=kind: gated_block(kind, x)
        for kind in ("olmoe", "olmoe-gelu", "mixtral", "qwen2-moe", "qwen3-moe")
    },
    "gpt-oss": gpt_oss_block,
    "llama-4": llama4_block,
}


class Thresholded(nn.Module):
    """act(g), zero where its magnitude is below tau; ``kept`` collects the share of active neurons."""

    def __init__(self, act: nn.Module, tau: float) -> None:
        super().__init__()
        self.act, self.tau, self.kept = act, tau, []

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        a = self.act(gate)
        active = a.abs() >= self.tau
        self.kept.append(active.float().mean())
        return torch.where(active, a, 0)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_threshold_zero_is_the_dense_model(model: str, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(NUM_TOKENS, SIZES["hidden_size"])
    block = MODELS[model](x)
    torch.testing.assert_close(block.ref(x, 0.0), block.routed(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "gpt-oss"])
@torch.no_grad()
def test_threshold_is_the_model_with_a_thresholded_activation(model: str, seed: int) -> None:
    """The paper's rule: setting act(g) to zero below tau inside the Hugging Face block gives the same result."""
    torch.manual_seed(seed)
    x = torch.randn(NUM_TOKENS, SIZES["hidden_size"])
    block = MODELS[model](x)
    dense, tau = block.routed(x), 0.5
    block.experts.act_fn = thresholded = Thresholded(block.experts.act_fn, tau)
    expected = block.routed(x)
    assert 0.01 < torch.stack(thresholded.kept).mean() < 0.95  # Llama-4 counts all pairs, routed or not
    assert (expected - dense).abs().max() > 0.01
    torch.testing.assert_close(block.ref(x, tau), expected, rtol=1e-4, atol=1e-4)


def written_out(problem: Problem) -> torch.Tensor:
    """The rule of the module's docstring with Python numbers, one neuron at a time."""
    x, w = problem.hidden_states.double(), problem.weights
    hidden, inter = w.hidden_size, w.intermediate_size
    tau = problem.thresholds.expand(w.num_experts, inter)
    acts = {
        "silu": lambda g: g / (1 + math.exp(-g)),
        "gelu": lambda g: g * 0.5 * (1 + math.erf(g / math.sqrt(2))),
        "gelu_tanh": lambda g: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
        "swigluoai": lambda g: min(g, 7.0) / (1 + math.exp(-1.702 * min(g, 7.0))),
    }
    result = torch.zeros(len(x), hidden, dtype=torch.float64)
    for t in range(len(x)):
        for e, r in zip(problem.topk_ids[t].tolist(), problem.topk_weights[t].tolist(), strict=True):
            if problem.expert_map is not None:
                e = int(problem.expert_map[e]) if 0 <= e < len(problem.expert_map) else -1
            if not 0 <= e < w.num_experts or r < problem.pair_threshold:
                continue
            scaled = x[t] * r if problem.apply_router_weight_on_input else x[t]
            factor = 1.0 if problem.apply_router_weight_on_input else r
            for i in range(inter):
                g = float(scaled @ w.w13[e, i].double())
                u = float(scaled @ w.w13[e, inter + i].double())
                if w.w13_bias is not None:
                    g, u = g + float(w.w13_bias[e, i]), u + float(w.w13_bias[e, inter + i])
                a = acts[problem.activation](g)
                u = max(-7.0, min(7.0, u)) + 1 if problem.activation == "swigluoai" else u
                if abs(a) * (r if problem.router_weighted else 1.0) >= float(tau[e, i]):
                    result[t] += factor * a * u * w.w2_rows[e, i].double()
            if w.w2_bias is not None:
                result[t] += factor * w.w2_bias[e].double()
    return result


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai"])
@pytest.mark.parametrize("router_weighted", [True, False])
@pytest.mark.parametrize("routing", ["uniform", "repeated"])
def test_rule_written_out(activation: str, router_weighted: bool, routing: str, seed: int) -> None:
    for flag in (False, True):
        problem = random_problem(
            seed,
            num_tokens=5,
            num_experts=4,
            top_k=3,
            hidden_size=9,
            intermediate_size=11,
            dtype=torch.float32,
            routing=routing,
            sparsity=0.6,
            skip_pairs=0.3,
            activation=activation,
            router_weighted=router_weighted,
            biases=flag,
            remote_experts=not flag,
            invalid_ids=flag,
            apply_router_weight_on_input=flag,
        )
        result = sparse_moe_ref(**problem.arguments)
        torch.testing.assert_close(result.double(), written_out(problem), rtol=1e-4, atol=1e-5)


def small(seed: int, **changes: object) -> Problem:
    arguments: dict = {"num_tokens": 6, "num_experts": 5, "top_k": 2, "hidden_size": 16, "intermediate_size": 12}
    return random_problem(seed, **{**arguments, "dtype": torch.float32, **changes})


def test_no_tokens(seed: int) -> None:
    assert sparse_moe_ref(**small(seed, num_tokens=0).arguments).shape == (0, 16)


def test_every_expert_remote_gives_zeros(seed: int) -> None:
    problem = dataclasses.replace(small(seed), expert_map=torch.full((5,), -1, dtype=torch.int32))
    assert not sparse_moe_ref(**problem.arguments).any()


def test_every_pair_skipped_gives_zeros(seed: int) -> None:
    problem = dataclasses.replace(small(seed), pair_threshold=1.01)
    assert not sparse_moe_ref(**problem.arguments).any()


def test_pair_equal_to_the_threshold_is_kept(seed: int) -> None:
    problem = small(seed, num_tokens=1, top_k=1, sparsity=0.0)
    r = float(problem.topk_weights[0, 0])
    kept = sparse_moe_ref(**dataclasses.replace(problem, pair_threshold=r).arguments)
    assert torch.equal(kept, sparse_moe_ref(**problem.arguments))
    assert kept.any()


def test_neuron_equal_to_its_threshold_is_active() -> None:
    """x = 1 and gate weights 1 give a = silu(1) for every neuron: tau = a keeps it, the next number above does not."""
    weights = ExpertWeights(torch.ones(1, 4, 1), torch.ones(1, 2, 1))
    x, r, ids = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    a = torch.nn.functional.silu(torch.ones(()))
    tau = torch.stack([a, torch.nextafter(a, torch.tensor(2.0))])
    assert sparse_moe_ref(x, weights, r, ids, tau).item() == pytest.approx(a.item())


def test_nan_reaches_the_result(seed: int) -> None:
    problem = small(seed, sparsity=0.9)
    problem.hidden_states[3, 0] = math.nan
    result = sparse_moe_ref(**problem.arguments)
    assert result[3].isnan().all()
    assert not result[[0, 1, 2, 4, 5]].isnan().any()


def test_tensor_parallel_halves_add_up(seed: int) -> None:
    """Two ranks with half of every expert's neurons each: the sum of their results is the whole layer's."""
    problem = small(seed, sparsity=0.5)
    w13, w2_rows = problem.weights.w13, problem.weights.w2_rows
    parts = []
    for half in (slice(0, 6), slice(6, 12)):
        gate_up = torch.cat([w13[:, :12][:, half], w13[:, 12:][:, half]], dim=1)
        shard = ExpertWeights(gate_up.contiguous(), w2_rows[:, half].contiguous())
        changed = dataclasses.replace(problem, weights=shard, thresholds=problem.thresholds[:, half])
        parts.append(sparse_moe_ref(**changed.arguments))
    torch.testing.assert_close(parts[0] + parts[1], sparse_moe_ref(**problem.arguments), rtol=1e-5, atol=1e-5)


def test_result_is_written_to_out(seed: int) -> None:
    problem = small(seed)
    out = torch.full((6, 16), math.nan)
    assert sparse_moe_ref(**problem.arguments, out=out) is out
    assert torch.equal(out, sparse_moe_ref(**problem.arguments))
