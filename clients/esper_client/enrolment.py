from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import Any

from esper_rpc.channel import MESSAGE_OPTIONS

import grpc  # isort: skip  # After channel, which sets how grpc behaves around forks.

from esper_rpc.envelope import Keyring
from esper_rpc.identity import Identity, IssuedLeaf
from esper_rpc.identity.enrolment import Invitation
from esper_rpc.identity.signing_request import new_signing_request
from esper_rpc.proto.identity.v1 import EnrollRequest, EnrollResponse
from esper_rpc.status import from_rpc_error

ENROLL = "/esper.identity.v1.IdentityService/Enroll"
TIMEOUT_SECONDS = 10.0


async def enroll(invitation: Invitation, directory: Path) -> Identity:
    """Redeem an invitation: draw a key here, have it certified, and write identity and keyring to a directory.

    The key never leaves this machine. Raises EsperError; a token that is refused stays refused.
    """
    key_pem, csr_pem = new_signing_request()
    response = await _call(invitation, EnrollRequest(token=invitation.secret, csr_pem=csr_pem.decode()))
    leaf = IssuedLeaf(
        chain_pem=response.chain_pem.encode(),
        key_pem=key_pem,
        root_pem=response.root_pem.encode(),
        not_after=response.not_after.ToDatetime(UTC),
    )
    identity = Identity.of(leaf).save(directory)
    if response.keyring_json:
        Keyring.parse(response.keyring_json).save(directory / "keyring.json")
    return identity


async def _call(invitation: Invitation, request: EnrollRequest) -> EnrollResponse:
    credentials = grpc.ssl_channel_credentials(invitation.root_pem.encode())
    options = [("grpc.ssl_target_name_override", "weatherlight.esper"), *MESSAGE_OPTIONS]
    async with grpc.aio.secure_channel(invitation.address, credentials, options=options) as channel:
        call: Any = channel.unary_unary(ENROLL, EnrollRequest.SerializeToString, EnrollResponse.FromString)
        try:
            return await call(request, timeout=TIMEOUT_SECONDS)  # type: ignore[no-any-return]  # FromString made it.
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
