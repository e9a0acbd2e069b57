"""What the engine tests run, as data: the tests take their parameters from here, and the table in docs/serving.md is
made of it.

    python tests/integration/support.py        writes the table into docs/serving.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- support:table -->", "<!-- /support:table -->"


@dataclass(frozen=True)
class Architecture:
    """One architecture of the tests. checkpoint: its name in tools/make_tiny_checkpoints.py. definition: where a
    sparse model is compared to sparse_moe_ref: "engine and transformers", or "engine" only. engine: whether the CPU
    engine runs it. gpu: what a GPU does with it. attention: vLLM's back end, where the one it chooses by itself on some
    processors (AMX) does not take float32.
    """

    checkpoint: str
    label: str
    definition: str = "engine and transformers"
    dtype: str = "float32"
    engine: bool = True
    gpu: str = "sparse"
    note: str = ""
    attention: str | None = None


ARCHITECTURES = (
    Architecture("olmoe", "OLMoE"),
    Architecture("mixtral", "Mixtral"),
    Architecture("qwen3-moe", "Qwen3-MoE"),
    Architecture("qwen2-moe", "Qwen2-MoE", note="shared expert stays dense"),
    Architecture("granite-moe", "Granite-MoE"),
    Architecture(
        "gpt-oss",
        "gpt-oss, bf16 weights",
        note="clamped SwiGLU and biases; for mxfp4 checkpoints vLLM's own method runs",
    ),
    Architecture(
        "deepseek-v2",
        "DeepSeek-V2",
        definition="engine",
        attention="CPU_MLA",
        note="transformers and vLLM differ on a random checkpoint, dense as well",
    ),
    Architecture(
        "llama4",
        "Llama-4",
        definition="engine",
        note="routing weight on the input, top-1: no pairs to skip; calibrate with --score gate",
    ),
    Architecture(
        "qwen3-next",
        "Qwen3-Next",
        definition="engine",
        dtype="bfloat16",
        note="linear attention, which the CPU engine computes in bf16 only",
    ),
    Architecture(
        "qwen3.5-moe",
        "Qwen3.5-MoE",
        engine=False,
        note="not loaded here: its image processor needs torchvision; the experts are Qwen3-Next's",
    ),
)

TWO_GPUS = "test_two_gpus_compute_what_one_does (two GPUs)"
# Option of vLLM, what happens, the test that shows it.
OPTIONS = (
    ("tensor parallel", "sparse; neurons are cut over the ranks", f"test_two_ranks_equal_one[tp2], {TWO_GPUS}"),
    (
        "expert parallel",
        "sparse; linear and round-robin placement",
        f"test_two_ranks_equal_one[ep2], test_ranks_add_up, {TWO_GPUS}",
    ),
    (
        "data parallel with expert parallel",
        "sparse, in vLLM's modular kernel; Llama-4's weight on the input too",
        f"test_two_data_parallel_ranks_equal_one, {TWO_GPUS}",
    ),
    (
        "pipeline parallel",
        "sparse; loading was run, serving not (vLLM's CPU build cannot)",
        "test_every_stage_of_a_pipeline_loads_its_own_layers",
    ),
    ("torch.compile", "sparse; one opaque operator", "test_compiled_engine_equals_eager"),
    ("prefix caching, n-gram speculation", "sparse, same tokens", "test_answers_keep_coming"),
    ("chunked prefill, mixed batches", "sparse, same tokens", "test_random_batches_of_random_lengths"),
    ("LoRA", "vLLM's own method: adapters may reach the experts", "test_lora_switched_on"),
    (
        "fp8, awq, gptq, mxfp4 checkpoints",
        "vLLM's own method for layers with quantized experts, sparse for others; run with fp8",
        "test_quantized_experts_run_as_in_stock_vllm, test_layers_that_are_not_quantized_run_sparse",
    ),
    ("reloading weights (reload_weights)", "sparse, under the same thresholds", "test_reloaded_weights"),
    (
        "sleep mode, weights offloaded to the host",
        "vLLM's own method: the kernels hold addresses",
        "test_weights_that_may_move_are_left_to_vllm",
    ),
    ("batch invariance (VLLM_BATCH_INVARIANT)", "vLLM's own method", "test_batch_invariance_is_left_to_vllm"),
    ("expert load balancing (EPLB)", "refused", "test_expert_load_balancing_is_refused"),
    (
        "all-to-all by DeepEP (high throughput, v2) or FlashInfer (NVLink)",
        "sparse; run on the CPU with a stand-in for the exchange, not on GPUs",
        "test_two_ranks_that_exchange_tokens_add_up",
    ),
    (
        "all-to-all by DeepEP (low latency), NIXL, MoonEP, MoRI",
        "vLLM's own method",
        "test_back_ends_that_hand_over_rows_are_taken, test_unsupported_layers_fall_back",
    ),
)


def table() -> str:
    lines = ["| model | on the CPU | on a Hopper GPU | checked against | |", "|---|---|---|---|---|"]
    for a in ARCHITECTURES:
        where = f"sparse, {a.dtype}" if a.engine else "not run"
        against = f"stock vLLM; the definition in {a.definition}" if a.engine else "-"
        lines.append(f"| {a.label} | {where} | {a.gpu} | {against} | {a.note} |")
    lines += ["", "| option | what happens | test |", "|---|---|---|"]
    lines += [f"| {option} | {effect} | `{test}` |" for option, effect, test in OPTIONS]
    return "\n".join(lines)


def rendered(document: str) -> str:
    """``document`` with the table between its markers replaced."""
    before, rest = document.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text()))
