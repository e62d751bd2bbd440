from __future__ import annotations

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from esper_client import IdentityClient, KasminaClient, TamiyoClient, TolariaClient, UrzaClient
from esper_client.client import MeshClient
from esper_rpc.proto.identity.v1 import identity_service_pb2
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.tamiyo.v1 import tamiyo_service_pb2
from esper_rpc.proto.tolaria.v1 import tolaria_service_pb2
from esper_rpc.proto.urza.v1 import urza_service_pb2

_FILES = (identity_service_pb2, kasmina_service_pb2, tamiyo_service_pb2, tolaria_service_pb2, urza_service_pb2)

CLIENTS: dict[str, type[MeshClient]] = {
    client.service: client for client in (IdentityClient, KasminaClient, TamiyoClient, TolariaClient, UrzaClient)
}
SERVICES: dict[str, ServiceDescriptor] = {
    service.full_name: service for file in _FILES for service in file.DESCRIPTOR.services_by_name.values()
}
METHODS: dict[str, MethodDescriptor] = {
    f"{service.full_name}/{method.name}": method for service in SERVICES.values() for method in service.methods
}


def name_of(method: MethodDescriptor) -> str:
    """Name an RPC as `package.Service/Method`."""
    return f"{method.containing_service.full_name}/{method.name}"
