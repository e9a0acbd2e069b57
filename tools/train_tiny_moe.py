"""Trains the small MoE language models of this repository on the text of tools/corpus.py, with transformers' classes.

    python tools/train_tiny_moe.py --architecture olmoe --size ship --minutes 60 --out models/tiny-olmoe
    python tools/train_tiny_moe.py --all --minutes 1.2 --out trained --pack packed     # four models at once on one GPU

Tokens are bytes (ids 0..255), 256 ends a document, 257 is padding; tokenizer.json says the same to transformers and
vLLM. The learning rate falls with the larger of steps done and time used, so a run ends on time with whatever steps
fit; the count is recorded. Written beside the weights: training.json, with seed, data hashes, steps, and the held-out
loss of the saved bf16 weights beside that of a byte trigram (Witten-Bell interpolation) counted on the same files.

On CUDA every expert computes every token as two dense products, with routing weight 0 where the router did not choose
it: the same function and gradients as the loop over experts, four times its arithmetic, and no small launches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import corpus

END_OF_TEXT, PADDING, VOCABULARY = 256, 257, 258
SYMBOLS = 257  # bytes and end of text: what occurs in the training stream
ALL_MODELS = (("olmoe", "ship"), ("olmoe", "10m"), ("mixtral", "10m"), ("qwen2moe", "10m"))
PART_BYTES = 15 * 2**20
SIZES: dict[tuple[str, str], dict[str, int]] = {
    ("olmoe", "ship"): {"hidden": 128, "inter": 128, "experts": 16, "top_k": 4, "heads": 2},
    ("olmoe", "10m"): {"hidden": 256, "inter": 192, "experts": 16, "top_k": 4, "heads": 4},
    ("mixtral", "ship"): {"hidden": 128, "inter": 256, "experts": 8, "top_k": 2, "heads": 2},
    ("mixtral", "10m"): {"hidden": 256, "inter": 384, "experts": 8, "top_k": 2, "heads": 4},
    ("qwen2moe", "ship"): {"hidden": 128, "inter": 112, "experts": 16, "top_k": 4, "heads": 2, "shared": 128},
    ("qwen2moe", "10m"): {"hidden": 256, "inter": 160, "experts": 16, "top_k": 4, "heads": 4, "shared": 256},
}


def build_model(architecture: str, size: str, context: int) -> Any:
    """A fresh transformers model. OLMoE and Qwen2-MoE keep raw softmax weights of the top k, Mixtral renormalises."""
    import transformers

    shape = SIZES[architecture, size]
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape["hidden"],
        "num_hidden_layers": 4,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "num_experts_per_tok": shape["top_k"],
        "max_position_embeddings": context,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
        "initializer_range": 0.04,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": PADDING,
        "use_cache": False,
    }
    if architecture == "olmoe":
        config = transformers.OlmoeConfig(**common, intermediate_size=shape["inter"], num_experts=shape["experts"])
        return transformers.OlmoeForCausalLM(config)
    if architecture == "mixtral":
        config = transformers.MixtralConfig(
            **common, intermediate_size=shape["inter"], num_local_experts=shape["experts"]
        )
        return transformers.MixtralForCausalLM(config)
    config = transformers.Qwen2MoeConfig(
        **common,
        intermediate_size=4 * shape["inter"],
        moe_intermediate_size=shape["inter"],
        shared_expert_intermediate_size=shape["shared"],
        num_experts=shape["experts"],
    )
    return transformers.Qwen2MoeForCausalLM(config)


def all_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """For an experts module's forward: hidden_states [T, H], top_k_* [T, k] -> [T, H]; all experts on all tokens."""
    experts, rows, hidden = self.gate_up_proj.shape
    gate_up = F.linear(hidden_states, self.gate_up_proj.reshape(experts * rows, hidden)).view(-1, experts, 2, rows // 2)
    routing = torch.zeros(hidden_states.shape[0], experts, dtype=gate_up.dtype, device=gate_up.device)
    routing = routing.scatter(1, top_k_index, top_k_weights.to(gate_up.dtype))
    inner = F.silu(gate_up[:, :, 0]) * gate_up[:, :, 1] * routing.unsqueeze(-1)
    down = self.down_proj.permute(1, 0, 2).reshape(hidden, experts * rows // 2)
    return F.linear(inner.flatten(1), down).to(hidden_states.dtype)


def use_all_experts(model: Any) -> None:
    for module in model.modules():
        if (
            hasattr(module, "gate_up_proj")
            and hasattr(module, "down_proj")
            and isinstance(module.gate_up_proj, torch.nn.Parameter)
        ):
            module.forward = MethodType(all_experts_forward, module)


def stream(documents: list[bytes]) -> np.ndarray:
    """int16 symbols of all documents, each followed by end of text."""
    parts = []
    for document in documents:
        parts += [np.frombuffer(document, dtype=np.uint8).astype(np.int16), np.array([END_OF_TEXT], dtype=np.int16)]
    return np.concatenate(parts)


def trigram_bits(train: np.ndarray, test: np.ndarray) -> float:
    """Mean bits per symbol of ``test`` under a Witten-Bell interpolated trigram counted on ``train``."""

    def counts(order: int) -> np.ndarray:
        code = np.zeros(len(train) - order + 1, dtype=np.int64)
        for i in range(order):
            code = code * SYMBOLS + train[i : len(train) - order + 1 + i]
        return np.bincount(code, minlength=SYMBOLS**order).reshape(-1, SYMBOLS)

    a, b, c = (test[i : len(test) - 2 + i].astype(np.int64) for i in range(3))
    probability = np.full(len(c), 1.0 / SYMBOLS)
    for order, context in ((1, np.zeros_like(c)), (2, b), (3, a * SYMBOLS + b)):
        table = counts(order)
        seen, kinds = table.sum(axis=1), (table > 0).sum(axis=1)
        numerator = table[context, c] + kinds[context] * probability
        denominator = seen[context] + kinds[context]
        probability = np.where(denominator > 0, numerator / np.maximum(denominator, 1), probability)
    return float(-np.log2(probability).mean())


@torch.no_grad()
def model_bits(model: Any, symbols: np.ndarray, context: int, device: torch.device) -> float:
    """Mean bits per symbol over windows of ``context`` symbols, each starting without memory of the one before."""
    windows = len(symbols) // context
    data = torch.from_numpy(symbols[: windows * context].astype(np.int64)).view(windows, context)
    total, count = 0.0, 0
    for batch in data.split(16 if device.type == "cuda" else 2):
        batch = batch.to(device)
        logits = model(input_ids=batch, output_router_logits=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
    return total / count / math.log(2)


def train(model: Any, symbols: np.ndarray, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Trains in place until ``--steps`` or ``--minutes`` is used up; returns steps, tokens, seconds, last loss."""
    data = torch.from_numpy(symbols).to(device)
    generator = torch.Generator().manual_seed(arguments.seed)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    window = torch.arange(arguments.context, device=device)
    batch = max(1, arguments.batch_tokens // arguments.context)
    limit = arguments.minutes * 60
    start, step, loss = time.perf_counter(), 0, torch.zeros(())
    model.train()
    while True:
        elapsed = time.perf_counter() - start
        progress = max(elapsed / limit, step / arguments.steps if arguments.steps else 0.0)
        if progress >= 1:
            break
        factor = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = arguments.learning_rate * factor
        offsets = torch.randint(len(symbols) - arguments.context, (batch,), generator=generator).to(device)
        ids = data[offsets.unsqueeze(1) + window].long()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % arguments.log_every == 0:
            print(
                f"step {step}  {elapsed:.0f} s  loss {loss.item() / math.log(2):.3f} bits (router loss included)",
                flush=True,
            )
        step += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.eval()
    return {
        "steps": step,
        "tokens": step * batch * arguments.context,
        "seconds": round(seconds, 1),
        "last_loss": round(loss.item(), 4),
    }


def write_tokenizer(folder: Path, context: int) -> None:
    """tokenizer.json and tokenizer_config.json: byte b is token b, no merges."""
    letters = byte_letters()
    vocabulary = {letters[b]: b for b in range(256)} | {"<|endoftext|>": END_OF_TEXT, "<|padding|>": PADDING}
    special = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, text in ((END_OF_TEXT, "<|endoftext|>"), (PADDING, "<|padding|>"))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|padding|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def byte_letters() -> list[str]:
    """The character that byte-level tokenizers use for each byte: itself where printable, else one from U+0100 on."""
    kept = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    letters = [chr(b) for b in range(256)]
    for i, b in enumerate(b for b in range(256) if b not in kept):
        letters[b] = chr(256 + i)
    return letters


def save_checkpoint(model: Any, folder: Path) -> None:
    """bf16 safetensors laid out like published checkpoints (a tensor per expert and projection), as vLLM reads them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    architecture = model.config.model_type
    mixtral = architecture == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.bfloat16)
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for e, (gate_rows, up_rows) in enumerate(part.chunk(2) for part in tensor):
                tensors[f"{prefix}{e}.{gate}.weight"] = gate_rows.contiguous()
                tensors[f"{prefix}{e}.{up}.weight"] = up_rows.contiguous()
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for e, part in enumerate(tensor):
                tensors[f"{prefix}{e}.{down}.weight"] = part.contiguous()
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model.config.to_diff_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        "output_router_logits": False,
        "use_cache": True,
    }
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": END_OF_TEXT, "pad_token_id": PADDING}, indent=1) + "\n"
    )
    write_tokenizer(folder, model.config.max_position_embeddings)


def sha256(documents: list[bytes]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document)
    return digest.hexdigest()


def run_one(arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    wanted = arguments.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    splits = {split: corpus.read_split(split) for split in corpus.SPLITS}
    streams = {split: stream(documents) for split, documents in splits.items()}
    held_out = streams["held-out"][: arguments.evaluate_symbols]
    trigram = trigram_bits(streams["train"], held_out)
    model = build_model(arguments.architecture, arguments.size, arguments.context).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    title = f"{arguments.architecture} {arguments.size}: {parameters / 1e6:.2f} M parameters on {device}"
    print(f"{title}; trigram {trigram:.4f} bits per byte", flush=True)
    if device.type == "cuda":
        use_all_experts(model)
    result = train(model, streams["train"], arguments, device)
    save_checkpoint(model, arguments.out)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(tensor.to(torch.bfloat16))
    bits = model_bits(model, held_out, arguments.context, device)
    record = {
        "architecture": arguments.architecture,
        "size": arguments.size,
        "parameters": parameters,
        "seed": arguments.seed,
        "context": arguments.context,
        "batch_tokens": arguments.batch_tokens,
        "learning_rate": arguments.learning_rate,
        **result,
        "held_out_bits_per_byte": round(bits, 4),
        "trigram_bits_per_byte": round(trigram, 4),
        "held_out_symbols": len(held_out),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "data": {
            split: {"files": len(d), "bytes": sum(map(len, d)), "sha256": sha256(d)} for split, d in splits.items()
        },
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    took = time.perf_counter() - began
    steps = f"{result['steps']} steps, {took:.0f} s in all"
    print(f"{arguments.out}: held-out {bits:.4f} bits per byte, trigram {trigram:.4f}; {steps}", flush=True)
    return record


def run_all(arguments: argparse.Namespace) -> int:
    """The four models as parallel processes, each limited by ``--minutes``, with a log. Returns how many failed."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    running = []
    for index, (architecture, size) in enumerate(ALL_MODELS):
        name = f"{architecture}-{size}"
        command = [sys.executable, __file__, "--architecture", architecture, "--size", size]
        command += ["--out", str(arguments.out / name), "--seed", str(arguments.seed + index)]
        for option in ("minutes", "steps", "context", "batch_tokens", "learning_rate", "evaluate_symbols", "device"):
            command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
        log = (arguments.out / f"{name}.log").open("w")
        running.append((name, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log))
    failed, records = 0, {}
    for name, process, log in running:
        code = process.wait()
        log.close()
        lines = (arguments.out / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"{name}: exit {code}", *lines[-(1 if code == 0 else 15) :], sep="\n  ", flush=True)
        failed += code != 0
        records[name] = (
            json.loads((arguments.out / name / "training.json").read_text()) if code == 0 else {"failed": lines[-15:]}
        )
        if arguments.pack and code == 0:
            pack(arguments.out / name, arguments.pack)
    if arguments.pack:
        arguments.pack.mkdir(parents=True, exist_ok=True)
        (arguments.pack / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    return failed


def pack(folder: Path, into: Path) -> None:
    """One tar file per model, cut into parts of at most 15 MiB named NAME.tar.0, NAME.tar.1, ...; `cat` joins them."""
    into.mkdir(parents=True, exist_ok=True)
    whole = into / f"{folder.name}.tar"
    with tarfile.open(whole, "w") as archive:
        archive.add(folder, arcname=folder.name)
    data = whole.read_bytes()
    whole.unlink()
    for part, start in enumerate(range(0, len(data), PART_BYTES)):
        (into / f"{whole.name}.{part}").write_bytes(data[start : start + PART_BYTES])


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains the small MoE language models of this repository.")
    parser.add_argument("--architecture", choices=("olmoe", "mixtral", "qwen2moe"), default="olmoe")
    parser.add_argument(
        "--size", choices=("ship", "10m"), default="ship", help="ship: about 3.5 M parameters; 10m: about 10 M"
    )
    parser.add_argument(
        "--all", action="store_true", help="train the shipped model and the three of about 10 M side by side"
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="time for training; loading and evaluation come on top"
    )
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps, 0: by time alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens per sequence, and the model's longest context"
    )
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--evaluate-symbols", type=int, default=400_000, help="held-out text to evaluate on")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the checkpoint, or of the checkpoints with --all"
    )
    parser.add_argument(
        "--pack",
        type=Path,
        help="with --all: also write each checkpoint as tar parts of at most 15 MiB into this folder",
    )
    arguments = parser.parse_args()
    for name in ("minutes", "context", "batch_tokens", "learning_rate", "log_every"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name)}")
    if arguments.evaluate_symbols < 2 * arguments.context:
        parser.error(f"--evaluate-symbols must be at least twice --context, got {arguments.evaluate_symbols}")
    if arguments.all:
        return 1 if run_all(arguments) else 0
    run_one(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
