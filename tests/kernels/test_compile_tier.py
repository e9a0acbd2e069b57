"""Every kernel that a default plan of a known model can choose, compiled for sm_90a: resources and instructions.

`make kernels-report` prints what is checked here. No GPU needed. CUTEDSL_KERNELS_COMPILE_ALL=1 inspects also the
kernels that differ only in numbers no choice in the code depends on.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from cutedsl_kernels import KNOWN_MODELS
from cutedsl_kernels.compile import KernelSpec
from cutedsl_kernels.compile.defaults import default_specs, dense_path_specs, known_shapes
from cutedsl_kernels.compile.inspect import KernelFacts, inspect_kernels
from cutedsl_kernels.compile.specs import fused_spec, staged_spec
from cutedsl_kernels.configs import SMEM_LIMIT, FusedConfig, StagedConfig

pytestmark = pytest.mark.compile

HIDDEN_SIZES = sorted({model.shape.hidden_size for model in KNOWN_MODELS.values()})
EVERY = os.environ.get("CUTEDSL_KERNELS_COMPILE_ALL") == "1"
# kernel -> instructions that carry its weights and its products; those without weights are not in it
MEANT = {
    "fused_decode": (("UBLKCP",), ("HMMA",), ("LDSM",)),
    "staged_moe.GateCompact": (("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128"), ("HGMMA", "HMMA")),
    "staged_moe.SparseUp": (("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128"), ("HGMMA", "HMMA")),
    "staged_moe.SparseDown": (("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128"), ("HGMMA", "HMMA")),
    "kept_pairs": (("LDG.E.128",),),
}


def faults(fact: KernelFacts) -> list[str]:
    """What is wrong with one kernel, as sentences."""
    found = []
    if fact.local_accesses:
        found.append(f"{fact.local_accesses} loads and stores of local memory")
    if fact.early_arrivals:
        found.append(f"{fact.early_arrivals} arrivals at an mbarrier while an ldmatrix may still be reading")
    if fact.split_addresses:
        found.append(f"{fact.split_addresses} asynchronous copies to a shared address with a uniform register")
    if fact.registers > fact.register_limit:
        found.append(f"{fact.registers} registers, {fact.threads} threads can have {fact.register_limit}")
    if fact.smem > SMEM_LIMIT:
        found.append(f"{fact.smem} bytes of shared memory, a CTA can have {SMEM_LIMIT}")
    config = fact.spec.keywords.get("config")
    if isinstance(config, FusedConfig):
        shape = fact.spec.keywords
        counted = config.smem_bytes(shape["hidden_size"], shape["num_experts"])
        if fact.smem > counted:
            found.append(f"{fact.smem} bytes of shared memory, FusedConfig.smem_bytes says {counted}")
        if fact.threads != config.num_threads:
            found.append(f"{fact.threads} threads, FusedConfig.num_threads says {config.num_threads}")
    for instructions in MEANT.get(fact.kernel, ()):
        if not fact.count(*instructions):
            found.append(f"no {' or '.join(instructions)}")
    return [f"{fact.spec.name} {fact.kernel}: {fault}" for fault in found]


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_kernels_of_default_plans(hidden_size: int) -> None:
    specs = default_specs(hidden_size, EVERY)
    assert specs, f"no known model of hidden size {hidden_size} gets a kernel from plan_for"
    wrong = [fault for spec in specs for fact in inspect_kernels(spec) for fault in faults(fact)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("wgmma", [0, 1])
@pytest.mark.parametrize("token_block", [32, 64])
def test_staged_kernels_by_token_block(token_block: int, wgmma: int) -> None:
    """Blocks that default plans choose for few shapes or none: of 64 tokens an assembler once made invalid copies."""
    spec = staged_spec(KNOWN_MODELS["qwen3.5-35b-a3b"].shape, StagedConfig(token_block=token_block, wgmma=wgmma))
    assert not [fault for fact in inspect_kernels(spec) for fault in faults(fact)]


@pytest.mark.parametrize("wgmma", [0, 1])
def test_staged_kernels_by_multiplier(wgmma: int) -> None:
    """The staged path with either matrix instruction, deterministic, whether or not a default plan chooses it."""
    shape = KNOWN_MODELS["deepseek-v2-lite"].shape  # its last tile of 64 neurons is full at I = 1408, not so at TP2
    spec = staged_spec(shape.shard(2), StagedConfig(wgmma=wgmma), deterministic=True, has_expert_map=True)
    facts = inspect_kernels(spec)
    assert not [fault for fact in facts for fault in faults(fact)]
    kernels = {fact.kernel: fact for fact in facts}
    wanted, other = ("HGMMA", "HMMA") if wgmma else ("HMMA", "HGMMA")
    for name in ("staged_moe.GateCompact", "staged_moe.SparseUp", "staged_moe.SparseDown"):
        assert kernels[name].count(wanted)
        assert not kernels[name].count(other)
    assert not kernels["staged_moe.SparseDown"].count("RED", "REDG", "ATOMG"), "no additions in the order of arrival"


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swigluoai"])
def test_fused_kernel_by_activation(activation: str) -> None:
    shape = KNOWN_MODELS["qwen3.5-35b-a3b"].shape
    spec = fused_spec(shape, FusedConfig(), activation=activation, weight_on_input=True, has_expert_map=True)
    assert not [fault for fact in inspect_kernels(spec) for fault in faults(fact)]


def bias_specs() -> dict[str, KernelSpec]:
    """Kernels with biases that no default plan of gpt-oss chooses."""
    wide, narrow = KNOWN_MODELS["gpt-oss-20b"].shape, KNOWN_MODELS["qwen3.5-35b-a3b"].shape
    mapped = {"has_bias": True, "has_expert_map": True, "activation": "swigluoai"}
    on_input = mapped | {"weight_on_input": True, "router_weighted": False}
    staged = StagedConfig(row_atoms=1, down_atoms=1)
    return {
        "fused, sums kept": fused_spec(narrow, FusedConfig(), **mapped),
        "fused, weight on the input": fused_spec(
            wide, FusedConfig(gate_stages=1, row_stages=3, keep_sums=0), **on_input
        ),
        "fused, tiles of 128": fused_spec(
            wide, FusedConfig(tile_neurons=128, gate_stages=1, row_stages=2, keep_sums=0), **mapped
        ),
        "staged": staged_spec(wide, staged, **mapped),
        "staged, weight on the input": staged_spec(wide, replace(staged, wgmma=0), **on_input),
        "staged, 64 tokens, deterministic": staged_spec(
            wide, replace(staged, token_block=64, down_splits=2), deterministic=True, **mapped
        ),
    }


@pytest.mark.parametrize("name", bias_specs())
def test_kernels_with_biases(name: str) -> None:
    assert not [fault for fact in inspect_kernels(bias_specs()[name]) for fault in faults(fact)]


def test_kernels_of_the_dense_path() -> None:
    specs = list(dense_path_specs())
    specs = specs if EVERY else specs[::7]  # they differ in sizes, k, activation and whether there is an expert map
    facts = [fact for spec in specs for fact in inspect_kernels(spec)]
    assert not [fault for fact in facts for fault in faults(fact)]
    sums = [fact for fact in facts if "top_k" in fact.spec.keywords]
    assert sums
    assert all(fact.count("LDG.E.128") == fact.spec.keywords["top_k"] for fact in sums), "one load for each pair"


def test_biases_are_compiled_where_the_model_has_them() -> None:
    for spec, names in default_specs().items():
        assert spec.keywords["has_bias"] == any(name.startswith("gpt-oss") for name in names)


def test_all_known_models_are_covered() -> None:
    """Each model at TP1 gets a kernel somewhere between 1 and 512 tokens, so the tests above look at all of them."""
    covered = {name.split()[0] for names in default_specs().values() for name in names}
    assert covered == set(KNOWN_MODELS)
    assert {name.split()[0] for name, _, _ in known_shapes()} == covered
