"""Host time of one sparse_moe call in microseconds, device time not counted; and of the choice of a plan.

Calls are issued without waiting for the device, in bursts small enough not to fill its queue. On a CPU only the choice
of a plan is measured: there the call itself is the computation.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from cutedsl_kernels import Plan, UserError, plan_for
from cutedsl_kernels.cost_model import Gpu

from . import arguments
from .layer import sparse_calls
from .plans import resolve_plans
from .problems import Rule, make_batch, make_weights
from .records import format_table

BURST = 64
ROUNDS = 31


def host_us(call: Callable[[], object], wait: Callable[[], object], burst: int = BURST) -> tuple[float, float]:
    """(median, fastest) microseconds per call over ROUNDS bursts; ``wait`` runs between bursts, outside the clock."""
    samples = []
    for index in range(ROUNDS + 1):
        wait()
        started = time.perf_counter_ns()
        for _ in range(burst):
            call()
        if index:
            samples.append((time.perf_counter_ns() - started) * 1e-3 / burst)
    wait()
    return statistics.median(samples), min(samples)


def main(argv: Sequence[str] | None = None, prog: str = "bench.launch") -> int:
    parser = arguments.Parser(prog, __doc__)
    arguments.add_shape(parser)
    parser.add_argument("--tokens", type=arguments.int_list, default=[1, 8, 64], help="T, comma separated")
    parser.add_argument("--plans", type=arguments.plan_list, default=["auto", "dense"], help="as for bench layer")
    parser.add_argument("--device", help="cuda or cpu (default cuda where there is one)")
    try:
        return _run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    device = arguments.device_of(options.device)
    options.model = options.model or (None if options.shape else arguments.DEFAULT_MODEL)
    layer = arguments.layer_of(options, device)
    sparsity = arguments.default_sparsity(layer.model)
    gpu = Gpu()
    rows = []
    for t in options.tokens:
        target: Gpu | torch.device = device if device.type == "cuda" else gpu
        plan_for(layer.shape, t, sparsity, target)
        median, fastest = host_us(functools.partial(plan_for, layer.shape, t, sparsity, target), int, 1000)
        rows.append(["plan_for, warm", str(t), f"{median:.2f}", f"{fastest:.2f}"])
    if device.type == "cuda":
        weights = make_weights(layer.shape, 1, device, layer.dtype, 0)
        for t in options.tokens:
            batch = make_batch(weights, layer.shape.top_k, t, calls=1, seed=0, activation=layer.activation)
            cutoffs = batch.cutoffs(Rule(sparsity))
            for text in options.plans:
                for plan in resolve_plans(text, layer.shape, t, sparsity, 0.0, device, layer.activation):
                    rows.append(_call_row(plan, t, sparse_calls(batch, cutoffs, plan)[0]))
    print(f"{layer.model} {layer.shape.key}, host microseconds per call")
    print(format_table(["what", "T", "median", "fastest"], rows))
    return 0


def _call_row(plan: Plan, num_tokens: int, call: Callable[[], object]) -> list[str]:
    call()
    median, fastest = host_us(call, torch.cuda.synchronize)
    return [f"sparse_moe, {plan.kind}", str(num_tokens), f"{median:.2f}", f"{fastest:.2f}"]


if __name__ == "__main__":
    raise SystemExit(main())
