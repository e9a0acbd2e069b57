"""Finds the fastest plan for every batch size of a layer on this GPU and stores it as a tuned table.

    cutedsl-kernels autotune --model qwen3.5-35b-a3b          or, from a checkout that is not installed:
    python -m autotune --shape 256,2048,512,8 --tokens 1,8,32 --sparsity 0.845

Without a GPU: --dry-run prints the search space as the cost model ranks it; --compile-only fills the kernel cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from cutedsl_kernels import KNOWN_MODELS, MoEShape, ProfileError, SparsityProfile, UserError, __version__
from cutedsl_kernels.cost_model import Gpu
from cutedsl_kernels.environment import dsl_version, user_dir
from cutedsl_kernels.plan import forget_plans
from cutedsl_kernels.shapes import KnownModel

from .progress import Progress
from .search import Summary, Tuner, compile_all
from .space import Bin, TunedLayer, candidates, default_tokens, ordered_bins, ranked
from .store import Store
from .timers import DeviceSetup, DeviceTimer, PlanFailure, SimulatedTimer, Timer

DEFAULT_SPARSITY = 0.85
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _positive_ints(text: str) -> list[int]:
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be positive integers separated by commas, got {text!r}")
    return sorted({int(part) for part in text.split(",")})


def _shares(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers in 0..1 (1 excluded) separated by commas, got {text!r}")
    return sorted(set(values))


Case = tuple[float, float | None]


def _cases(text: str) -> list[Case]:
    """``0.845,0.9:0.35``: sparsities, each with a share of skipped pairs of its own or without."""
    cases: list[Case] = []
    for part in text.split(","):
        sparsity, _, skip = part.partition(":")
        cases.append((_shares(sparsity)[0], _shares(skip)[0] if skip else None))
    return cases


def _shape(text: str) -> MoEShape:
    try:
        return MoEShape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    option = parser.add_argument
    option("--model", help=f"one of {', '.join(KNOWN_MODELS)}, or a checkpoint folder or config.json")
    option("--shape", type=_shape, help="E,H,I,k: experts, hidden size, intermediate size, experts per token")
    option("--profile", type=Path, help="sparsity profile: its targets are tuned, for its shape unless one is given")
    option("--tp", type=int, default=1, help="tensor-parallel ranks: each holds 1/tp of every expert's neurons")
    option("--ep", type=int, default=1, help="expert-parallel ranks: each holds 1/ep of the experts")
    option(
        "--sparsity",
        type=_cases,
        help="shares of inactive neurons, comma separated (default the model's cutoff); 0.9:0.35 with a share of pairs "
        "skipped whole of its own",
    )
    option(
        "--pair-skip",
        type=_shares,
        default=[0.0],
        help="shares of pairs skipped whole, comma separated, each with every sparsity that names none (default 0)",
    )
    option("--tokens", type=_positive_ints, help="batch sizes (default 1..512 by powers of two and vLLM's graph sizes)")
    option("--routing", choices=("uniform", "zipf"), default="uniform")
    option("--budget", type=float, default=5.0, metavar="MINUTES", help="time for measuring (default 5)")
    option("--candidates", type=int, default=12, help="plans timed for each batch size, besides dense (default 12)")
    option("--processes", type=int, help="compile processes (default one per core)")
    option("--out", type=Path, help="folder for tables and kernels (default the user's, where the library looks)")
    option("--resume", action="store_true", help="keep what earlier runs found and go on")
    option("--device", default="cuda", help="cuda, cuda:N, or cpu to try the machinery (default cuda)")
    option(
        "--dense", choices=("auto", "library", "vllm"), default="auto", help="what dense is (default vllm if installed)"
    )
    option("--seed", type=int, default=0)
    option("--dry-run", action="store_true", help="print the search space and the cost model's ranking; no GPU needed")
    option("--compile-only", action="store_true", help="compile all that would be timed into the cache; no GPU needed")
    option("--simulate", type=int, metavar="SEED", help="times from the cost model with noise; the table is marked so")
    option("--simulate-delay", type=float, default=0.0, help="seconds a simulated measurement takes (default 0)")
    option("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m autotune") -> int:
    """Exit code: 0, 1 when bins were left out or kernels did not compile, 2 for bad input, 130 when interrupted."""
    options = build_parser(prog).parse_args(argv)
    try:
        return _run(options)
    except (UserError, ProfileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing is lost, go on with the same command and --resume", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    for name in ("budget", "candidates"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} must be positive, got {getattr(options, name):g}")
    if sum((options.dry_run, options.compile_only, options.simulate is not None)) > 1:
        raise UserError("give one of --dry-run, --compile-only and --simulate")
    layer, cases = layer_of(options)
    bins = ordered_bins(options.tokens or default_tokens(), [(s, p) for s, p in cases if p <= s])
    if not bins:
        raise UserError("--pair-skip must not exceed --sparsity, of which skipped pairs are a part")
    for s, p in cases:
        if p > s:
            print(f"left out: {p:g} of the pairs skipped at sparsity {s:g}, of which they are a part", file=sys.stderr)
    if options.out is not None:
        os.environ["CUTEDSL_KERNELS_CACHE_DIR"] = str(options.out / "compiled")
    if options.dry_run:
        return _dry_run(options, layer, bins)
    progress = Progress()
    if options.compile_only:
        plans = [plan for where in bins for plan in candidates(layer, where, Gpu(), options.candidates)]
        outcome = compile_all(layer, plans, progress, options.processes)
        _print(options, {"compiled": outcome["ok"], "failed": outcome["compile"]})
        return 1 if outcome["compile"] else 0
    compiling = options.simulate is None and options.device != "cpu"
    timer = make_timer(options, layer)
    try:
        folder = options.out or user_dir("tuned")
        store = Store(folder, layer.shape, _metadata(timer), report=progress.note)
        tuner = Tuner(
            layer,
            bins,
            timer,
            store=store,
            compile_processes=options.processes,
            compiling=compiling,
            count=options.candidates,
            budget_s=options.budget * 60,
            resume=options.resume,
            progress=progress,
        )
        summary = tuner.run()
    finally:
        timer.close()
    if compiling:
        chosen = [entry.chosen for entry in summary.entries.values()]
        compile_all(layer, chosen, Progress(quiet=True), options.processes, every_use=True)
    forget_plans()
    _report(options, summary, store.path, folder)
    return 1 if summary.skipped else 0


def layer_of(options: argparse.Namespace) -> tuple[TunedLayer, list[tuple[float, float]]]:
    """The layer, and the (sparsity, share of skipped pairs) that the options ask for. UserError for what is missing,
    unknown or does not fit."""
    if options.model and options.shape:
        raise UserError("give --model or --shape, not both")
    for name in ("tp", "ep"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    profile = SparsityProfile.load(options.profile) if options.profile else None
    shares, name, activation, known = [DEFAULT_SPARSITY], "", "silu", None
    if options.model in KNOWN_MODELS:
        known = KNOWN_MODELS[options.model]
        shape, name, activation = known.shape, known.name, known.activation
        shares = [known.cutoff] if known.cutoff else shares
    elif options.model:
        shape, activation, known = _from_config(Path(options.model))
        name = options.model
    elif options.shape:
        shape = options.shape
    elif profile is not None:
        m = profile.model
        shape, name = MoEShape(m.num_experts, m.top_k, m.hidden_size, m.intermediate_size), m.name
    else:
        raise UserError("say what to tune: --model NAME_OR_PATH, --shape E,H,I,k or --profile FILE")
    if profile is not None:
        targets = {target for table in profile.layers.values() for target in table.targets}
        shares = sorted(target for target in targets if 0 < target < 1)
    try:
        shape = shape.shard(options.tp, options.ep)
    except ValueError as error:
        raise UserError(f"--tp {options.tp} --ep {options.ep}: {error}") from None
    on_input, has_bias = (known.router_weight_on_input, known.biases) if known is not None else (False, False)
    weighted = profile.router_weighted if profile is not None else not on_input
    asked: list[Case] = options.sparsity or [(share, None) for share in shares]
    cases = [(s, p) for s, own in asked for p in (options.pair_skip if own is None else [own])]
    return TunedLayer(shape, activation, on_input, weighted, has_bias, name), cases


def _from_config(path: Path) -> tuple[MoEShape, str, KnownModel | None]:
    """Shape and activation of a checkpoint, and the known model of the same architecture."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
        shape = MoEShape.from_config(config)
    except OSError as error:
        names = ", ".join(KNOWN_MODELS)
        raise UserError(f"--model {path}: {error.strerror}: give a checkpoint folder or one of {names}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"--model {path}: not JSON ({error}): give a checkpoint folder or its config.json") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"--model {path}: {error}") from None
    known = next((m for m in KNOWN_MODELS.values() if m.architecture in config.get("architectures", ())), None)
    activation = (config.get("text_config") or config).get("hidden_act", "silu")
    activation = {"gelu_pytorch_tanh": "gelu_tanh", "swiglu": "silu"}.get(activation, activation)
    return shape, "swigluoai" if known is not None and known.activation == "swigluoai" else activation, known


def make_timer(options: argparse.Namespace, layer: TunedLayer) -> Timer:
    if options.simulate is not None:
        return SimulatedTimer(layer, options.simulate, delay_s=options.simulate_delay)
    import torch

    if options.device != "cpu" and not options.device.startswith("cuda"):
        raise UserError(f"--device must be cuda, cuda:N or cpu, got {options.device!r}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError("tuning needs an sm_90 GPU and torch sees none: use --dry-run or --compile-only here")
    dense = options.dense
    if dense == "auto":
        dense = "vllm" if options.device != "cpu" and _has_vllm() else "library"
    try:
        return DeviceTimer(DeviceSetup(options.device, layer, options.routing, options.seed, dense))
    except PlanFailure as error:
        raise UserError(f"--device {options.device}: the timing process did not start: {error}") from None


def _has_vllm() -> bool:
    from importlib.util import find_spec

    return find_spec("vllm") is not None


def _metadata(timer: Timer) -> dict[str, str]:
    return {
        "gpu": timer.gpu.name,
        "driver": timer.gpu.driver,
        "library": __version__,
        "dsl": dsl_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "dense": timer.dense,
        "timing": timer.timing,
    }


def _dry_run(options: argparse.Namespace, layer: TunedLayer, bins: Sequence[Bin]) -> int:
    """Prints, for each bin, how many plans are legal and the ones that would be timed, with modelled times."""
    rows = []
    for where in bins:
        order = ranked(layer, where, Gpu())
        times = {plan: us for us, plan in order}
        tried = candidates(layer, where, Gpu(), options.candidates)
        rows.append(
            {
                "num_tokens": where.num_tokens,
                "sparsity": where.sparsity,
                "pair_skip": where.pair_skip,
                "legal": len(order),
                "candidates": [{**plan.to_json(), "modelled_us": round(times[plan], 2)} for plan in tried],
            }
        )
        if not options.json:
            print(f"{where}: {len(order)} legal plans, {len(tried)} would be timed")
            for plan in sorted(tried, key=times.__getitem__):
                print(f"  {times[plan]:>9.1f} us  {times[tried[0]] / times[plan]:>5.2f}x  {plan}")
    if options.json:
        print(json.dumps({"shape": layer.shape.key, "bins": rows}, indent=1))
    return 0


def _report(options: argparse.Namespace, summary: Summary, path: Path, folder: Path) -> None:
    rows = []
    for where in sorted(summary.entries):
        entry = summary.entries[where]
        dense = next((m.us for m in entry.tried if m.plan.kind == "dense"), None)
        rows.append({**entry.to_json(), "dense_us": dense, "ratio": dense and round(dense / entry.us, 3)})
    result: dict[str, Any] = {
        "table": str(path),
        "entries": [{name: row[name] for name in row if name != "tried"} for row in rows],
        "not_reached": [str(where) for where in summary.skipped],
        "failures": dict(summary.failures),
        "measured": summary.measured,
        "kept_from_earlier_runs": summary.reused,
        "seconds": round(summary.seconds, 1),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for row in rows:
        ratio = f"{row['ratio']:.2f}x dense" if row["ratio"] else "dense not timed"
        name = row["chosen"]["kind"]
        where = Bin(row["num_tokens"], row["sparsity"], row["pair_skip"])
        print(f"{where!s:<28} {name:<7} {row['us']:>9.1f} us  {ratio}")
    for cause, count in sorted(summary.failures.items()):
        print(f"{count} plans failed: {cause}, such as: {summary.examples[cause]}")
    if summary.skipped:
        why = "budget ended, or every plan failed: go on with --resume, or see above"
        print(f"{len(summary.skipped)} sizes without a plan ({why})")
    table = f"table: {path}" if path.exists() else "no table"
    print(f"{summary.measured} measurements in {summary.seconds:.0f} s, {table}")
    if options.out is not None and path.exists():
        print(f"to serve from it: CUTEDSL_KERNELS_TUNED_DIR={folder} CUTEDSL_KERNELS_CACHE_DIR={folder / 'compiled'}")


def _print(options: argparse.Namespace, result: dict[str, Any]) -> None:
    print(json.dumps(result) if options.json else ", ".join(f"{value} {name}" for name, value in result.items()))
