"""A mesh for the tests of the SDK on its oldest dependencies: it runs on the newest, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from pathlib import Path

from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandType
from esper_rpc.proto.urza.v1 import urza_service_pb2
from esper_rpc.testing import TAMIYO, FakeTamiyo, TemporaryMesh, serving
from esper_servers.urza.library import BlueprintLibrary
from esper_servers.urza.service import UrzaServicer

URZA = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]


def pause(_step):
    return AdaptationCommand(command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_PAUSE)


async def main(directory: Path) -> None:
    mesh = TemporaryMesh(directory)
    mesh.identity("trainer"), mesh.identity("operator")
    fake = FakeTamiyo(mesh.keyring("tamiyo"), decide=pause)
    library = BlueprintLibrary(directory / "urza")
    async with serving(mesh.identity("tamiyo"), (TAMIYO, fake), raw_methods=FakeTamiyo.RAW_METHODS) as tamiyo:
        async with serving(mesh.identity("urza"), (URZA, UrzaServicer(library))) as urza:
            print(json.dumps({"tamiyo": tamiyo.address, "urza": urza.address}), flush=True)
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
