"""Whether a service may keep its state where it is told to, and what is said when it may not."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError

PROBE_BYTES = 4096


def require_writable(directory: Path) -> None:
    """Raise ConfigError unless a file can be written and synced in the directory, which is made if it is missing."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _probe(directory / f".probe-{os.getpid()}")
    except OSError as error:
        raise unwritable(directory, error) from error


def unwritable(directory: Path, error: OSError) -> ConfigError:
    """Say which directory cannot be written, why, and what to do."""
    return ConfigError(
        f"The directory {directory} cannot be written ({error.strerror});"
        " free space or permit writing, or name another one."
    )


def _probe(path: Path) -> None:
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
