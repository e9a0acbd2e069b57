"""End-to-end decode speed through vLLM on an sm_90 GPU: stock dense, dense through our plans, and sparse.

    python tools/gpu_e2e.py --quick      8 layers of Qwen3-30B-A3B, under 4 minutes: does it work, roughly how fast
    python tools/gpu_e2e.py              both Qwens in full: several minutes each
    python tools/gpu_e2e.py --model qwen3.5-35b-a3b --modes stock routed --batches 1 8 --profile

Random ("dummy") weights of the real shapes; norms are set to 1, embeddings to variance 1 and router weights scaled up,
so that tokens differ and routing weights spread as in trained models. The profile is calibrated in the engine on random
tokens. Every mode runs in a process of its own: batches of prompts of --input random tokens, --output tokens decoded
greedily, CUDA graphs on. Time per decoded token = (time with --output tokens - time with 1) / (output - 1), of medians
of --repeats; prefill = time with 1 token, median of three times as many. prefill_device_ms: what the device's kernels
take of it, by torch's profiler; the rest is the host, whose times differ by a third from one process to the next.

modes   stock   vLLM's own method
        dense   this method at target 0
        paper   |act(gate)| only, at --target (default: the model's published cutoff)
        routed  times the routing weight, 90 % with 35 % of the pairs skipped

Runs from a source tree without installation: needs torch, vLLM and the CuTe DSL on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import datetime
import gc
import json
import os
import pathlib
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from e2e_models import MODELS
from source_tree import source_tree

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROUTED_TARGET, ROUTED_SKIP = 0.9, 0.35
ROUTER_SCALE = 60.0  # dummy weights are uniform in +-1e-3: logits of standard deviation 0.03 (H = 2048) become 1.6
MODES = ("stock", "dense", "paper", "routed")
CALIBRATED = ("paper", "routed")  # modes that need a profile

COLUMNS = [
    "date",
    "revision",
    "gpu",
    "driver",
    "torch",
    "triton",
    "vllm",
    "model",
    "architecture",
    "layers",
    "mode",
    "target",
    "sparsity",
    "skipped_pairs",
    "batch",
    "input",
    "output",
    "step_ms",
    "tokens_per_s",
    "prefill_ms",
    "prefill_fastest_ms",
    "prefill_device_ms",
    "baseline",
    "ratio",
    "prefill_ratio",
    "prefill_device_ratio",
]
RATIOS = {"ratio": "step_ms", "prefill_ratio": "prefill_ms", "prefill_device_ratio": "prefill_device_ms"}


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": max(args.input + args.output, 544),
        "max_num_seqs": max(max(args.batches), 8),
        "max_num_batched_tokens": 8192,  # what vllm serve takes on these GPUs
        "gpu_memory_utilization": 0.92,
        "disable_log_stats": True,
    }
    if args.cuda:
        found["attention_backend"] = "TRITON_ATTN"
        found["additional_config"] = {"gdn_prefill_backend": "triton"}  # linear attention without FlashInfer
    # Fewer sizes than vLLM's default, which takes all multiples of 8 too.
    graphs: dict[str, Any] = {
        "cudagraph_capture_sizes": sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, *args.batches}),
        # One for all modes: torch.compile sees the same graphs, with the experts' operator opaque in all of them, and
        # tuning Triton's kernels for linear attention takes 100 s.
        "cache_dir": str(pathlib.Path(args.folder) / "compiled"),
    }
    if args.quick:  # graphs of the decode steps without torch.compile: half the time to start
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    found["compilation_config"] = graphs
    return found


def make_realistic(worker: Any) -> tuple[int, int, int]:
    """Runs in the worker: sets the weights of all norms to 1, the variance of the embeddings to 1, and scales the
    weights of all routers, in place. Returns how many there are of each.

    vLLM's embeddings of +-1e-3 are no larger than what attention adds to every token alike, or gpt-oss's biases: there
    all tokens of a batch went to the same five experts.
    """
    import torch

    norms = embeddings = routers = 0
    with torch.no_grad():
        for name, module in worker.get_model().named_modules():
            if type(module).__name__ in (
                "RMSNorm",
                "RMSNormGated",
            ):  # Gemma's kind has 1 + weight, which is right as it is
                module.weight.fill_(1.0)
                norms += 1
            elif type(module).__name__ == "VocabParallelEmbedding":
                module.weight.div_(module.weight.float().std())
                embeddings += 1
            elif name.endswith(("mlp.gate", "mlp.router")):
                module.weight.mul_(ROUTER_SCALE)
                routers += 1
    return norms, embeddings, routers


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    import random

    source = random.Random(seed)
    return [[source.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def stage_calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Profiles for `paper` and `routed` if asked for, their realised sparsity, and a layer against the definition."""
    from cutedsl_kernels.integration.vllm.calibrate import calibrate_profile
    from cutedsl_kernels.integration.vllm.engine import SparseEngine

    arguments = {**engine_arguments(args), "enforce_eager": True}
    arguments.pop("compilation_config", None)
    engine = SparseEngine(args.folder, record=True, **arguments)
    print("norms, embeddings and routers changed:", engine.llm.collective_rpc(make_realistic), flush=True)
    vocabulary = engine.model_config.get_vocab_size()
    count = 16 if args.cuda else 1
    texts = random_prompts(count, 512, vocabulary, 1)
    held_out = random_prompts(4 if args.cuda else 1, 512, vocabulary, 2)
    result: dict[str, Any] = {"realised": {}}
    for mode, score, skip, target in (
        ("paper", "gate", 0.0, args.target),
        ("routed", "gate-routed", ROUTED_SKIP, ROUTED_TARGET),
    ):
        if mode not in args.modes:
            continue
        profile = calibrate_profile(
            engine, texts, text_sha256="0" * 64, max_len=512, score=score, skip_pairs=skip, targets=[0.3, target]
        )
        profile.save(pathlib.Path(args.folder) / f"{mode}.json")
        engine.profile = profile
        engine.set_target(target)
        engine.reset_realised()
        engine.set_counting(True)
        engine.run(held_out)
        engine.set_counting(False)
        layers = engine.realised().values()
        result["realised"][mode] = (
            statistics.mean(layer.sparsity for layer in layers),
            statistics.mean(layer.skipped_share for layer in layers),
        )
        print(mode, "realised sparsity, skipped pairs:", result["realised"][mode], flush=True)
        result[f"checks_{mode}"] = engine.llm.collective_rpc(check_layer)[0]
    return result


def check_layer(worker: Any) -> list[str]:
    """Runs in the worker: the first layer at several batch sizes against sparse_moe_ref; no synchronisation allowed
    on the way.
    """
    import torch
    from cutedsl_kernels.integration.vllm.dense import run_dense
    from cutedsl_kernels.integration.vllm.method import run_layer

    layer, state = next(iter(worker._sparsity_states().values()))
    weights = state.weights
    exact, state.exact = state.exact, False  # as a server runs it
    if weights.device.type == "cuda":
        state.choose_plans(layer.expert_map)
    lines = []
    generator = torch.Generator(weights.device).manual_seed(0)
    for num_tokens in (1, 3, 8, 33, 128, 512):
        x = torch.randn(num_tokens, weights.hidden_size, generator=generator, device=weights.device).to(weights.dtype)
        logits = 1.6 * torch.randn(num_tokens, layer.global_num_experts, generator=generator, device=weights.device)
        topk_weights, ids = torch.topk(torch.softmax(logits, -1), state.top_k)
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        plan = state.plan(num_tokens) if weights.device.type == "cuda" else None
        run_layer(layer, x, topk_weights, ids.int())
        if plan is not None:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            found = run_layer(layer, x, topk_weights, ids.int())
        finally:
            if plan is not None:
                torch.cuda.set_sync_debug_mode("default")
        given = (topk_weights, ids)
        dense = plan is not None and plan.kind == "dense"
        tau = 0.0 if dense else state.tau
        lines.append(
            f"{state.label} T={num_tokens} plan={plan} relative error {error(state, found, x, *given, tau):.2e}"
        )
        if plan is not None:
            found = run_dense(state, x, topk_weights, ids.int(), layer.expert_map, layer.global_num_experts)
            lines[-1] += f", vLLM's kernel {error(state, found, x, *given, 0.0):.2e}"
        print(lines[-1], flush=True)
    state.exact, state.plans = exact, []
    return lines


def error(state: Any, found: Any, x: Any, topk_weights: Any, topk_ids: Any, tau: Any) -> float:
    """Relative to sparse_moe_ref, in the Euclidean norm."""
    from cutedsl_kernels import sparse_moe_ref

    options = {"router_weighted": state.router_weighted, "pair_threshold": state.rho, "activation": state.activation}
    expected = sparse_moe_ref(x.float(), state.weights, topk_weights, topk_ids, tau, **options)
    return float((found.float() - expected).norm() / expected.norm())


def stage_measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times of one mode: {batch: times of COLUMNS, in ms}."""
    from cutedsl_kernels.integration.vllm.engine import SparseEngine
    from vllm import SamplingParams

    begun = time.perf_counter()
    options: dict[str, Any] = {"dense": True}
    if args.mode == "dense":
        options = {"record": True}  # thresholds 0, without a profile
    elif args.mode in CALIBRATED:
        target = {"paper": args.target, "routed": ROUTED_TARGET}[args.mode]
        options = {"profile": pathlib.Path(args.folder) / f"{args.mode}.json", "target": target}
    engine = SparseEngine(args.folder, enforce_eager=False, **options, **engine_arguments(args))
    print(args.mode, "norms, embeddings and routers changed:", engine.llm.collective_rpc(make_realistic), flush=True)
    print(f"{args.mode}: started in {time.perf_counter() - begun:.0f} s", flush=True)
    if args.mode != "stock":
        print(args.mode, "plans:", *(f"{bucket}: {plan};" for bucket, plan in engine.report()["plans"]), flush=True)
    vocabulary = engine.model_config.get_vocab_size()
    times: dict[str, Any] = {}
    gc.collect()
    gc.freeze()  # as vLLM's server does once it has started; a full collection takes longer than a prefill

    def seconds(batch: int, tokens: int, seed: int) -> float:
        prompts = [{"prompt_token_ids": p} for p in random_prompts(batch, args.input, vocabulary, seed)]
        parameters = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        engine.generate(prompts, parameters)
        return time.perf_counter() - start

    for batch in args.batches:
        seconds(batch, min(args.output, 8), 0)  # compiles vLLM's own kernels for these sizes
        seconds(batch, 1, 1)
        prefills = [1e3 * seconds(batch, 1, 10 + 2 * repeat) for repeat in range(3 * args.repeats)]
        wholes = [1e3 * seconds(batch, args.output, 11 + 2 * repeat) for repeat in range(args.repeats)]
        prefill = statistics.median(prefills)
        step = (statistics.median(wholes) - prefill) / (args.output - 1)
        device = statistics.median(device_ms(seconds, batch, 1, seed) for seed in (10, 12, 14)) if args.cuda else 0.0
        times[str(batch)] = {
            "step_ms": step,
            "prefill_ms": prefill,
            "prefill_fastest_ms": min(prefills),
            "prefill_device_ms": device,
        }
        spread = f"{min(prefills):.1f}..{max(prefills):.1f}; whole {min(wholes):.0f}..{max(wholes):.0f}"
        print(
            f"{args.mode} batch {batch}: {step:.3f} ms a step, prefill {prefill:.1f} ms ({spread}), "
            f"of which the device works {device:.2f}",
            flush=True,
        )
    if args.profile is not None:
        profile_steps(args.mode, seconds, args.profile or args.batches)
    if args.mode != "stock":
        print(args.mode, "kernels compiled while serving:", engine.report()["compiled_late"], flush=True)
    return {"times": times}


def device_events(call: Any, *arguments: Any) -> Any:
    """What the device's kernels and copies take in one call, by torch's profiler: its averages by name."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(*arguments)
    return profile.key_averages()


def device_ms(call: Any, *arguments: Any) -> float:
    """Milliseconds that the device works in one call."""
    return sum(event.self_device_time_total for event in device_events(call, *arguments)) / 1e3


def profile_steps(mode: str, seconds: Any, batches: list[int]) -> None:
    """Prints where the device's time goes while decoding 32 tokens at each batch size, and the host's in a prefill."""
    for batch in batches:
        host = cProfile.Profile()
        for repeat in range(3):
            host.runcall(seconds, batch, 1, 90 + repeat)
        print(f"host's time in three prefills of {mode}, batch {batch} (cProfile, which slows Python down)")
        pstats.Stats(host).sort_stats("tottime").print_stats(20)
        pstats.Stats(host).sort_stats("cumulative").print_stats(50)
        for what, tokens, seed in (("prefill of batch", 1, 98), ("batch", 32, 99)):
            events = device_events(seconds, batch, tokens, seed)
            print(f"profile of {mode}, {what} {batch}")
            print(events.table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=70))


def run_stage(
    args: argparse.Namespace, stage: str, mode: str, folder: pathlib.Path, environment: dict[str, str]
) -> Any:
    """Runs one stage in a process of its own and returns its result, or None if it failed."""
    result = folder / f"{stage}-{mode}.result.json"
    command = [
        sys.executable,
        __file__,
        "--stage",
        stage,
        "--mode",
        mode,
        "--folder",
        str(folder),
        "--result",
        str(result),
    ]
    command += ["--input", str(args.input), "--output", str(args.output), "--repeats", str(args.repeats)]
    command += ["--target", str(args.target), "--modes", *args.modes, "--batches", *map(str, args.batches)]
    environment = {**environment, "TRITON_CACHE_DIR": str(folder / "compiled" / "rank_0_0" / "triton_cache")}
    command += ["--quick"] if args.quick else []
    command += [] if args.profile is None else ["--profile", *map(str, args.profile)]
    begun = time.perf_counter()
    status = subprocess.run(command, env=environment).returncode
    print(f"== {stage} {mode}: exit {status}, {time.perf_counter() - begun:.0f} s", flush=True)
    return json.loads(result.read_text()) if status == 0 and result.is_file() else None


def facts() -> dict[str, str]:
    import torch

    sys.path.append(str(ROOT))
    from bench.records import revision

    found = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    found["revision"] = revision()
    for module in ("triton", "vllm"):
        version = subprocess.run(
            [sys.executable, "-c", f"import {module}; print({module}.__version__)"], capture_output=True, text=True
        )
        found[module] = version.stdout.strip().splitlines()[-1] if version.stdout.strip() else ""
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def benchmark(
    args: argparse.Namespace, name: str, writer: Any, scratch: pathlib.Path, environment: dict[str, str]
) -> bool:
    config, cutoff = MODELS[name]
    layers = args.layers or (8 if args.quick else config["num_hidden_layers"])
    if "full_attention_interval" in config:
        layers = max(4, layers // 4 * 4)
    config = {**config, "num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    folder = scratch / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    args.target = args.target or cutoff
    wanted = [mode for mode in CALIBRATED if mode in args.modes]
    kept = None if args.profiles is None else args.profiles / "-".join([name, str(layers), f"{args.target:g}", *wanted])
    if not wanted:
        calibrated: Any = {"realised": {}}
    elif kept is not None and kept.is_dir():
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        calibrated = json.loads((folder / "calibrated.json").read_text())
    else:
        calibrated = run_stage(args, "calibrate", "profiles", folder, environment)
        if calibrated is None:
            return False
        if kept is not None:
            kept.mkdir(parents=True)
            (folder / "calibrated.json").write_text(json.dumps(calibrated))
            for file in (*wanted, "calibrated"):
                shutil.copy(folder / f"{file}.json", kept)
    known = facts()
    stock: dict[str, Any] = {}
    complete = True
    for mode in args.modes:
        measured = run_stage(args, "measure", mode, folder, environment)
        if measured is None:
            complete = False
            continue
        stock = measured["times"] if mode == "stock" else stock
        sparsity, skipped = calibrated["realised"].get(mode, (0.0, 0.0))
        for batch, times in measured["times"].items():
            row = {
                **known,
                "model": name,
                "architecture": config["architectures"][0],
                "layers": layers,
                "mode": mode,
                "target": {"paper": args.target, "routed": ROUTED_TARGET}.get(mode, 0.0),
                "sparsity": f"{sparsity:.4f}",
                "skipped_pairs": f"{skipped:.4f}",
                "batch": batch,
                "input": args.input,
                "output": args.output,
                **figures(int(batch), times, stock.get(batch)),
            }
            writer.writerow(row)
            print(
                f"{name} {mode:6} batch {batch:>4}: {times['step_ms']:8.3f} ms a step, {row['tokens_per_s']:>9} "
                f"tokens/s, {row['ratio'] or '-'} times as fast as stock, the device in a prefill "
                f"{row['prefill_device_ratio'] or '-'}",
                flush=True,
            )
    return complete


def figures(batch: int, times: dict[str, float], stock: dict[str, float] | None) -> dict[str, str]:
    """Columns of one measured batch: its times, and how many times as fast as ``stock``'s; a time of 0 has none."""
    found = {column: f"{value:.4f}" for column, value in times.items()}
    found["tokens_per_s"] = f"{1e3 * batch / times['step_ms']:.1f}"
    found["baseline"] = "" if stock is None else "vllm stock"
    for column, which in RATIOS.items():
        found[column] = "" if stock is None or not times[which] else f"{stock[which] / times[which]:.3f}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=[*MODELS], help="default: both Qwens; with --quick the first")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--batches", nargs="*", type=int)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--target", type=float, help="target sparsity of mode paper")
    parser.add_argument("--profiles", type=pathlib.Path, help="folder to keep profiles in, and to take them from")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--profile", nargs="*", type=int, metavar="BATCH", help="print where device and host spend their time"
    )
    parser.add_argument("--out", type=pathlib.Path, help="CSV to write; default: bench/results/e2e-<date>.csv")
    for hidden in ("--stage", "--mode", "--folder", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batches = args.batches or ([1, 8, 32] if args.quick else [1, 8, 32, 128])
    args.output = args.output or (64 if args.quick else 256)
    args.repeats = args.repeats or (2 if args.quick else 5)
    if args.stage:
        import torch

        args.cuda = torch.cuda.is_available()
        result = stage_calibrate(args) if args.stage == "calibrate" else stage_measure(args)
        pathlib.Path(args.result).write_text(json.dumps(result))
        return 0
    names = args.model or list(MODELS)[: 1 if args.quick else 2]
    out = args.out or ROOT / "bench" / "results" / f"e2e-{datetime.date.today()}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-e2e-") as scratch_name, out.open("w", newline="", buffering=1) as file:
        scratch = pathlib.Path(scratch_name)
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            **os.environ,
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            part for part in (source_tree(scratch / "tree"), os.environ.get("PYTHONPATH")) if part
        )
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        target = args.target
        complete = True
        for name in names:
            args.target = target
            complete &= benchmark(args, name, writer, scratch, environment)
            file.flush()
    print(f"figures: {out}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
