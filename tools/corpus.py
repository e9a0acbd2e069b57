"""The text of the bundled models: the Python standard library's own sources, split three ways by file.

    python tools/corpus.py --split calibration --out calibration.txt [--max-bytes 300000]
    python tools/corpus.py --split held-out --list

Every Python installation has this text. A file's split depends on the hash of its path below the library's root alone,
so a file is on the same side in every Python version: what one version trains on is never held out by another. Test
packages are used for training only, where they are installed (some distributions leave them out). Left out: third-party
packages, generated tables (encodings, pydoc_data, build settings), caches, and anything that is not UTF-8.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
from pathlib import Path

SPLITS = ("train", "calibration", "held-out")
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "lib-dynload",
    "__phello__",
}
TEST_FOLDERS = {"test", "tests", "idle_test"}
CALIBRATION_SHARE, HELD_OUT_SHARE = 6, 6  # of 100


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(relative: str) -> str:
    """train, calibration or held-out, from the path below the library's root (with forward slashes)."""
    parts = relative.split("/")
    if TEST_FOLDERS.intersection(parts[:-1]):
        return "train"
    bucket = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big") % 100
    if bucket < CALIBRATION_SHARE:
        return "calibration"
    return "held-out" if bucket < CALIBRATION_SHARE + HELD_OUT_SHARE else "train"


def source_files(root: Path | None = None) -> dict[str, list[Path]]:
    """{split: files}, sorted by relative path. Equal contents are kept once, on the training side if one is there."""
    root = root or library_root()
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    candidates = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if (
            LEFT_OUT.intersection(relative.parts)
            or relative.parts[0].startswith("config-")
            or relative.name.startswith("_sysconfigdata")
        ):
            continue
        candidates.append(relative.as_posix())
    for name in sorted(candidates, key=lambda name: (SPLITS.index(split_of(name)), name)):
        try:
            data = (root / name).read_bytes()
            data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(data).digest()
        if data and digest not in seen:
            seen.add(digest)
            found[split_of(name)].append(root / name)
    return found


def read_split(split: str, root: Path | None = None) -> list[bytes]:
    """The files of a split as bytes, in order of relative path."""
    return [path.read_bytes() for path in source_files(root)[split]]


def excerpt(split: str, max_bytes: int | None, root: Path | None = None) -> str:
    """Text of a split. With ``max_bytes`` every file gives its beginning, in equal shares, so that all are sampled."""
    documents = read_split(split, root)
    if max_bytes is not None and documents:
        left = max_bytes
        shortened = {}
        for rank, index in enumerate(sorted(range(len(documents)), key=lambda i: len(documents[i]))):
            share = left // (len(documents) - rank)
            shortened[index] = documents[index][:share]
            left -= len(shortened[index])
        documents = [shortened[i] for i in range(len(documents))]
    return "\n".join(document.decode("utf-8", errors="ignore") for document in documents if document)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Text of the bundled models: one split of the standard library's sources."
    )
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--out", type=Path, help="text file to write")
    parser.add_argument("--max-bytes", type=int, help="about this much text, spread over all files of the split")
    parser.add_argument("--list", action="store_true", help="print the files instead")
    arguments = parser.parse_args()
    if arguments.list == (arguments.out is not None):
        parser.error("give either --out FILE or --list")
    if arguments.max_bytes is not None and arguments.max_bytes < 1:
        parser.error(f"--max-bytes must be at least 1, got {arguments.max_bytes}")
    if arguments.list:
        for path in source_files()[arguments.split]:
            print(path)
        return 0
    text = excerpt(arguments.split, arguments.max_bytes)
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"--out {arguments.out}: cannot write: {error.strerror}")
    print(f"{arguments.out}: {len(text.encode())} bytes of the {arguments.split} split", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
