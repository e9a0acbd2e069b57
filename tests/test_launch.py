"""The launch layer without a GPU: kernels are replaced by functions that compute the definition on CPU tensors.

What is tested is everything around them: choice and refusal of plans, arguments as the kernels were compiled to take
them, thresholds, scratch, warm-up, capture; and the dense path itself, which runs on the CPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import Problem, check_close, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import cutedsl_kernels.launch as layer
from cutedsl_kernels import ExpertWeights, MoEShape, Plan, plan_for, sparse_moe_ref
from cutedsl_kernels.compile import KernelSpec
from cutedsl_kernels.compile.specs import SIGNATURES, Fakes
from cutedsl_kernels.configs import FusedConfig, StagedConfig
from cutedsl_kernels.cost_model import Gpu
from cutedsl_kernels.dense import sparse_moe_dense
from cutedsl_kernels.launch import NotWarm, scratch_for, sparse_moe_cuda, threshold_table, warmup, workspace_for
from cutedsl_kernels.plan import forget_plans
from cutedsl_kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
FUSED, STAGED, DENSE = Plan("fused", FusedConfig()), Plan("staged", StagedConfig()), Plan("dense")
SIZES: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_size": 128, "intermediate_size": 64}


class Signature(Fakes):
    """What a kernel was compiled to take: tensors as (dtype, sizes, alignment), sizes being numbers or names."""

    def __init__(self) -> None:
        self.symbol = str
        self.bf16, self.f32, self.i32 = (Number(name) for name in ("bfloat16", "float32", "int32"))

    def tensor(self, dtype: Any, *shape: Any, align: int = 16) -> Any:
        return dtype.name, shape, align


@dataclass(frozen=True)
class Number:
    name: str

    def __call__(self, value: float) -> float:
        return value


def check_arguments(spec: KernelSpec, arguments: Sequence[Any]) -> None:
    """As TVM-FFI does before a launch: types, alignment, and that a size has one value wherever it stands."""
    sizes: dict[str, int] = {}
    wanted = SIGNATURES[spec.factory](Signature(), spec.keywords)
    for number, (want, got) in enumerate(zip(wanted, arguments, strict=True)):
        if isinstance(want, tuple):
            dtype, shape, align = want
            assert str(got.dtype) == f"torch.{dtype}", number
            assert got.is_contiguous(), number
            assert got.data_ptr() % align == 0, number
            fixed = tuple(
                sizes.setdefault(s, n) if isinstance(s, str) else s for s, n in zip(shape, got.shape, strict=True)
            )
            assert tuple(got.shape) == fixed, f"argument {number} of {spec.kernel} is {tuple(got.shape)}, not {fixed}"
        else:
            assert type(got) is type(want), number


def kernel_of(spec: KernelSpec) -> Callable[..., None]:
    """The definition, behind the calling convention of the kernel of ``spec``."""
    flags = spec.keywords

    def run(x: torch.Tensor, w13: torch.Tensor, w2_rows: torch.Tensor, tau: torch.Tensor, *rest: Any) -> None:
        check_arguments(spec, (x, w13, w2_rows, tau, *rest))
        ids, routing, expert_map, w13_bias, w2_bias, *others = rest
        assert (w13_bias is not None) == (w2_bias is not None) == flags["has_bias"]
        if spec.kernel == "fused_decode":
            accum, counters, out, pair_threshold, num_ctas = others
            assert accum.shape[0] >= x.shape[0]
            assert counters.shape[0] >= x.shape[0] + num_ctas // 2
            assert not accum.any()
            assert not counters.any()
            assert num_ctas == 132
        else:
            pair_threshold, *workspace, out = others
            wanted = flags["config"].workspace(
                shape_of(w13, ids), x.shape[0], flags["deterministic"], flags["weight_on_input"]
            )
            assert [(tuple(t.shape), str(t.dtype)) for t in workspace] == [
                (size, f"torch.{dtype}") for size, dtype in wanted.values()
            ]
            for tensor in workspace:
                assert tensor.data_ptr() % 16 == 0
                tensor.view(torch.uint8).fill_(255)  # NaN, -1
        assert w13_bias is None or w13_bias.data_ptr() % 16 == 0
        assert x.data_ptr() != out.data_ptr()
        assert expert_map.numel() > 0  # the kernels look up one entry whatever the id
        sparse_moe_ref(
            x,
            ExpertWeights(w13, w2_rows, w13_bias, w2_bias),
            routing,
            ids,
            tau,
            router_weighted=flags["router_weighted"],
            pair_threshold=pair_threshold,
            activation=flags["activation"],
            expert_map=expert_map if flags["has_expert_map"] else None,
            apply_router_weight_on_input=flags["weight_on_input"],
            out=out,
        )

    return run


def shape_of(w13: torch.Tensor, ids: torch.Tensor) -> MoEShape:
    return MoEShape(w13.shape[0], ids.shape[1], w13.shape[2], w13.shape[1] // 2)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[KernelSpec]]:
    """A Hopper GPU that computes on CPU tensors; lists the kernels that were asked for."""
    asked: list[KernelSpec] = []

    def compile_kernel(spec: KernelSpec) -> Callable[..., None]:
        asked.append(spec)
        return kernel_of(spec)

    monkeypatch.setattr(layer, "compile_kernel", compile_kernel)
    monkeypatch.setattr(layer, "compile_count", lambda: len(asked))
    monkeypatch.setattr(layer, "precompile", lambda specs: 0)
    monkeypatch.setattr(layer, "_is_hopper", lambda device: True)
    monkeypatch.setattr(
        layer, "plan_for", lambda shape, tokens, s, device, skip, act: plan_for(shape, tokens, s, Gpu(), skip, act)
    )
    for name in ("_scratch", "_pools", "_workspaces", "_scalar_thresholds"):
        monkeypatch.setattr(layer, name, {})
    monkeypatch.setattr(layer, "_retired", [])
    layer._kernel.cache_clear()
    yield asked
    layer._kernel.cache_clear()
    forget_plans()


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """capturing(True): torch says that a CUDA graph is being captured."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: on)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: on)

    return switch


def problem(seed: int, num_tokens: int = 5, **changes: Any) -> Problem:
    return random_problem(seed, num_tokens=num_tokens, **SIZES | changes)


# ---- dispatch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [FUSED, STAGED, DENSE, None], ids=lambda plan: plan.kind if plan else "auto")
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_every_plan_gets_its_arguments(
    compiled: list[KernelSpec], seed: int, plan: Plan | None, on_input: bool, remote: bool, biases: bool
) -> None:
    flags = {"apply_router_weight_on_input": on_input, "remote_experts": remote, "biases": biases}
    case = problem(seed, skip_pairs=0.3, invalid_ids=True, **flags)
    for _ in range(3):
        check_close(sparse_moe_cuda(**case.arguments, plan=plan), case)
    expected = {"fused": ["fused_decode"], "staged": ["staged_moe"], "dense": []}
    if plan is not None:
        assert [spec.kernel for spec in compiled] == expected[plan.kind]


@pytest.mark.parametrize("plan", [FUSED, STAGED, DENSE], ids=lambda plan: plan.kind)
def test_awkward_tensors_are_brought_into_shape(compiled: list[KernelSpec], seed: int, plan: Plan) -> None:
    case = problem(seed, ids_dtype=torch.int64, remote_experts=True)
    case = replace(
        case,
        hidden_states=torch.cat([torch.zeros(1).bfloat16(), case.hidden_states.flatten()])[1:].view(5, 128),
        topk_weights=torch.stack([case.topk_weights] * 2, 1)[:, 0],
        topk_ids=torch.stack([case.topk_ids] * 2, 1)[:, 0],
        thresholds=case.thresholds.double(),
        expert_map=case.expert_map.long() if case.expert_map is not None else None,
    )
    assert case.hidden_states.data_ptr() % 16
    assert not case.topk_ids.is_contiguous()
    check_close(sparse_moe_cuda(**case.arguments, plan=plan), case)


@pytest.mark.parametrize("plan", [FUSED, STAGED, DENSE], ids=lambda plan: plan.kind)
def test_an_empty_expert_map_knows_no_expert(compiled: list[KernelSpec], seed: int, plan: Plan) -> None:
    case = problem(seed)
    empty = torch.zeros(0, dtype=torch.int64)
    assert not sparse_moe_cuda(**{**case.arguments, "expert_map": empty}, plan=plan).any()


@pytest.mark.parametrize("plan", [FUSED, STAGED, DENSE], ids=lambda plan: plan.kind)
@pytest.mark.parametrize("kind", ["fresh", "strided", "misaligned", "input"])
def test_out_is_written_whatever_its_layout(compiled: list[KernelSpec], seed: int, plan: Plan, kind: str) -> None:
    case = problem(seed)
    nan = torch.full((3 * 5 * 128 + 1,), float("nan")).bfloat16()
    out = {
        "fresh": nan[: 5 * 128].view(5, 128),
        "strided": nan[: 10 * 128].view(5, 256)[:, :128],
        "misaligned": nan[1 : 5 * 128 + 1].view(5, 128),
        "input": case.hidden_states.clone(),
    }[kind]
    arguments = case.arguments | ({"hidden_states": out} if kind == "input" else {})
    assert sparse_moe_cuda(**arguments, plan=plan, out=out) is out
    check_close(out, case)


def test_no_tokens(compiled: list[KernelSpec]) -> None:
    case = problem(0, num_tokens=0)
    assert sparse_moe_cuda(**case.arguments, plan=FUSED).shape == (0, 128)
    assert sparse_moe_cuda(**case.arguments, plan=FUSED, out=case.hidden_states) is case.hidden_states
    assert compiled == []


@pytest.mark.parametrize(
    ("plan", "changes", "reason"),
    [
        (Plan("cpu"), {}, "tensors on the CPU"),
        (FUSED, {"num_tokens": 129}, "exceed max_pairs 256"),
        (FUSED, {"hidden_size": 96}, "not a multiple of 64"),
    ],
)
def test_plans_that_cannot_run_say_why(
    compiled: list[KernelSpec], plan: Plan, changes: dict[str, Any], reason: str
) -> None:
    case = problem(0, **changes)
    with pytest.raises(ValueError, match=reason):
        sparse_moe_cuda(**case.arguments, plan=plan)


@pytest.mark.parametrize("missing", [False, True])
def test_biases_that_no_kernel_takes_run_dense(compiled: list[KernelSpec], seed: int, missing: bool) -> None:
    case = problem(seed, biases=True, activation="swigluoai")
    assert case.weights.w2_bias is not None
    case = replace(case, weights=replace(case.weights, w2_bias=None if missing else case.weights.w2_bias.float()))
    check_close(sparse_moe_cuda(**case.arguments), case)
    for plan in (FUSED, STAGED):
        with pytest.raises(ValueError, match="w13_bias and w2_bias in bfloat16 or neither, these are"):
            sparse_moe_cuda(**case.arguments, plan=plan)
    assert compiled == []


def test_biased_layers_choose_kernels_by_themselves(compiled: list[KernelSpec], seed: int) -> None:
    case = problem(seed, biases=True, activation="swigluoai")
    check_close(sparse_moe_cuda(**case.arguments), case)
    assert [spec.keywords["has_bias"] for spec in compiled] == [True]


def test_biases_that_start_anywhere_are_copied(compiled: list[KernelSpec], seed: int) -> None:
    case = problem(seed, biases=True, activation="swigluoai")
    assert case.weights.w2_bias is not None
    bias = torch.cat([torch.zeros(1).bfloat16(), case.weights.w2_bias.flatten()])[1:].view(8, 128)
    case = replace(case, weights=replace(case.weights, w2_bias=bias))
    for plan in (FUSED, STAGED):
        check_close(sparse_moe_cuda(**case.arguments, plan=plan), case)
    assert [spec.keywords["has_bias"] for spec in compiled] == [True, True]


def test_other_gpus_take_the_dense_path(compiled: list[KernelSpec], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "_is_hopper", lambda device: False)
    case = problem(seed)
    check_close(sparse_moe_cuda(**case.arguments), case)
    with pytest.raises(ValueError, match="need an sm_90 GPU"):
        sparse_moe_cuda(**case.arguments, plan=FUSED)
    assert compiled == []


def test_only_bf16(compiled: list[KernelSpec]) -> None:
    with pytest.raises(TypeError, match=r"bfloat16.* got torch\.float16"):
        sparse_moe_cuda(**problem(0, dtype=torch.float16).arguments)


def test_deterministic_algorithms(compiled: list[KernelSpec], seed: int) -> None:
    case = problem(seed)
    torch.use_deterministic_algorithms(True)
    try:
        check_close(sparse_moe_cuda(**case.arguments), case)
        with pytest.raises(ValueError, match="no fixed order"):
            sparse_moe_cuda(**case.arguments, plan=FUSED)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [(spec.kernel, spec.keywords["deterministic"]) for spec in compiled] == [("staged_moe", True)]


# ---- thresholds and scratch ------------------------------------------------------------------------------------------


def test_thresholds(compiled: list[KernelSpec]) -> None:
    shape = MoEShape(4, 2, 64, 16)
    full = torch.rand(4, 16)
    assert threshold_table(full, shape, CPU) is full
    assert threshold_table(0.5, shape, CPU) is threshold_table(0.5, shape, CPU)
    assert torch.equal(threshold_table(0.5, shape, CPU), torch.full((4, 16), 0.5))
    assert threshold_table(0.5, replace(shape, num_experts=3), CPU).shape == (3, 16)
    for given_as in (full[:, :1], full[0], full.double(), full.t().contiguous().t()):
        table = threshold_table(given_as, shape, CPU)
        assert table.is_contiguous()
        assert torch.equal(table, given_as.float().expand(4, 16))
    with pytest.raises(ValueError, match="thresholds must be"):
        threshold_table(torch.rand(5), shape, CPU)
    for i in range(2 * layer.REMEMBERED_SCALARS):
        threshold_table(float(i), shape, CPU)
    assert len(layer._scalar_thresholds) <= layer.REMEMBERED_SCALARS


def test_tables_are_fp32_whatever_the_default_dtype(compiled: list[KernelSpec]) -> None:
    """vLLM loads models with bfloat16 as the default: the kernels refused such thresholds, and all ran dense."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert threshold_table(0.25, MoEShape(4, 2, 64, 16), CPU).dtype == torch.float32
        assert scratch_for(CPU, 3, 64).accum.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_scratch_is_made_once_and_never_freed(compiled: list[KernelSpec]) -> None:
    small = scratch_for(CPU, 3, 64)
    assert scratch_for(CPU, 64, 64) is small
    large = scratch_for(CPU, 65, 64)
    assert large.accum.shape == (128, 64)
    assert scratch_for(CPU, 1, 64) is large
    assert layer._retired == [small]
    assert scratch_for(CPU, 1, 128).accum.shape == (64, 128)


def test_workspaces_share_one_pool(compiled: list[KernelSpec]) -> None:
    shape, config = MoEShape(8, 2, 128, 64), StagedConfig()
    first = workspace_for(CPU, config, shape, 32, False, False)
    assert workspace_for(CPU, config, shape, 32, False, False) is first
    smaller = workspace_for(CPU, config, shape, 8, False, False)
    assert smaller[0].data_ptr() == first[0].data_ptr()
    ends = [t.data_ptr() + t.numel() * t.element_size() for t in first]
    assert all(end <= t.data_ptr() for end, t in zip(ends, first[1:], strict=False))
    (pool,) = layer._pools.values()
    larger = workspace_for(CPU, config, shape, 500, True, True)
    assert layer._retired == [pool]
    assert workspace_for(CPU, config, shape, 8, False, False)[0].data_ptr() == larger[0].data_ptr()


# ---- capture and warm-up ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [FUSED, STAGED], ids=lambda plan: plan.kind)
def test_capture_needs_a_warm_up(
    compiled: list[KernelSpec], capturing: Callable[[bool], None], seed: int, plan: Plan
) -> None:
    case = problem(seed)
    capturing(True)
    with pytest.raises(NotWarm, match=r"kernel to load.*warmup"):
        sparse_moe_cuda(**case.arguments, plan=plan)
    capturing(False)
    sparse_moe_cuda(**case.arguments, plan=plan)
    capturing(True)
    monster = problem(seed, num_tokens=100)
    check_close(sparse_moe_cuda(**case.arguments, plan=plan), case)
    with pytest.raises(NotWarm, match=r"scratch memory.*warmup"):
        sparse_moe_cuda(**monster.arguments, plan=plan)


def test_scalars_seen_first_in_a_capture_are_not_kept(
    compiled: list[KernelSpec], capturing: Callable[[bool], None]
) -> None:
    capturing(True)
    threshold_table(0.25, MoEShape(4, 2, 64, 16), CPU)
    assert layer._scalar_thresholds == {}


def test_after_a_warm_up_nothing_compiles(
    compiled: list[KernelSpec], capturing: Callable[[bool], None], seed: int
) -> None:
    case, buckets = problem(seed), (1, 5, 64, 100)
    first = warmup(case.weights, 2, buckets, plans=[FUSED, STAGED])
    assert first == len(compiled) == 2
    assert warmup(case.weights, 2, buckets, plans=[FUSED, STAGED]) == 0
    capturing(True)
    for num_tokens in buckets:
        same_layer = problem(seed, num_tokens)
        for plan in (FUSED, STAGED):
            check_close(sparse_moe_cuda(**same_layer.arguments, plan=plan), same_layer)
    assert len(compiled) == 2


def test_a_warm_up_compiles_side_by_side_what_it_launches(
    compiled: list[KernelSpec], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    ahead: list[KernelSpec] = []
    monkeypatch.setattr(layer, "precompile", lambda specs: ahead.extend(specs) or 0)
    warmup(problem(seed).weights, 2, (1, 5), plans=[FUSED, STAGED], router_weighted=False)
    assert set(ahead) == set(compiled)
    assert len(compiled) == 2


def test_warm_up_of_chosen_plans_covers_the_default_call(
    compiled: list[KernelSpec], capturing: Callable[[bool], None], seed: int
) -> None:
    case = problem(seed)
    warmup(case.weights, 2, [5])
    before = len(compiled)
    capturing(True)
    check_close(sparse_moe_cuda(**case.arguments), case)
    assert len(compiled) == before


def test_plans_that_cannot_run_a_bucket_are_left_out_of_a_warm_up(compiled: list[KernelSpec]) -> None:
    assert warmup(problem(0).weights, 2, [1000], plans=[FUSED]) == 0


# ---- the dense path --------------------------------------------------------------------------------------------------


@st.composite
def dense_problems(draw: st.DrawFn) -> dict[str, Any]:
    num_experts = draw(st.integers(1, 9))
    flags = ("router_weighted", "biases", "remote_experts", "invalid_ids", "apply_router_weight_on_input")
    return {
        "seed": draw(st.integers(0, 2**31)),
        "num_tokens": draw(st.integers(1, 24)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, min(num_experts, 6))),
        "hidden_size": draw(st.sampled_from([32, 64, 96])),
        "intermediate_size": draw(st.sampled_from([24, 40, 64])),
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float32])),
        "routing": draw(st.sampled_from(["uniform", "zipf", "one-expert", "repeated"])),
        "sparsity": draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        "skip_pairs": draw(st.sampled_from([0.0, 0.35])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        **{name: draw(st.booleans()) for name in flags},
    }


@settings(max_examples=60, deadline=None)
@given(arguments=dense_problems())
def test_dense_matches_the_definition(arguments: dict[str, Any]) -> None:
    case = random_problem(**arguments)
    check_close(sparse_moe_dense(**case.arguments), case)


def test_dense_in_several_pieces(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutedsl_kernels.dense.ROWS_AT_ONCE", 7)
    case = problem(seed, num_tokens=20, sparsity=0.7)
    check_close(sparse_moe_dense(**case.arguments), case)


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_dense_takes_a_number(seed: int, threshold: float) -> None:
    case = problem(seed, sparsity=0.0, dtype=torch.float32)
    arguments = case.arguments | {"thresholds": threshold}
    torch.testing.assert_close(sparse_moe_dense(**arguments), sparse_moe_ref(**arguments), rtol=1e-4, atol=1e-5)
