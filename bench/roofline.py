"""What a shape can gain at best: bytes of the dense and the sparse layer, and their time at copy bandwidth.

The copy bandwidth is measured on this machine's GPU; without a GPU that of an H200 is assumed, and said so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cutedsl_kernels import MoEShape, UserError
from cutedsl_kernels.cost_model import Gpu, dense_bytes, layer_bytes, layer_flops

from . import arguments
from .records import format_table
from .timing import copy_bandwidth

TOKENS = [1, 8, 32, 64, 128, 256, 512, 4096, 16384]


def roofline_rows(
    shape: MoEShape, tokens: Sequence[int], sparsity: float, pair_skip: float, copy_gbps: float, tflops: float
) -> list[list[str]]:
    """Cells: T, dense MB, sparse MB, ratio of bytes, dense us, sparse us, ratio of times; a time is the larger of what
    the bytes take at the copy's bandwidth and what the operations left take at ``tflops``."""
    rows = []
    for t in tokens:
        dense = dense_bytes(shape, t).total
        sparse = layer_bytes(shape, t, sparsity, pair_skip).total
        dense_us = max(dense / copy_gbps * 1e-3, layer_flops(shape, t, 0.0) / tflops * 1e-6)
        # Where arithmetic bounds, whole pairs are work saved and single neurons are not.
        sparse_us = max(sparse / copy_gbps * 1e-3, layer_flops(shape, t, pair_skip) / tflops * 1e-6)
        values = [f"{dense / 1e6:.1f}", f"{sparse / 1e6:.1f}", f"{dense / sparse:.2f}x"]
        rows.append([str(t), *values, f"{dense_us:.1f}", f"{sparse_us:.1f}", f"{dense_us / sparse_us:.2f}x"])
    return rows


def main(argv: Sequence[str] | None = None, prog: str = "bench.roofline") -> int:
    parser = arguments.Parser(prog, __doc__)
    arguments.add_shape(parser)
    parser.add_argument("--tokens", type=arguments.int_list, default=TOKENS, help="T, comma separated")
    parser.add_argument("--sparsity", type=arguments.share, help="share of inactive neurons (default the cutoff)")
    parser.add_argument("--pair-skip", type=arguments.share, default=0.0, help="share of pairs skipped whole")
    parser.add_argument("--copy-gbps", type=float, help="copy bandwidth to assume instead of measuring")
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
    sparsity = arguments.default_sparsity(layer.model) if options.sparsity is None else options.sparsity
    if options.pair_skip > sparsity:
        raise UserError(f"--pair-skip must not exceed --sparsity {sparsity:g}, got {options.pair_skip:g}")
    if options.copy_gbps is not None:
        if options.copy_gbps <= 0:
            raise UserError(f"--copy-gbps must be positive, got {options.copy_gbps:g}")
        copy, source = options.copy_gbps, "given"
    elif device.type == "cuda":
        copy, source = copy_bandwidth(device), "measured"
    else:
        copy, source = Gpu().copy_gbps, "assumed: an H200's"
    skip = f", {options.pair_skip:.0%} of pairs skipped" if options.pair_skip else ""
    print(f"{layer.model} {layer.shape.key}, {sparsity:.1%} of neurons inactive{skip}; copy {copy:.0f} GB/s ({source})")
    header = ["T", "dense MB", "sparse MB", "bytes", "dense us", "sparse us", "limit"]
    rows = roofline_rows(layer.shape, options.tokens, sparsity, options.pair_skip, copy, Gpu().dense_tflops)
    print(format_table(header, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
