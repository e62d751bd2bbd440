"""Tokens of paged lists: opaque to clients, a position in one list to us."""

from __future__ import annotations

import base64
import binascii
import re

from .errors import InvalidRequest, Violation

_CONTENT = re.compile(r"([a-z_]+):([0-9]{1,18})")


def write(name: str, position: int) -> str:
    """Make the token that goes on after a position of the named list."""
    return base64.urlsafe_b64encode(f"{name}:{position}".encode()).decode()


def read(token: str, name: str) -> int:
    """Return the position, 0 for the empty token; raises InvalidRequest for one that is not of this list."""
    if not token:
        return 0
    try:
        content = base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        content = ""
    found = _CONTENT.fullmatch(content)
    if found is None or found[1] != name:
        violation = Violation("page_token", "must be the next_page_token of a response")
        raise InvalidRequest("page_token is not from this list.", violations=(violation,))
    return int(found[2])
