"""The files of a mesh on one machine: $ESPER_HOME."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from esper_client.discovery import MESH_FILE, SETTINGS_FILE, home_directory
from esper_rpc.config import read_section
from esper_rpc.envelope import Keyring, RootKeys
from esper_rpc.envelope.trust import keyring_for
from esper_rpc.errors import ConfigError
from esper_rpc.identity import Authority, Identity, SpiffeId
from esper_rpc.identity.authority import utc_now

MEMBERS = ("weatherlight", "urza", "tamiyo", "trainer", "operator")
INSTANCE = "local"
# A leaf with less left is issued again at a start, so that a laptop that slept just works.
RENEWAL_MARGIN = timedelta(hours=8)
INTERMEDIATE_MARGIN = timedelta(days=10)


@dataclass(frozen=True, slots=True)
class Home:
    """Where a mesh keeps its certificates, keys, state and logs."""

    directory: Path

    @classmethod
    def find(cls, option: Path | None, environ: Mapping[str, str]) -> Home:
        """Take the option, then ESPER_HOME, then ~/.esper."""
        chosen = option or home_directory(environ)
        return cls(chosen.expanduser().resolve())

    @property
    def pki(self) -> Path:
        """The authority."""
        return self.directory / "pki"

    @property
    def root_keys(self) -> Path:
        """The signing roots, which only `esper keys` reads."""
        return self.directory / "keys" / "root.json"

    @property
    def mesh_file(self) -> Path:
        """Where `esper up` writes the addresses."""
        return self.directory / MESH_FILE

    @property
    def settings_file(self) -> Path:
        """Where an operator writes settings, by section."""
        return self.directory / SETTINGS_FILE

    @property
    def deny_list(self) -> Path:
        """Members that are refused although their certificates are valid."""
        return self.pki / "denied.json"

    @property
    def tokens_dir(self) -> Path:
        """Enrolment tokens that wait to be redeemed."""
        return self.pki / "tokens"

    @property
    def metrics_dir(self) -> Path:
        """Where the processes of a running mesh count."""
        return self.directory / "run" / "metrics"

    def audit_log(self, service: str) -> Path:
        """Where a service writes refusals and admin calls."""
        return self.directory / "logs" / f"{service}.audit.jsonl"

    def identity_dir(self, role: str, instance: str = INSTANCE) -> Path:
        """The certificate, key and keyring of one member."""
        return self.directory / "identities" / f"{role}-{instance}"

    def state_dir(self, service: str) -> Path:
        """What a service keeps."""
        return self.directory / "state" / service

    def log_file(self, service: str) -> Path:
        """Where `esper up` sends the log of a service."""
        return self.directory / "logs" / f"{service}.log"

    def identity(self, role: str = "operator", instance: str = INSTANCE) -> Identity:
        """Read the identity of a member."""
        return Identity.load(self.identity_dir(role, instance))

    def keyring(self, role: str, instance: str = INSTANCE) -> Keyring:
        """Read the keyring of a member."""
        return Keyring.load(self.identity_dir(role, instance) / "keyring.json")

    def issue_identity(self, spiffe_id: SpiffeId, *, lifetime: timedelta | None = None) -> Identity:
        """Issue a leaf and write it to the member's directory."""
        authority = Authority.load(self.pki)
        leaf = authority.issue(spiffe_id, lifetime=lifetime) if lifetime else authority.issue(spiffe_id)
        return Identity.of(leaf).save(self.identity_dir(spiffe_id.role, spiffe_id.instance))

    def issue_keyring(self, spiffe_id: SpiffeId) -> Keyring:
        """Derive a keyring from the roots and write it to the member's directory."""
        keyring = keyring_for(RootKeys.load(self.root_keys), spiffe_id)
        keyring.save(self.identity_dir(spiffe_id.role, spiffe_id.instance) / "keyring.json")
        return keyring

    def reissue_keyrings(self) -> list[str]:
        """Derive again every keyring that lies here, after the roots changed; returns whose."""
        names = sorted(file.parent.name for file in (self.directory / "identities").glob("*/keyring.json"))
        for name in names:
            role, _, instance = name.partition("-")
            self.issue_keyring(SpiffeId(role, instance))
        return names

    def prepare(self) -> None:
        """Make whatever a mesh on this machine still lacks: authority, roots, identities, keyrings."""
        if not (self.pki / "root.pem").exists():
            Authority.create(self.pki)
        self._renew_intermediate()
        if not self.root_keys.exists():
            RootKeys.create(self.root_keys)
        for role in MEMBERS:
            spiffe_id = SpiffeId(role, INSTANCE)
            if self._needs_leaf(role):
                self.issue_identity(spiffe_id)
            if not (self.identity_dir(role) / "keyring.json").exists():
                self.issue_keyring(spiffe_id)

    def write_mesh(self, addresses: Mapping[str, str]) -> None:
        """Publish the addresses of running services, for `attach` and the other commands."""
        lines = ["[mesh]", *(f"{service} = {json.dumps(address)}" for service, address in addresses.items())]
        lines.append(f"identity = {json.dumps(str(self.identity_dir('trainer')))}")
        lines.append(f"deny_list = {json.dumps(str(self.deny_list))}")
        scratch = self.mesh_file.with_suffix(".part")
        scratch.write_text("\n".join(lines) + "\n")
        scratch.replace(self.mesh_file)

    def address(self, service: str, option: str | None = None) -> str:
        """Return the address of a service; raises ConfigError when none is known."""
        if option:
            return option
        mesh = self.read_mesh()
        if service not in mesh:
            raise ConfigError(f"No address of {service} in {self.mesh_file}; run `esper up` or give --address.")
        return mesh[service]

    def read_mesh(self) -> dict[str, str]:
        """Read what `write_mesh` wrote, empty when no mesh was started."""
        mesh = read_section(self.mesh_file, "mesh")
        if not all(isinstance(value, str) for value in mesh.values()):
            raise ConfigError(f"{self.mesh_file} must hold text only; `esper up` writes it anew.")
        return mesh

    def _renew_intermediate(self) -> None:
        """Sign a new intermediate in time where the root key is at hand; elsewhere `esper pki status` warns."""
        left = Authority.load(self.pki).not_after - utc_now()
        if left < INTERMEDIATE_MARGIN and (self.pki / "root.key").exists():
            Authority.renew_intermediate(self.pki)

    def renew_leaves(self) -> list[str]:
        """Issue again the local leaves that no process renewed, because there is none or the machine slept.

        Also those that have not begun, because the clock of the machine was set back: peers refuse them.
        """
        overdue = [role for role in MEMBERS if self._is_overdue(role)]
        for role in overdue:
            self.issue_identity(SpiffeId(role, INSTANCE))
        return overdue

    def _is_overdue(self, role: str) -> bool:
        try:
            identity = self.identity(role)
        except ConfigError:
            return True
        # Halfway between the time when its process should have renewed it and its end.
        late = identity.renewal_due + (identity.not_after - identity.renewal_due) / 2
        return not identity.not_before <= utc_now() <= late

    def _needs_leaf(self, role: str) -> bool:
        if not (self.identity_dir(role) / "cert.pem").exists():
            return True
        try:
            identity = self.identity(role)
        except ConfigError:
            return True
        return identity.not_before > utc_now() or identity.not_after - utc_now() < RENEWAL_MARGIN
