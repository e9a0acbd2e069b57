"""Makes a folder in which the package has the layout that an installation gives it, by links into this checkout.

    export PYTHONPATH=$(python tools/source_tree.py /tmp/tree):$PYTHONPATH

For machines where nothing can be installed: cutedsl_kernels.autotune, .bench and .integration can be imported then.
"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def source_tree(folder: pathlib.Path) -> str:
    """Fills ``folder``, which must not exist, and returns what to put on PYTHONPATH."""
    package = folder / "cutedsl_kernels"
    package.mkdir(parents=True)
    for child in (ROOT / "cutedsl_kernels").iterdir():
        (package / child.name).symlink_to(child)
    for name in ("autotune", "bench", "integration"):
        (package / name).symlink_to(ROOT / name)
    return str(folder)


if __name__ == "__main__":
    print(source_tree(pathlib.Path(sys.argv[1])))
