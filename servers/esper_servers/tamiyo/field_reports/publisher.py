from __future__ import annotations

from typing import Protocol

from esper_rpc.proto.leyline.v1 import FieldReport


class ReportPublisher(Protocol):
    """Hands reports to whoever learns from them."""

    async def publish(self, report: FieldReport) -> None:
        """Hand a report over; raises EsperError when that failed.

        Whoever receives it calls AckFieldReport. The same report may come again, under the same id.
        """
        ...
