"""Command-line arguments that several benchmarks share. argparse, so that they run where typer is not installed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from cutedsl_kernels import KNOWN_MODELS, MoEShape, UserError

if TYPE_CHECKING:
    from .layer import Layer, Options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_MODEL = "qwen3.5-35b-a3b"
DEFAULT_MODEL_CPU = "olmoe-1b-7b"
DEFAULT_SPARSITY = 0.85


class Parser(argparse.ArgumentParser):
    """Bad arguments give one line and exit code 2."""

    def __init__(self, prog: str, doc: str | None) -> None:
        text = (doc or "").split("\n\n")[0].strip()
        super().__init__(prog=prog, description=text, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def int_list(text: str) -> list[int]:
    values = [part.strip() for part in text.split(",")]
    if not all(value.isdigit() and int(value) > 0 for value in values):
        raise argparse.ArgumentTypeError(f"must be positive integers separated by commas, got {text!r}")
    return [int(value) for value in values]


def at_least(least: int) -> Callable[[str], int]:
    """Type of an option that must be an integer of ``least`` or more."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return value

    return read


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in 0..1 (1 excluded), got {text!r}")
    return value


def share_list(text: str) -> list[float]:
    return [share(part) for part in text.split(",")]


def name_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def plan_list(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def shape_of(text: str) -> MoEShape:
    """``E,H,I,k``."""
    try:
        return MoEShape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_shape(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--model", help=f"one of {', '.join(KNOWN_MODELS)} (default {DEFAULT_MODEL}; on a CPU {DEFAULT_MODEL_CPU})"
    )
    group.add_argument("--shape", type=shape_of, help="E,H,I,k instead of a model")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks the layer is split over")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="cuda, cuda:1 or cpu (default cuda where there is one)")
    parser.add_argument("--csv", type=Path, default=None, help="append rows to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replays", type=at_least(2), default=12, help="replays the median is taken over")
    parser.add_argument(
        "--calls", type=at_least(1), default=None, help="calls per replay (default 24, fewer for large T)"
    )
    parser.add_argument(
        "--copies",
        type=at_least(1),
        default=None,
        help="weight copies in turn (default enough to leave L2 cold)",
    )


def device_of(text: str | None) -> torch.device:
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UserError(f"--device must be cuda, cuda:N or cpu, got {text!r}") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device must be cuda, cuda:N or cpu, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no CUDA device here: use --device cpu, or run `cutedsl-kernels doctor`"
        )
    return device


def layer_of(options: argparse.Namespace, device: torch.device) -> Layer:
    """The layer that --model or --shape, --tp and --dtype describe."""
    from .layer import Layer

    dtype = DTYPES[options.dtype]
    if options.shape is not None:
        name, shape, activation, on_input = options.shape.key, options.shape, "silu", False
    else:
        name = options.model or (DEFAULT_MODEL if device.type == "cuda" else DEFAULT_MODEL_CPU)
        known = KNOWN_MODELS.get(name)
        if known is None:
            raise UserError(
                f"--model must be one of {', '.join(KNOWN_MODELS)}, got {name!r}: use --shape E,H,I,k for another"
            )
        shape, activation, on_input = known.shape, known.activation, known.router_weight_on_input
    if options.tp != 1:
        try:
            shape = shape.shard(options.tp)
        except (ValueError, ZeroDivisionError):
            raise UserError(f"--tp must divide intermediate_size {shape.intermediate_size}, got {options.tp}") from None
        name = f"{name}/tp{options.tp}"
    return Layer(name, shape, activation, on_input, dtype)


def default_sparsity(model: str) -> float:
    """The model's published cutoff, or DEFAULT_SPARSITY."""
    known = KNOWN_MODELS.get(model.partition("/")[0])
    return known.cutoff if known is not None and known.cutoff else DEFAULT_SPARSITY


def run_options(options: argparse.Namespace, device: torch.device) -> Options:
    from .layer import Options

    return Options(device, options.replays, options.seed, options.calls, options.copies)
