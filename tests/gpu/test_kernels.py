"""The kernels on an sm_90 GPU: numbers, CUDA graphs, streams, determinism, host time, memory and race checks.

python -m pytest -m gpu tests/gpu/test_kernels.py       (the package on PYTHONPATH is enough, nothing need be installed)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Problem, check_close, random_problem, set_thresholds

from cutedsl_kernels import KNOWN_MODELS, ExpertWeights, Plan, plan_for, sparse_moe
from cutedsl_kernels import launch as layer
from cutedsl_kernels.compile import compile_count
from cutedsl_kernels.compile.dsl import has_tvm_ffi
from cutedsl_kernels.configs import FusedConfig, StagedConfig, illegal_reason
from cutedsl_kernels.launch import warmup

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")]

SMALL: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_size": 512, "intermediate_size": 136}
PLANS = {
    "fused": Plan("fused", FusedConfig()),
    "fused-added": Plan("fused", FusedConfig(keep_sums=0)),
    "staged": Plan("staged", StagedConfig()),
    "staged-mma": Plan("staged", StagedConfig(wgmma=0)),
    "dense": Plan("dense"),
}
by_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def on_gpu(seed: int, num_tokens: int, **changes: Any) -> Problem:
    return random_problem(seed, num_tokens=num_tokens, **SMALL | changes).to("cuda")


def poisoned(case: Problem) -> torch.Tensor:
    return torch.full_like(case.hidden_states, float("nan"))


def check_scratch_is_clean() -> None:
    torch.cuda.synchronize()
    for scratch in layer._scratch.values():
        assert not scratch.accum.any(), "the fp32 sums are not zero after a launch"
        assert not scratch.counters.any(), "the counters are not zero after a launch"


# ---- numbers ---------------------------------------------------------------------------------------------------------


@by_plan
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity": 0.0},
        {"sparsity": 1.0},
        {"sparsity": 0.5, "activation": "gelu"},
        {"activation": "gelu_tanh", "router_weighted": False},
        {"activation": "swigluoai"},
        {"activation": "swigluoai", "biases": True},
        {"activation": "swigluoai", "biases": True, "sparsity": 0.0, "routing": "zipf"},
        {"activation": "swigluoai", "biases": True, "sparsity": 1.0, "skip_pairs": 0.35},
        {"biases": True, "remote_experts": True, "invalid_ids": True, "router_weighted": False},
        {"biases": True, "top_k": 1, "apply_router_weight_on_input": True, "router_weighted": False},
        {"biases": True, "activation": "swigluoai", "intermediate_size": 200, "hidden_size": 64, "skip_pairs": 0.9},
        {"skip_pairs": 0.35, "routing": "zipf"},
        {"skip_pairs": 0.9},
        {"routing": "one-expert"},
        {"routing": "repeated", "invalid_ids": True},
        {"remote_experts": True, "invalid_ids": True, "ids_dtype": torch.int64},
        {"top_k": 1, "apply_router_weight_on_input": True, "router_weighted": False},
        {"intermediate_size": 64, "hidden_size": 1024},
        {"intermediate_size": 2048, "hidden_size": 64},  # items enough for neighbours to share theirs (fused)
        {"intermediate_size": 200, "hidden_size": 64},
        {"num_experts": 1, "top_k": 1},
    ],
    ids=str,
)
def test_small_layers(plan: Plan, changes: dict[str, Any], seed: int) -> None:
    for num_tokens in (1, 3, 17, 40):
        case = on_gpu(seed + num_tokens, num_tokens, **changes)
        if reason := illegal_reason(plan, case.weights.shape(case.topk_ids.shape[1]), num_tokens, case.activation):
            pytest.skip(f"{plan.kind} is not written for this layer: {reason}")
        check_close(sparse_moe(**case.arguments, plan=plan, out=poisoned(case)), case)
    check_scratch_is_clean()


@pytest.mark.parametrize("kind", ["fused", "staged"])
@pytest.mark.parametrize("num_tokens", [129, 500])
def test_larger_batches(kind: str, num_tokens: int, seed: int) -> None:
    case = on_gpu(seed, num_tokens)
    plan = Plan("staged", StagedConfig()) if kind == "staged" else Plan("fused", FusedConfig(max_pairs=1024))
    check_close(sparse_moe(**case.arguments, plan=plan, out=poisoned(case)), case)
    check_scratch_is_clean()


STAGED_FIELDS: dict[str, tuple[int, ...]] = {
    "token_block": (32, 64),
    "row_stages": (2, 6),
    "row_atoms": (1,),
    "row_groups": (2,),
    "up_rows": (16, 128),
    "down_stages": (2, 6),
    "down_atoms": (1, 4),
    "down_tiles": (1, 3),
    "down_splits": (3,),
    "overlap": (0, 1),
}


@pytest.mark.parametrize("wgmma", [0, 1])
@pytest.mark.parametrize(("field", "value"), [(field, n) for field, values in STAGED_FIELDS.items() for n in values])
def test_fields_of_a_staged_plan(field: str, value: int, wgmma: int, seed: int) -> None:
    config = replace(StagedConfig(wgmma=wgmma), **{field: value})
    for num_tokens, routing in ((40, "zipf"), (129, "uniform")):
        case = on_gpu(seed + num_tokens, num_tokens, routing=routing)
        check_close(sparse_moe(**case.arguments, plan=Plan("staged", config), out=poisoned(case)), case)
    check_scratch_is_clean()


def full_problem(name: str, num_tokens: int, seed: int, sparsity: float) -> Problem:
    """A layer of a known model, random weights made on the GPU, thresholds that no rounding of the gate crosses."""
    model = KNOWN_MODELS[name]
    shape = model.shape
    experts, inter, hidden = shape.num_experts, shape.intermediate_size, shape.hidden_size
    torch.manual_seed(seed)

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16).mul_(scale)

    weights = ExpertWeights(
        randn(experts, 2 * inter, hidden, scale=hidden**-0.5),
        randn(experts, inter, hidden, scale=inter**-0.5),
        randn(experts, 2 * inter, scale=0.5) if model.biases else None,
        randn(experts, hidden, scale=0.5) if model.biases else None,
    )
    x = randn(num_tokens, hidden)
    ids = torch.rand(num_tokens, experts, device="cuda").topk(shape.top_k).indices.int()
    routing = torch.softmax(torch.randn(num_tokens, shape.top_k, device="cuda"), dim=1)
    thresholds = torch.zeros(experts, inter, device="cuda")
    case = Problem(x, weights, routing, ids, thresholds, activation=model.activation)
    if sparsity:
        set_thresholds(case, torch.Generator("cuda").manual_seed(seed), sparsity)
    return case


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models(name: str, seed: int) -> None:
    """Full shapes, every plan kind that can run, and the plan that plan_for chooses."""
    shape, wrong = KNOWN_MODELS[name].shape, []
    for num_tokens, sparsity in ((1, 0.85), (8, 0.85), (32, 0.0), (64, 0.9)):
        case = full_problem(name, num_tokens, seed, sparsity)
        chosen = plan_for(shape, num_tokens, 0.85, "cuda", 0.0, case.activation)
        for plan in dict.fromkeys([chosen, *PLANS.values()]):
            if illegal_reason(plan, shape, num_tokens, case.activation) is None:
                try:
                    check_close(sparse_moe(**case.arguments, plan=plan, out=poisoned(case)), case)
                except AssertionError as error:
                    wrong.append(f"T={num_tokens} s={sparsity} {plan}: {error}")
        del case
        torch.cuda.empty_cache()
    assert not wrong, "\n".join(wrong)
    check_scratch_is_clean()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt-oss-20b", FusedConfig(gate_stages=1, row_stages=3, keep_sums=0)),
        ("olmoe-1b-7b", FusedConfig()),
    ],
    ids=["gpt-oss-20b", "olmoe-1b-7b"],
)
def test_every_launch_is_right(name: str, config: FusedConfig, seed: int) -> None:
    """3000 launches on the same inputs. See RowRing.release: up to one of ten was wrong once."""
    case, plan = full_problem(name, 8, seed, 0.85), Plan("fused", config)
    check_close(sparse_moe(**case.arguments, plan=plan, out=poisoned(case)), case)
    first = torch.stack([sparse_moe(**case.arguments, plan=plan).float() for _ in range(15)])
    usual = first.median(0).values
    # From launch to launch only the order of additions differs; one wrong neuron is far more than that.
    allowed = 12 * ((first - usual).norm(dim=2).median() + 1e-4 * usual.norm(dim=1).median())
    for _ in range(15):
        found = torch.stack([sparse_moe(**case.arguments, plan=plan, out=poisoned(case)) for _ in range(200)]).float()
        assert ((found - usual).norm(dim=2) <= allowed).all()


# ---- CUDA graphs, streams --------------------------------------------------------------------------------------------


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


@pytest.mark.parametrize("name", ["fused", "staged"])
@pytest.mark.parametrize("num_tokens", [1, 16, 100])
def test_a_graph_follows_new_routings(name: str, num_tokens: int, seed: int) -> None:
    """Captured once, replayed with other tokens, experts, weights and thresholds in the same buffers."""
    case, out = on_gpu(seed, num_tokens), poisoned(on_gpu(seed, num_tokens))
    graph = capture(lambda: sparse_moe(**case.arguments, plan=PLANS[name], out=out))
    compiled = compile_count()
    variations: list[dict[str, Any]] = [
        {},
        {"sparsity": 0.0},
        {"sparsity": 1.0},
        {"routing": "one-expert"},
        {"invalid_ids": True},
        {"sparsity": 0.9},
    ]
    for i, changes in enumerate(variations):
        new = on_gpu(seed + i + 1, num_tokens, **changes)
        for source, target in (
            (new.hidden_states, case.hidden_states),
            (new.weights.w13, case.weights.w13),
            (new.weights.w2_rows, case.weights.w2_rows),
            (new.topk_ids, case.topk_ids),
            (new.topk_weights, case.topk_weights),
            (new.thresholds, case.thresholds),
        ):
            target.copy_(source)
        out.fill_(float("nan"))
        graph.replay()
        graph.replay()
        check_close(out, new)
    check_scratch_is_clean()
    assert compile_count() == compiled


def test_capture_without_warm_up_is_refused(seed: int) -> None:
    case = on_gpu(seed, 3, intermediate_size=72)
    sparse_moe(**case.arguments, plan=Plan("dense"))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(layer.NotWarm), torch.cuda.graph(graph):
        sparse_moe(**case.arguments, plan=PLANS["fused"])
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["fused", "staged"])
def test_two_streams(name: str, seed: int) -> None:
    """Two layers at the same time: every stream has its own scratch."""
    cases = [on_gpu(seed + i, 20, sparsity=0.5) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in cases]
    outs = [poisoned(case) for case in cases]
    torch.cuda.synchronize()
    for _ in range(50):
        for case, stream, out in zip(cases, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                sparse_moe(**case.arguments, plan=PLANS[name], out=out)
    torch.cuda.synchronize()
    for case, out in zip(cases, outs, strict=True):
        check_close(out, case)
    check_scratch_is_clean()


def test_after_a_warm_up_nothing_compiles(seed: int) -> None:
    case, buckets = on_gpu(seed, 1), (1, 8, 16, 64)
    plans = [PLANS["fused"], PLANS["staged"]]
    warmup(case.weights, 2, buckets, plans=plans)
    compiled = compile_count()
    assert warmup(case.weights, 2, buckets, plans=plans) == 0
    for num_tokens in buckets:
        same = on_gpu(seed, num_tokens)
        for plan in plans:
            check_close(sparse_moe(**same.arguments, plan=plan), same)
    assert compile_count() == compiled


# ---- determinism, host time ------------------------------------------------------------------------------------------


def test_deterministic_staged_path_is_bitwise_repeatable(seed: int) -> None:
    case = on_gpu(seed, 64, sparsity=0.5, routing="zipf")
    torch.use_deterministic_algorithms(True)
    try:
        first = sparse_moe(**case.arguments)
        check_close(first, case)
        for _ in range(20):
            assert torch.equal(sparse_moe(**case.arguments), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not has_tvm_ffi(), reason="apache-tvm-ffi is not installed: tensors go through DLPack")
def test_launch_costs_at_most_six_microseconds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host time of the launch function alone; for the record (printed) of sparse_moe as a whole, and of torch."""
    case = on_gpu(seed, 1)
    taken: list[float] = []
    real = layer._kernel

    def timed_kernel(*key: Any) -> Callable[..., Any]:
        launch = real(*key)

        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            launch(*arguments)
            taken.append(time.perf_counter() - start)

        return timed

    monkeypatch.setattr(layer, "_kernel", timed_kernel)
    whole = []
    for i in range(400):
        start = time.perf_counter()
        sparse_moe(**case.arguments, plan=PLANS["fused"])
        whole.append(time.perf_counter() - start)
        if i % 100 == 99:  # as in a server, the host runs ahead; its queue must not fill up
            torch.cuda.synchronize()
    torch_times = []  # of one operation of torch, to know the host by
    for _ in range(400):
        start = time.perf_counter()
        case.hidden_states.add_(0)
        torch_times.append(time.perf_counter() - start)
    launch_us, whole_us, torch_us = (1e6 * sorted(times)[len(times) // 2] for times in (taken, whole, torch_times))
    print(f"median host time: launch {launch_us:.1f} us, sparse_moe {whole_us:.1f} us, torch's add_ {torch_us:.1f} us")
    assert launch_us <= 6.0


# ---- memory ----------------------------------------------------------------------------------------------------------


def requested_bytes(when: str) -> int:
    """What was asked of torch's allocator ("current" or "peak"); it may give up to 1 MiB more, from a block it had."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


@pytest.mark.parametrize("interleaved", [False, True])
def test_relaying_takes_one_expert_more(interleaved: bool) -> None:
    experts, hidden, inter = 16, 1024, 512
    w13 = torch.randn(experts, 2 * inter, hidden, device="cuda").bfloat16()
    w2 = torch.randn(experts, hidden, inter, device="cuda").bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = requested_bytes("current")
    weights = ExpertWeights.from_w13_w2(w13, w2, interleaved=interleaved)
    one_expert = (w13 if interleaved else w2)[0].nbytes
    assert requested_bytes("peak") - before <= one_expert
    assert requested_bytes("current") == before
    assert weights.w2_rows.data_ptr() == w2.data_ptr()


@pytest.mark.parametrize("name", ["fused", "staged"])
def test_warm_launches_allocate_nothing(name: str, seed: int) -> None:
    case, out = on_gpu(seed, 16), poisoned(on_gpu(seed, 16))
    sparse_moe(**case.arguments, plan=PLANS[name], out=out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        sparse_moe(**case.arguments, plan=PLANS[name], out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).resolve().parents[2]
    folders = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            "99",
            sys.executable,
            str(Path(__file__).with_name("sanitize.py")),
            *(["--every-lane-arrives"] if tool == "racecheck" else []),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "6 layers checked" in result.stdout
