"""The dense path inside vLLM on an sm_90 GPU: what the kernels for kept pairs save, and which block sizes are fastest.

    python tools/gpu_try_dense.py --model qwen3.5-35b-a3b qwen3-30b-a3b --tokens 1024 4096 --skip 0 0.35 --configs

Needs vLLM, the CuTe DSL and the source tree (tools/source_tree.py) on PYTHONPATH. Every path is checked against the
definition before it is timed; times are those of the benchmarks (CUDA graph, L2 cold, median). --configs also times
run_dense under each of CONFIGS instead of what vLLM chooses; --down with each of DOWN_CONFIGS for the second product
alone, whose weights are the transposed view.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from cutedsl_kernels.bench.baselines import TRITON_FIELDS, VllmTriton
from cutedsl_kernels.bench.check import WrongResult, check, expectations
from cutedsl_kernels.bench.problems import Rule, calls_for, copies_needed, make_batch, make_weights
from cutedsl_kernels.bench.serving import vllm_dense_calls
from cutedsl_kernels.bench.timing import Call, copy_bandwidth, prepare
from cutedsl_kernels.integration.vllm import compat
from vllm.model_executor.layers.fused_moe import override_config

from cutedsl_kernels import KNOWN_MODELS

CONFIGS = (  # in the order of TRITON_FIELDS
    (16, 64, 128, 1, 4, 3),
    (16, 64, 64, 1, 4, 5),
    (32, 128, 64, 1, 4, 3),
    (64, 128, 64, 1, 4, 3),
    (64, 128, 64, 1, 8, 3),
    (128, 128, 64, 1, 8, 3),
    (128, 256, 64, 1, 8, 4),
    (128, 256, 64, 16, 8, 4),
)

DOWN_FIELDS = ("BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps", "num_stages")
DOWN_CONFIGS = (
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 64, 4, 4),
    (128, 64, 4, 3),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
    (128, 128, 4, 3),
    (128, 128, 8, 3),
    (128, 32, 4, 5),
    (256, 64, 4, 3),
    (256, 64, 8, 3),
    (256, 64, 8, 4),
    (256, 32, 4, 4),
)


@contextlib.contextmanager
def down_config(values: Sequence[int]) -> Iterator[None]:
    """Within this, run_dense's second product runs under ``values`` (DOWN_FIELDS)."""
    experts = compat.triton_experts()
    gemm = experts.gemm

    def replaced(a: Any, b: torch.Tensor, *others: Any) -> None:
        *before, config, bias = others
        if b.stride(-1) != 1:
            config = {**config, **dict(zip(DOWN_FIELDS, values, strict=True))}
        gemm(a, b, *before, config, bias)

    experts.gemm = replaced
    try:
        yield
    finally:
        experts.gemm = gemm


def time_us(calls: Sequence[Call], expected: Sequence) -> str:
    """Microseconds, or why there are none."""
    try:
        prepared = prepare(calls, "cuda")
        check(prepared, expected)
        return f"{prepared.measure(8, 0.5).median_us:8.1f}"
    except WrongResult as wrong:
        return f"WRONG {wrong}"
    except Exception as error:  # Triton: out of shared memory for this config, and the like
        torch.cuda.synchronize()
        return f"{type(error).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=KNOWN_MODELS, default=["qwen3.5-35b-a3b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--skip", nargs="+", type=float, default=[0.0, 0.35])
    parser.add_argument("--configs", action="store_true")
    parser.add_argument("--down", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), f"copy {copy_bandwidth(device):.0f} GB/s", flush=True)
    for name in options.model:
        model = KNOWN_MODELS[name]
        copies = max(copies_needed(model.shape, t, 0.9, torch.bfloat16, 25e9) for t in options.tokens)
        layers = make_weights(model.shape, copies, device, torch.bfloat16, 1)
        baseline = VllmTriton(0.0)
        for num_tokens in options.tokens:
            number = min(calls_for(model.shape, num_tokens, device), 12)
            batch = make_batch(
                layers, model.shape.top_k, num_tokens, calls=number, seed=num_tokens, activation=model.activation
            )

            def show(what: str, found: str, where: str = f"{name} T={num_tokens}") -> None:
                print(f"{where} {what}: {found}", flush=True)

            if model.activation in ("silu", "gelu"):
                plain = expectations(batch, batch.cutoffs(Rule()))
                found = time_us(baseline.own_calls(batch), plain)
                show(f"vLLM {baseline.own_config(batch)}", found)
            for skip in options.skip:
                cutoffs = batch.cutoffs(Rule(skip, skip, True)).without_neurons()
                expected = expectations(batch, cutoffs)
                for kernels in (False, True):
                    calls = vllm_dense_calls(batch, cutoffs, kernels)
                    show(f"skip {skip} {'with' if kernels else 'without'} pair kernels", time_us(calls, expected))
                for values in CONFIGS if options.configs else ():
                    with override_config(dict(zip(TRITON_FIELDS, values, strict=True)) | {"SPLIT_K": 1}):
                        show(f"skip {skip} {values}", time_us(vllm_dense_calls(batch, cutoffs), expected))
                for values in DOWN_CONFIGS if options.down else ():
                    with down_config(values):
                        show(f"skip {skip} down {values}", time_us(vllm_dense_calls(batch, cutoffs), expected))
        baseline.release()
        del layers, batch
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
