"""One-time tokens: how a new machine gets its first certificate."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import orjson

from esper_rpc.errors import ConfigError, InvalidRequest, PermissionDenied

from .authority import utc_now
from .secret_files import read_secret, write_secret
from .spiffe import SpiffeId

_PREFIX = "esper-enrol-1."
_REFUSED = "This token is unknown, used or expired; ask for a new one (`esper pki token`)."


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """What is carried to the new machine, as one line of text. Whoever holds it can enrol once."""

    secret: str
    address: str
    """Where enrolment is served."""
    root_pem: str
    """What the server's certificate is checked against."""

    def encode(self) -> str:
        """Write as text."""
        document = {"secret": self.secret, "address": self.address, "root_pem": self.root_pem}
        return _PREFIX + base64.urlsafe_b64encode(orjson.dumps(document)).decode()

    @classmethod
    def decode(cls, text: str) -> Invitation:
        """Read what `encode` wrote; raises ConfigError, never quoting it."""
        try:
            if not text.startswith(_PREFIX):
                raise ValueError
            document = orjson.loads(base64.urlsafe_b64decode(text.removeprefix(_PREFIX)))
            return cls(secret=document["secret"], address=document["address"], root_pem=document["root_pem"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError("This is not an enrolment token; `esper pki token` prints one.") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrolment:
    """What a token is good for."""

    spiffe_id: SpiffeId
    not_after: datetime
    keyring_json: str
    """Derived when the token is made, because the roots are not where tokens are redeemed."""


class EnrolmentTokens:
    """Tokens on disk, by the hash of their secret: a file per token, renamed when it is redeemed."""

    def __init__(self, directory: Path, clock: Callable[[], datetime] = utc_now) -> None:
        self._directory = directory
        self._clock = clock

    def create(self, spiffe_id: SpiffeId, *, lifetime: timedelta, keyring_json: str) -> str:
        """Draw a secret good for one certificate of this name."""
        secret = secrets.token_urlsafe(32)
        document = {
            "spiffe_id": str(spiffe_id),
            "not_after": (self._clock() + lifetime).isoformat(),
            "keyring": keyring_json,
        }
        write_secret(self._path(secret), orjson.dumps(document))
        return secret

    def redeem(self, secret: str) -> Enrolment:
        """Use up a secret; raises PermissionDenied, with the same words whatever is wrong with it."""
        path = self._path(secret)
        used = path.with_suffix(".used")
        try:
            path.rename(used)  # Only one of two who come at once succeeds.
        except FileNotFoundError:
            raise PermissionDenied(_REFUSED, reason="TOKEN_REFUSED") from None
        enrolment = _parse(used)
        # The keyring has gone to its owner; the name stays, for the audit.
        write_secret(used, orjson.dumps({"spiffe_id": str(enrolment.spiffe_id), "used": self._clock().isoformat()}))
        if enrolment.not_after <= self._clock():
            raise PermissionDenied(_REFUSED, reason="TOKEN_REFUSED")
        return enrolment

    def _path(self, secret: str) -> Path:
        return self._directory / f"{hashlib.sha256(secret.encode()).hexdigest()}.json"


def _parse(path: Path) -> Enrolment:
    try:
        document = orjson.loads(read_secret(path))
        return Enrolment(
            spiffe_id=SpiffeId.parse(document["spiffe_id"]),
            not_after=datetime.fromisoformat(document["not_after"]),
            keyring_json=document["keyring"],
        )
    except (ValueError, KeyError, InvalidRequest, ConfigError):
        raise PermissionDenied(_REFUSED, reason="TOKEN_REFUSED") from None
