from __future__ import annotations

import re
from dataclasses import dataclass

from esper_rpc.errors import InvalidRequest

TRUST_DOMAIN = "esper"
_PATTERN = re.compile(r"spiffe://esper/([a-z][a-z0-9-]{0,31})/([A-Za-z0-9][A-Za-z0-9._-]{0,63})")


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """A member of the mesh: a role and an instance of it."""

    role: str
    instance: str

    def __post_init__(self) -> None:
        if not _PATTERN.fullmatch(str(self)):
            raise InvalidRequest(f"{self} is not a SPIFFE id of this mesh: spiffe://esper/<role>/<instance>.")

    def __str__(self) -> str:
        return f"spiffe://{TRUST_DOMAIN}/{self.role}/{self.instance}"

    @property
    def dns_name(self) -> str:
        """The name that clients expect in the certificate of this role."""
        return f"{self.role}.esper"

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Read `spiffe://esper/<role>/<instance>`; raises InvalidRequest."""
        found = _PATTERN.fullmatch(text)
        if not found:
            raise InvalidRequest(f"{text!r} is not a SPIFFE id of this mesh: spiffe://esper/<role>/<instance>.")
        return cls(found[1], found[2])
