"""Two data-parallel ranks that share the experts: each has texts of its own, and answers what one process answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import assert_equal_but_for_ties, recorded_setting, scores, sequences

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("data_parallel_rank.py")
RANKS = 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("name", "skip"), [("qwen3-moe", 0.2), ("llama4", 0.0)], ids=lambda value: value if isinstance(value, str) else ""
)
def test_two_data_parallel_ranks_equal_one(
    name: str, skip: float, checkpoint: Callable[[str], str], engine: Callable[..., Any], seed: int, tmp_path: Path
) -> None:
    """Through the modular kernel: tokens are gathered, experts spread over the ranks, results scattered. Texts of
    different lengths, so that the ranks' batches differ; Llama-4's routing weight goes on the input.
    """
    folder = checkpoint(name)
    texts = sequences(seed, count=2, length=48) + sequences(seed + 1, count=2, length=31)
    alone = engine(folder, record=True, dtype="float32")
    settings = [0.0, recorded_setting(alone, texts, 0.7, skip)]
    expected = scores(alone, texts, settings)
    counted = alone.realised("setting 1")
    alone.shutdown()

    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_DP_SIZE": str(RANKS),
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(free_port()),
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in (sorted(os.sched_getaffinity(0)) * 2)[:RANKS]),
    }
    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enable_expert_parallel": True}
    processes = []
    for rank in range(RANKS):
        task = {"folder": folder, "options": options, "texts": texts[rank::RANKS], "settings": settings}
        torch.save(task, tmp_path / f"task{rank}.pt")
        with (tmp_path / f"log{rank}.txt").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, SCRIPT, tmp_path / f"task{rank}.pt", tmp_path / f"answer{rank}.pt"],
                    env={**environment, "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * RANKS, (tmp_path / "log0.txt").read_text()[-4000:]

    answers = [torch.load(tmp_path / f"answer{rank}.pt", weights_only=False) for rank in range(RANKS)]
    for index in range(len(texts)):
        found = answers[index % RANKS]["log_probs"][index // RANKS]
        torch.testing.assert_close(found[0], expected[0][index], atol=2e-3, rtol=0)
        assert_equal_but_for_ties(found[1], expected[1][index])
        assert (expected[0][index] - expected[1][index]).abs().max() > 0.05, "the thresholds changed nothing"
    for layer, whole in counted.items():
        parts = [answer["counters"][layer] for answer in answers]
        assert sum(part.pairs for part in parts) == whole.pairs
        active = sum(part.active_neurons for part in parts)
        assert abs(active - whole.active_neurons) <= 0.001 * whole.neurons
