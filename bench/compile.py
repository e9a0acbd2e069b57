"""Seconds until a kernel can be launched: compiled into an empty cache (cold), and loaded from it (warm).

Each measurement runs in a fresh process, so the imports are counted too, and apart. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from cutedsl_kernels import UserError
from cutedsl_kernels.configs import Plan

from . import arguments
from .plans import resolve_plans
from .records import format_table

_CHILD = """
import json, sys, time
started = time.perf_counter()
import torch
from cutedsl_kernels import MoEShape
from cutedsl_kernels.compile import compile_count, compile_kernel
from cutedsl_kernels.compile.specs import plan_spec
from cutedsl_kernels.configs import Plan
imported = time.perf_counter()
shape, plan, activation = json.loads(sys.argv[1])
spec = plan_spec(Plan.from_json(plan), MoEShape(**shape), activation=activation)
import cutlass
loaded = time.perf_counter()
compile_kernel(spec)
ready = time.perf_counter()
print(json.dumps([imported - started, loaded - imported, ready - loaded, compile_count()]))
"""


def ready_seconds(shape: dict[str, int], plan: Plan, activation: str, cache: str) -> tuple[float, float, float, int]:
    """(importing the library, importing the CuTe DSL, compiling or loading, kernels compiled) in a fresh process."""
    environment = {**os.environ, "CUTEDSL_KERNELS_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": ""}
    argument = json.dumps([shape, plan.to_json(), activation])
    done = subprocess.run([sys.executable, "-c", _CHILD, argument], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{plan} does not compile: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    library, dsl, ready, compiled = json.loads(done.stdout.splitlines()[-1])
    return library, dsl, ready, compiled


def main(argv: Sequence[str] | None = None, prog: str = "bench.compile") -> int:
    parser = arguments.Parser(prog, __doc__)
    arguments.add_shape(parser)
    parser.add_argument("--tokens", type=arguments.int_list, default=[1], help="T the plans are chosen for")
    parser.add_argument("--plans", type=arguments.plan_list, default=["fused"], help="as for bench layer")
    try:
        return _run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    options.model = options.model or (None if options.shape else arguments.DEFAULT_MODEL)
    layer = arguments.layer_of(options, torch.device("cpu"))
    sparsity = arguments.default_sparsity(layer.model)
    sizes = {name: getattr(layer.shape, name) for name in ("num_experts", "top_k", "hidden_size", "intermediate_size")}
    rows = []
    for t in options.tokens:
        for text in options.plans:
            # A device that is not a CPU: plans are chosen as for an H200 where there is no GPU.
            for plan in resolve_plans(text, layer.shape, t, sparsity, 0.0, torch.device("cuda"), layer.activation):
                if plan.config is None:
                    continue
                with tempfile.TemporaryDirectory(prefix="cutedsl-kernels-") as cache:
                    for state in ("cold", "warm"):
                        library, dsl, ready, compiled = ready_seconds(sizes, plan, layer.activation, cache)
                        kinds = [f"{library:.2f}", f"{dsl:.2f}", f"{ready:.3f}", str(compiled)]
                        rows.append([f"{plan.kind}, T={t}, {state}", *kinds])
    print(f"{layer.model} {layer.shape.key}, seconds in a fresh process")
    print(format_table(["plan", "import library", "import DSL", "kernel ready", "compiled"], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
