"""Decoding through vLLM: time per token and tokens per second, dense against sparse, same prompts, several batch sizes.

Dense is vLLM's own method in an engine of its own. Each batch size is warmed up once, then timed over whole generations
of two lengths; their difference leaves the prompt out: what remains is decoding.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cutedsl_kernels import UserError

from . import arguments
from .records import device_name, format_table, revision

COLUMNS = (
    "revision",
    "device",
    "model",
    "weights",
    "target",
    "batch",
    "prompt_tokens",
    "new_tokens",
    "ms_per_step",
    "tokens_per_s",
    "dense_ms",
    "ratio",
)
SHORT = 4  # tokens of the shorter generation


def decode_ms(generate: Any, batch: int, prompt_tokens: int, new_tokens: int, vocabulary: int, rounds: int) -> float:
    """Median milliseconds of one decoding step at ``batch`` sequences; generate(prompts, tokens) -> None."""
    gen = torch.Generator().manual_seed(batch)
    prompts = torch.randint(5, vocabulary - 5, (batch, prompt_tokens), generator=gen).tolist()
    generate(prompts, SHORT)
    steps = []
    for _ in range(rounds):
        seconds = {}
        for tokens in (SHORT, SHORT + new_tokens):
            started = time.perf_counter()
            generate(prompts, tokens)
            seconds[tokens] = time.perf_counter() - started
        steps.append((seconds[SHORT + new_tokens] - seconds[SHORT]) / new_tokens * 1e3)
    return statistics.median(steps)


def main(argv: Sequence[str] | None = None, prog: str = "bench.e2e") -> int:
    parser = arguments.Parser(prog, __doc__)
    option = parser.add_argument
    option("model", help="checkpoint folder or hub name")
    option("--profile", type=Path, help="sparsity profile (default the one beside the checkpoint)")
    option("--target", type=arguments.share_list, default=[0.8], help="target sparsities (default 0.8)")
    option("--batch", type=arguments.int_list, default=[1, 8, 32, 128], help="batch sizes (default 1,8,32,128)")
    option("--prompt-tokens", type=int, default=32)
    option("--new-tokens", type=int, default=64, help="decoding steps timed (default 64)")
    option("--rounds", type=int, default=3, help="the median of this many is taken (default 3)")
    option("--weights", choices=("real", "dummy"), default="real", help="dummy: random weights, config.json suffices")
    option("--csv", type=Path, help="append rows to this file")
    try:
        return _run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    try:
        from cutedsl_kernels.integration.vllm.engine import SparseEngine
    except ImportError as error:
        raise UserError(f"vLLM and this package must be installed ({error}): cutedsl-kernels[vllm]") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common: dict[str, Any] = {
        "max_model_len": options.prompt_tokens + options.new_tokens + SHORT + 1,
        "max_num_seqs": max(options.batch),
        "enforce_eager": device.type == "cpu",
    }
    if options.weights == "dummy":
        common |= {"load_format": "dummy", "skip_tokenizer_init": True}
    dense: dict[int, float] = {}
    rows = []
    for target in [None, *options.target]:
        if target is None:
            engine = SparseEngine(options.model, dense=True, **common)
        else:
            engine = SparseEngine(options.model, profile=options.profile, target=target, **common)
        try:
            for batch in options.batch:
                ms = decode_ms(
                    lambda prompts, tokens, engine=engine: _generate(engine, prompts, tokens),
                    batch,
                    options.prompt_tokens,
                    options.new_tokens,
                    engine.model_config.get_vocab_size(),
                    options.rounds,
                )
                if target is None:
                    dense[batch] = ms
                rows.append(_row(options, device, target, batch, ms, dense[batch]))
        finally:
            engine.shutdown()
            del engine
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if options.csv is not None:
        _append(options.csv, rows)
    shown = ("target", "batch", "ms_per_step", "tokens_per_s", "ratio")
    print(format_table(shown, [[row[name] for name in shown] for row in rows]))
    return 0


def _generate(engine: Any, prompts: list[list[int]], tokens: int) -> None:
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)


def _row(
    options: argparse.Namespace, device: torch.device, target: float | None, batch: int, ms: float, dense_ms: float
) -> dict[str, str]:
    values = (
        revision(),
        device_name(device),
        options.model,
        options.weights,
        "dense" if target is None else f"{target:g}",
        batch,
        options.prompt_tokens,
        options.new_tokens,
        f"{ms:.3f}",
        f"{batch / ms * 1e3:.1f}",
        f"{dense_ms:.3f}",
        f"{dense_ms / ms:.3f}",
    )
    return dict(zip(COLUMNS, map(str, values), strict=True))


def _append(path: Path, rows: Sequence[dict[str, str]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"{path}: cannot write the CSV: {error.strerror}: give --csv another place") from None


if __name__ == "__main__":
    raise SystemExit(main())
