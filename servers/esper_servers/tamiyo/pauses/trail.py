from __future__ import annotations

import uuid
from collections.abc import Iterator

from esper_rpc import page_token
from esper_rpc.journal import Journal
from esper_rpc.proto.tamiyo.v1 import PauseGrant

KIND = "pause"


class PauseTrail:
    """The audit trail of pauses in the journal. Every method waits for the disk."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def keep(self, grant: PauseGrant) -> bool:
        """Write a line; False when the disk did not take it."""
        return self._journal.keep(KIND, str(uuid.uuid4()), grant.SerializeToString())

    def page(self, size: int, token: str) -> tuple[list[PauseGrant], str]:
        """Return lines, oldest first, and the token of the next page; raises InvalidRequest for a token not of here."""
        after = page_token.read(token, KIND)
        self._journal.flush()
        found = self._journal.page(KIND, after=after, limit=size + 1)
        grants = [PauseGrant.FromString(record.body) for _, record in found[:size]]
        return grants, page_token.write(KIND, found[size - 1][0]) if len(found) > size else ""

    def newest_first(self) -> Iterator[PauseGrant]:
        """Yield every line."""
        for record in self._journal.newest(KIND):
            yield PauseGrant.FromString(record.body)
