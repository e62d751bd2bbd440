from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from esper_rpc.errors import ConfigError, InvalidRequest, PermissionDenied
from esper_rpc.identity import Authority, Identity, SpiffeId, authorise
from esper_rpc.identity.authorisation import TABLE, rows_for
from esper_rpc.identity.authority import check_signing_request
from esper_rpc.identity.peer import STRANGER
from esper_rpc.proto.identity.v1 import identity_service_pb2
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.tamiyo.v1 import tamiyo_service_pb2
from esper_rpc.proto.tolaria.v1 import tolaria_service_pb2
from esper_rpc.proto.urza.v1 import urza_service_pb2

FILES = (identity_service_pb2, kasmina_service_pb2, tamiyo_service_pb2, tolaria_service_pb2, urza_service_pb2)
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.mark.parametrize("method", METHODS)
def test_every_rpc_has_a_row_in_the_authorisation_table(method):
    assert TABLE[method]


def test_the_table_names_no_method_that_does_not_exist():
    assert {m for m in TABLE if m.startswith("/esper.")} == set(METHODS)


def test_what_has_no_row_is_denied_to_everyone():
    with pytest.raises(PermissionDenied):
        authorise(SpiffeId("operator", "local"), "/esper.tamiyo.v1.TamiyoService/Unknown")


@pytest.mark.parametrize("text", ["", "spiffe://other/tamiyo/a", "spiffe://esper/tamiyo", "spiffe://esper/Tamiyo/a/b"])
def test_a_foreign_name_is_no_member(text):
    with pytest.raises(InvalidRequest):
        SpiffeId.parse(text)


def test_a_leaf_has_exactly_one_spiffe_id_and_one_dns_name_and_no_host(tmp_path):
    leaf = Authority.create(tmp_path).issue(SpiffeId("tamiyo", "a"))
    names = x509.load_pem_x509_certificate(leaf.chain_pem).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert [n.value for n in names.value] == ["spiffe://esper/tamiyo/a", "tamiyo.esper"]


def test_a_signing_request_cannot_choose_its_name(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tamiyo")])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://esper/tamiyo/a")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    pem = csr.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    leaf = Authority.create(tmp_path).issue(SpiffeId("trainer", "b"), csr_pem=pem)
    found = x509.load_pem_x509_certificate(leaf.chain_pem).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert "spiffe://esper/trainer/b" in [n.value for n in found.value]


def request_of(key, algorithm):
    return x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)


def tampered(request):
    der = request.public_bytes(serialization.Encoding.DER)
    return x509.load_der_x509_csr(der[:-1] + bytes([der[-1] ^ 1]))


@pytest.mark.parametrize(
    "request_",
    [
        request_of(ed25519.Ed25519PrivateKey.generate(), None),
        request_of(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()),
        tampered(request_of(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())),
    ],
    ids=["no EC key", "another curve", "not its own signature"],
)
def test_a_signing_request_is_signed_by_its_own_key_of_p_256(request_):
    with pytest.raises(InvalidRequest, match="csr_pem must"):
        check_signing_request(request_.public_bytes(serialization.Encoding.PEM))


def test_a_leaf_ends_no_later_than_the_intermediate(tmp_path):
    start = datetime.now(UTC)
    Authority.create(tmp_path, clock=lambda: start)
    late = Authority.load(tmp_path, clock=lambda: start + timedelta(days=29, hours=12))
    assert late.issue(SpiffeId("urza", "a")).not_after == late.not_after < start + timedelta(days=30, hours=1)


def test_an_expired_leaf_says_how_to_get_a_new_one(tmp_path):
    yesterday = datetime.now(UTC) - timedelta(days=2)
    leaf = Authority.create(tmp_path / "pki", clock=lambda: yesterday).issue(SpiffeId("urza", "a"))
    with pytest.raises(ConfigError, match="esper pki issue urza a"):
        Identity.of(leaf).save(tmp_path / "id")


def test_a_key_that_others_can_read_is_refused(mesh):
    mesh.identity("urza")
    (mesh.identity_dir("urza") / "key.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.load(mesh.identity_dir("urza"))


def test_a_second_authority_does_not_replace_the_first(tmp_path):
    Authority.create(tmp_path)
    with pytest.raises(ConfigError, match="holds an authority already"):
        Authority.create(tmp_path)


def test_an_identity_never_shows_its_key(mesh):
    assert b"PRIVATE" not in repr(mesh.identity("urza")).encode()


def replace_secret(path, content):
    path.write_bytes(content)
    path.chmod(0o600)


@pytest.mark.parametrize("name", ["cert.pem", "key.pem", "ca.pem"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_of_an_identity_that_cannot_be_read_is_a_clear_error(mesh, name, content):
    mesh.identity("trainer")
    replace_secret(mesh.identity_dir("trainer") / name, content)
    with pytest.raises(ConfigError, match=re.escape(name)):
        Identity.load(mesh.identity_dir("trainer"))


def test_a_certificate_of_another_mesh_is_a_clear_error(mesh, monkeypatch):
    from esper_rpc.identity import spiffe

    identity = mesh.identity("trainer")
    monkeypatch.setattr(spiffe, "_PATTERN", re.compile("spiffe://other/(.*)/(.*)"))
    with pytest.raises(ConfigError, match="not a SPIFFE id of this mesh"):
        Identity.load(identity.directory)


def test_the_key_of_another_certificate_is_a_clear_error(mesh):
    stranger = mesh.identity("operator")
    mesh.identity("trainer")
    replace_secret(mesh.identity_dir("trainer") / "key.pem", stranger.key_pem)
    with pytest.raises(ConfigError, match=r"key\.pem is not the key of the certificate"):
        Identity.load(mesh.identity_dir("trainer"))


@pytest.mark.parametrize("name", ["root.pem", "intermediate.pem", "intermediate.key"])
def test_an_authority_that_cannot_be_read_is_a_clear_error(tmp_path, name):
    Authority.create(tmp_path)
    replace_secret(tmp_path / name, b"nothing")
    with pytest.raises(ConfigError, match=name):
        Authority.load(tmp_path)


def test_an_authority_whose_key_is_anothers_is_a_clear_error(tmp_path):
    for name in ("one", "other"):
        Authority.create(tmp_path / name)
    replace_secret(tmp_path / "one" / "intermediate.key", (tmp_path / "other" / "intermediate.key").read_bytes())
    with pytest.raises(ConfigError, match=r"intermediate\.key is not the key of intermediate\.pem"):
        Authority.load(tmp_path / "one")


OWN = rows_for("my.v1.Counter", ["Add", "Reset"], {"Add": {"trainer"}})


def test_a_service_of_ones_own_has_rows_and_what_they_do_not_name_is_denied():
    authorise(SpiffeId("trainer", "local"), "/my.v1.Counter/Add", OWN)
    for role, method in (("urza", "Add"), ("trainer", "Reset"), ("operator", "Reset")):
        with pytest.raises(PermissionDenied):
            authorise(SpiffeId(role, "local"), f"/my.v1.Counter/{method}", OWN)


def test_a_row_for_a_method_that_a_service_lacks_is_refused():
    with pytest.raises(ConfigError, match="has no method 'Ad'; it has Add, Reset"):
        rows_for("my.v1.Counter", ["Add", "Reset"], {"Ad": {"trainer"}})


def test_a_service_of_the_mesh_cannot_be_given_other_rows():
    with pytest.raises(ConfigError, match=r"esper\.tamiyo\.v1\.TamiyoService stands in the table"):
        rows_for("esper.tamiyo.v1.TamiyoService", ["OpenRun"], {"OpenRun": {"urza"}})


def test_what_is_for_every_member_is_for_a_role_of_ones_own_and_never_for_a_stranger():
    authorise(SpiffeId("counter", "local"), "/grpc.health.v1.Health/Check")
    with pytest.raises(PermissionDenied):
        authorise(SpiffeId("counter", "local"), "/esper.tamiyo.v1.TamiyoService/OpenRun")
    with pytest.raises(PermissionDenied):
        authorise(STRANGER, "/grpc.health.v1.Health/Check")
