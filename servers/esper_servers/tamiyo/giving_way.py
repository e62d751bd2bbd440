from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_SECONDS = 0.0005

_lock = threading.Lock()
_usual: list[float] = []
"""The interval to return to, once for each who gives way."""


@contextmanager
def giving_way() -> Iterator[None]:
    """Have threads hand the interpreter to each other within half a millisecond; otherwise one keeps it for 5 ms.

    On any thread, and by several at a time: the usual interval returns with the last.
    """
    with _lock:
        _usual.append(_usual[0] if _usual else sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        with _lock:
            usual = _usual.pop()
            if not _usual:
                sys.setswitchinterval(usual)
