"""Files that are there whole or not at all, and whether a service may keep its state where it is told to."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from .errors import ConfigError

log = structlog.get_logger(__name__)

PROBE_BYTES = 4096
ASIDE = ".unusable"
Content = TypeVar("Content")


def require_writable(directory: Path) -> None:
    """Raise ConfigError unless a file can be written and synced in the directory, which is made if it is missing."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _probe(directory / f".probe-{os.getpid()}")
    except OSError as error:
        raise unwritable(directory, error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write or replace a file; after a crash at any moment the old one or the new one is there. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    _sync_directory(path.parent)


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


def unwritable(directory: Path, error: OSError) -> ConfigError:
    """Say which directory cannot be written, why, and what to do."""
    return ConfigError(
        f"The directory {directory} cannot be written ({error.strerror});"
        " free space or permit writing, or name another one."
    )


def _sync_directory(directory: Path) -> None:
    """Until then the new name itself may be lost with the power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _probe(path: Path) -> None:
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
