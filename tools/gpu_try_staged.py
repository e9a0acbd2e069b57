"""Tries the staged path on an sm_90 GPU: numbers against the definition, then times. One file, no installation.

    python tools/gpu_try_staged.py                      everything, about 5 minutes
    python tools/gpu_try_staged.py --only checks        numbers only
    python tools/gpu_try_staged.py --only times --tokens 64 128 --sparsity 0.845 --stages
    python tools/gpu_try_staged.py --variant wgmma=1,token_block=16,row_stages=8 --variant wgmma=0

Needs torch with CUDA and the CuTe DSL on PYTHONPATH (apache-tvm-ffi if it is there); run in the repository's root.
Every case that fails prints one line and the rest goes on. Times: CUDA graph of 24 calls on different inputs,
median of 12 replays. Read GB/s counts weight rows that the call had to read, each (expert, token block) once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
import time
import traceback
import types
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def import_without_installation() -> None:
    """Makes the package importable without its optional dependencies: only the modules named below are loaded."""
    for name in ("cutedsl_kernels", "cutedsl_kernels.compile"):
        module = types.ModuleType(name)
        module.__path__ = [str(ROOT / name.replace(".", "/"))]
        sys.modules[name] = module
    import cutedsl_kernels as package
    from cutedsl_kernels.reference import sparse_moe_ref
    from cutedsl_kernels.weights import ExpertWeights

    package.sparse_moe_ref, package.ExpertWeights = sparse_moe_ref, ExpertWeights  # type: ignore[attr-defined]


import_without_installation()

from cutedsl_kernels.compile import dsl  # noqa: E402
from cutedsl_kernels.compile.specs import staged_spec  # noqa: E402
from cutedsl_kernels.configs import Plan, StagedConfig, illegal_reason  # noqa: E402
from cutedsl_kernels.shapes import MoEShape  # noqa: E402
from tests.helpers import check_close, random_problem  # noqa: E402

DTYPES = {"int32": torch.int32, "float32": torch.float32, "bfloat16": torch.bfloat16}
STAGES = ("RouteSort", "GateCompact", "SparseUp", "SparseDown", "Combine")
# Triton fused_experts of vLLM 0.26.0, default config, qwen3.5-35b-a3b's shape, an H200, microseconds (November 2026)
DENSE_US = {32: 260, 64: 343, 128: 403, 256: 421, 512: 432}
VARIANTS = (
    "deterministic=0",
    "row_stages=6",
    "up_rows=32",
    "up_rows=32,down_stages=3",
    "row_stages=3,up_rows=32,down_stages=3",
    "row_groups=2",
    "row_stages=3,row_groups=2",
    "row_stages=3,row_groups=2,up_rows=64,down_stages=3",
    "wgmma=0",
    "deterministic=1",
    "token_block=32",
    "token_block=32,row_groups=2",
    "token_block=64,row_stages=3,row_groups=2,down_stages=3",
)

_functions: dict[Any, Any] = {}


def compiled(spec: Any) -> Any:
    if spec not in _functions:
        folder = pathlib.Path(tempfile.mkdtemp())
        dsl.compile_object(spec, folder / "kernel.o")
        _functions[spec] = dsl.load_object(folder / "kernel.o", spec)
    return _functions[spec]


def parse_variant(text: str) -> tuple[StagedConfig, bool]:
    values = {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
    deterministic = bool(values.pop("deterministic", 0))
    return dataclasses.replace(StagedConfig(), **values), deterministic


class Staged:
    """The compiled path for one shape and variant; call() launches it on the current stream."""

    def __init__(self, shape: MoEShape, variant: str, **flags: Any):
        self.shape, self.flags = shape, flags
        self.config, self.deterministic = parse_variant(variant)
        reason = illegal_reason(Plan("staged", self.config), shape)
        if reason:
            raise ValueError(reason)
        spec = staged_spec(shape, self.config, deterministic=self.deterministic, **flags)
        self.function = compiled(spec)
        self.buffers: dict[int, list[torch.Tensor]] = {}

    def workspace(self, num_tokens: int, poison: bool = False) -> list[torch.Tensor]:
        if poison or num_tokens not in self.buffers:
            on_input = self.flags.get("weight_on_input", False)
            sizes = self.config.workspace(self.shape, num_tokens, self.deterministic, on_input)
            self.buffers[num_tokens] = [
                torch.full(size, float("nan") if "float" in dtype else 0x7FFFFFFF, dtype=DTYPES[dtype], device="cuda")
                for size, dtype in sizes.values()
            ]
        return self.buffers[num_tokens]

    def call(self, x, w13, w2_rows, thresholds, ids, routing, expert_map, rho, out, poison=False):
        workspace = self.workspace(x.shape[0], poison)
        self.function(x, w13, w2_rows, thresholds, ids, routing, expert_map, None, None, float(rho), *workspace, out)


# ---- numbers

CHECKS: tuple[dict[str, Any], ...] = (
    {"num_tokens": 9, "num_experts": 4, "top_k": 2, "hidden_size": 256, "intermediate_size": 136, "sparsity": 0.5},
    {"num_tokens": 40, "num_experts": 4, "top_k": 2, "hidden_size": 512, "intermediate_size": 200, "sparsity": 0.9},
    {
        "num_tokens": 33,
        "num_experts": 8,
        "top_k": 4,
        "hidden_size": 256,
        "intermediate_size": 64,
        "sparsity": 0.8,
        "skip_pairs": 0.4,
    },
    {
        "num_tokens": 70,
        "num_experts": 4,
        "top_k": 2,
        "hidden_size": 256,
        "intermediate_size": 192,
        "routing": "one-expert",
    },
    {"num_tokens": 5, "num_experts": 4, "top_k": 2, "hidden_size": 256, "intermediate_size": 128, "sparsity": 1.0},
    {"num_tokens": 64, "num_experts": 8, "top_k": 2, "hidden_size": 512, "intermediate_size": 320, "sparsity": 0.0},
    {
        "num_tokens": 17,
        "num_experts": 4,
        "top_k": 3,
        "hidden_size": 256,
        "intermediate_size": 72,
        "remote_experts": True,
    },
    {
        "num_tokens": 24,
        "num_experts": 4,
        "top_k": 1,
        "hidden_size": 256,
        "intermediate_size": 256,
        "activation": "gelu",
    },
    {
        "num_tokens": 200,
        "num_experts": 16,
        "top_k": 8,
        "hidden_size": 2048,
        "intermediate_size": 512,
        "sparsity": 0.845,
    },
)


@functools.cache
def problem_of(number: int, on_input: bool) -> Any:
    return random_problem(number, apply_router_weight_on_input=on_input, **CHECKS[number])


def run_checks(variants: list[str]) -> None:
    print(f"\n== numbers against the definition ({len(CHECKS)} problems; tolerance of tests/helpers.py)")
    for variant in variants:
        for number in range(len(CHECKS)):
            for on_input in (False, True) if number == 1 else (False,):
                label = f"{variant:60s} problem {number} {'weight on input' if on_input else ''}"
                try:
                    message = check_one(problem_of(number, on_input), variant)
                except Exception as error:
                    message = f"ERROR {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                    if "illegal memory" in message or "unspecified launch" in message:
                        raise
                if not message.startswith("ok") or number == len(CHECKS) - 1:
                    print(f"{label} {message}", flush=True)
    print("(problems not listed passed)")


def check_one(problem: Any, variant: str) -> str:
    weights = problem.weights
    shape = MoEShape(weights.num_experts, problem.topk_ids.shape[1], weights.hidden_size, weights.intermediate_size)
    staged = Staged(
        shape,
        variant,
        activation=problem.activation,
        router_weighted=problem.router_weighted,
        weight_on_input=problem.apply_router_weight_on_input,
        has_expert_map=problem.expert_map is not None,
    )
    device = problem.to("cuda")
    expert_map = (
        device.expert_map if device.expert_map is not None else torch.zeros(1, dtype=torch.int32, device="cuda")
    )
    thresholds = device.thresholds.expand(shape.num_experts, shape.intermediate_size).contiguous()
    results = []
    for _ in range(3):
        out = torch.full_like(device.hidden_states, float("nan"))
        staged.call(
            device.hidden_states,
            device.weights.w13,
            device.weights.w2_rows,
            thresholds,
            device.topk_ids.int(),
            device.topk_weights,
            expert_map,
            device.pair_threshold,
            out,
            poison=True,
        )
        torch.cuda.synchronize()
        results.append(out)
    try:
        check_close(results[0], device)
    except AssertionError as error:
        return f"WRONG {str(error).splitlines()[0][:200]}"
    if staged.deterministic and not all(torch.equal(results[0], other) for other in results[1:]):
        return "NOT REPEATABLE"
    return "ok"


# ---- times


class Bench:
    """Weights and rotating inputs of one shape."""

    def __init__(self, shape: MoEShape, weight_on_input: bool = False):
        self.shape, self.weight_on_input = shape, weight_on_input
        generator = torch.Generator("cuda").manual_seed(1)
        experts, inter, width = shape.num_experts, shape.intermediate_size, shape.hidden_size
        self.w13 = torch.empty(experts, 2 * inter, width, dtype=torch.bfloat16, device="cuda")
        self.w2 = torch.empty(experts, inter, width, dtype=torch.bfloat16, device="cuda")
        for e in range(experts):
            self.w13[e].normal_(generator=generator).mul_(width**-0.5)
            self.w2[e].normal_(generator=generator).mul_(inter**-0.5)
        self.expert_map = torch.zeros(1, dtype=torch.int32, device="cuda")

    def inputs(self, num_tokens: int, sparsity: float, count: int = 24) -> list[tuple[torch.Tensor, ...]]:
        shape, result = self.shape, []
        generator = torch.Generator("cuda").manual_seed(num_tokens)
        gate = torch.randn(1_000_000, generator=generator, device="cuda")
        tau = torch.nn.functional.silu(gate).abs().quantile(sparsity) if sparsity > 0 else torch.tensor(0.0)
        thresholds = torch.full((shape.num_experts, shape.intermediate_size), float(tau), device="cuda")
        for _ in range(count):
            x = torch.randn(num_tokens, shape.hidden_size, generator=generator, device="cuda").bfloat16()
            logits = torch.randn(num_tokens, shape.num_experts, generator=generator, device="cuda")
            routing, ids = logits.topk(shape.top_k, dim=1)
            weights = torch.ones_like(routing) if self.weight_on_input else routing.softmax(1)
            result.append((x, thresholds, ids.int(), weights.float().contiguous()))
        return result

    def time(self, variant: str, num_tokens: int, sparsity: float, stages: bool) -> str:
        flags = {"router_weighted": False, "weight_on_input": self.weight_on_input}
        staged = Staged(self.shape, variant, **flags)
        inputs = self.inputs(num_tokens, sparsity)
        out = torch.empty_like(inputs[0][0])

        def call(arguments: tuple[torch.Tensor, ...]) -> None:
            x, thresholds, ids, weights = arguments
            staged.call(x, self.w13, self.w2, thresholds, ids, weights, self.expert_map, 0.0, out)

        for arguments in inputs[:3]:
            call(arguments)
        torch.cuda.synchronize()
        buffers = dict(
            zip(
                staged.config.workspace(self.shape, num_tokens, staged.deterministic, self.weight_on_input),
                staged.workspace(num_tokens),
                strict=True,
            )
        )
        items = int((buffers["items"][:, 2] > 0).sum())
        active = int(buffers["active"][:items].sum())
        experts = int(buffers["items"][:items, 0].unique().numel())
        rows = items * self.shape.intermediate_size + 2 * active
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for arguments in inputs:
                call(arguments)
        times = []
        for _ in range(15):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(inputs))
        us = statistics.median(times[3:])
        gbps = rows * self.shape.hidden_size * 2 / us / 1e3
        union = active / (items * self.shape.intermediate_size)
        text = f"{us:7.1f} us {gbps:6.0f} GB/s  union {union:.3f} items {items} experts {experts}"
        if self.shape.num_experts == 256 and num_tokens in DENSE_US:
            text += f"  {DENSE_US[num_tokens] / us:5.2f}x of dense {DENSE_US[num_tokens]} us"
        if stages:
            # without overlap: a kernel that starts early would count its waiting
            staged = Staged(self.shape, variant + ",overlap=0", **flags)
            call(inputs[0])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for arguments in inputs:
                    call(arguments)
            text += "\n" + " " * 8 + self.stage_times(graph, len(inputs), items, active)
        return text

    def stage_times(self, graph: torch.cuda.CUDAGraph, calls: int, items: int, active: int) -> str:
        """Device time of each kernel, from the profiler; in brackets: GB/s of weight rows."""
        from torch.profiler import ProfilerActivity, profile

        graph.replay()
        torch.cuda.synchronize()

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            graph.replay()
            torch.cuda.synchronize()
        spent = dict.fromkeys(STAGES, 0.0)
        for event in profiler.events():
            for stage in STAGES:
                if stage in event.name:
                    spent[stage] += event.device_time / calls
        row = self.shape.hidden_size * 2 / 1e3
        moved = {"GateCompact": items * self.shape.intermediate_size * row, "SparseUp": active * row}
        moved["SparseDown"] = moved["SparseUp"]
        parts = []
        for stage, us in spent.items():
            rate = f" ({moved[stage] / us:.0f} GB/s)" if stage in moved and us > 0 else ""
            parts.append(f"{stage} {us:.1f}{rate}")
        return "stages without overlap, us: " + ", ".join(parts)


def run_times(bench: Bench, name: str, variants: list[str], tokens: list[int], sparsities: list[float], stages: bool):
    for sparsity in sparsities:
        print(f"\n== times, {name}, {sparsity:.1%} of the neurons inactive, no pair skipped", flush=True)
        for number, variant in enumerate(variants):
            if sparsity != sparsities[0] and number:
                break
            for num_tokens in tokens:
                try:
                    text = bench.time(variant, num_tokens, sparsity, stages or number < 2)
                except Exception as error:
                    if "CUDA error" in str(error):
                        raise
                    text = f"ERROR {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                print(f"T={num_tokens:4d} {variant:55s} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("checks", "times", "wide"))
    parser.add_argument("--variant", action="append", help="fields of StagedConfig, and deterministic=0/1")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.845, 0.0])
    parser.add_argument("--stages", action="store_true", help="per-stage times of every variant, not only the first")
    args = parser.parse_args()
    variants = args.variant or list(VARIANTS)
    begin = time.time()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, TVM-FFI {'yes' if dsl.has_tvm_ffi() else 'no'}")
    parts = {
        "checks": lambda: run_checks(variants),
        "times": lambda: run_times(
            Bench(MoEShape(256, 8, 2048, 512)), "qwen3.5-35b-a3b", variants, args.tokens, args.sparsity, args.stages
        ),
        "wide": lambda: run_times(
            Bench(MoEShape(128, 1, 5120, 8192), True), "llama-4-maverick", variants[:2], [8, 64, 256], [0.908], True
        ),
    }
    for part, run in parts.items():
        if args.only in (None, part):
            try:
                run()
            except Exception:
                traceback.print_exc(limit=4)
                if args.only is None and part == "checks":
                    print("the device may be in an error state: run --only times in a new process")
                    break
            torch.cuda.empty_cache()
    print(f"\n{time.time() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
