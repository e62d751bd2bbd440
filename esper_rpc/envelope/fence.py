from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from esper_rpc.proto.leyline.v1 import CommandOutcome


@dataclass(slots=True)
class Receipt:
    """What is remembered of an accepted envelope until its nonce expires."""

    mac: bytes
    expires_at: float
    outcome: CommandOutcome | None = field(default=None)


class NonceStore:
    """Nonces seen within a time to live, in order of arrival, so that purging costs O(1) per entry."""

    def __init__(self, *, ttl_seconds: float, capacity: int, clock: Callable[[], float]) -> None:
        self._ttl = ttl_seconds
        self._capacity = capacity
        self._clock = clock
        self._receipts: OrderedDict[Any, Receipt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._receipts)

    def find(self, nonce: str) -> Receipt | None:
        """Return the receipt of a nonce that has not expired."""
        self._purge()
        return self._receipts.get(nonce)

    def is_full(self) -> bool:
        """Whether a new nonce would push out one that has not expired, which would reopen the window."""
        self._purge()
        return len(self._receipts) >= self._capacity

    def add(self, nonce: str, mac: bytes) -> None:
        """Remember a nonce."""
        self._receipts[nonce] = Receipt(mac, self._clock() + self._ttl)

    def _purge(self) -> None:
        now = self._clock()
        while self._receipts:
            first = next(iter(self._receipts))
            if self._receipts[first].expires_at > now:
                return
            del self._receipts[first]
