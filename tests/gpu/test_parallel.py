"""Two sm_90 GPUs against one: real vLLM engines under tensor, expert and data parallelism, dense and sparse.

python -m pytest -m gpu -s tests/gpu/test_parallel.py      (needs vLLM; nothing need be installed; about 10 minutes)

The measure is the definition: a transformers model in fp32 whose experts run sparse_moe_ref, on the tokens that the
engine saw and decoded. Parallel engines run in bf16, as the one-GPU engine does, and may be off by twice what that one
is off by. So no tokens are compared, which differ as soon as two of them are nearly equally likely. Batches are kept so
small that all of them, prefill too, run the sparse kernels: a server would compute large ones in full.

Every engine is a process of its own (parallel_engine.py) and starts once. The one-GPU engines, one for each model, run
first, side by side; they make the profiles and run both targets in eager mode.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "tests" / "integration")]  # source_tree; hf_reference
TWO_HOPPERS = torch.cuda.device_count() >= 2 and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not TWO_HOPPERS, reason="needs two sm_90 GPUs")]

WORKER = Path(__file__).with_name("parallel_engine.py")
SPARSE = 0.8
EXPERTS, NEURONS, VOCABULARY = 16, 256, 256
MAX_BATCH = 8  # tokens of a rank at once: data-parallel ranks gather twice as many, which must still run a kernel
DECODED = 12
LIMIT_S = 240  # an engine starts in 70 s where nothing has been imported before

ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": MAX_BATCH,
    "enable_chunked_prefill": True,
    "max_logprobs": VOCABULARY,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 2**28,
    "attention_backend": "TRITON_ATTN",
}
GRAPHS = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": NEURONS,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
# Plain thresholds for one model; for the other one per neuron, which have to be cut for the ranks like the weights.
SCORES = {"qwen3-moe": "gate-routed", "glm4-moe": "moments-routed"}


@dataclass(frozen=True)
class Case:
    """options: of the engine. data_parallel: ranks that are processes of their own. owned: the experts of each rank."""

    name: str
    model: str
    targets: tuple[float, ...]
    options: dict[str, Any]
    neurons: int
    owned: tuple[range, range]
    data_parallel: int = 1


EVERYWHERE = (range(EXPERTS), range(EXPERTS))
HALVES = (range(EXPERTS // 2), range(EXPERTS // 2, EXPERTS))
TURNS = (range(0, EXPERTS, 2), range(1, EXPERTS, 2))
TP = {"tensor_parallel_size": 2}
EP = {**TP, "enable_expert_parallel": True}
# The engines of a data-parallel group must take their steps in turn, which two batches in flight would break.
DP = {"enable_expert_parallel": True, "all2all_backend": "allgather_reducescatter", "async_scheduling": False}
CASES = (
    Case("tp2-graphs-sparse", "qwen3-moe", (SPARSE,), {**TP, **GRAPHS}, NEURONS // 2, EVERYWHERE),
    Case("ep2-linear", "qwen3-moe", (SPARSE, 0.0), EP, NEURONS, HALVES),
    Case("dp2-ep2", "qwen3-moe", (SPARSE, 0.0), DP, NEURONS, HALVES, data_parallel=2),
    # vLLM places experts in turn only where they are routed in groups; elsewhere it falls back to halves and warns.
    Case(
        "ep2-round-robin", "glm4-moe", (SPARSE, 0.0), {**EP, "expert_placement_strategy": "round_robin"}, NEURONS, TURNS
    ),
    Case("tp2-graphs-dense", "qwen3-moe", (0.0,), {**TP, **GRAPHS}, NEURONS // 2, EVERYWHERE),
    Case("dp2-ep2-graphs-sparse", "qwen3-moe", (SPARSE,), {**DP, **GRAPHS}, NEURONS, HALVES, data_parallel=2),
)


def say(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


# ---- models and text -------------------------------------------------------------------------------------------------


def sequences(seed: int, lengths: list[int]) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


PROMPTS = sequences(1, [20, 41, 33, 26, 44, 23, 37, 30])
TEXTS = sequences(2, [64] * 8)


def save_checkpoint(name: str, folder: Path) -> None:
    """bf16 random weights that keep the activations near 1 and spread routing weights and predictions. Where thresholds
    are per neuron, up rows differ in size, and so do they: a rank that had another one's would be noticed.
    """
    import transformers

    if name == "qwen3-moe":
        config = transformers.Qwen3MoeConfig(**SHARED, num_experts=EXPERTS)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        grouped = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
        config = transformers.Glm4MoeConfig(**SHARED, **grouped, n_routed_experts=EXPERTS, n_shared_experts=1)
        model = transformers.Glm4MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() > 1:
                scale = 1.0 if "embed_tokens" in key else 0.15 if "lm_head" in key else 0.06
                tensor.normal_(0.0, scale, generator=generator)
                if name == "glm4-moe" and tensor.dim() == 3 and key.endswith("gate_up_proj"):
                    tensor[:, NEURONS:] *= (0.5 * torch.randn(EXPERTS, NEURONS, 1, generator=generator)).exp()
            elif "correction_bias" in key:
                tensor.normal_(0.0, 0.1, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)


@dataclass
class Machine:
    """Checkpoints, profiles and one-GPU answers under ``folder``, and the environment of the engines' processes."""

    folder: Path
    environment: dict[str, str]
    references: dict[str, Any] = field(default_factory=dict)  # model -> answer, or why there is none
    definitions: dict[tuple[str, str], torch.nn.Module] = field(default_factory=dict)
    known_errors: dict[tuple[str, str], Errors] = field(default_factory=dict)

    def task(self, model: str, targets: tuple[float, ...], prompts: list[list[int]], **more: Any) -> dict[str, Any]:
        return {
            "folder": str(self.folder / model),
            "profile": str(self.folder / f"{model}.profile.json"),
            "targets": targets,
            "prompts": prompts,
            "tokens": DECODED,
            "limit_s": LIMIT_S,
            **more,
        }

    def reference(self, model: str) -> dict[str, Any]:
        found = self.references[model]
        if isinstance(found, str):
            pytest.fail(f"no one-GPU engine of {model} to compare with: {found}")
        return found

    def definition(self, model: str, target: str) -> torch.nn.Module:
        """The transformers model in fp32, with the thresholds that the one-GPU engine ran with."""
        import hf_reference

        if (model, target) in self.definitions:
            return self.definitions[model, target]
        defined = hf_reference.load(str(self.folder / model))
        layers = self.reference(model)["runs"][target]["thresholds"]
        hf_reference.make_sparse(
            defined, [(torch.tensor(layer["tau"]), layer["rho"], layer["router_weighted"]) for layer in layers]
        )
        self.definitions[model, target] = defined
        return defined

    def reference_errors(self, model: str, target: str) -> Errors:
        """Of the one-GPU engine."""
        if (model, target) not in self.known_errors:
            self.known_errors[model, target] = errors(self, model, target, self.reference(model)["runs"][target])
        return self.known_errors[model, target]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def tree_with_entry_points(folder: Path) -> str:
    """What to put on PYTHONPATH so that every process finds the package and, like one that is installed, its plugin."""
    from source_tree import source_tree

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    tree = source_tree(folder)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{entry} = {place}" for entry, place in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return tree


def run_together(
    machine: Machine, name: str, tasks: list[dict[str, Any]], environments: list[dict[str, str]]
) -> list[dict[str, Any] | str]:
    """Runs one engine process for each task, all at the same time: their answers, or the end of the log of one that
    failed. When one fails, what waits for it is ended as well.
    """

    def path(index: int, what: str) -> Path:
        return machine.folder / f"{name}.{index}.{what}"

    say(f"{name}: {len(tasks)} processes")
    begun, processes = time.monotonic(), []
    for index, (task, environment) in enumerate(zip(tasks, environments, strict=True)):
        path(index, "task.json").write_text(json.dumps(task))
        with path(index, "log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, WORKER, path(index, "task.json"), path(index, "answer.json")],
                    env={**machine.environment, **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
            )
    coupled = "VLLM_DP_RANK" in environments[0]
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() - begun < LIMIT_S + 15:
            if coupled and any(process.poll() for process in processes):
                time.sleep(5)  # the others may have something to say about it
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            if process.poll() != 0:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    answers: list[dict[str, Any] | str] = []
    for index, process in enumerate(processes):
        log_text = path(index, "log").read_text(errors="replace")
        for line in log_text.splitlines():
            if line.startswith("[") and " s] " in line[:12]:
                say(f"{name}.{index}: {line}")
        if process.returncode == 0:
            answers.append(json.loads(path(index, "answer.json").read_text()))
        else:
            answers.append(f"exit {process.returncode}, the log ends:\n{log_text[-6000:]}")
    say(f"{name}: exit {[process.returncode for process in processes]}, {time.monotonic() - begun:.0f} s")
    return answers


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    folder = tmp_path_factory.mktemp("parallel")
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # No multicast over NVLink: on shared hosts it is out of bounds.
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NVSHMEM_DISABLE_NVLS": "1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONUNBUFFERED": "1",
    }
    path = [tree_with_entry_points(folder / "tree"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    machine = Machine(folder, environment)
    say("writing checkpoints")
    tasks = []
    for model, score in SCORES.items():
        save_checkpoint(model, folder / model)
        calibrate = {"texts": TEXTS, "score": score, "skip_pairs": 0.2, "targets": [0.4, SPARSE]}
        tasks.append(machine.task(model, (SPARSE, 0.0), PROMPTS, options=ENGINE, calibrate=calibrate))
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    answers = run_together(machine, "one", tasks, [{"CUDA_VISIBLE_DEVICES": device} for device in devices[:2]])
    machine.references = dict(zip(SCORES, answers, strict=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for the definitions: too small for more
    yield machine
    torch.set_num_threads(threads)


# ---- measures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Of log-probabilities, the largest over the vocabulary at every position: prompt [n] and decoded [m] positions of
    all sequences. effect: the same between the dense definition and the sparse one, over all positions.
    """

    prompt: torch.Tensor
    decoded: torch.Tensor
    effect: torch.Tensor


def errors(machine: Machine, model: str, target: str, run: dict[str, Any]) -> Errors:
    """run: of all PROMPTS, in their order."""
    import hf_reference

    parts: tuple[list[torch.Tensor], ...] = ([], [], [])
    for prompt, tokens, found in zip(PROMPTS, run["tokens"], run["log_probs"], strict=True):
        assert len(tokens) == DECODED
        exact = {
            at: hf_reference.log_probs(machine.definition(model, at), [*prompt, *tokens]) for at in ("0", f"{SPARSE:g}")
        }
        assert torch.tensor(found).shape == exact[target].shape
        off = (torch.tensor(found) - exact[target]).abs().amax(dim=1)
        effect = (exact["0"] - exact[f"{SPARSE:g}"]).abs().amax(dim=1)
        cut = len(prompt) - 1
        for part, values in zip(parts, (off[:cut], off[cut:], effect), strict=True):
            part.append(values)
    return Errors(*map(torch.cat, parts))


def check_ranks(case: Case, ranks: list[dict[str, Any]]) -> None:
    """Each has the part of the experts that it should have, on a GPU of its own."""
    assert [rank["experts"] for rank in ranks] == [list(owned) for owned in case.owned]
    assert [rank["neurons"] for rank in ranks] == [case.neurons] * 2
    assert sorted(rank["device"] for rank in ranks) == ["cuda:0", "cuda:1"]
    assert all(rank["modular"] == (case.data_parallel > 1) for rank in ranks)


def check_kernels(run: dict[str, Any], largest_batch: int, served: bool) -> None:
    """Every rank planned a sparse kernel for all batches that there were. served: with CUDA graphs, as a server, which
    compiles nothing on the way; otherwise plans are chosen as batches come.
    """
    for plans in run["plans"]:
        below = [bucket for bucket, _ in plans if bucket < largest_batch]
        used = plans[: len(below) + 1]
        assert used
        assert all(plan.startswith(("fused", "staged")) for _, plan in used), used
    assert not served or not any(run["compiled_late"]), run["compiled_late"]


def check_errors(name: str, found: Errors, allowed: Errors) -> None:
    """At most twice the one-GPU engine's error, in the median over positions: rounding in a router sends single tokens
    to other experts, in either engine. And nearer to the definition than dense and sparse are to each other, by half in
    the median, in nine positions of ten at all.
    """
    effect = found.effect.median()
    for phase in ("prompt", "decoded"):
        error, one = getattr(found, phase), getattr(allowed, phase)
        most, most_one = error.quantile(0.9), one.quantile(0.9)
        line = (
            f"{name}, {phase}: off by {error.median():.4f} (one GPU {one.median():.4f}), nine of ten by at most "
            f"{most:.4f} ({most_one:.4f}); dense and sparse differ by {effect:.4f}"
        )
        say(line)
        assert error.median() <= 2 * one.median() + 1e-5, line
        assert error.median() < effect / 2, line
        assert most < effect, line


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", SCORES)
def test_one_gpu_computes_the_definition(model: str, machine: Machine) -> None:
    """What the other tests compare with."""
    answer = machine.reference(model)
    check_kernels(answer["runs"][f"{SPARSE:g}"], MAX_BATCH, served=False)
    for target in answer["runs"]:
        found = machine.reference_errors(model, target)
        check_errors(f"one {model} {target}", found, found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_gpus_compute_what_one_does(case: Case, machine: Machine) -> None:
    machine.reference(case.model)
    size = case.data_parallel
    tasks = [
        machine.task(case.model, case.targets, PROMPTS[rank::size], options={**ENGINE, **case.options})
        for rank in range(size)
    ]
    environments: list[dict[str, str]] = [{}]
    if size > 1:
        group = {"VLLM_DP_SIZE": str(size), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(free_port())}
        environments = [{**group, "VLLM_DP_RANK": str(r), "VLLM_DP_RANK_LOCAL": str(r)} for r in range(size)]
    answers = run_together(machine, case.name, tasks, environments)
    failed = [answer for answer in answers if isinstance(answer, str)]
    assert not failed, "\n\n".join(failed)

    check_ranks(case, [rank for answer in answers for rank in answer["ranks"]])
    assert not any(answer["fallbacks"] for answer in answers)
    assert not any(late for answer in answers for late in answer["compiled_late"])
    for target in (f"{target:g}" for target in case.targets):
        runs = [answer["runs"][target] for answer in answers]
        if target != "0":
            for run in runs:
                check_kernels(run, MAX_BATCH * size, served="compilation_config" in case.options)
        whole = {key: [runs[i % size][key][i // size] for i in range(len(PROMPTS))] for key in ("tokens", "log_probs")}
        found = errors(machine, case.model, target, whole)
        check_errors(f"{case.name} {target}", found, machine.reference_errors(case.model, target))
