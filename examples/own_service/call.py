"""A client of the service in serve.py.

python call.py 127.0.0.1:PORT $ESPER_HOME/identities/trainer-local seeds 2
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from counter_pb2 import DESCRIPTOR, AddRequest, AddResponse

from esper_client.client import MeshClient
from esper_rpc.identity import Identity


class CounterClient(MeshClient):
    role = "counter"  # The server must have a certificate of this role.
    service = DESCRIPTOR.services_by_name["CounterService"].full_name

    async def add(self, request: AddRequest, *, timeout: float = 2.0) -> AddResponse:
        return await self._unary("Add", request, AddResponse, timeout)


async def main(address: str, identity_dir: Path, name: str, amount: int) -> None:
    async with CounterClient(address, identity=Identity.load(identity_dir)) as client:
        print((await client.add(AddRequest(name=name, amount=amount))).total)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
