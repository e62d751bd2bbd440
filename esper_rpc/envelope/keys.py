from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from esper_rpc.errors import ConfigError
from esper_rpc.identity.secret_files import read_secret, write_secret
from esper_rpc.identity.spiffe import SpiffeId

KEY_BYTES = 32
SECRET_VARIABLE = "ESPER_LEYLINE_SECRET"  # noqa: S105  # A name, no secret.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)


def length_prefixed(*parts: str) -> bytes:
    """Join strings so that no two lists of parts give the same bytes."""
    encoded = (part.encode() for part in parts)
    return b"".join(len(part).to_bytes(8, "little") + part for part in encoded)


def derive_issuer_key(root: bytes, key_id: str, role: str) -> bytes:
    """K_issuer = HKDF-SHA256(root, salt = key_id, info = LP("esper/1/issuer", role)), RFC 5869."""
    info = length_prefixed("esper/1/issuer", role)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=key_id.encode(), info=info).derive(root)


def derive_audience_key(issuer_key: bytes, audience: str) -> bytes:
    """K = HKDF-Expand(K_issuer, LP("esper/1/audience", audience)), RFC 5869."""
    info = length_prefixed("esper/1/audience", audience)
    return HKDFExpand(algorithm=SHA256(), length=KEY_BYTES, info=info).derive(issuer_key)


@dataclass(frozen=True, kw_only=True, slots=True)
class RootKeys:
    """The roots of the mesh, which exist only where `esper keys` runs."""

    active_key_id: str
    roots: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def create(cls, path: Path) -> RootKeys:
        """Draw a first root and write it, mode 0600; raises ConfigError when there is one."""
        if path.exists():
            raise ConfigError(f"{path} holds signing roots already; remove it to start afresh.")
        key_id = secrets.token_hex(8)
        keys = cls(active_key_id=key_id, roots={key_id: secrets.token_bytes(KEY_BYTES)})
        keys.save(path)
        return keys

    def save(self, path: Path) -> None:
        """Write the file, mode 0600."""
        document = {"active_key_id": self.active_key_id, "roots": {k: _to_text(v) for k, v in self.roots.items()}}
        write_secret(path, json.dumps(document).encode())

    def with_new_root(self) -> RootKeys:
        """Add a root that receivers learn to verify before anybody signs with it."""
        return replace(self, roots={**self.roots, secrets.token_hex(8): secrets.token_bytes(KEY_BYTES)})

    def with_active(self, key_id: str) -> RootKeys:
        """Sign with this root from now on; raises ConfigError when it is unknown."""
        if key_id not in self.roots:
            raise ConfigError(f"There is no root {key_id}; there are {', '.join(self.roots)}.")
        return replace(self, active_key_id=key_id)

    def without(self, key_id: str) -> RootKeys:
        """Forget a root: what it signed is refused from now on; raises ConfigError for the active one."""
        if key_id == self.active_key_id:
            raise ConfigError(f"{key_id} is active; rotate first.")
        return replace(self, roots={k: root for k, root in self.roots.items() if k != key_id})

    @property
    def newest_key_id(self) -> str:
        """The root that was added last."""
        return list(self.roots)[-1]

    @classmethod
    def load(cls, path: Path) -> RootKeys:
        """Read the roots."""
        document = _parse(read_secret(path), str(path))
        try:
            roots = {key_id: _to_bytes(text) for key_id, text in document["roots"].items()}
            roots[document["active_key_id"]]  # The key to sign with must be there.
        except _MALFORMED as error:
            raise ConfigError(f"{path} does not hold signing roots; `esper keys init` writes them.") from error
        return cls(active_key_id=document["active_key_id"], roots=roots)


class Keyring:
    """The keys of one service: its own issuer keys, and those of messages addressed to it. Never shows a secret."""

    def __init__(
        self,
        *,
        role: str,
        active_key_id: str,
        issuer_keys: Mapping[str, bytes],
        received: Mapping[tuple[str, str, str], bytes],
    ) -> None:
        self.role = role
        self.active_key_id = active_key_id
        self._issuer_keys = dict(issuer_keys)
        self._received = dict(received)
        self._signing: dict[tuple[str, str], bytes] = {}
        self._path: Path | None = None
        self._stamp = 0

    def __repr__(self) -> str:
        return f"Keyring(role={self.role!r}, active_key_id={self.active_key_id!r}, received={len(self._received)})"

    @classmethod
    def for_identity(
        cls, root_keys: RootKeys, spiffe_id: SpiffeId, *, audiences: Iterable[str] = (), issuers: Iterable[str]
    ) -> Keyring:
        """Derive the keyring of a member that trusts `issuers` for its SPIFFE id and for further `audiences`."""
        own = {k: derive_issuer_key(root, k, spiffe_id.role) for k, root in root_keys.roots.items()}
        received = {
            (key_id, issuer, audience): derive_audience_key(derive_issuer_key(root, key_id, issuer), audience)
            for key_id, root in root_keys.roots.items()
            for issuer in issuers
            for audience in (str(spiffe_id), *audiences)
        }
        return cls(role=spiffe_id.role, active_key_id=root_keys.active_key_id, issuer_keys=own, received=received)

    def signing_key(self, audience: str) -> bytes:
        """The active key towards one audience; raises ConfigError without issuer keys."""
        cached = self._signing.get((self.active_key_id, audience))
        if cached is None:
            if self.active_key_id not in self._issuer_keys:
                raise ConfigError("This keyring cannot sign; run `esper keys issue` for this identity.")
            cached = derive_audience_key(self._issuer_keys[self.active_key_id], audience)
            self._signing[self.active_key_id, audience] = cached
        return cached

    def verification_key(self, key_id: str, issuer: str, audience: str) -> bytes | None:
        """The key of messages from an issuer to an audience, or None. What our own role signs can be checked too."""
        found = self._received.get((key_id, issuer, audience))
        return self.own_key(key_id, audience) if found is None and issuer == self.role else found

    def own_key(self, key_id: str, audience: str) -> bytes | None:
        """The key of messages from our own role to an audience, or None when we lack the issuer key."""
        issuer_key = self._issuer_keys.get(key_id)
        return derive_audience_key(issuer_key, audience) if issuer_key is not None else None

    def knows(self, key_id: str) -> bool:
        """Whether any key has this identifier."""
        return key_id in self._issuer_keys or any(known == key_id for known, _, _ in self._received)

    def issuers(self) -> frozenset[str]:
        """Roles whose messages this keyring can verify."""
        return frozenset(issuer for _, issuer, _ in self._received)

    def to_json(self) -> bytes:
        """Encode for `Keyring.parse`."""
        received = [[k, i, a, _to_text(key)] for (k, i, a), key in sorted(self._received.items())]
        own = {key_id: _to_text(key) for key_id, key in self._issuer_keys.items()}
        document = {
            "role": self.role, "active_key_id": self.active_key_id, "issuer_keys": own, "received": received,
        }  # fmt: skip
        return json.dumps(document).encode()

    @classmethod
    def parse(cls, text: bytes | str, *, source: str = "the keyring") -> Keyring:
        """Read what `to_json` wrote, for example from ESPER_LEYLINE_SECRET; raises ConfigError."""
        document = _parse(text, source)
        if isinstance(document, dict) and "roots" in document:
            raise ConfigError(f"{source} holds signing roots, which no service may have; give it a keyring instead.")
        try:
            return cls(
                role=_word(document["role"]),
                active_key_id=_word(document["active_key_id"]),
                issuer_keys={k: _to_bytes(v) for k, v in document["issuer_keys"].items()},
                received={(_word(k), _word(i), _word(a)): _to_bytes(v) for k, i, a, v in document["received"]},
            )
        except _MALFORMED as error:
            raise ConfigError(f"{source} is not a keyring; `esper keys issue` writes one.") from error

    @classmethod
    def load(cls, path: Path) -> Keyring:
        """Read a keyring file, which only its owner may read."""
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        keyring = cls.parse(read_secret(path), source=str(path))
        keyring._path, keyring._stamp = path, stamp
        return keyring

    @classmethod
    def find(cls, directory: Path, environ: Mapping[str, str], *, role: str) -> Keyring:
        """Read ESPER_LEYLINE_SECRET if it is set, else the keyring.json of an identity; only the file can rotate.

        Raises:
            ConfigError: When it is not the keyring of this role.
        """
        secret = environ.get(SECRET_VARIABLE)
        found = cls.parse(secret, source=SECRET_VARIABLE) if secret else cls.load(directory / "keyring.json")
        if found.role != role:
            source = SECRET_VARIABLE if secret else directory / "keyring.json"
            raise ConfigError(f"{source} holds the keyring of {found.role}, and this is {role}.")
        return found

    async def refresh(self) -> None:
        """Read the file again if it has changed, so that keys rotate without a restart; raises ConfigError."""
        stamp = self._path.stat().st_mtime_ns if self._path is not None and self._path.exists() else self._stamp
        if stamp == self._stamp or self._path is None:
            return
        read = Keyring.load(self._path)
        self._received, self._issuer_keys = read._received, read._issuer_keys
        self._signing, self.active_key_id, self._stamp = {}, read.active_key_id, stamp

    def save(self, path: Path) -> None:
        """Write the file, mode 0600."""
        write_secret(path, self.to_json())


def _parse(text: bytes | str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # The parser's own message could quote a secret.
        raise ConfigError(f"{source} is not valid JSON.") from None


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("A name must be text.")
    return value


def _to_text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def _to_bytes(text: str) -> bytes:
    key = base64.b64decode(text, validate=True)
    if len(key) != KEY_BYTES:
        raise ConfigError(f"A key must have {KEY_BYTES} bytes.")
    return key
