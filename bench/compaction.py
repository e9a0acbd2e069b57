"""What gating and compaction cost: the layer with no neuron active, so that nothing is gathered, up or down.

All gate rows are read, all scores compared, all lists built, and all are empty; the time over the gate's bytes at copy
bandwidth is what thresholding, compaction and the launch add.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from cutedsl_kernels import UserError

from . import arguments
from .check import WrongResult, check, expectations
from .layer import sparse_calls
from .plans import resolve_plans
from .problems import Rule, calls_for, copies_needed, make_batch, make_weights
from .records import format_table
from .timing import copy_bandwidth, prepare


def main(argv: Sequence[str] | None = None, prog: str = "bench.compaction") -> int:
    parser = arguments.Parser(prog, __doc__)
    arguments.add_shape(parser)
    parser.add_argument("--tokens", type=arguments.int_list, help="T, comma separated (default 1,8,32,128; CPU 1,4)")
    parser.add_argument("--plans", type=arguments.plan_list, default=["auto"], help="as for bench layer")
    arguments.add_run(parser)
    try:
        return _run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    device = arguments.device_of(options.device)
    layer = arguments.layer_of(options, device)
    cpu = device.type == "cpu"
    copy = copy_bandwidth(device)
    memory = 0.0 if cpu else torch.cuda.get_device_properties(device).total_memory * 0.45
    rows, wrong = [], 0
    for t in options.tokens or ([1, 4] if cpu else [1, 8, 32, 128]):
        copies = options.copies or copies_needed(layer.shape, t, 1.0, layer.dtype, memory)
        batch = make_batch(
            make_weights(layer.shape, copies, device, layer.dtype, options.seed),
            layer.shape.top_k,
            t,
            calls=options.calls or calls_for(layer.shape, t, device),
            seed=options.seed,
            activation=layer.activation,
            router_weight_on_input=layer.router_weight_on_input,
        )
        none = batch.cutoffs(Rule())
        none = replace(none, thresholds=torch.full_like(none.thresholds, 3.0e38))
        expected, counts = expectations(batch, none), batch.count(none)
        floor = counts.bytes_read / copy * 1e-3
        for text in options.plans:
            for plan in resolve_plans(text, layer.shape, t, 1.0, 0.0, device, layer.activation):
                prepared = prepare(sparse_calls(batch, none, plan), device)
                try:
                    check(prepared, expected)
                except WrongResult as reason:
                    print(f"WRONG T={t} {plan}: {reason}", file=sys.stderr)
                    wrong += 1
                    continue
                us = prepared.measure(options.replays).median_us
                rows.append([plan.kind, str(t), f"{us:.1f}", f"{floor:.1f}", f"{us - floor:.1f}", f"{floor / us:.0%}"])
    print(f"{layer.model} {layer.shape.key}, no neuron active; copy {copy:.0f} GB/s")
    print(format_table(["plan", "T", "us", "gate bytes us", "added us", "of a copy"], rows))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
