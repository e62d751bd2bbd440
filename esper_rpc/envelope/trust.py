"""Whose messages each role verifies, and under which names besides its SPIFFE id (architecture, section 5)."""

from __future__ import annotations

from esper_rpc.identity.spiffe import SpiffeId

from .keys import Keyring, RootKeys

TRUSTED_ISSUERS: dict[str, tuple[str, ...]] = {
    "trainer": ("tamiyo", "operator", "weatherlight"),
    "tamiyo": ("simic", "operator"),
    "operator": ("trainer",),
    "nissa": ("trainer",),
    "weatherlight": ("trainer",),
}
SHARED_AUDIENCES: dict[str, tuple[str, ...]] = {
    "tamiyo": ("tamiyo",),
    # What a trainer announces is for all who watch runs.
    "operator": ("run",),
    "nissa": ("run",),
    "weatherlight": ("run",),
}


def keyring_for(root_keys: RootKeys, spiffe_id: SpiffeId) -> Keyring:
    """Derive the keyring that a member of this role needs, and no key more."""
    return Keyring.for_identity(
        root_keys,
        spiffe_id,
        issuers=TRUSTED_ISSUERS.get(spiffe_id.role, ()),
        audiences=SHARED_AUDIENCES.get(spiffe_id.role, ()),
    )
