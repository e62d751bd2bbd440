"""Small files of state that are there whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

log = structlog.get_logger(__name__)

ASIDE = ".unusable"
Content = TypeVar("Content")


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file. Let only one thread at a time write the same one; raises OSError, and the old file stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # One name for all times: what a kill leaves is overwritten, and does not pile up.
    scratch = path.with_name(f".{path.name}.new")
    try:
        _write(scratch, content)
        scratch.replace(path)
        _sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def read_whole(path: Path, read: Callable[[bytes], Content]) -> Content | None:
    """Return what `read` makes of a file, None where there is none.

    One that cannot be read, or of which `read` raises ValueError, is kept aside and told of once; the result is None.
    """
    try:
        return read(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        aside = path.with_name(path.name + ASIDE)
        with contextlib.suppress(OSError):
            path.replace(aside)
        log.warning("state_file_unusable", file=path.name, kept_as=aside.name, problem=str(error)[:200])
        return None


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Keep the new name as safe as the content."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
