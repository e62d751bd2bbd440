"""What is said of a database that cannot be opened."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from .errors import ConfigError

_LOCKED = "end the process that holds it"
_CLOSED = "permit reading and writing it and its directory, or name another directory"
_NO_ROOM = "free space on its disk, or name another directory"
_DAMAGED = "move it away, or put a copy in its place"
_ADVICE = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: _CLOSED,
    sqlite3.SQLITE_CANTOPEN: _CLOSED,
    sqlite3.SQLITE_PERM: _CLOSED,
    sqlite3.SQLITE_FULL: _NO_ROOM,
    sqlite3.SQLITE_IOERR: _NO_ROOM,
}


def unopenable(path: Path, error: sqlite3.Error) -> ConfigError:
    """Say which database cannot be opened, why, and what to do."""
    # The low byte is the error; the others say where in SQLite it arose.
    advice = _ADVICE.get(error.sqlite_errorcode & 0xFF, _DAMAGED)
    return ConfigError(f"The database {path} cannot be opened ({error}); {advice}.")
