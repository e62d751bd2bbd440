from __future__ import annotations

import shutil
import socket
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import typer

from esper_rpc.breaker import BreakerConfig
from esper_rpc.concurrency import ConcurrencyConfig
from esper_rpc.config import load
from esper_rpc.disk import require_writable
from esper_rpc.envelope import Keyring, RootKeys
from esper_rpc.envelope.keys import SECRET_VARIABLE
from esper_rpc.errors import ConfigError, EsperError
from esper_rpc.identity import Authority, Identity
from esper_rpc.identity.authority import utc_now
from esper_rpc.identity.deny_list import read_denied
from esper_rpc.quota import QuotaConfig
from esper_servers.weatherlight.identity_server import PkiConfig

from .console import EXIT_FAILURE, HomeOption, JsonOption, environ_of, explain, home_of, print_json, print_rows, run
from .home import MEMBERS, Home

LEAST_FREE_BYTES = 200 * 1024 * 1024
INTERMEDIATE_WARNING = timedelta(days=7)
CONNECT_SECONDS = 1.0
SERVICES = ("urza", "tamiyo", "weatherlight")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, and what to do about it."""

    check: str
    problem: str
    fix: str


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined."""

    home: Home
    environ: Mapping[str, str]


Check = Callable[[Patient], Iterator[Finding]]


def doctor(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Look for the likeliest misconfigurations, and say how to mend each."""
    patient = Patient(home_of(context, home), environ_of(context))
    findings = [finding for check in CHECKS for finding in examine(check, patient)]
    rows = [{"check": f.check, "problem": f.problem, "fix": f.fix} for f in findings]
    if as_json:
        print_json({"home": str(patient.home.directory), "checks": len(CHECKS), "findings": rows})
    elif rows:
        print_rows(f"{len(rows)} findings in {patient.home.directory}", rows, as_json=False)
    else:
        typer.echo(f"{len(CHECKS)} checks of {patient.home.directory}: nothing wrong")
    if rows:
        raise typer.Exit(EXIT_FAILURE)


def examine(check: Check, patient: Patient) -> Iterator[Finding]:
    """Run one check; one that stumbles over a broken file reports that."""
    try:
        yield from check(patient)
    except EsperError as error:
        yield Finding(check.__name__, explain(error), "mend or remove that file, then ask again")


def home_is_writable(patient: Patient) -> Iterator[Finding]:
    """The home exists, can be written and has room."""
    try:
        require_writable(patient.home.directory)
    except ConfigError as error:
        yield Finding("home", error.message, "free space, chown the directory, or set ESPER_HOME to another one")
        return
    if shutil.disk_usage(patient.home.directory).free < LEAST_FREE_BYTES:
        yield Finding("disk", "less than 200 MiB are free", "free space: journals and kernels need it")


def authority_is_valid(patient: Patient) -> Iterator[Finding]:
    """There is an authority and its intermediate lasts."""
    if not (patient.home.pki / "root.pem").exists():
        yield Finding("authority", f"no authority in {patient.home.pki}", "esper pki init")
        return
    if Authority.load(patient.home.pki).not_after - utc_now() < INTERMEDIATE_WARNING:
        yield Finding("authority", "the intermediate ends within a week", "esper pki intermediate")


def certificates_are_valid(patient: Patient) -> Iterator[Finding]:
    """Every member has a certificate of this authority that is valid, with its key, and closed to others."""
    for role in MEMBERS:
        fix = f"esper pki issue {role}"
        try:
            identity = Identity.load(patient.home.identity_dir(role))
        except ConfigError as error:
            yield Finding("certificate", error.message, fix)
            continue
        if identity.root_pem != (patient.home.pki / "root.pem").read_bytes():
            yield Finding("certificate", f"{identity.spiffe_id} was issued by another authority", fix)


def keyrings_agree(patient: Patient) -> Iterator[Finding]:
    """Every keyring signs with the active root and knows all live ones."""
    if not patient.home.root_keys.exists():
        yield Finding("keys", f"no signing roots in {patient.home.root_keys}", "esper keys init")
        return
    roots = RootKeys.load(patient.home.root_keys)
    for role in MEMBERS:
        path = patient.home.identity_dir(role) / "keyring.json"
        if not path.exists():
            yield Finding("keys", f"{path} is missing", f"esper keys issue {role}")
        elif Keyring.load(path).active_key_id != roots.active_key_id:
            yield Finding("keys", f"{path} signs with a root that is not active", f"esper keys issue {role}")


def secret_in_the_environment(patient: Patient) -> Iterator[Finding]:
    """ESPER_LEYLINE_SECRET, where it is set, holds a trainer's keyring."""
    if patient.environ.get(SECRET_VARIABLE):
        try:
            Keyring.find(patient.home.identity_dir("trainer"), patient.environ, role="trainer")
        except ConfigError as error:
            yield Finding(
                "environment", error.message, f"unset {SECRET_VARIABLE}, or put a trainer's keyring.json in it"
            )


def settings_sections() -> dict[str, type]:
    """Return the sections of esper.toml and what each is read into."""
    from esper_client.session import SessionConfig
    from esper_rpc.pause_quota import PauseConfig
    from esper_servers.kasmina.gates.config import GateConfig
    from esper_servers.kasmina.kernels.library import KernelConfig
    from esper_servers.kasmina.limits import LocalLimits
    from esper_servers.kasmina.memory import MemoryConfig
    from esper_servers.policy.prior import PriorConfig
    from esper_servers.tamiyo.blend_modes import BlendModeConfig
    from esper_servers.tamiyo.field_reports.config import ReportConfig
    from esper_servers.tamiyo.plans.plan_switch import PlanConfig
    from esper_servers.tamiyo.risk.config import RiskConfig
    from esper_servers.tamiyo.step_processes.processes import StepProcessConfig
    from esper_servers.tamiyo.turns.anticipation import AnticipationConfig
    from esper_servers.tamiyo.turns.step_queue import BatchConfig
    from esper_servers.tolaria.checkpoints.schedule import CheckpointConfig
    from esper_servers.tolaria.emergency.escalation import EmergencyConfig
    from esper_servers.tolaria.epoch_guard import EpochGuardConfig
    from esper_servers.tolaria.metrics.step_metrics import TolariaConfig
    from esper_servers.tolaria.rollback.rollback import RollbackConfig

    return {
        "session": SessionConfig, "breaker": BreakerConfig, "limits": LocalLimits, "seed_gates": GateConfig,
        "kernels": KernelConfig, "memory": MemoryConfig, "risk": RiskConfig, "prior": PriorConfig,
        "plan": PlanConfig, "batch": BatchConfig, "anticipation": AnticipationConfig, "pause": PauseConfig,
        "reports": ReportConfig, "quota": QuotaConfig,
        "concurrency": ConcurrencyConfig, "pki": PkiConfig, "step_processes": StepProcessConfig,
        "checkpoints": CheckpointConfig, "rollback": RollbackConfig, "blending": BlendModeConfig,
        "tolaria": TolariaConfig, "emergency": EmergencyConfig, "epoch_guard": EpochGuardConfig,
    }  # fmt: skip


def settings_are_valid(patient: Patient) -> Iterator[Finding]:
    """esper.toml and ESPER_* hold settings that exist, in range."""
    sections = settings_sections()
    path = patient.home.settings_file
    for section, config in sections.items():
        try:
            load(config, section, path=path, environ=patient.environ)
        except ConfigError as error:
            yield Finding("settings", error.message, f"correct it in {path} or in the environment")
    try:
        written = tomllib.loads(path.read_text()) if path.exists() else {}
    except tomllib.TOMLDecodeError:
        return  # Told above, once for every section.
    for section in sorted(set(written) - set(sections)):
        yield Finding("settings", f"[{section}] is read by nobody", f"use one of {', '.join(sections)}")


def seeds_stay_long_enough(patient: Patient) -> Iterator[Finding]:
    """A trainer leaves a seed in a stage for as long as Tamiyo wants it there."""
    from esper_servers.kasmina.gates.config import GateConfig
    from esper_servers.policy.prior import PriorConfig

    path, environ = patient.home.settings_file, patient.environ
    try:
        most = load(GateConfig, "seed_gates", path=path, environ=environ).stage_patience
        prior = load(PriorConfig, "prior", path=path, environ=environ)
    except ConfigError:
        return  # Told above.
    for name in ("shadow_steps", "probation_steps"):
        if 0 < most <= getattr(prior, name):
            problem = f"[prior] {name} = {getattr(prior, name)}: a trainer takes a seed out after {most} steps"
            yield Finding("settings", problem, f"raise stage_patience of [seed_gates] in {path}, or lower {name}")


def process_environment(patient: Patient) -> Iterator[Finding]:
    """Nothing in the environment undoes what the step path needs."""
    found = patient.environ.get
    if found("GRPC_ENABLE_FORK_SUPPORT", "0") not in ("0", "false"):
        problem = "GRPC_ENABLE_FORK_SUPPORT is on: forked DataLoader workers crash"
        yield Finding("environment", problem, "unset GRPC_ENABLE_FORK_SUPPORT")
    if found("OMP_WAIT_POLICY", "passive").lower() != "passive":
        problem = "OMP_WAIT_POLICY is not passive: the tail of steps doubles"
        yield Finding("environment", problem, "unset OMP_WAIT_POLICY")
    if found("http_proxy") and "127.0.0.1" not in found("no_proxy", ""):
        yield Finding("environment", "http_proxy is set and gRPC heeds it", "add 127.0.0.1 to no_proxy")


def deny_list_spares_us(patient: Patient) -> Iterator[Finding]:
    """No member of this home is denied by it."""
    for name, reason in read_denied(patient.home.deny_list).items():
        role, instance = name.rpartition("esper/")[2].split("/")
        if patient.home.identity_dir(role, instance).exists():
            yield Finding("deny list", f"{name} is denied: {reason}", f"esper pki allow {role} {instance}")


def services_are_reachable(patient: Patient) -> Iterator[Finding]:
    """What mesh.toml names is there and serves."""
    mesh = patient.home.read_mesh()
    if not mesh:
        yield Finding("mesh", f"{patient.home.mesh_file} is missing: no mesh was started here", "esper up")
        return
    for service in SERVICES:
        address = mesh.get(service, "")
        if not _listens(address):
            yield Finding("mesh", f"nobody listens for {service} at {address or 'an unknown address'}", "esper up")
        elif (health := run(_health(patient.home, service, address))) != "SERVING":
            yield Finding("mesh", f"{service} at {address}: {health}", f"esper logs --service {service}")


def library_is_seeded(patient: Patient) -> Iterator[Finding]:
    """Urza has blueprints; without any, no seed ever germinates."""
    address = patient.home.read_mesh().get("urza", "")
    if _listens(address) and run(_blueprints(patient.home, address)) == 0:
        yield Finding("library", "Urza has no blueprints: no seed can germinate", "esper urza seed")


CHECKS: tuple[Check, ...] = (
    home_is_writable, authority_is_valid, certificates_are_valid, keyrings_agree, secret_in_the_environment,
    settings_are_valid, seeds_stay_long_enough, process_environment, deny_list_spares_us, services_are_reachable,
    library_is_seeded,
)  # fmt: skip


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), CONNECT_SECONDS):
            return True
    except (OSError, ValueError):
        return False


async def _health(home: Home, service: str, address: str) -> str:
    from .status import HealthClient

    async with HealthClient(address, identity=home.identity(), role=service) as client:
        try:
            return await client.check("")
        except EsperError as error:
            return explain(error)


async def _blueprints(home: Home, address: str) -> int:
    from esper_client import UrzaClient
    from esper_rpc.proto.urza.v1 import ListBlueprintsRequest

    async with UrzaClient(address, identity=home.identity()) as client:
        return len((await client.list_blueprints(ListBlueprintsRequest(page_size=1))).blueprints)
