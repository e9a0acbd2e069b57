"""The vLLM plugin: `--quantization intra_expert_sparse`. See docs/serving.md."""

from __future__ import annotations


def register() -> None:
    """Entry point of group vllm.general_plugins. vLLM calls it in every process, some more than once; it does not
    touch CUDA.
    """
    import logging

    from .compat import unsupported_version

    problem = unsupported_version()
    if problem is not None:
        logging.getLogger("vllm.cutedsl_kernels").warning(
            "%s; the method intra_expert_sparse is not available", problem
        )
        return
    from .config import register_method

    register_method()
