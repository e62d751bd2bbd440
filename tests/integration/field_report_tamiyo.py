"""A Tamiyo with a publisher that hands field reports to a socket of another process.

Its arguments: the directory of its identity, that of its state, and the port of the other process.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from esper_rpc.envelope import Keyring
from esper_rpc.errors import Unavailable
from esper_rpc.logging import log_json_lines
from esper_rpc.proto.leyline.v1 import FieldReport
from esper_servers.tamiyo.field_reports.config import ReportConfig
from esper_servers.tamiyo.plans.plan_switch import PlanConfig
from esper_servers.tamiyo.server import serve
from esper_servers.tamiyo.server_config import TamiyoServerConfig


class SocketPublisher:
    """One connection for each report; it is taken when the other side has read it and closes."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def publish(self, report: FieldReport) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(report.SerializeToString())
            writer.write_eof()
            await reader.read()
            writer.close()
        except OSError as error:
            raise Unavailable(f"Nobody takes reports: {error}.") from error


if __name__ == "__main__":
    log_json_lines()
    identity, state, port = sys.argv[1:]
    config = TamiyoServerConfig(
        identity_dir=Path(identity), state_dir=Path(state), keyring=Keyring.load(Path(identity) / "keyring.json"),
        plan=PlanConfig(compile=False), publisher=SocketPublisher(int(port)),
        reports=ReportConfig(attempts=8, backoff_seconds=0.5, backoff_multiplier=1.5, ack_seconds=5.0),
    )  # fmt: skip
    asyncio.run(serve(config))
