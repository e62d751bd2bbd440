"""Logs that are bounded: once one is large it is copied aside and emptied, and its service writes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def rotate(file: Path, most_bytes: int) -> bool:
    """Keep what a large log holds as `<name>.1`, in place of the one before, and empty it; whether it was large.

    A service keeps its log open and appends to it, so that the file stays the same. What is written between the copy
    and the emptying is lost, some lines at most. Raises OSError, for instance on a full disk; then nothing was emptied.
    """
    if not file.exists() or file.stat().st_size <= most_bytes:
        return False
    scratch = file.with_name(f"{file.name}.new")
    try:
        shutil.copyfile(file, scratch)
        scratch.replace(rotated(file))
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    os.truncate(file, 0)
    return True


def rotated(file: Path) -> Path:
    """Where the older half of a log is."""
    return file.with_name(f"{file.name}.1")


def oldest_first(file: Path) -> list[Path]:
    """The files of a log that are there."""
    return [part for part in (rotated(file), file) if part.exists()]
