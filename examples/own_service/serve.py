"""A service of your own, beside a mesh that `esper up` runs: it counts by name.

esper pki issue counter
python examples/own_service/serve.py $ESPER_HOME/identities/counter-local
"""

from __future__ import annotations

import asyncio
import collections
import os
import sys
from pathlib import Path

from counter_pb2 import DESCRIPTOR, AddRequest, AddResponse

from esper_client import find_mesh
from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
from esper_rpc.identity import Identity
from esper_rpc.server import Call, MeshServer, ServerConfig

SERVICE = DESCRIPTOR.services_by_name["CounterService"]
ROLES = {"Add": {"trainer", "operator"}}


class CounterServicer:
    def __init__(self) -> None:
        self._totals: collections.Counter[str] = collections.Counter()

    async def Add(self, request: AddRequest, call: Call) -> AddResponse:
        self._totals[request.name] += request.amount
        return AddResponse(total=self._totals[request.name])


async def main(identity_dir: Path) -> None:
    mesh, identity = find_mesh(os.environ), Identity.load(identity_dir)
    if mesh is None:
        sys.exit("No mesh found; `esper up` starts one.")
    server = MeshServer(config=ServerConfig(deny_list=mesh.deny_list), identity=identity)
    server.add_service(SERVICE, CounterServicer(), roles=ROLES)
    print(await server.start(), flush=True)
    server.every(CHECK_SECONDS, CertificateRenewer(identity, address=mesh.weatherlight).check)
    await server.run_until_signal()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
