from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson
import structlog

from esper_rpc.errors import ConfigError, InvalidRequest

from .secret_files import write_secret
from .spiffe import SpiffeId

log = structlog.get_logger(__name__)


class DenyList:
    """Members that are refused before their short-lived certificate ends: a JSON file of names and reasons.

    A file that cannot be read keeps the list that was read last: a slip of the pen must not let everyone in.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._stamp = 0
        self._denied: Mapping[str, str] = {}
        self.refresh()

    def reason_for(self, spiffe_id: SpiffeId) -> str | None:
        """Why a member is denied, None when it is not."""
        return self._denied.get(str(spiffe_id))

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        stamp = _stamp_of(self._path)
        if stamp == self._stamp or self._path is None:
            return
        try:
            self._denied = read_denied(self._path)
        except ConfigError as error:
            log.error("deny_list_unreadable", path=str(self._path), error=error.message, priority="HIGH")
        self._stamp = stamp


def read_denied(path: Path) -> dict[str, str]:
    """Read names and reasons, empty without a file; raises ConfigError."""
    if not path.exists():
        return {}
    try:
        document = orjson.loads(path.read_bytes())
        return {str(SpiffeId.parse(name)): str(reason) for name, reason in document.items()}
    except (ValueError, AttributeError, OSError, InvalidRequest) as error:
        raise ConfigError(f"{path} is not a deny list; `esper pki deny` writes it.") from error


def write_denied(path: Path, denied: Mapping[str, str]) -> None:
    """Replace the list."""
    write_secret(path, orjson.dumps(dict(denied), option=orjson.OPT_INDENT_2))


def _stamp_of(path: Path | None) -> int:
    try:
        return path.stat().st_mtime_ns if path is not None else 0
    except FileNotFoundError:
        return 0
