"""Files that only their owner may read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from esper_rpc.errors import ConfigError


def write_secret(path: Path, content: bytes) -> None:
    """Replace a file atomically, mode 0600; raises ConfigError."""
    write_secrets({path: content})


def write_secrets(contents: Mapping[Path, bytes]) -> None:
    """Replace files that belong together; when one has no room they all stay as they were."""
    scratches = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    try:
        for path, scratch in scratches.items():
            _write(scratch, contents[path])
        for path, scratch in scratches.items():
            scratch.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); free space or permit writing.") from error
    finally:
        for scratch in scratches.values():
            with contextlib.suppress(OSError):
                scratch.unlink()


def read_secret(path: Path) -> bytes:
    """Read a secret; raises ConfigError when it is missing or others may read it."""
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; `esper pki issue` and `esper keys issue` write it.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); permit reading it.") from error
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode & 0o777:o}); run chmod 600 {path}.")
    return content


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
