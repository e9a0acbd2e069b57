"""The layer benchmark: one sparse MoE layer against dense baselines, over tokens, sparsity, mask overlap and plans.

    python -m bench.layer --model qwen3.5-35b-a3b --tokens 1,8,32 --sparsity 0.845 --csv out.csv
    cutedsl-kernels bench layer ...        the same, installed

Every path is compared with the definition on the outputs of the very calls that are timed; a path that differs, or
fails, is reported and gets no number. Rows are on disk as soon as they are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from cutedsl_kernels import ExpertWeights, MoEShape, Plan, UserError, sparse_moe

from . import arguments
from .baselines import NAMES as BASELINES
from .baselines import Baseline, Unavailable, VllmTriton, make_baselines
from .check import Expectation, WrongResult, check, expectations
from .plans import NoPlan, resolve_plans
from .problems import (
    ROUTINGS,
    Batch,
    Cutoffs,
    LayerInputs,
    MaskCounts,
    Rule,
    calls_for,
    copies_needed,
    layer_weight_bytes,
    make_batch,
    make_weights,
)
from .records import CsvWriter, Machine
from .serving import NoServing, vllm_dense_calls
from .timing import Call, Timing, copy_bandwidth, prepare

HEADER = (
    f"{'model':<18} {'T':>5} {'s':>5} {'skip':>5} {'iou':>5}  "
    f"{'plan':<18} {'us':>9} {'GB/s':>6} {'copy':>5} {'ratio':>6}"
)


class DeviceLost(RuntimeError):
    """A CUDA error that leaves the process without a usable device."""


@dataclass(frozen=True)
class Layer:
    """What is benchmarked: one layer shape with its particulars."""

    model: str
    shape: MoEShape
    activation: str = "silu"
    router_weight_on_input: bool = False
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Options:
    """How it is measured. ``calls`` and ``copies``: None for what calls_for and copies_needed give."""

    device: torch.device
    replays: int = 12
    seed: int = 0
    calls: int | None = None
    copies: int | None = None
    memory_share: float = 0.45
    report: Callable[[str], None] = print


@dataclass
class LayerBench:
    """Runs points, keeps the weights of the current shape, writes rows. ``failures``: one line per path left out."""

    options: Options
    baselines: Sequence[Baseline]
    writer: CsvWriter | None = None
    failures: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    references: dict[tuple[Layer, int, str], tuple[str, float] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.copy_gbps = copy_bandwidth(self.options.device)
        self.machine = Machine.here(self.options.device, self.copy_gbps)
        self._layers: list[ExpertWeights] = []
        self._layer: Layer | None = None
        self._reported: set[str] = set()

    @property
    def headline(self) -> str:
        values = self.machine.values
        return f"{values['gpu']}, copy {self.copy_gbps:.0f} GB/s, revision {values['revision']}"

    def open(
        self,
        layer: Layer,
        num_tokens: int,
        *,
        routing: str = "uniform",
        iou: float | None = None,
        sparsity: float = 0.85,
    ) -> Point:
        """Measures the baselines at one number of tokens, once in a run, for all paths to be compared with.

        sparsity: where the masks are to overlap by ``iou``.
        """
        return Point(self, layer, num_tokens, routing, iou, sparsity)

    def batch(self, layer: Layer, num_tokens: int, routing: str, iou: float | None, sparsity: float) -> Batch:
        """Inputs for a point; the weights stay from point to point while the shape does."""
        options = self.options
        if self._layer is None or (self._layer.shape, self._layer.dtype) != (layer.shape, layer.dtype):
            self.release()
            self._layer = layer
        wanted = options.copies or copies_needed(layer.shape, num_tokens, 0.9, layer.dtype, self._memory(layer))
        if options.device.type == "cpu" and options.copies is None:
            wanted = 1
        missing = wanted - len(self._layers)
        if missing > 0:
            seed = options.seed + 1000 * len(self._layers)
            self._layers += make_weights(layer.shape, missing, options.device, layer.dtype, seed)
        return make_batch(
            self._layers[:wanted],
            layer.shape.top_k,
            num_tokens,
            calls=options.calls or calls_for(layer.shape, num_tokens, options.device),
            seed=options.seed + num_tokens,
            routing=routing,
            iou=iou,
            sparsity=sparsity,
            activation=layer.activation,
            router_weight_on_input=layer.router_weight_on_input,
        )

    def _memory(self, layer: Layer) -> float:
        """Bytes that all weight copies may take; vLLM's second copy of w2 is a third more."""
        if self.options.device.type == "cpu":
            return float(layer_weight_bytes(layer.shape, layer.dtype))
        total = torch.cuda.get_device_properties(self.options.device).total_memory
        return total * self.options.memory_share

    def release(self) -> None:
        """Frees the weights of the current shape."""
        self._layers, self._layer = [], None
        for baseline in self.baselines:
            baseline.release()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(
        self, label: str, calls: Sequence[Call], expected: Sequence[Expectation]
    ) -> tuple[Timing | None, float]:
        """Check, then time; (None, 0) and a line in failures for a path that fails or is wrong."""
        try:
            prepared = prepare(calls, self.options.device)
            error = check(prepared, expected)
            return prepared.measure(self.options.replays), error
        except WrongResult as reason:
            line = f"WRONG {label}: {reason}"
        except Exception as reason:  # whatever a path under test raises is a result of the benchmark
            line = f"FAILED {label}: {type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
            if self.options.device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError as lost:
                    raise DeviceLost(f"{label}: {lost}") from reason
        self.failures.append(line)
        self.options.report(line)
        return None, 0.0

    def row(
        self,
        base: dict[str, str],
        counts: MaskCounts,
        read: MaskCounts,
        rule: Rule,
        plan: str,
        config: str,
        choice: str,
        timing: Timing,
        error: float,
        reference: tuple[str, float] | None,
    ) -> None:
        """counts: what the rule leaves active; read: what the path computes and reads."""
        gbps = read.bytes_read / timing.median_us * 1e-3
        row = {
            **self.machine.values,
            **base,
            "sparsity_target": f"{rule.sparsity:g}",
            "sparsity": f"{counts.sparsity:.4f}",
            "mask_iou": "" if counts.iou is None else f"{counts.iou:.3f}",
            "plan": plan,
            "config": config,
            "statistic": timing.statistic,
            "us": f"{timing.median_us:.2f}",
            "gbps": f"{gbps:.0f}",
            "copy_share": f"{gbps / self.copy_gbps:.3f}",
            "tflops": f"{read.flops / timing.median_us * 1e-6:.2f}",
            "baseline": reference[0] if reference else "",
            "baseline_us": f"{reference[1]:.2f}" if reference else "",
            "ratio": f"{reference[1] / timing.median_us:.3f}" if reference else "",
            "pair_skip_target": f"{rule.pair_skip:g}",
            "pair_skip": f"{counts.pairs_skipped:.4f}",
            "router_weighted": str(int(rule.router_weighted)),
            "choice": choice,
            "iqr_us": f"{timing.iqr_us:.2f}",
            "error": f"{error:.2e}",
        }
        self.rows.append(row)
        if self.writer is not None:
            self.writer.write(row)
        shown = plan + ("*" if choice in ("auto", "serving") else "")
        self.options.report(
            f"{base['model']:<18} {base['num_tokens']:>5} {counts.sparsity:>5.3f} {counts.pairs_skipped:>5.2f} "
            f"{row['mask_iou'] or '-':>5}  {shown:<18} {timing.median_us:>9.1f} {gbps:>6.0f} "
            f"{gbps / self.copy_gbps:>5.0%} {row['ratio'] + 'x' if reference else '-':>6}"
        )

    def once(self, line: str) -> None:
        if line not in self._reported:
            self._reported.add(line)
            self.options.report(line)


class Point:
    """One layer at one number of tokens: baselines measured on opening, then any rules and plans."""

    def __init__(
        self, bench: LayerBench, layer: Layer, num_tokens: int, routing: str, iou: float | None, sparsity: float
    ) -> None:
        self._bench, self._layer, self._num_tokens, self._routing, self._iou = bench, layer, num_tokens, routing, iou
        self._sparsity = sparsity
        self._batch = bench.batch(layer, num_tokens, routing, iou, sparsity)
        self._base = {
            "model": layer.model,
            "experts": str(layer.shape.num_experts),
            "hidden": str(layer.shape.hidden_size),
            "intermediate": str(layer.shape.intermediate_size),
            "top_k": str(layer.shape.top_k),
            "num_tokens": str(num_tokens),
            "routing": routing,
            "dtype": str(layer.dtype).removeprefix("torch."),
            "iou_target": "" if iou is None else f"{iou:g}",
        }
        key = (layer, num_tokens, routing)
        if key not in bench.references:  # dense times depend on neither the rule nor the overlap of masks
            bench.references[key] = self._dense_rows()
        self._reference = bench.references[key]

    def run(self, rule: Rule, text: str) -> None:
        """Measures what ``text`` names (plans.py) under ``rule``, a row for each plan."""
        bench, shape = self._bench, self._layer.shape
        if self._iou is not None and rule.sparsity != self._sparsity:
            self._sparsity = rule.sparsity
            self._batch = bench.batch(self._layer, self._num_tokens, self._routing, self._iou, rule.sparsity)
        batch = self._batch
        where = f"{self._layer.model} T={self._num_tokens}"
        try:
            plans = resolve_plans(
                text, shape, self._num_tokens, rule.sparsity, rule.pair_skip, bench.options.device, batch.activation
            )
        except NoPlan as reason:
            bench.once(f"{where}: plan {text} left out: {reason}")
            return
        if plans == [Plan("cpu")] and text not in ("auto", "serving", "cpu"):
            bench.once(f"plan {text}: on a CPU the CPU back end runs instead")
        cutoffs = batch.cutoffs(rule)
        counts, expected = batch.count(cutoffs), expectations(batch, cutoffs)
        choice = text if text in ("auto", "serving") else "asked"
        for plan in plans:
            label = f"{where} s={rule.sparsity:g} skip={rule.pair_skip:g} {plan}"
            name: str = plan.kind
            if plan.kind == "dense" and text == "serving":
                name, label = "dense-vllm", f"{label} of vLLM"
                try:
                    calls = vllm_dense_calls(batch, cutoffs)
                except NoServing as reason:
                    bench.once(f"{where}: plan serving left out: {reason}")
                    continue
                timing, error = bench.measure(label, calls, expectations(batch, cutoffs.without_neurons()))
            else:
                timing, error = bench.measure(label, sparse_calls(batch, cutoffs, plan), expected)
            if timing is None:
                continue
            config = json.dumps(asdict(plan.config)) if plan.config is not None else "{}"
            # A dense plan reads every neuron of the pairs it keeps.
            read = batch.count(cutoffs.without_neurons()) if plan.kind == "dense" else counts
            bench.row(self._base, counts, read, rule, name, config, choice, timing, error, self._reference)

    def _dense_rows(self) -> tuple[str, float] | None:
        """Measures the baselines; name and time of the first that could be measured."""
        bench, batch = self._bench, self._batch
        dense = batch.cutoffs(Rule())
        counts, expected = batch.count(dense), expectations(batch, dense)
        first: tuple[str, float] | None = None
        for baseline in bench.baselines:
            try:
                variants = [(baseline.name, baseline.calls(batch), baseline.config)]
            except Unavailable as reason:
                bench.once(f"baseline {baseline.name} left out: {reason}")
                continue
            if isinstance(baseline, VllmTriton) and baseline.tuned:
                variants.append((f"{baseline.name}-default", baseline.own_calls(batch), baseline.own_config(batch)))
            for name, calls, config in variants:
                label = f"{self._layer.model} T={self._num_tokens} {name}"
                timing, error = bench.measure(label, calls, expected)
                if timing is not None:
                    first = first or (name, timing.median_us)
                    bench.row(self._base, counts, counts, Rule(), name, config, "baseline", timing, error, first)
        return first


def sparse_calls(batch: Batch, cutoffs: Cutoffs, plan: Plan) -> list[Call]:
    """sparse_moe on every call of the batch under ``plan``, each into its own output."""

    def bind(call: LayerInputs) -> Call:
        out = torch.empty_like(call.hidden_states)

        def run() -> torch.Tensor:
            return sparse_moe(
                call.hidden_states,
                call.weights,
                call.topk_weights,
                call.topk_ids,
                cutoffs.thresholds,
                router_weighted=cutoffs.rule.router_weighted,
                pair_threshold=cutoffs.pair_threshold,
                activation=batch.activation,
                apply_router_weight_on_input=batch.router_weight_on_input,
                plan=plan,
                out=out,
            )

        return run

    return [bind(call) for call in batch.calls]


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = arguments.Parser(prog, __doc__)
    arguments.add_shape(parser)
    option = parser.add_argument
    option("--tokens", type=arguments.int_list, help="T, comma separated (default 1,2,4..256; on a CPU 1,2,4)")
    option(
        "--sparsity",
        type=arguments.share_list,
        help="target shares of inactive neurons, comma separated (default the model's published cutoff, or 0.85)",
    )
    option("--pair-skip", type=arguments.share, default=0.0, help="share of pairs skipped whole, part of --sparsity")
    option(
        "--rule",
        choices=("paper", "routed"),
        help="threshold abs(act(gate)), or that times the routing weight (default paper; routed with --pair-skip)",
    )
    option("--iou", type=arguments.share, help="overlap of two tokens' masks (default independent masks)")
    option("--routing", choices=ROUTINGS, default="uniform")
    option(
        "--plans",
        type=arguments.plan_list,
        default=["auto"],
        help="auto, serving (as inside vLLM), dense, fused, staged, fused:4 (the four best by the cost model) or "
        "fused[tile_neurons=32,...], separated by commas outside brackets",
    )
    option(
        "--baselines",
        type=arguments.name_list,
        help=f"of {', '.join(BASELINES)}; ratios refer to the first (default vllm-triton,torch-grouped-mm; "
        "on a CPU torch-dense)",
    )
    option(
        "--tune-s",
        type=float,
        default=20.0,
        help="seconds for each T to tune vllm-triton in where vLLM ships no config (default 20, 0: do not)",
    )
    arguments.add_run(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "bench.layer") -> int:
    """Exit code: 0, 1 when a path was wrong or failed, 2 for bad input, 3 when the device was lost."""
    options = build_parser(prog).parse_args(argv)
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"device lost: {error}", file=sys.stderr)
        return 3


def _run(options: argparse.Namespace) -> int:
    device = arguments.device_of(options.device)
    layer = arguments.layer_of(options, device)
    cpu = device.type == "cpu"
    tokens = options.tokens or ([1, 2, 4] if cpu else [1, 2, 4, 8, 16, 32, 64, 128, 256])
    shares = options.sparsity or [arguments.default_sparsity(layer.model)]
    weighted = options.rule == "routed" or (options.rule is None and options.pair_skip > 0)
    try:
        rules = [Rule(share, options.pair_skip, weighted) for share in shares]
        names = options.baselines or (["torch-dense"] if cpu else ["vllm-triton", "torch-grouped-mm"])
        baselines = make_baselines(names, options.tune_s)
    except ValueError as error:
        raise UserError(str(error)) from None
    writer = CsvWriter(options.csv) if options.csv else None
    bench = LayerBench(arguments.run_options(options, device), baselines, writer)
    print(
        f"{bench.machine.values['gpu']}, copy {bench.copy_gbps:.0f} GB/s, revision {bench.machine.values['revision']}"
    )
    print(HEADER)
    try:
        for num_tokens in tokens:
            point = bench.open(layer, num_tokens, routing=options.routing, iou=options.iou, sparsity=shares[0])
            for rule in rules:
                for text in options.plans:
                    point.run(rule, text)
    except ValueError as error:
        raise UserError(str(error)) from None
    if writer is not None:
        writer.close()
        print(f"{len(bench.rows)} rows in {writer.path}")
    for line in bench.failures:
        print(line, file=sys.stderr)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
