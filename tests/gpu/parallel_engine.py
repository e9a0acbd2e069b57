"""One engine of test_parallel.py, in a process of its own: told what to run in JSON, and answers in JSON.

    python parallel_engine.py TASK.json ANSWER.json

A data-parallel rank is such a process too; the environment says which rank it is. In the task:

    folder      the checkpoint
    options     keywords for SparseEngine
    profile     the profile's path
    calibrate   {texts, score, skip_pairs, targets}: make the profile first, with this engine
    targets     sparsities to run, one after the other; an engine with CUDA graphs has room for one
    prompts     token ids
    tokens      how many to decode after each prompt
    limit_s     where everything hangs: after so many seconds every process prints its stacks, and this one ends

The answer: ``ranks``, what each rank holds of the first layer; ``fallbacks``, the layers that run vLLM's own method;
``compiled_late``, how many kernels each rank compiled between loading and the first prompt. And for every target, in
``runs``: the tokens that were decoded; the log-probabilities [n - 1][vocabulary] of each sequence of n tokens (the
prompt and what follows); the ranks' plans [[largest batch, plan], ...]; how many kernels each compiled meanwhile; and,
where there is one rank, the thresholds.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()
ENDS = "CUTEDSL_KERNELS_TEST_ENDS"  # tells the workers when time is up


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - BEGUN:6.1f} s]", *words, flush=True)


def describe(worker: Any) -> dict[str, Any]:
    """Runs in the worker: the part of the first layer that this rank holds."""
    layer, state = next(iter(worker._sparsity_states().values()))
    weights = state.weights
    slots = None if layer.expert_map is None else layer.expert_map.tolist()
    return {
        "experts": list(range(weights.num_experts)) if slots is None else [i for i, s in enumerate(slots) if s >= 0],
        "neurons": weights.intermediate_size,
        "device": str(weights.device),
        "modular": layer.quant_method.moe_kernel is not None,
    }


def thresholds(worker: Any) -> list[dict[str, Any]]:
    """Runs in the worker: per layer tau [E, I] (or [1, 1]), rho and router_weighted, as the kernels get them."""
    states = [state for _, state in worker._sparsity_states().values()]
    return [{"tau": s.tau.tolist(), "rho": s.rho, "router_weighted": s.router_weighted} for s in states]


def rows(positions: list[Any], vocabulary: int) -> list[list[float]]:
    """vLLM's {token: Logprob} of each position as a list over the vocabulary."""
    return [[float(position[token].logprob) for token in range(vocabulary)] for position in positions]


def run(engine: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    vocabulary = engine.model_config.get_vocab_size()
    parameters = SamplingParams(
        max_tokens=tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        logprobs=vocabulary,
        prompt_logprobs=vocabulary,
    )
    before = engine._call("sparsity_report")
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters)
    after = engine._call("sparsity_report")
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "log_probs": [
            rows([*output.prompt_logprobs[1:], *output.outputs[0].logprobs], vocabulary) for output in outputs
        ],
        "plans": [report["plans"] for report in after],
        "compiled_late": [
            now["compiled_late"] - then["compiled_late"] for now, then in zip(after, before, strict=True)
        ],
    }


def main(task_file: str, answer_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    os.environ[ENDS] = str(time.time() + task["limit_s"])
    faulthandler.dump_traceback_later(task["limit_s"], exit=True)
    from cutedsl_kernels.integration.vllm.calibrate import calibrate_profile
    from cutedsl_kernels.integration.vllm.engine import SparseEngine

    calibrate, targets = task.get("calibrate"), task["targets"]
    start = {"record": True} if calibrate else {"profile": task["profile"], "target": targets[0]}
    engine = SparseEngine(task["folder"], **start, **task["options"])
    say("engine started")
    reports = engine._call("sparsity_report")
    if calibrate:
        texts = calibrate.pop("texts")
        out = Path(task["profile"])
        engine.profile = calibrate_profile(
            engine, texts, text_sha256="0" * 64, max_len=max(map(len, texts)), out=out, **calibrate
        )
        engine.profile.save(out)
        say("calibrated")
    answer: dict[str, Any] = {
        "ranks": engine.llm.collective_rpc(describe),
        "fallbacks": reports[0]["fallbacks"],
        "compiled_late": [report["compiled_late"] for report in reports],
        "runs": {},
    }
    for target in targets:
        if target != engine.target or calibrate:
            engine.set_target(target)
        answer["runs"][f"{target:g}"] = found = run(engine, task["prompts"], task["tokens"])
        if len(answer["ranks"]) == 1:
            found["thresholds"] = engine.llm.collective_rpc(thresholds)[0]
        say(f"target {target:g}:", engine.report()["summary"])
    Path(answer_file).write_text(json.dumps(answer))
    engine.shutdown()
    say("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
elif __name__ == "__mp_main__":  # a worker that vLLM has spawned
    faulthandler.dump_traceback_later(max(float(os.environ[ENDS]) - time.time() - 3, 1))
