"""The disk cache of compiled kernels: one object and one description per key, made under a lock, replaced atomically.

``<folder>/sm_90a/<DSL version>-<calling convention>/<readable name>-<hash of the key>.o`` beside a ``.json`` with the
whole key and the object's SHA-256. The object is written first: an entry counts only if description, key and checksum
agree; anything else is rebuilt. Entries are never wrong, at worst missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


class CacheWarning(UserWarning):
    """The cache cannot be written; kernels are compiled again in every process."""


class ObjectCache:
    """Objects under ``folder``; see the module."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, name: str, key: Mapping[str, str], build: Callable[[Path], None]) -> tuple[Path, bool]:
        """(path of the object for ``key``, whether ``build`` had to make it). build(path) writes an object.

        Processes that want the same key wait for the one that builds it. If the folder cannot be written, the object
        is made in a temporary folder, with a CacheWarning.
        """
        stem = self._stem(name, key)
        if self._valid(stem, key):
            return stem.with_suffix(".o"), False
        try:
            with exclusive(stem.with_suffix(".lock")):
                if self._valid(stem, key):
                    return stem.with_suffix(".o"), False
                return self._build(stem, key, build), True
        except OSError as error:
            warnings.warn(
                f"{self.folder}: compiled kernels cannot be kept ({error}): set CUTEDSL_KERNELS_CACHE_DIR to a folder"
                " that can be written",
                CacheWarning,
                stacklevel=2,
            )
            path = Path(tempfile.mkdtemp(prefix="cutedsl-kernels-")) / f"{stem.name}.o"
            build(path)
            return path, True

    def contains(self, name: str, key: Mapping[str, str]) -> bool:
        """Whether ``key`` is there, whole."""
        return self._valid(self._stem(name, key), key)

    def _stem(self, name: str, key: Mapping[str, str]) -> Path:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        readable = name.replace(".", "_")  # with_suffix would take what follows a dot for the suffix
        return self.folder / key["arch"] / f"{key['dsl']}-{key['convention']}" / f"{readable}-{digest[:16]}"

    @staticmethod
    def _valid(stem: Path, key: Mapping[str, str]) -> bool:
        try:
            description = json.loads(stem.with_suffix(".json").read_text())
            content = stem.with_suffix(".o").read_bytes()
        except (OSError, ValueError):
            return False
        return description == _description(key, content)

    @staticmethod
    def _build(stem: Path, key: Mapping[str, str], build: Callable[[Path], None]) -> Path:
        with tempfile.TemporaryDirectory(dir=stem.parent, prefix=".building-") as folder:
            made = Path(folder) / "kernel.o"
            build(made)
            description = Path(folder) / "kernel.json"
            description.write_text(json.dumps(_description(key, made.read_bytes()), indent=1))
            os.replace(made, stem.with_suffix(".o"))
            os.replace(description, stem.with_suffix(".json"))
        return stem.with_suffix(".o")


def _description(key: Mapping[str, str], content: bytes) -> dict[str, object]:
    return {"key": dict(key), "sha256": hashlib.sha256(content).hexdigest()}


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """While this is held, no other process or thread holds it for ``path``, a file that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
