"""The vLLM plugin: `--quantization intra_expert_sparse`."""
