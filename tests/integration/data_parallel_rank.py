"""One rank of test_data_parallel.py: an engine of its own process, told by the environment which rank it is.

    VLLM_DP_RANK=0 VLLM_DP_SIZE=2 ... python data_parallel_rank.py TASK.pt ANSWER.pt

vLLM 0.32's CPU communicator builds the allgather_reducescatter all-to-all manager, but lacks the two collectives that
the manager calls, so that no MoE model runs data-parallel on it, with vLLM's own method either. They are put in here,
at the top level, where the engine's spawned worker comes by too.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Rows of all ranks, sizes[rank] of each, one after the other; for a list, of each tensor."""
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    assert dim == 0
    assert sizes is not None
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """The sum over ranks, of which each gets sizes[rank] rows."""
    assert dim == 0
    assert sizes is not None
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].clone()


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv


def main(task_file: str, answer_file: str) -> None:
    from cutedsl_kernels.integration.vllm.engine import SparseEngine

    task = torch.load(task_file, weights_only=False)
    engine = SparseEngine(task["folder"], record=True, **task["options"])
    log_probs = [chunk.log_probs for chunk in engine.score(task["texts"], settings=task["settings"], chunk_tokens=128)]
    label = f"setting {len(task['settings']) - 1}"
    torch.save({"log_probs": log_probs, "counters": engine.realised(label)}, answer_file)
    engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
