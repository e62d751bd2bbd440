"""Certificates and keys change under a live mesh, and nobody notices."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from esper_client import IdentityClient, UrzaClient
from esper_client.enrolment import enroll
from esper_client.renewal import CertificateRenewer
from esper_rpc import errors
from esper_rpc.envelope import Keyring, RootKeys
from esper_rpc.envelope.trust import keyring_for
from esper_rpc.identity import Identity, SpiffeId
from esper_rpc.identity.enrolment import EnrolmentTokens, Invitation
from esper_rpc.identity.signing_request import new_signing_request
from esper_rpc.proto.identity.v1 import RenewCertificateRequest
from esper_rpc.proto.urza.v1 import ListBlueprintsRequest, urza_service_pb2
from esper_rpc.testing import serving
from esper_servers.urza.library import BlueprintLibrary
from esper_servers.urza.service import UrzaServicer
from esper_servers.weatherlight.identity_server import IdentityServer, IdentityServerConfig, PkiConfig

URZA = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]
GPU = SpiffeId("trainer", "gpu-3")


@pytest.fixture
async def authority(mesh):
    mesh.identity("weatherlight")
    server = IdentityServer(
        IdentityServerConfig(
            identity_dir=mesh.identity_dir("weatherlight"),
            pki_dir=mesh.directory / "pki",
            tokens_dir=mesh.directory / "tokens",
            pki=PkiConfig(leaf_seconds=4),
        )
    )
    await server.start()
    yield server
    await server.drain()


def invitation_of(mesh, authority, secret):
    root_pem = mesh.identity("trainer").root_pem.decode()
    return Invitation(secret=secret, address=authority.newcomers.address, root_pem=root_pem)


async def test_a_newcomer_enrols_once_with_a_key_of_its_own(mesh, authority, tmp_path):
    keyring = keyring_for(RootKeys.load(mesh.directory / "keys" / "root.json"), GPU)
    tokens = EnrolmentTokens(mesh.directory / "tokens")
    secret = tokens.create(GPU, lifetime=timedelta(minutes=1), keyring_json=keyring.to_json().decode())
    invitation = invitation_of(mesh, authority, secret)
    identity = await enroll(invitation, tmp_path / "new")
    assert identity.spiffe_id == GPU
    assert Keyring.load(tmp_path / "new" / "keyring.json").to_json() == keyring.to_json()
    with pytest.raises(errors.PermissionDenied, match="unknown, used or expired"):
        await enroll(invitation, tmp_path / "again")


async def test_a_stranger_may_do_nothing_but_enrol(mesh, authority, tmp_path):
    import grpc

    credentials = grpc.ssl_channel_credentials(mesh.identity("trainer").root_pem)
    options = [("grpc.ssl_target_name_override", "weatherlight.esper")]
    async with grpc.aio.secure_channel(authority.newcomers.address, credentials, options=options) as channel:
        call = channel.unary_unary("/esper.identity.v1.IdentityService/RenewCertificate")
        request = RenewCertificateRequest(csr_pem=new_signing_request()[1].decode())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request.SerializeToString(), timeout=5)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_calls_never_fail_while_leaves_are_renewed_again_and_again(mesh, authority, tmp_path):
    short = mesh.identity("trainer", "short", lifetime=timedelta(seconds=3))
    first_end = short.not_after
    renewed = []
    renewer = CertificateRenewer(short, address=authority.members.address, on_renewed=renewed.append)
    library = BlueprintLibrary(tmp_path / "urza")
    async with serving(mesh.identity("urza"), (URZA, UrzaServicer(library))) as server, asyncio.timeout(60):
        async with UrzaClient(server.address, identity=short) as client:
            while len(renewed) < 3:
                await renewer.check()
                await client.list_blueprints(ListBlueprintsRequest())
                await asyncio.sleep(0.01)
    library.close()
    assert renewed[-1].not_after > first_end + timedelta(seconds=4)
    assert renewed[-1].key_pem != short.key_pem


async def test_the_authority_issues_its_own_leaf_again_in_time(mesh):
    first = mesh.reissue("weatherlight", lifetime=timedelta(seconds=3))
    server = IdentityServer(
        IdentityServerConfig(
            identity_dir=mesh.identity_dir("weatherlight"), pki_dir=mesh.directory / "pki",
            tokens_dir=mesh.directory / "tokens",
        )
    )  # fmt: skip
    await server.start()
    async with asyncio.timeout(10):
        while Identity.load(mesh.identity_dir("weatherlight")).not_after == first.not_after:
            await asyncio.sleep(0.05)
    async with IdentityClient(server.members.address, identity=mesh.identity("trainer")) as client:
        csr_pem = new_signing_request()[1].decode()
        assert (await client.renew_certificate(RenewCertificateRequest(csr_pem=csr_pem))).chain_pem
    await server.drain()


async def test_an_authority_that_is_away_leaves_the_old_leaf_in_use(mesh):
    short = mesh.identity("trainer", "short", lifetime=timedelta(seconds=30))
    before = (Path(short.directory) / "cert.pem").read_bytes()
    now = short.not_after - timedelta(seconds=1)
    renewer = CertificateRenewer(short, address="127.0.0.1:1", clock=lambda: now)
    await renewer.check()
    assert (Path(short.directory) / "cert.pem").read_bytes() == before


async def test_a_leaf_renewed_by_someone_else_is_taken_up(mesh):
    identity = mesh.identity("trainer")
    seen = []
    renewer = CertificateRenewer(identity, address=None, on_renewed=seen.append)
    await renewer.check()
    mesh.reissue("trainer")
    await renewer.check()
    await renewer.check()
    assert [i.not_after >= identity.not_after for i in seen] == [True]
    assert Identity.load(identity.directory) == seen[0]


async def test_a_rotated_key_is_learnt_without_a_restart_and_a_retired_one_refused(mesh):
    path = mesh.directory / "keys" / "root.json"
    receiver, sender = mesh.keyring("trainer"), mesh.keyring("tamiyo")
    audience = "spiffe://esper/trainer/local"

    async def rotate(roots):
        roots.save(path)
        for role in ("trainer", "tamiyo"):
            keyring_for(roots, SpiffeId(role, "local")).save(mesh.identity_dir(role) / "keyring.json")
        await receiver.refresh()
        await sender.refresh()
        return roots

    def is_understood():
        return receiver.verification_key(sender.active_key_id, "tamiyo", audience) == sender.signing_key(audience)

    old = sender.active_key_id
    roots = await rotate(RootKeys.load(path).with_new_root())
    assert (sender.active_key_id, is_understood()) == (old, True)
    roots = await rotate(roots.with_active(roots.newest_key_id))
    assert (sender.active_key_id != old, is_understood()) == (True, True)
    assert receiver.verification_key(old, "tamiyo", audience)
    await rotate(roots.without(old))
    assert receiver.verification_key(old, "tamiyo", audience) is None


async def test_a_spoilt_keyring_keeps_the_keys_that_were_read(mesh):
    keyring = mesh.keyring("trainer")
    known = keyring.to_json()
    (mesh.identity_dir("trainer") / "keyring.json").write_text("{")
    with pytest.raises(errors.ConfigError):
        await keyring.refresh()
    assert keyring.to_json() == known
