from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client import REGISTRY

from esper_client import BlockingTamiyoClient, IdentityClient, TamiyoClient, UrzaClient
from esper_rpc import errors
from esper_rpc.proto.tamiyo.v1 import CloseRunRequest, GetPolicyRequest, OpenRunRequest
from esper_rpc.testing import TAMIYO, FakeTamiyo, serving

CLOSE = "/esper.tamiyo.v1.TamiyoService/CloseRun"


@pytest.fixture
async def server(mesh):
    fake = FakeTamiyo(mesh.keyring("tamiyo"))
    async with serving(mesh.identity("tamiyo"), (TAMIYO, fake), raw_methods=FakeTamiyo.RAW_METHODS) as running:
        yield running


async def close_run(channel, timeout=3):
    call = channel.unary_unary(CLOSE)
    return await call(CloseRunRequest(run_id="r").SerializeToString(), timeout=timeout)


async def test_a_member_with_the_right_role_is_served(mesh, server):
    async with TamiyoClient(server.address, identity=mesh.identity("trainer")) as client:
        assert not (await client.close_run(CloseRunRequest(run_id="r"))).closed


async def test_the_wrong_role_is_refused(mesh, server):
    async with TamiyoClient(server.address, identity=mesh.identity("urza")) as client:
        with pytest.raises(errors.PermissionDenied, match="spiffe://esper/urza/local may not call"):
            await client.close_run(CloseRunRequest(run_id="r"))


async def test_served_and_refused_calls_are_metered(mesh, server):
    def calls(status):
        labels = {"grpc_method": CLOSE[1:], "grpc_status": status}
        return REGISTRY.get_sample_value("grpc_server_call_duration_seconds_count", labels) or 0

    before = calls("OK"), calls("PERMISSION_DENIED")
    for role in ("trainer", "urza"):
        async with TamiyoClient(server.address, identity=mesh.identity(role)) as client:
            with contextlib.suppress(errors.PermissionDenied):
                await client.close_run(CloseRunRequest(run_id="r"))
    # The server counts a call when its answer has left.
    async with asyncio.timeout(10):
        while (calls("OK"), calls("PERMISSION_DENIED")) != (before[0] + 1, before[1] + 1):
            await asyncio.sleep(0.01)
    received = REGISTRY.get_sample_value(
        "grpc_server_call_rcvd_total_compressed_message_size_bytes_sum",
        {"grpc_method": CLOSE[1:], "grpc_status": "OK"},
    )
    assert received >= len(CloseRunRequest(run_id="r").SerializeToString())


async def test_a_peer_without_a_certificate_is_refused(mesh, server):
    credentials = grpc.ssl_channel_credentials(mesh.identity("trainer").root_pem)
    options = [("grpc.ssl_target_name_override", "tamiyo.esper")]
    async with grpc.aio.secure_channel(server.address, credentials, options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await close_run(channel)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_authority_is_refused(server, tmp_path):
    from esper_rpc.testing import TemporaryMesh

    stranger = TemporaryMesh(tmp_path / "other").identity("trainer")
    async with TamiyoClient(server.address, identity=stranger) as client:
        with pytest.raises(errors.Unavailable):
            await client.close_run(CloseRunRequest(run_id="r"))


async def test_plaintext_is_refused(server):
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await close_run(channel)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_trainer_cannot_pose_as_tamiyo(mesh):
    fake = FakeTamiyo(mesh.keyring("trainer"))
    async with serving(mesh.identity("trainer"), (TAMIYO, fake), raw_methods=FakeTamiyo.RAW_METHODS) as impostor:
        async with TamiyoClient(impostor.address, identity=mesh.identity("trainer", "victim")) as client:
            with pytest.raises(errors.Unavailable):
                await client.close_run(CloseRunRequest(run_id="r"))
    assert not fake.runs


@pytest.mark.parametrize(
    ("version", "status"), [(ssl.TLSVersion.TLSv1_2, "16"), (ssl.TLSVersion.TLSv1_3, "0")], ids=["1.2", "1.3"]
)
async def test_only_tls_1_3_is_spoken(mesh, server, version, status):
    directory = mesh.identity_dir("trainer")
    mesh.identity("trainer")
    context = ssl.create_default_context(cafile=directory / "ca.pem")
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    body = CloseRunRequest(run_id="r").SerializeToString()
    async with httpx.AsyncClient(http1=False, http2=True, verify=context) as client:
        response = await client.post(
            f"https://{server.address}{CLOSE}",
            content=b"\0" + len(body).to_bytes(4, "big") + body,
            headers={"content-type": "application/grpc", "te": "trailers"},
            extensions={"sni_hostname": "tamiyo.esper"},
        )
    assert response.headers.get("grpc-status", "0") == status


async def test_a_malformed_request_names_field_and_rule(mesh, server):
    async with TamiyoClient(server.address, identity=mesh.identity("trainer")) as client:
        with pytest.raises(errors.InvalidRequest) as caught:
            await client.open_run(OpenRunRequest(run_id="r", protocol_versions=[1], receiver_epoch=b"short"))
    assert [(v.field, v.description) for v in caught.value.violations] == [
        ("receiver_epoch", "must have exactly 16 characters or bytes")
    ]


async def test_an_rpc_that_is_not_offered_says_so_in_a_sentence(mesh, server):
    async with TamiyoClient(server.address, identity=mesh.identity("operator")) as client:
        with pytest.raises(errors.Unimplemented, match="GetPolicy is not offered yet by TamiyoService"):
            await client.get_policy(GetPolicyRequest())


async def test_a_server_that_is_gone_is_unavailable(mesh):
    async with UrzaClient("127.0.0.1:1", identity=mesh.identity("trainer")) as client:
        from esper_rpc.proto.urza.v1 import GetExtrasRequest

        with pytest.raises(errors.Unavailable):
            await client.get_extras(GetExtrasRequest(blueprint_id="x"))


def buf_curl(buf_args, mesh, address, role, path, data=None):
    mesh.identity(role)
    directory = mesh.identity_dir(role)
    files = ["--cacert", directory / "ca.pem", "--cert", directory / "cert.pem", "--key", directory / "key.pem"]
    command = [
        Path(sys.executable).with_name("buf"),
        "curl",
        "--protocol",
        "grpc",
        *files,
        "--servername",
        "tamiyo.esper",
        *buf_args,
    ]
    command += [*(["--data", data] if data else []), f"https://{address}{path}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


async def test_an_operator_lists_and_calls_services_with_buf_curl(mesh, server):
    listed = await asyncio.to_thread(buf_curl, ["--list-methods"], mesh, server.address, "operator", "")
    assert "esper.tamiyo.v1.TamiyoService/EvaluateStep" in listed.stdout, listed.stderr
    called = await asyncio.to_thread(buf_curl, [], mesh, server.address, "operator", CLOSE, '{"runId": "r"}')
    assert called.returncode == 0, called.stderr
    assert called.stdout.strip() == "{}"


async def test_reflection_is_refused_to_everyone_else(mesh, server):
    refused = await asyncio.to_thread(buf_curl, ["--list-methods"], mesh, server.address, "trainer", "")
    assert refused.returncode != 0
    assert "may not call" in refused.stderr


async def test_a_leaf_is_renewed_under_the_callers_own_name(mesh):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from esper_rpc.identity import Authority
    from esper_rpc.identity.service import IdentityServicer
    from esper_rpc.proto.identity.v1 import RenewCertificateRequest, identity_service_pb2

    descriptor = identity_service_pb2.DESCRIPTOR.services_by_name["IdentityService"]
    authority = Authority.load(mesh.directory / "pki")
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = request.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    pem = csr.public_bytes(serialization.Encoding.PEM).decode()
    async with serving(mesh.identity("weatherlight"), (descriptor, IdentityServicer(lambda: authority))) as running:
        async with IdentityClient(running.address, identity=mesh.identity("trainer", "me")) as client:
            response = await client.renew_certificate(RenewCertificateRequest(csr_pem=pem))
    leaf = x509.load_pem_x509_certificate(response.chain_pem.encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "spiffe://esper/trainer/me" in [n.value for n in names]


def test_a_script_without_asyncio_gets_the_same_errors(mesh):
    with BlockingTamiyoClient("127.0.0.1:1", identity=mesh.identity("trainer")) as client:
        with pytest.raises(errors.Unavailable):
            client.close_run(CloseRunRequest(run_id="r"), timeout=5.0)
