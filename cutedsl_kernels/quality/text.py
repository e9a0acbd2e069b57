"""Text for calibration and evaluation: files read, hashed, tokenised and cut into sequences."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> tuple[str, str]:
    """(all files joined by a newline, sha256 of that text's UTF-8 bytes). UserError for a file that cannot be read or
    is empty.
    """
    if not paths:
        raise UserError("no text given: name at least one file with --text")
    parts = []
    for path in map(Path, paths):
        try:
            part = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"text {path}: cannot be read: {reason}") from None
        if not part.strip():
            raise UserError(f"text {path}: is empty")
        parts.append(part)
    text = "\n".join(parts)
    return text, hashlib.sha256(text.encode()).hexdigest()


def cut_sequences(
    text: str, encode: Callable[[str], list[int]], *, max_tokens: int, max_len: int, min_tokens: int = 64
) -> list[list[int]]:
    """Sequences of at most ``max_len`` token ids, ``max_tokens`` in all, taken at even distances over the whole text.

    ``encode``: text -> token ids. UserError if the text has fewer than ``min_tokens`` tokens.
    """
    tokens = encode(text)
    if len(tokens) < min_tokens:
        raise UserError(f"the text has {len(tokens)} tokens, at least {min_tokens} are needed: give more text")
    windows = [tokens[start : start + max_len] for start in range(0, len(tokens), max_len)]
    if len(windows) > 1 and len(windows[-1]) < min(max_len, min_tokens):
        windows.pop()
    wanted = max(1, -(-max_tokens // max_len))
    if wanted < len(windows):
        windows = [windows[int((i + 0.5) * len(windows) / wanted)] for i in range(wanted)]
    left = max_tokens
    chosen = []
    for window in windows:
        if left < 2:
            break
        chosen.append(window[:left])
        left -= len(window)
    return [window for window in chosen if len(window) >= 2]
