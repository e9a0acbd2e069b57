"""A whole grid of layer measurements under a time budget, most important rows first.

    python -m bench.suite --preset h200-first --budget-s 540 --csv out.csv

A parent process that never touches the GPU runs a worker. When the worker loses the device (a fault in a kernel under
test) or stops making progress (a kernel that hangs), the parent ends it, notes the point and plan it was at, and starts
another that goes on behind it. Rows are on disk as they are measured; starting the command again with the same --csv
and --journal continues where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from cutedsl_kernels import KNOWN_MODELS, MoEShape, UserError

from . import arguments
from .baselines import make_baselines
from .layer import HEADER, DeviceLost, Layer, LayerBench, Options
from .problems import Rule
from .records import CsvWriter

DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FULL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SWEEP = (0.0, 0.5, 0.7, 0.85, 0.9)
ROUTED = Rule(0.9, 0.35, True)
LEAST_BUDGET_S = 5.0  # with less left no worker is started
WORKER_LOST = 3
WORKER_OUT_OF_TIME = 4


@dataclass(frozen=True)
class Point:
    """One layer at one T: the baselines once, then every rule under every plan."""

    model: str
    num_tokens: int
    rules: tuple[Rule, ...]
    routing: str = "uniform"
    iou: float | None = None

    def step(self, rule: Rule | None, plan: str) -> str:
        """Name of one step in the journal; rule None for the baselines."""
        shares = "" if rule is None else f" s={rule.sparsity:g} skip={rule.pair_skip:g} rw={int(rule.router_weighted)}"
        return f"{self.model} T={self.num_tokens} {self.routing} iou={self.iou}{shares} {plan}"


def _decode(model: str, tokens: Sequence[int], shares: Sequence[float]) -> Iterator[Point]:
    rules = tuple(Rule(s) for s in shares)
    return (Point(model, t, rules) for t in tokens)


def h200_first() -> Iterator[Point]:
    """The first figures on a device: one model at its cutoff, the routed rule at all sizes, the sweep, other models."""
    main = "qwen3.5-35b-a3b"
    yield from _decode(main, DECODE, (0.845,))
    yield from (Point(main, t, (ROUTED,)) for t in FULL)
    yield from _decode(main, DECODE, SWEEP)
    others = ("qwen3-30b-a3b", "qwen3.5-122b-a10b", "olmoe-1b-7b")
    for model in others:
        yield from _decode(model, DECODE, SWEEP)
    for model in others:
        yield from (Point(model, t, (ROUTED,)) for t in FULL)
    yield from (Point(main, t, (Rule(0.85),), routing="zipf") for t in DECODE)
    yield from (Point(main, t, (Rule(0.85),), iou=0.17) for t in DECODE)


def h200_more() -> Iterator[Point]:
    """The remaining known models at their cutoffs, decode sizes."""
    for model in ("deepseek-v2-lite", "qwen3.5-397b-a17b", "llama-4-maverick", "granite-1b-a400m", "mixtral-8x7b"):
        share = KNOWN_MODELS[model].cutoff or arguments.DEFAULT_SPARSITY
        yield from _decode(model, DECODE, (share,))


def short() -> Iterator[Point]:
    """A few minutes on any device."""
    if torch.cuda.is_available():
        yield from _decode("qwen3.5-35b-a3b", (1, 8, 32, 128), (0.845,))
        yield from (Point("qwen3.5-35b-a3b", t, (ROUTED,)) for t in (1, 8, 32, 4096))
    else:
        yield from _decode("olmoe-1b-7b", (1, 4), (0.85,))
        yield from _decode("qwen3.5-35b-a3b", (1, 4), (0.85,))
        yield Point("qwen3.5-35b-a3b", 4, (ROUTED,))


def self_test() -> Iterator[Point]:
    """Tiny made-up layers, to try the machinery itself in seconds."""
    for num_tokens in (1, 4):
        yield Point("E=8,H=128,I=64,k=2", num_tokens, (Rule(0.8), ROUTED))


PRESETS = {"h200-first": h200_first, "h200-more": h200_more, "short": short, "self-test": self_test}


def layer_named(name: str) -> Layer:
    """A known model, or a shape in its key form ``E=8,H=128,I=64,k=2``."""
    if name in KNOWN_MODELS:
        known = KNOWN_MODELS[name]
        return Layer(name, known.shape, known.activation, known.router_weight_on_input)
    sizes = {part[0]: int(part[2:]) for part in name.split(",")}
    return Layer(name, MoEShape(sizes["E"], sizes["k"], sizes["H"], sizes["I"]))


class Journal:
    """One JSON line per event, on disk at once: which steps (point and plan) were begun, done or left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, step: str, note: str = "") -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, "note": note, "time": time.time()}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, str]]:
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a worker that was killed while writing it
                continue
        return found

    def closed(self) -> set[str]:
        return {event["step"] for event in self.events() if event["event"] in ("done", "left out")}

    def left_out(self) -> set[str]:
        return {event["step"] for event in self.events() if event["event"] == "left out"}

    def open_step(self) -> str | None:
        """The step begun last, if nothing has closed it."""
        begun = [event["step"] for event in self.events() if event["event"] == "begin"]
        if not begun:
            return None
        last = max(i for i, event in enumerate(self.events()) if event["event"] == "begin")
        ended = any(event["event"] in ("done", "left out") for event in self.events()[last + 1 :])
        return None if ended else begun[-1]


def work(options: argparse.Namespace, journal: Journal) -> int:
    """The worker: all steps not closed yet, in order."""
    deadline = time.monotonic() + options.budget_s
    device = arguments.device_of(options.device)
    baselines = make_baselines(options.baselines or _default_baselines(device), options.tune_s)
    plans = options.plans or (["serving"] if find_spec("vllm") is not None else ["auto"])
    run = Options(device, options.replays, options.seed, options.calls, options.copies)
    writer = CsvWriter(options.csv) if options.csv else None
    bench = LayerBench(run, baselines, writer)
    print(
        f"{bench.machine.values['gpu']}, copy {bench.copy_gbps:.0f} GB/s, revision {bench.machine.values['revision']}"
    )
    print(HEADER, flush=True)
    for point in _points(options):
        closed = journal.closed()
        todo = [(r, p) for r in point.rules for p in plans if point.step(r, p) not in closed]
        if not todo or point.step(None, "baselines") in journal.left_out():
            continue
        if time.monotonic() > deadline:
            return WORKER_OUT_OF_TIME
        try:
            journal.write("begin", point.step(None, "baselines"))
            opened = bench.open(
                layer_named(point.model),
                point.num_tokens,
                routing=point.routing,
                iou=point.iou,
                sparsity=point.rules[0].sparsity,
            )
            journal.write("done", point.step(None, "baselines"))
            for rule, plan in todo:
                journal.write("begin", point.step(rule, plan))
                opened.run(rule, plan)
                journal.write("done", point.step(rule, plan))
                sys.stdout.flush()
        except DeviceLost as error:
            print(f"device lost: {error}", flush=True)
            return WORKER_LOST
    return 1 if bench.failures else 0


def _points(options: argparse.Namespace) -> list[Point]:
    """Those of the preset that --only names."""
    return [point for point in PRESETS[options.preset]() if options.only in point.step(None, "")]


def _default_baselines(device: torch.device) -> list[str]:
    return ["torch-dense"] if device.type == "cpu" else ["vllm-triton", "torch-grouped-mm"]


def supervise(command: Sequence[str], budget_s: float, stall_s: float, journal: Journal) -> int:
    """The parent: runs workers until one ends by itself or the budget is spent. 0; 1: paths left out; 2: bad input.

    command: what starts a worker, but for its journal and its share of the budget.
    """
    deadline = time.monotonic() + budget_s
    lost = 0
    while True:
        left = deadline - time.monotonic()
        if left <= LEAST_BUDGET_S:
            print("budget spent: run the same command again to go on")
            return 1 if lost else 0
        words = [*command, "--journal", str(journal.path), "--worker-budget-s", f"{left:.0f}"]
        began = time.time()
        worker = subprocess.Popen(words)
        try:
            code = _watch(worker, journal, began, stall_s, deadline)
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        if code in (0, 1, 2):
            return 1 if lost and code == 0 else code
        if code == WORKER_OUT_OF_TIME:
            print("budget spent: run the same command again to go on")
            return 1 if lost else 0
        if time.monotonic() >= deadline:
            continue
        step = journal.open_step()
        if step is None:
            print(f"worker ended with code {code} outside any step: giving up", file=sys.stderr)
            return 3
        lost += 1
        journal.write("left out", step, f"worker ended with code {code}")
        print(f"LEFT OUT {step}: worker ended with code {code}", flush=True)


def _watch(worker: subprocess.Popen[bytes], journal: Journal, began: float, stall_s: float, deadline: float) -> int:
    """Exit code of the worker; it is killed after stall_s without an event in the journal, or at the deadline."""
    while True:
        try:
            return worker.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            pass
        events = journal.events()
        latest = max([began, *(float(event["time"]) for event in events[-1:])])
        if time.time() - latest > stall_s or time.monotonic() > deadline:
            worker.kill()
            return worker.wait()


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = arguments.Parser(prog, __doc__)
    option = parser.add_argument
    option("--preset", choices=tuple(PRESETS), default="short")
    option("--budget-s", type=float, default=540.0, help="wall-clock seconds for everything")
    option("--plans", type=arguments.plan_list, help="as for bench.layer (default serving with vLLM, else auto)")
    option("--baselines", type=arguments.name_list, help="as for bench.layer")
    option("--tune-s", type=float, default=20.0, help="as for bench.layer")
    option("--only", default="", help="only points whose name contains this, such as 'qwen3.5-35b-a3b T=8 '")
    option("--journal", type=Path, help="progress file (default beside --csv)")
    option("--fresh", action="store_true", help="measure everything again instead of going on")
    option("--stall-s", type=float, default=120.0, help="a worker without progress for this long is ended")
    option("--list", action="store_true", help="print the points in order and exit")
    option("--worker-budget-s", type=float, help=argparse.SUPPRESS)
    arguments.add_run(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "bench.suite") -> int:
    """Exit code: 0, 1 when a path was left out, 2 for bad input, 3 when a worker cannot start."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = build_parser(prog).parse_args(argv)
    try:
        if options.list:
            for point in PRESETS[options.preset]():
                for rule in point.rules:
                    print(point.step(rule, ""))
            return 0
        if options.worker_budget_s is not None:
            options.budget_s = options.worker_budget_s
            return work(options, Journal(options.journal))
        if options.budget_s <= 0:
            raise UserError(f"--budget-s must be positive, got {options.budget_s:g}")
        if not _points(options):
            raise UserError(f"--only {options.only!r} names no point of {options.preset}: see --list")
        make_baselines(options.baselines or [])
        if options.csv:
            CsvWriter(options.csv).close()
        command = [sys.executable, "-m", __spec__.name, *_without_journal(argv)]
        with tempfile.TemporaryDirectory() as folder:
            path = options.journal or (options.csv and options.csv.with_suffix(".journal")) or Path(folder, "journal")
            if options.fresh:
                path.unlink(missing_ok=True)
            return supervise(command, options.budget_s, options.stall_s, Journal(path))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _without_journal(argv: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in argv:
        if skip or word.startswith("--journal="):
            skip = False
        elif word == "--journal":
            skip = True
        else:
            kept.append(word)
    return kept


if __name__ == "__main__":
    raise SystemExit(main())
