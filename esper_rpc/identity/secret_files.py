"""Files that only their owner may read."""

from __future__ import annotations

import os
from pathlib import Path

from esper_rpc.errors import ConfigError


def write_secret(path: Path, content: bytes) -> None:
    """Replace a file atomically, mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read_secret(path: Path) -> bytes:
    """Read a secret; raises ConfigError when it is missing or others may read it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; `esper pki issue` and `esper keys issue` write it.") from None
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode & 0o777:o}); run chmod 600 {path}.")
    return path.read_bytes()
