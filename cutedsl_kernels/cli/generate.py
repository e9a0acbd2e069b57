"""`cutedsl-kernels generate`: the dense model and the sparse one continue the same prompts, side by side."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option("--prompt-file", help="A file with one prompt; may be given several times.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option("--target", help="Sparsity of the sparse model, 0..1. Default: what a server would choose."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Sparsity profile. Default: the one beside the checkpoint.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks to shard the model over.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the texts and figures here.")] = None,
) -> None:
    """Text of the dense and of the sparse model for the same prompts, with tokens per second of both."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..integration.vllm.options import Options, choose_target
    from ..quality.engine_eval import open_profile, start_engine
    from ..quality.metrics import agreement_length
    from ..quality.report import check_writable, write_json
    from .evaluate import check_counts, check_targets

    prompts = _prompts(prompt, prompt_file)
    check_targets([] if target is None else [target])
    check_counts(max_new_tokens=max_tokens, tensor_parallel_size=tensor_parallel_size)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature must be at least 0, got {temperature:g}")
    check_writable("--json", json_path)
    if target is None:
        target = choose_target(Options.collect(None), open_profile(model, profile)[1])
    engine = start_engine(model, profile, [target], max_len=None, tensor_parallel_size=tensor_parallel_size)
    try:
        sequences = [engine.tokenizer.encode(text) for text in prompts]
        longest = engine.max_model_len - max_tokens
        if longest < 1:
            raise UserError(
                f"--max-tokens must be less than this model's {engine.max_model_len} positions, got {max_tokens}"
            )
        for index, sequence in enumerate(sequences):
            if not 1 <= len(sequence) <= longest:
                raise UserError(
                    f"prompt {index + 1} has {len(sequence)} tokens; "
                    f"this model takes 1..{longest} with --max-tokens {max_tokens}"
                )
        dense, dense_rate = _run(engine, sequences, 0.0, max_tokens, temperature)
        sparse, sparse_rate = _run(engine, sequences, target, max_tokens, temperature)
    finally:
        engine.shutdown()
    console = Console()
    agreements = [agreement_length(a.token_ids, b.token_ids) for a, b in zip(dense, sparse, strict=True)]
    for index, text in enumerate(prompts):
        table = Table(
            title=f"prompt {index + 1}; the first {agreements[index]} tokens agree",
            title_justify="left",
            show_lines=True,
        )
        table.add_column(f"dense, {dense_rate:.1f} tokens/s", ratio=1, overflow="fold")
        table.add_column(f"sparse {target:.0%}, {sparse_rate:.1f} tokens/s", ratio=1, overflow="fold")
        head = Text(text[-400:], style="dim")
        table.add_row(head + Text(dense[index].text, style="not dim"), head + Text(sparse[index].text, style="not dim"))
        console.print(table)
    console.print(
        f"{len(prompts)} prompts at once, at most {max_tokens} new tokens each; tokens/s include the prompts.\n"
        "Dense is this engine at sparsity 0."
    )
    if json_path is not None:
        results = [
            {"prompt": p, "dense": a.text, "sparse": b.text, "agreement_tokens": n}
            for p, a, b, n in zip(prompts, dense, sparse, agreements, strict=True)
        ]
        figures = {"dense_tokens_per_s": dense_rate, "sparse_tokens_per_s": sparse_rate, "target": target}
        write_json(json_path, {"model": model, **figures, "results": results})


def _prompts(prompt: list[str] | None, files: list[Path] | None) -> list[str]:
    prompts = list(prompt or [])
    for path in files or []:
        try:
            prompts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"--prompt-file {path}: cannot be read: {reason}") from None
    if not prompts:
        raise UserError("no prompt given: use --prompt TEXT or --prompt-file FILE")
    return prompts


def _run(
    engine: Any, sequences: list[list[int]], target: float, max_tokens: int, temperature: float
) -> tuple[list[Any], float]:
    """Completions and new tokens per second, after a short warm-up of the same batch size."""
    from vllm import SamplingParams

    engine.set_target(target)
    prompts = [{"prompt_token_ids": sequence} for sequence in sequences]
    engine.generate(prompts, SamplingParams(max_tokens=2, temperature=temperature, seed=0))
    start = time.perf_counter()
    answers = engine.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=0))
    seconds = time.perf_counter() - start
    completions = [answer.outputs[0] for answer in answers]
    return completions, sum(len(completion.token_ids) for completion in completions) / seconds
