"""The plugin against the Python sources of other vLLM releases, unpacked from their wheels.

CUTEDSL_KERNELS_VLLM_SOURCES names a folder with one unpacked wheel per subfolder, for example

    pip download --no-deps vllm==0.26.0 && unzip -d sources/0.26.0 vllm-0.26.0-*.whl 'vllm/*.py' 'vllm/*.json'

for both ends of the supported range. The wheels are several hundred MiB each, so nothing downloads them by itself.
Without a GPU they import but run no engine: what is checked is that everything this package asks of vLLM is there, with
the parameters it passes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

VARIABLE = "CUTEDSL_KERNELS_VLLM_SOURCES"
SOURCES = sorted(Path(os.environ[VARIABLE]).iterdir()) if os.environ.get(VARIABLE) else []

CHECK = """
import inspect, sys
import vllm
assert vllm.__file__.startswith(sys.argv[1]), vllm.__file__
from cutedsl_kernels.integration.vllm import compat, register
assert compat.unsupported_version() is None, compat.unsupported_version()
register()
register()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
assert QUANTIZATION_METHODS.count("intra_expert_sparse") == 1
from cutedsl_kernels.integration.vllm import config, dense, method, modular, worker
assert get_quantization_config("intra_expert_sparse") is config.IntraExpertSparseConfig
assert issubclass(method.IntraExpertSparseMethod, compat.method_base_class())
assert not method.IntraExpertSparseMethod.__abstractmethods__
assert not config.IntraExpertSparseConfig.__abstractmethods__
compat.empty_quant_config()
compat.routed_experts_class()
assert not modular.IntraExpertSparseExperts.__abstractmethods__
from vllm.model_executor.layers.fused_moe import all2all_utils, modular_kernel, routed_experts
inspect.signature(all2all_utils.maybe_make_prepare_finalize).bind(
    moe=0, quant_config=0, routing_tables=None, allow_new_interface=True, use_monolithic=False)
names = list(inspect.signature(compat.experts_base_class().apply).parameters)[1:]
inspect.signature(modular.IntraExpertSparseExperts.apply).bind(None, **dict.fromkeys(names))
inspect.signature(modular.IntraExpertSparseExperts.workspace_shapes).bind(None, *range(8))
inspect.signature(modular_kernel.FusedMoEKernel.apply).bind(None, hidden_states=0, w1=0, w2=0, topk_weights=0,
    topk_ids=0, activation=0, global_num_experts=0, expert_map=None, apply_router_weight_on_input=False,
    shared_experts=None, shared_experts_input=None)
assert hasattr(routed_experts.RoutedExperts, "_expert_routing_tables")
assert compat.standard_format().name == "Standard"
compat.already_reduced()
inspect.signature(compat.stock_method_class().create_weights).bind(None, None, 1, 2, 3, None)
inspect.signature(compat.method_base_class().apply).bind(
    None, layer=0, x=0, topk_weights=0, topk_ids=0, shared_experts=0, shared_experts_input=0)
assert compat.why_weights_move() is None
assert not compat.is_batch_invariant()
from vllm.config import ModelConfig, OffloadConfig
assert "enable_sleep_mode" in ModelConfig.__dataclass_fields__
assert (OffloadConfig().uva.cpu_offload_gb, OffloadConfig().prefetch.offload_group_size) == (0, 0)
triton = compat.triton_experts()
inspect.signature(triton._gemm).bind(*range(12), compute_type=0, use_fp8_w8a8=False, use_int8_w8a8=False,
    use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False, B_bias=None)
inspect.signature(triton._align).bind(0, 1, 2, None, ignore_invalid_experts=True)
inspect.signature(triton._activate).bind(0, 1, 2)
from vllm.model_executor.layers.fused_moe import activation
assert "torch.ops._C.silu_and_mul_with_clamp(" in inspect.getsource(activation)
inspect.signature(triton._sum).bind(0, 1)
inspect.signature(triton._config).bind(0, 1, 2, None, 4)
from vllm.forward_context import ForwardContext
assert "no_compile_layers" in ForwardContext.__annotations__
print("vLLM", vllm.__version__, "has everything")
"""


@pytest.mark.skipif(not SOURCES, reason=f"{VARIABLE} names no folder of unpacked vLLM wheels")
@pytest.mark.parametrize("source", SOURCES or [None], ids=lambda path: path.name if path else "none")
def test_everything_asked_of_vllm_is_there(source: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(source), "VLLM_NO_USAGE_STATS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CHECK, str(source)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "has everything" in result.stdout


def test_everything_asked_of_the_installed_vllm_is_there() -> None:
    import vllm

    folder = str(Path(vllm.__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", CHECK, folder], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
