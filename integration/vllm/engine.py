"""SparseEngine: a vLLM engine whose sparsity can be switched, recorded, counted and compared. Used by calibrate,
evaluate and generate.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from ...calibration import LayerCounters, LayerHistograms
from ...errors import UserError
from ...sparsity import ModelIdentity, SparsityProfile
from .options import METHOD_NAME, OVERRIDES_KEY, Options, find_profile, served_identity

if TYPE_CHECKING:
    from .worker import Setting

Thresholds = Mapping[str, tuple[float | torch.Tensor, float, bool]]


@dataclass(frozen=True)
class ScoreChunk:
    """Next-token log-probabilities at positions start..start+n-1 of one sequence.

    next_tokens: int64 [n], the tokens that follow in the text. log_probs: one fp32 [n, V] CPU tensor for each setting
    asked for.
    """

    sequence: int
    start: int
    next_tokens: torch.Tensor
    log_probs: tuple[torch.Tensor, ...]


class SparseEngine:
    """An offline vLLM engine (in this process) with the intra_expert_sparse method.

    model: folder or hub name. profile: a path or a SparsityProfile; None: the one beside the checkpoint, or none at
    all with ``record``. target: where to start (0 = dense). dense: vLLM's own method instead, as a baseline: then
    nothing below ``llm`` and ``generate`` may be used but score() without settings. Other keywords go to vllm.LLM.

    The default is eager execution, in which thresholds can be switched at will and are applied at every batch size (a
    server computes the large batches of prefill in full, where that is faster). With CUDA graphs (enforce_eager=False
    on a GPU) the target is fixed at start. Raises UserError (one line) for a model that is missing or not an MoE, or
    a profile that does not fit.
    """

    def __init__(
        self,
        model: str,
        *,
        profile: str | os.PathLike[str] | SparsityProfile | None = None,
        target: float = 0.0,
        record: bool = False,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        dense: bool = False,
        **llm_kwargs: Any,
    ) -> None:
        model = os.fspath(model)
        check_model(model)
        self.profile: SparsityProfile | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        overrides: dict[str, Any] = {"without_profile": True}
        if isinstance(profile, SparsityProfile):
            self._scratch = tempfile.TemporaryDirectory(prefix="cutedsl-kernels-")
            saved = Path(self._scratch.name) / "profile.json"
            profile.save(saved)
            path: Path | None = saved
        elif profile is not None:
            path = Path(profile)
        else:
            path = None if record or dense else find_profile(Options.collect(None), model)
        if path is not None and not dense:
            self.profile = SparsityProfile.load(path)
            overrides = {"profile": os.fspath(path), "target_sparsity": target}
        self._dense = dense
        arguments: dict[str, Any] = {
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "use_tqdm_on_load": False,
            "seed": 0,
            **llm_kwargs,
            "tensor_parallel_size": tensor_parallel_size,
        }
        if max_model_len is not None:
            arguments["max_model_len"] = max_model_len
        given = arguments.pop("hf_overrides", None) or {}
        if dense:
            arguments["hf_overrides"] = given
        else:
            arguments["quantization"] = METHOD_NAME
            arguments["hf_overrides"] = {**given, OVERRIDES_KEY: overrides}
        arguments["worker_extension_cls"] = "cutedsl_kernels.integration.vllm.worker.SparsityWorker"
        _prepare_environment(tensor_parallel_size)
        self._fixed = not arguments["enforce_eager"] and torch.cuda.is_available()
        self.llm = _start(model, arguments)
        self.layer_names: list[str] = [] if dense else self._call("sparsity_layers")[0]
        if not dense and not self.layer_names:
            raise UserError(f"{model}: no layer can use {METHOD_NAME}; the log says why for each layer")
        if not dense and not self._fixed:
            self._call("sparsity_exact", True)
        self.target = target

    def _call(self, method: str, *args: Any) -> list[Any]:
        return self.llm.collective_rpc(method, args=args)

    @property
    def tokenizer(self) -> Any:
        return self.llm.get_tokenizer()

    @property
    def model_config(self) -> Any:
        return self.llm.llm_engine.vllm_config.model_config

    @property
    def max_model_len(self) -> int:
        return self.model_config.max_model_len

    @property
    def identity(self) -> ModelIdentity:
        return served_identity(self.model_config.model, self.model_config.hf_config, len(self.layer_names))

    def generate(self, prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Any:
        """vllm.LLM.generate, without a progress bar unless asked."""
        return self.llm.generate(prompts, sampling_params, **{"use_tqdm": False, **kwargs})

    # Switching

    def set_target(self, target: float) -> None:
        """The profile's thresholds for ``target``, on all ranks; 0 = dense. Counters get the label f"{target:g}"."""
        if target == 0:
            settings: Thresholds = dict.fromkeys(self.layer_names, (0.0, 0.0, True))
        elif self.profile is None:
            raise UserError("target sparsity: this engine was started without a sparsity profile")
        else:
            profile = self.profile
            settings = {name: (*profile.thresholds(name, target), profile.router_weighted) for name in self.layer_names}
        self.set_thresholds(settings, label=f"{target:g}", sparsity=target)
        self.target = target

    def set_thresholds(self, settings: Thresholds, *, label: str = "custom", sparsity: float = 0.8) -> None:
        """{layer: (tau, rho, router_weighted)} on all ranks; tau a number or an fp32 tensor that broadcasts to the
        whole model's [E, I].

        ``sparsity``: what the thresholds are expected to give; it only guides the choice of kernels. UserError if the
        engine runs CUDA graphs, in which thresholds are fixed, or if a layer is missing.
        """
        if self._fixed:
            raise UserError("thresholds cannot be switched under CUDA graphs: start the engine with enforce_eager=True")
        missing = [name for name in self.layer_names if name not in settings]
        if missing:
            raise UserError(f"thresholds are missing for layer {missing[0]!r}")
        sent: dict[str, Setting] = {name: settings[name] for name in self.layer_names}
        self._call("sparsity_set", sent, label, sparsity)

    def report(self) -> dict[str, Any]:
        """fallbacks: {layer: reason}; plans: [(largest number of tokens, plan)]; summary: the plans in words;
        compiled_late: kernels compiled since the model was loaded.
        """
        return self._call("sparsity_report")[0]

    # Recording and counting

    def start_recording(self) -> None:
        """Empty histograms on all ranks; what runs from now on is recorded (in addition to being computed)."""
        self._call("sparsity_record", True)

    def read_recording(self) -> LayerHistograms:
        """What was recorded since start_recording, merged over ranks, in the model's layer order. Recording goes on."""
        merged = LayerHistograms()
        for part in self._call("sparsity_histograms"):
            merged.merge_arrays(part)
        return merged

    def stop_recording(self) -> None:
        self._call("sparsity_record", False)

    def set_counting(self, on: bool) -> None:
        """Exact counters of active neurons and skipped pairs, per setting; costs a second gate projection. score()
        does it by itself.
        """
        self._call("sparsity_count", on)

    def reset_realised(self) -> None:
        self._call("sparsity_reset_counters")

    def realised(self, setting: float | str | None = None) -> dict[str, LayerCounters]:
        """Counters per layer since the last reset, for a target (or the label given to set_thresholds); None: the
        current target.
        """
        wanted = self.target if setting is None else setting
        label = wanted if isinstance(wanted, str) else f"{wanted:g}"
        merged: dict[str, LayerCounters] = {}
        copies: dict[str, int] = {}
        for part in self._call("sparsity_counters"):
            for name, counts in part.get(label, {}).items():
                merged.setdefault(name, LayerCounters()).add(counts)
                copies[name] = counts["copies"]
        for name, counters in merged.items():
            counters.pairs //= copies[name]
            counters.skipped_pairs //= copies[name]
        return merged

    # Running text

    def run(self, sequences: Sequence[Sequence[int]]) -> int:
        """Runs prompts of token ids through the model (one token is sampled and thrown away). Returns the number of
        tokens.
        """
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        self.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, detokenize=False))
        return sum(len(sequence) for sequence in sequences)

    def time_decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds per decoded step of a batch of prompts: (time for ``tokens`` >= 2 tokens - time for one) / (tokens
        - 1).
        """
        from vllm import SamplingParams

        def run(count: int) -> float:
            batch = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            begun = time.perf_counter()
            self.generate(batch, SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False))
            return time.perf_counter() - begun

        first = run(1)
        return max(run(tokens) - first, 0.0) / (tokens - 1)

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        settings: Sequence[float | Thresholds] | None = None,
        chunk_tokens: int = 256,
        count: bool = True,
    ) -> Iterator[ScoreChunk]:
        """Full next-token log-probabilities of every position but the last of each sequence, chunk by chunk.

        sequences: token ids, each of length 2..max_model_len - 1. settings: targets (0 = dense) or thresholds to
        compare on the same text; None: the present setting only. Memory held: one chunk's [chunk_tokens, V] per
        setting here, one sequence's hidden states per setting in the worker. With ``count`` the realised sparsity
        goes to realised(target), or realised("setting i") for thresholds. Leaves the engine at the last setting.
        """
        counted = count and not self._dense
        if counted:
            self.set_counting(True)
        try:
            for index, sequence in enumerate(sequences):
                yield from self._score_one(index, list(sequence), settings, chunk_tokens)
        finally:
            self._call("sparsity_capture", None)
            self._call("sparsity_release")
            if counted:
                self.set_counting(False)

    def _score_one(
        self, index: int, sequence: list[int], settings: Sequence[float | Thresholds] | None, chunk_tokens: int
    ) -> Iterator[ScoreChunk]:
        if not 2 <= len(sequence) < self.max_model_len:
            raise ValueError(f"sequences must have 2..{self.max_model_len - 1} tokens, got {len(sequence)}")
        slots = 1 if settings is None else len(settings)
        for slot in range(slots):
            if settings is not None:
                setting = settings[slot]
                if isinstance(setting, Mapping):
                    self.set_thresholds(setting, label=f"setting {slot}")
                else:
                    self.set_target(setting)
            self._call("sparsity_capture", slot)
            self.run([sequence])
        self._call("sparsity_capture", None)
        following = torch.tensor(sequence[1:], dtype=torch.int64)
        for start in range(0, len(sequence) - 1, chunk_tokens):
            stop = min(start + chunk_tokens, len(sequence) - 1)
            chunks = []
            for slot in range(slots):
                answers = self._call("sparsity_log_probs", slot, start, stop)
                chunks.append(next(answer for answer in answers if answer is not None))
            yield ScoreChunk(index, start, following[start:stop], tuple(chunks))

    def shutdown(self) -> None:
        """Ends the engine's processes and frees its memory, so that another engine can start in this process. Once."""
        if not hasattr(self, "llm"):
            return
        core = getattr(self.llm.llm_engine, "engine_core", None)
        if core is not None:
            core.shutdown()
        del self.llm
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        if self._scratch is not None:
            self._scratch.cleanup()


def check_model(model: str) -> dict[str, Any]:
    """config.json of ``model`` (a folder, or a hub name). UserError, one line: missing, unreadable, or not an MoE."""
    from ...shapes import MoEShape

    folder = Path(model)
    path: Path | None = folder / "config.json" if folder.is_dir() else None
    if path is None and not model.startswith((".", "/")) and model.count("/") == 1:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except Exception as error:
            raise UserError(f"model {model}: no such folder, and not on the hub ({type(error).__name__})") from None
    if path is None or not path.is_file():
        raise UserError(f"model {model}: no such checkpoint folder (one that holds config.json)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {model}: config.json cannot be read: {error}") from None
    try:
        MoEShape.from_config(config)
    except ValueError as error:
        raise UserError(f"model {model}: {error}") from None
    return config


def _prepare_environment(tensor_parallel_size: int) -> None:
    """Settings that vLLM takes from the environment, where the user has not made a choice."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if tensor_parallel_size > 1:
            cores = sorted(os.sched_getaffinity(0))
            share = max(1, len(cores) // tensor_parallel_size)
            groups = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(tensor_parallel_size)]
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, g)) for g in groups))


def _start(model: str, arguments: dict[str, Any]) -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"this command needs vLLM, which cannot be imported here ({error}): see docs/serving.md"
        ) from None
    from . import register
    from .config import MethodError

    register()  # vLLM finds the entry point of an installed package by itself; a source tree has none
    try:
        return LLM(model=model, **arguments)
    except MethodError as error:
        raise UserError(str(error)) from None
    except ValueError as error:  # a configuration that vLLM refuses
        text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        reason = text.removeprefix("Value error, ").strip().partition("\n")[0]
        raise UserError(f"{model}: vLLM refuses to start: {reason}") from None
