"""Certificates and keys as they lie in files: what cannot be read is a ConfigError that names the file."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from esper_rpc.errors import ConfigError

# What the parsers of `cryptography` raise for bytes that are no certificate or key.
UNREADABLE = (
    ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip


def load_certificate(pem: bytes, path: Path) -> x509.Certificate:
    """Read the first certificate of a PEM text, down to the fields that are used; raises ConfigError."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.public_key()
        _ = certificate.subject, certificate.not_valid_after_utc
    except UNREADABLE as error:
        raise ConfigError(f"{path} is not a certificate: {error}.") from error
    return certificate


def load_key(pem: bytes, path: Path) -> ec.EllipticCurvePrivateKey:
    """Read an EC key; raises ConfigError."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except UNREADABLE:
        # The parser's own message could quote the file.
        raise ConfigError(f"{path} is not a private key.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an EC key.")
    return key
