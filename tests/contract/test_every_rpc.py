from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
import yaml
from google.protobuf.message_factory import GetMessageClass

import esper_client
from esper_rpc.channel import open_channel
from esper_rpc.identity.authorisation import TABLE
from esper_rpc.proto.identity.v1 import identity_service_pb2
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.tamiyo.v1 import tamiyo_service_pb2
from esper_rpc.proto.urza.v1 import urza_service_pb2

GAPS = yaml.safe_load((Path(__file__).parent / "known_gaps.yaml").read_text())
FILES = (identity_service_pb2, kasmina_service_pb2, tamiyo_service_pb2, urza_service_pb2)
RPCS = {
    f"{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
CLIENTS = {c.service: c for c in (esper_client.TamiyoClient, esper_client.KasminaClient, esper_client.UrzaClient,
                                  esper_client.IdentityClient)}  # fmt: skip


def test_every_gap_names_an_rpc_and_a_reason():
    assert set(GAPS) <= set(RPCS)
    assert all(GAPS.values())


@pytest.mark.parametrize("name", RPCS)
def test_the_sdk_has_a_method_for_every_rpc(name):
    service, method = name.split("/")
    assert hasattr(CLIENTS[service], re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower())


@pytest.mark.parametrize("name", RPCS)
async def test_an_rpc_is_unimplemented_exactly_when_it_is_a_known_gap(name, mesh, addresses):
    method = RPCS[name]
    address, role = addresses[method.containing_service.full_name]
    caller = mesh.identity("operator" if "operator" in TABLE[f"/{name}"] else "trainer", "caller")
    channel = open_channel(address, identity=caller, role=role)
    try:
        code = await code_of(channel, name, method)
    finally:
        await channel.close()
    assert (code == grpc.StatusCode.UNIMPLEMENTED) == (name in GAPS), code


async def code_of(channel, name, method):
    empty = GetMessageClass(method.input_type)().SerializeToString()
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    call = getattr(channel, kind)(f"/{name}")
    argument = iter([empty]) if method.client_streaming else empty
    try:
        answer = call(argument, timeout=10)
        if not method.server_streaming:
            await answer
        elif await answer.read() is not grpc.aio.EOF:
            answer.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
