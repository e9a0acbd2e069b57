"""`cutedsl-kernels serve-check`: load a model as a server would, run it, and say what happens at each batch size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError


def register(app: typer.Typer) -> None:
    app.command("serve-check")(serve_check)


def serve_check(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name.")],
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Sparsity profile. Default: the one beside the checkpoint.")
    ] = None,
    target: Annotated[
        float | None, typer.Option("--target", help="Target sparsity, 0..1. Default: what a server would choose.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Batch sizes to run; may be given several times.")
    ] = None,
    max_model_len: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 256,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks to shard the model over.")] = 1,
) -> None:
    """Run the whole serving path once: profile, layers, plans, decoding at several batch sizes, dense and sparse."""
    from rich.console import Console
    from rich.table import Table

    from ..integration.vllm.engine import SparseEngine, check_model
    from ..integration.vllm.options import Options, choose_target, find_profile
    from ..sparsity import SparsityProfile

    batches = sorted(set(batch or (1, 4, 16)))
    for name, value, least in (
        ("batch", batches[0], 1),
        ("max-model-len", max_model_len, 32),
        ("tensor-parallel-size", tensor_parallel_size, 1),
    ):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if target is not None and not 0 <= target < 1:
        raise UserError(f"--target must lie in 0..1, got {target:g}")
    config = check_model(model)
    options = Options.collect({"profile": profile, "target_sparsity": target})
    path = find_profile(options, model)
    chosen = choose_target(options, SparsityProfile.load(path))
    longest = (config.get("text_config") or config).get("max_position_embeddings")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    console = Console()
    with Console(stderr=True).status(f"starting vLLM with {model}"):
        engine = SparseEngine(
            model,
            profile=path,
            target=chosen,
            max_model_len=min(max_model_len, longest) if isinstance(longest, int) else max_model_len,
            max_num_seqs=batches[-1],
            tensor_parallel_size=tensor_parallel_size,
            disable_log_stats=True,
        )
    try:
        report = engine.report()
        found = engine.profile
        assert found is not None
        console.print(
            f"model    {model}: {engine.identity.architecture}, {len(engine.layer_names)} layers use the method"
        )
        for layer, reason in report["fallbacks"].items():
            console.print(f"dense    {layer}: {reason}")
        console.print(
            f"profile  {path}: score {found.score}, {found.calibration.tokens} tokens, {found.created.date}",
            soft_wrap=True,
        )
        console.print(f"target   {chosen:g} (the profile reaches {found.max_target:g})")
        console.print(f"plans    {report['summary']}")
        table = Table("batch", "dense ms/step", "sparse ms/step", "dense / sparse", "sparsity", "skipped pairs")
        for size in batches:
            table.add_row(*_measure(engine, size, chosen))
        console.print(table)
    finally:
        engine.shutdown()
    console.print(
        f"serve it with: vllm serve {model} --quantization intra_expert_sparse --hf-overrides "
        f'\'{{"intra_expert_sparsity": {{"profile": "{path}", "target_sparsity": {chosen:g}}}}}\'',
        soft_wrap=True,
        highlight=False,
    )


def _measure(engine: Any, batch: int, target: float) -> list[str]:
    """Decoding 16 tokens for ``batch`` random prompts, dense and at ``target``; then once more, counting."""
    import random

    source = random.Random(batch)
    vocabulary = engine.model_config.get_vocab_size()
    prompts = [[source.randrange(vocabulary) for _ in range(8)] for _ in range(batch)]
    times = []
    for setting in (0.0, target):
        engine.set_target(setting)
        engine.time_decode(prompts, 4)
        times.append(1e3 * engine.time_decode(prompts, 16))
    engine.reset_realised()
    engine.set_counting(True)
    engine.time_decode(prompts, 8)
    engine.set_counting(False)
    layers = list(engine.realised().values())
    sparsity = sum(layer.sparsity for layer in layers) / len(layers)
    skipped = sum(layer.skipped_share for layer in layers) / len(layers)
    return [
        str(batch),
        f"{times[0]:.2f}",
        f"{times[1]:.2f}",
        f"{times[0] / times[1]:.2f}x",
        f"{sparsity:.3f}",
        f"{skipped:.3f}",
    ]
