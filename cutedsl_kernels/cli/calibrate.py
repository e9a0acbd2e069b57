"""`cutedsl-kernels calibrate`: find the thresholds of a checkpoint for a range of target sparsities, by running it
through vLLM.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError
from ..quality import LEARN_STEPS
from ..sparsity import PROFILE_FILENAME

if TYPE_CHECKING:
    from rich.console import Console

    from ..integration.vllm.calibrate import LearnedParts

MINIMUM_TOKENS = 1024
AUTO_WITHOUT_LEARNING = "moments-routed"  # what --score auto is where thresholds cannot be learned
SHARE_OF_GPU = 0.4  # of its free memory that a checkpoint may take to be learned from: down rows are there twice
SHARE_TOLERANCE = 0.02  # of the pairs, by which the layers may miss the share to skip, in the mean, without a word
WIDE_GAP = 0.2  # between two targets
LARGEST_ON_CPU = 100_000_000  # bytes of a checkpoint that --score auto learns from without a GPU: minutes


def register(app: typer.Typer) -> None:
    app.command()(calibrate)


def calibrate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub name of a Mixture-of-Experts model.")],
    text: Annotated[list[Path], typer.Option("--text", help="Text file, UTF-8; may be given several times.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help=f"Profile to write. Default: {PROFILE_FILENAME} beside the checkpoint."),
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            help="What a neuron is judged by: gate (the paper's), down, up-down, moments or learned, each also with "
            "-routed: times the routing weight. docs/thresholds.md explains them. auto: learned-routed where the model "
            "can be opened for training in the memory there is, else moments-routed."
        ),
    ] = "auto",
    learn_steps: Annotated[
        int, typer.Option(help="Steps of training for the scores learned and learned-routed.")
    ] = LEARN_STEPS,
    skip_pairs: Annotated[
        str,
        typer.Option(
            help="Share of (token, expert) pairs to skip whole, those of lowest routing weight; 0..1, or auto: chosen "
            "together with the sparsity, for --batch tokens at once."
        ),
    ] = "0",
    batch: Annotated[int, typer.Option(help="Tokens at once that --skip-pairs auto chooses for.")] = 1,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Sparsity per layer for an average: uniform; shared (one threshold); greedy or fisher (measured); "
            "learned (with the scores learned). Default: learned with those scores, else fisher; uniform where a fixed "
            "share of pairs is skipped."
        ),
    ] = None,
    target: Annotated[
        list[float] | None,
        typer.Option("--target", help="Rows of the table, 0..1; may be given several times. Default: 0.05 to 0.99."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on, spread over the text.")] = 32768,
    max_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks to shard the model over.")] = 1,
    enable_expert_parallel: Annotated[bool, typer.Option(help="Shard by experts instead of by neurons.")] = False,
) -> None:
    """Write the sparsity profile of a model: per layer, the thresholds for each target sparsity."""
    from ..calibration import DEFAULT_TARGETS
    from ..quality.budgets import BUDGETS
    from ..quality.scores import SCORES

    if score not in (*SCORES, "auto"):
        raise UserError(f"--score must be one of auto, {', '.join(SCORES)}, got {score!r}")
    if budget is not None and budget not in (*BUDGETS, "learned"):
        raise UserError(f"--budget must be one of {', '.join(BUDGETS)}, learned, got {budget!r}")
    if budget == "learned" and not score.startswith("learned"):
        raise UserError(f"--budget learned needs --score learned-routed (or learned), got --score {score}")
    share = _share(skip_pairs)
    targets = sorted(set(target or DEFAULT_TARGETS))
    for value in targets:
        if not 0 < value < 1:
            raise UserError(f"--target must lie between 0 and 1, got {value:g}")
    for name, number, least in (
        ("max-tokens", max_tokens, MINIMUM_TOKENS),
        ("max-len", max_len, 16),
        ("tensor-parallel-size", tensor_parallel_size, 1),
        ("learn-steps", learn_steps, 1),
        ("batch", batch, 1),
    ):
        if number < least:
            raise UserError(f"--{name} must be at least {least}, got {number}")

    if batch != 1 and share != "auto":
        raise UserError("--batch is for --skip-pairs auto only: leave it out, or ask for auto")
    if learn_steps != LEARN_STEPS and score != "auto" and SCORES[score].weight != "learned":
        raise UserError(f"--learn-steps is for the scores learned and learned-routed, got --score {score}")
    if isinstance(share, float) and share > targets[-1]:
        raise UserError(
            f"--skip-pairs {share:g} is more than the largest --target {targets[-1]:g}: skipped pairs are a part of it"
        )

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..integration.vllm.calibrate import calibrate_profile, planned_tokens
    from ..integration.vllm.engine import SparseEngine, check_model
    from ..quality.engine_eval import able_length
    from ..quality.text import cut_sequences, read_texts

    words, text_hash = read_texts(text)
    if len(words) < MINIMUM_TOKENS:  # no tokenizer gives more tokens than bytes
        _too_short(len(words.encode()))
    config = check_model(model)
    out = _check_out(out, model)
    max_len = able_length(config, max_len)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console = Console(stderr=True)
    learned, auto = None, score == "auto"
    if auto:
        score, reason = learnable(model)
        console.print(f"score {score}: {reason}")
    if SCORES[score].weight == "learned":

        def learn() -> LearnedParts:
            return _learn(model, words, score, learn_steps, max_tokens, max_len, console)

        score, learned = _learn_or_give_up(score, learn, auto and budget != "learned", console.print)
    if budget is None:  # a layer cannot be less sparse than its share of skipped pairs
        measured = "learned" if SCORES[score].weight == "learned" else "fisher"
        budget = measured if share in (0, "auto") else "uniform"
    with console.status(f"starting vLLM with {model}"):
        engine = SparseEngine(
            model,
            record=True,
            max_model_len=max_len + 1,
            tensor_parallel_size=tensor_parallel_size,
            enable_expert_parallel=enable_expert_parallel,
            disable_log_stats=True,
        )
    try:
        sequences = cut_sequences(words, engine.tokenizer.encode, max_tokens=max_tokens, max_len=max_len)
        tokens = sum(map(len, sequences))
        if tokens < MINIMUM_TOKENS:
            _too_short(tokens)
        columns = (
            TextColumn("calibrating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("calibrating", total=planned_tokens(sequences, targets, score))
            profile = calibrate_profile(
                engine,
                sequences,
                text_sha256=text_hash,
                max_len=max_len,
                score=score,
                skip_pairs=share,
                targets=targets,
                budget=budget,
                out=out,
                progress=lambda done: progress.advance(task, done),
                learned=learned,
                batch=batch,
            )
    finally:
        engine.shutdown()
    profile.save(out)
    less = isinstance(share, float) and share > targets[0]
    print(
        f"{out}: {len(profile.layers)} layers, score {score}, budget {budget}, skipped pairs {skip_pairs}"
        f"{' (at smaller targets as many as the target)' if less else ''}, "
        f"targets {targets[0]:g} to {targets[-1]:g}, from {tokens} tokens"
    )
    if isinstance(share, float):
        reached = sum(table.pair_skip(targets[-1]) or 0.0 for table in profile.layers.values()) / len(profile.layers)
        if reached < min(share, targets[-1]) - SHARE_TOLERANCE:
            print(
                f"only {100 * reached:.1f} % of the pairs can be skipped at {targets[-1]:g}: routing weights are equal"
            )
    wide = [(a, b) for a, b in pairwise(targets) if b - a > WIDE_GAP]
    if wide:
        print(
            f"between {' and '.join(f'{a:g} and {b:g}' for a, b in wide)} thresholds are interpolated over a wide gap "
            "and may miss a target by far: give a --target there to serve there"
        )
    if profile.neurons is not None:
        print(f"{out.with_name(profile.neurons.file)}: per-neuron parts, {profile.neurons.size} bytes; keep it there")


def _learn_or_give_up(
    score: str, learn: Callable[[], LearnedParts], auto: bool, say: Callable[[str], Any]
) -> tuple[str, LearnedParts | None]:
    """(score, parts). If ``learn`` fails: the error where the score was asked for, else a line and another score."""
    import gc

    import torch

    learned = None
    try:
        learned = learn()
    except Exception as error:  # a model that transformers opens in another way, or not in this memory
        if not auto:
            raise
        score = AUTO_WITHOUT_LEARNING
        say(f"score {score}: learning failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    gc.collect()  # the model must be gone before the engine starts
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return score, learned


def _learn(
    model: str, words: str, score: str, steps: int, max_tokens: int, max_len: int, console: Console
) -> LearnedParts:
    """Trains thresholds in plain torch."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from rich.progress import Progress
    from transformers import AutoTokenizer

    from ..integration.vllm.calibrate import LearnedParts
    from ..quality.hf import MoEModel
    from ..quality.learned import learn_thresholds
    from ..quality.scores import SCORES
    from ..quality.text import cut_sequences

    with console.status(f"opening {model} to learn thresholds"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        opened = MoEModel.load(model, device, torch.bfloat16 if device == "cuda" else torch.float32)
        encode = AutoTokenizer.from_pretrained(model).encode
    sequences = cut_sequences(words, encode, max_tokens=2 * max_tokens, max_len=max_len)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("learning", total=steps)
        found = learn_thresholds(
            opened,
            sequences,
            router_weighted=SCORES[score].router_weighted,
            steps=steps,
            progress=lambda done: progress.advance(task, done),
        )
        return LearnedParts(found.factors(opened.layers), found.budget)


def learnable(model: str) -> tuple[str, str]:
    """(score, reason): what --score auto is for this model.

    Learning opens the whole checkpoint through transformers on one device, with room for activations: its files may
    take SHARE_OF_GPU of the free memory of the GPU, or without one LARGEST_ON_CPU bytes.
    """
    import torch

    folder = Path(model)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if not size:
        return AUTO_WITHOUT_LEARNING, f"{model} is no folder of safetensors; --score learned-routed would open it"
    if torch.cuda.is_available():
        room = int(SHARE_OF_GPU * torch.cuda.mem_get_info()[0])
        where = f"{SHARE_OF_GPU:.0%} of the free memory of the GPU"
    else:
        room, where = LARGEST_ON_CPU, "the limit for learning on a CPU"
    if size > room:
        return AUTO_WITHOUT_LEARNING, f"the checkpoint has {size / 1e9:.2f} GB, {where} is {room / 1e9:.2f} GB"
    return "learned-routed", f"the checkpoint has {size / 1e9:.2f} GB, within {where}"


def _share(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UserError(f"--skip-pairs must be a share in 0..1, or auto, got {text}")
    return value


def _too_short(tokens: int) -> None:
    raise UserError(f"--text has {tokens} tokens, at least {MINIMUM_TOKENS} are needed to calibrate: give more text")


def _check_out(out: Path | None, model: str) -> Path:
    """Where to write, checked by writing there before the model is loaded."""
    if out is None:
        if not Path(model).is_dir():
            raise UserError(f"--out is needed: {model} is not a folder that the profile could be put into")
        out = Path(model) / PROFILE_FILENAME
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, for example {out / PROFILE_FILENAME}")
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}") from None
    return out
