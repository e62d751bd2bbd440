from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import grpc
from cryptography import x509

from esper_rpc.errors import ConfigError, InvalidRequest

from .authority import BACKDATING, IssuedLeaf, utc_now
from .pem import UNREADABLE, load_certificate, load_key
from .secret_files import read_secret, write_secrets
from .spiffe import SpiffeId

# Written in this order: whoever sees a new certificate finds its key.
_FILES = {"root_pem": "ca.pem", "key_pem": "key.pem", "chain_pem": "cert.pem"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A certificate with its key: who a process is."""

    spiffe_id: SpiffeId
    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    root_pem: bytes
    directory: Path | None = None
    """Where it was read from, and is read from again after a renewal."""

    @classmethod
    def of(cls, leaf: IssuedLeaf) -> Identity:
        """Hold a leaf that was issued with its key."""
        return cls(
            spiffe_id=_spiffe_id_of(leaf.chain_pem),
            chain_pem=leaf.chain_pem,
            key_pem=leaf.key_pem,
            root_pem=leaf.root_pem,
        )

    @classmethod
    def load(cls, directory: Path) -> Identity:
        """Read an identity; raises ConfigError when a file is missing, readable by others, or the leaf has ended."""
        parts = {part: read_secret(directory / name) for part, name in reversed(_FILES.items())}
        identity = cls(
            spiffe_id=_spiffe_id_of(parts["chain_pem"], str(directory / _FILES["chain_pem"])),
            directory=directory,
            **parts,
        )
        _check_files(identity, directory)
        if identity.not_after <= utc_now():
            raise ConfigError(
                f"The certificate of {identity.spiffe_id} ended at {identity.not_after:%F %T} UTC;"
                f" run `esper pki issue {identity.spiffe_id.role} {identity.spiffe_id.instance}`."
            )
        return identity

    def save(self, directory: Path) -> Identity:
        """Write the files, mode 0600, and return the identity that lives there."""
        write_secrets({directory / name: getattr(self, part) for part, name in _FILES.items()})
        return Identity.load(directory)

    @property
    def not_after(self) -> datetime:
        """When the leaf ends."""
        return x509.load_pem_x509_certificate(self.chain_pem).not_valid_after_utc

    @property
    def not_before(self) -> datetime:
        """When the leaf begins; later than now where the clock was ahead when it was issued."""
        return x509.load_pem_x509_certificate(self.chain_pem).not_valid_before_utc

    @property
    def renewal_due(self) -> datetime:
        """When two thirds of the leaf's life have passed."""
        issued = self.not_before + BACKDATING
        return issued + (self.not_after - issued) * 2 / 3

    def with_leaf(self, chain_pem: bytes, key_pem: bytes) -> Identity:
        """Return this identity with a renewed leaf."""
        return replace(self, chain_pem=chain_pem, key_pem=key_pem)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials for calling a peer."""
        return grpc.ssl_channel_credentials(self.root_pem, self.key_pem, self.chain_pem)

    def server_credentials(self, *, admits_strangers: bool = False) -> grpc.ServerCredentials:
        """Credentials for serving: a renewed leaf on disk is taken up, and peers must show a certificate.

        With `admits_strangers` none is asked of them, which serves enrolment and nothing else.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            _Fetcher(self),  # type: ignore[arg-type]  # None is how gRPC is told that nothing changed.
            require_client_authentication=not admits_strangers,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.key_pem, self.chain_pem)], root_certificates=self.root_pem
        )


class LiveIdentity:
    """An identity that follows its files: a renewed leaf is taken up when it is whole."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._stamp = _stamp_of(identity.directory)

    def current(self) -> Identity:
        """Return the newest identity; the same object while nothing changed."""
        stamp = _stamp_of(self._identity.directory)
        if stamp == self._stamp or self._identity.directory is None:
            return self._identity
        try:
            self._identity = Identity.load(self._identity.directory)
        except ConfigError:
            return self._identity  # A half-written renewal: the old leaf serves until the new one is whole.
        self._stamp = stamp
        return self._identity


class _Fetcher:
    """Called by gRPC at each handshake. None means that nothing changed."""

    def __init__(self, identity: Identity) -> None:
        self._live = LiveIdentity(identity)
        self._serving = identity

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        current = self._live.current()
        if current is self._serving:
            return None
        self._serving = current
        return current._configuration()


def _stamp_of(directory: Path | None) -> int:
    try:
        return (directory / _FILES["chain_pem"]).stat().st_mtime_ns if directory else 0
    except FileNotFoundError:
        return 0


def _check_files(identity: Identity, directory: Path) -> None:
    """Raise ConfigError for what gRPC would only refuse later, and without a word about the file.

    Two files are not replaced at once: a reader in between must see that they do not fit.
    """
    leaf = load_certificate(identity.chain_pem, directory / _FILES["chain_pem"])
    load_certificate(identity.root_pem, directory / _FILES["root_pem"])
    key = load_key(identity.key_pem, directory / _FILES["key_pem"])
    if key.public_key() != leaf.public_key():
        raise ConfigError(f"{directory / _FILES['key_pem']} is not the key of the certificate beside it.")


def _spiffe_id_of(chain_pem: bytes, source: str = "The certificate chain") -> SpiffeId:
    try:
        leaf = x509.load_pem_x509_certificate(chain_pem)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        if len(uris) != 1:
            raise ConfigError(f"A leaf has exactly one SPIFFE id, this one has {len(uris)}.")
        return SpiffeId.parse(uris[0])
    except (*UNREADABLE, x509.ExtensionNotFound, InvalidRequest) as error:
        raise ConfigError(f"{source} cannot be read: {error}; `esper pki issue` makes it anew.") from error
