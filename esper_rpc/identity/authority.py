from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from esper_rpc.errors import ConfigError, InvalidRequest

from .pem import load_certificate, load_key
from .secret_files import read_secret, write_secrets
from .spiffe import SpiffeId

ROOT_LIFETIME = timedelta(days=3650)
INTERMEDIATE_LIFETIME = timedelta(days=30)
LEAF_LIFETIME = timedelta(hours=24)
# A peer whose clock runs behind must still accept a certificate that was just issued.
BACKDATING = timedelta(minutes=15)


def utc_now() -> datetime:
    """The wall clock; certificates know no other."""
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedLeaf:
    """A leaf with what its holder needs beside it, in PEM."""

    chain_pem: bytes
    key_pem: bytes
    """Empty when the caller brought a signing request and so holds the key."""
    root_pem: bytes
    not_after: datetime


@dataclass(frozen=True, slots=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Authority:
    """An offline root and the intermediate that signs leaves."""

    def __init__(self, root_pem: bytes, intermediate: _Signer, clock: Callable[[], datetime] = utc_now) -> None:
        self._root_pem = root_pem
        self._intermediate = intermediate
        self._clock = clock

    @classmethod
    def create(cls, directory: Path, *, clock: Callable[[], datetime] = utc_now) -> Authority:
        """Make a root and an intermediate; raises ConfigError if there is one already."""
        if (directory / "root.pem").exists():
            raise ConfigError(f"{directory} holds an authority already; remove it to start afresh.")
        root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        root = _Signer(_certify_authority("esper root", root_key, None, clock(), ROOT_LIFETIME, 1), root_key)
        intermediate = _Signer(
            _certify_authority("esper intermediate", key, root, clock(), INTERMEDIATE_LIFETIME, 0), key
        )
        write_secrets(_files_of(directory, "intermediate", intermediate) | _files_of(directory, "root", root))
        return cls(_pem(root.certificate), intermediate, clock)

    @classmethod
    def load(cls, directory: Path, *, clock: Callable[[], datetime] = utc_now) -> Authority:
        """Read the intermediate and the root certificate; the root key is not touched."""
        root = directory / "root.pem"
        root_pem = read_secret(root)
        load_certificate(root_pem, root)
        return cls(root_pem, _read_signer(directory, "intermediate"), clock)

    @classmethod
    def renew_intermediate(cls, directory: Path, *, clock: Callable[[], datetime] = utc_now) -> Authority:
        """Sign a new intermediate with the root key, which must be at hand. Leaves of the old one stay valid."""
        root = _read_signer(directory, "root")
        key = ec.generate_private_key(ec.SECP256R1())
        intermediate = _Signer(
            _certify_authority("esper intermediate", key, root, clock(), INTERMEDIATE_LIFETIME, 0), key
        )
        write_secrets(_files_of(directory, "intermediate", intermediate))
        return cls(_pem(root.certificate), intermediate, clock)

    @property
    def root_pem(self) -> bytes:
        """The certificate that every member trusts."""
        return self._root_pem

    @property
    def not_after(self) -> datetime:
        """When the intermediate ends, and with it every leaf."""
        return self._intermediate.certificate.not_valid_after_utc

    def issue(
        self, spiffe_id: SpiffeId, *, lifetime: timedelta = LEAF_LIFETIME, csr_pem: bytes | None = None
    ) -> IssuedLeaf:
        """Issue a leaf; from a signing request only the key is taken, never a name."""
        key = None if csr_pem else ec.generate_private_key(ec.SECP256R1())
        public = check_signing_request(csr_pem) if csr_pem else key.public_key()  # type: ignore[union-attr]  # one of the two
        now = self._clock()
        end = min(now + lifetime, self.not_after)
        leaf = _sign_leaf(self._intermediate, spiffe_id, public, now, end)
        chain = _pem(leaf) + _pem(self._intermediate.certificate)
        return IssuedLeaf(
            chain_pem=chain, key_pem=_key_pem(key) if key else b"", root_pem=self._root_pem, not_after=end
        )


def _files_of(directory: Path, name: str, signer: _Signer) -> dict[Path, bytes]:
    return {directory / f"{name}.key": _key_pem(signer.key), directory / f"{name}.pem": _pem(signer.certificate)}


def _read_signer(directory: Path, name: str) -> _Signer:
    chain, secret = directory / f"{name}.pem", directory / f"{name}.key"
    certificate, key = load_certificate(read_secret(chain), chain), load_key(read_secret(secret), secret)
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{secret} is not the key of {chain.name}.")
    return _Signer(certificate, key)


def _certify_authority(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    signer: _Signer | None,
    now: datetime,
    lifetime: timedelta,
    path_length: int,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = signer.certificate.subject if signer else subject
    signing_key = signer.key if signer else key
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        _builder(subject, issuer, key.public_key(), now, now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
        .sign(signing_key, hashes.SHA256())
    )


def _sign_leaf(
    signer: _Signer, spiffe_id: SpiffeId, public: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{spiffe_id.role} {spiffe_id.instance}")])
    names = [x509.UniformResourceIdentifier(str(spiffe_id)), x509.DNSName(spiffe_id.dns_name)]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer_key = signer.key.public_key()
    return (
        _builder(subject, signer.certificate.subject, public, now, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .sign(signer.key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATING)
        .not_valid_after(end)
    )


def check_signing_request(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a signing request; raises InvalidRequest unless it is P-256 and signs itself."""
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
    except ValueError as error:
        raise InvalidRequest(f"csr_pem is not a PEM signing request: {error}.") from error
    public = csr.public_key()
    if not csr.is_signature_valid or not isinstance(public, ec.EllipticCurvePublicKey):
        raise InvalidRequest("csr_pem must be signed by its own EC key.")
    if not isinstance(public.curve, ec.SECP256R1):
        raise InvalidRequest("csr_pem must hold a P-256 key.")
    return public


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
