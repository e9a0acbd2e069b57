"""`vllm serve` on loopback with the bundled model: concurrent clients, one that goes away, nonsense, and right
answers all along.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models" / "tiny-olmoe")
START_SECONDS = 240
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hand-made thresholds: what matters here is that server and offline engine agree."""
    layers = {
        f"model.layers.{i}.mlp.experts": {"targets": [0.7], "thresholds": [0.02], "pair_thresholds": [0.1]}
        for i in range(4)
    }
    config = json.loads((Path(MODEL) / "config.json").read_text())
    path = tmp_path_factory.mktemp("http") / "profile.json"
    path.write_text(
        json.dumps(
            {
                "format": "intra-expert-sparsity/1",
                "model": {
                    "name": "tiny-olmoe",
                    "architecture": "OlmoeForCausalLM",
                    "num_layers": 4,
                    "num_experts": config["num_experts"],
                    "top_k": config["num_experts_per_tok"],
                    "hidden_size": config["hidden_size"],
                    "intermediate_size": config["intermediate_size"],
                },
                "score": "gate-routed",
                "router_weighted": True,
                "calibration": {"tokens": 1, "text_sha256": "0" * 64, "max_len": 1},
                "layers": layers,
                "created": {"version": "0", "date": "2026-11-23"},
            }
        )
    )
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts `vllm serve` and returns its address once it answers; ends it, and all of its processes, afterwards."""
    running: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "server.log"

    def start(*arguments: str, **environment: str) -> str:
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", MODEL, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager", *arguments]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", **environment}
        variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # as users run it: the engine in a process of its own
        with log.open("wb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, env=variables, start_new_session=True)
        running.append(server)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    return address
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")

    yield start
    for server in running:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def complete(address: str, prompt: Any, **options: Any) -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **options}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["text"]


@pytest.mark.parametrize("target", [0.7, 0.0])
def test_answers_keep_coming_and_equal_the_offline_ones(
    target: float,
    profile: Path,
    engine: Callable[..., Any],
    serve: Callable[..., str],
    tmp_path: Path,
    library_text: Callable[[str], Path],
) -> None:
    """Prefix caching is on (the default); the sparse server also speculates, and counts while it serves."""
    from vllm import SamplingParams

    text = library_text("heapq.py").read_text()
    prompts = [text[at : at + 150] for at in range(0, 1600, 200)]
    offline = engine(MODEL, profile=profile, target=target, dtype="float32", max_model_len=256)
    parameters = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    expected = [output.outputs[0].text for output in offline.generate(prompts, parameters)]
    offline.shutdown()

    options = {"profile": str(profile), "target_sparsity": target, "sparsity_stats": True}
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    address = serve(
        "--quantization",
        "intra_expert_sparse",
        "--hf-overrides",
        json.dumps({"intra_expert_sparsity": options}),
        *(("--speculative-config", json.dumps(SPECULATION)) if target else ()),
        PROMETHEUS_MULTIPROC_DIR=str(metrics),
    )
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: complete(address, prompt), prompts)) == expected

    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "prompt": text[:150], "max_tokens": 100, "stream": True, "ignore_eos": True})
    with socket.create_connection((host, int(port))) as leaver:
        leaver.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        leaver.recv(64)  # the stream has begun

    for wrong in ({"prompt": "x" * 1000}, {"prompt": [10**9]}, {"max_tokens": -1}, {"model": "another"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            complete(address, **{"prompt": "x", **wrong})
        assert 400 <= refused.value.code < 500
    request = urllib.request.Request(f"{address}/v1/completions", b"{", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert 400 <= refused.value.code < 500

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: complete(address, prompt), prompts)) == expected
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        assert 'intra_expert_sparsity_neurons_total{layer="model.layers.0.mlp.experts"}' in response.read().decode()
