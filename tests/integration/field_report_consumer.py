"""A process that takes field reports on a socket and acknowledges each at Tamiyo, as role simic, over mutual TLS.

Its arguments: the directory of its identity, a file with the address of Tamiyo, the port to listen on, and a file where
it writes a line for each report that came and each that it acknowledged.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from esper_client import TamiyoClient
from esper_rpc.identity import Identity
from esper_rpc.proto.leyline.v1 import FieldReport
from esper_rpc.proto.tamiyo.v1 import AckFieldReportRequest


async def serve(identity: Identity, tamiyo: Path, port: int, diary: Path) -> None:
    async def take(reader, writer):
        report = FieldReport.FromString(await reader.read())
        note(f"took {report.report_id}")
        writer.close()
        async with TamiyoClient(tamiyo.read_text(), identity=identity) as client:
            answer = await client.ack_field_report(AckFieldReportRequest(report_id=report.report_id), timeout=10.0)
        note(f"{'repeated' if answer.already_acknowledged else 'acknowledged'} {report.report_id}")

    def note(line):
        with diary.open("a") as file:
            file.write(line + "\n")

    server = await asyncio.start_server(take, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    directory, address, number, lines = sys.argv[1:]
    asyncio.run(serve(Identity.load(Path(directory)), Path(address), int(number), Path(lines)))
