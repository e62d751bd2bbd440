"""Who may call what. A method without a row is denied to everyone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

from esper_rpc.errors import ConfigError, PermissionDenied

from .spiffe import SpiffeId

ROLES = frozenset({"trainer", "tamiyo", "urza", "operator", "simic", "nissa", "oona", "weatherlight"})
"""Who has a certificate. A row that names them all is for roles of your own too.

`stranger` is not one of them: it may enrol, where that is served, and nothing else.
"""

STRANGER_ROLE = "stranger"

Rows = Mapping[str, frozenset[str]]
"""The roles that may call each method, by `/package.Service/Method`."""

_TRAINING = frozenset({"trainer", "operator"})
_OPERATOR = frozenset({"operator"})
_WATCHING = frozenset({"operator", "nissa"})
_SUPERVISING = frozenset({"trainer", "operator", "nissa", "weatherlight"})
_LIBRARY = frozenset({"tamiyo", "trainer", "simic", "operator"})

_TAMIYO = "/esper.tamiyo.v1.TamiyoService/"
_KASMINA = "/esper.kasmina.v1.KasminaService/"
_TOLARIA = "/esper.tolaria.v1.TolariaService/"
_URZA = "/esper.urza.v1.UrzaService/"
_IDENTITY = "/esper.identity.v1.IdentityService/"

TABLE: Rows = {
    _TAMIYO + "OpenRun": _TRAINING,
    _TAMIYO + "CloseRun": _TRAINING,
    _TAMIYO + "EvaluateSteps": _TRAINING,
    _TAMIYO + "EvaluateStep": _TRAINING,
    _TAMIYO + "EvaluateEpoch": _TRAINING,
    _TAMIYO + "RequestPause": _TRAINING,
    _TAMIYO + "IngestPolicyUpdate": frozenset({"simic", "operator"}),
    _TAMIYO + "GetPolicy": frozenset({"trainer", "operator", "simic", "nissa"}),
    _TAMIYO + "RollbackPolicy": _OPERATOR,
    _TAMIYO + "ListPauseGrants": _OPERATOR,
    _TAMIYO + "SetConservativeMode": _OPERATOR,
    _TAMIYO + "GetStatus": frozenset({"operator", "nissa", "weatherlight"}),
    _TAMIYO + "AckFieldReport": frozenset({"simic", "operator"}),
    _TAMIYO + "ListFieldReports": frozenset({"simic", "operator"}),
    _TAMIYO + "PublishHistory": frozenset({"weatherlight", "operator"}),
    _TAMIYO + "ExplainDecision": _OPERATOR,
    _TAMIYO + "ReplayDecision": _OPERATOR,
    _TAMIYO + "ListStepDumps": _OPERATOR,
    _TAMIYO + "ListDumpedSteps": _OPERATOR,
    _KASMINA + "ApplyCommand": _TRAINING,
    _KASMINA + "ExportSeedStates": frozenset({"trainer", "operator", "nissa"}),
    _KASMINA + "AdvanceAlpha": _TRAINING,
    _KASMINA + "FinalizeStep": _TRAINING,
    _KASMINA + "UpdateEpoch": _TRAINING,
    _KASMINA + "WatchSeedEvents": _WATCHING,
    _KASMINA + "GetStatus": frozenset({"trainer", "operator", "nissa"}),
    _KASMINA + "ValidateParameters": _TRAINING,
    _KASMINA + "GetRollbackPayload": _TRAINING,
    _KASMINA + "TerminateSeed": _OPERATOR,
    _KASMINA + "EmergencyCleanup": _OPERATOR,
    _TOLARIA + "GetStatus": _SUPERVISING,
    _TOLARIA + "CreateCheckpoint": _TRAINING,
    _TOLARIA + "Rollback": _TRAINING,
    _TOLARIA + "SignalEmergency": frozenset({"trainer", "operator", "weatherlight"}),
    _TOLARIA + "WatchEmergencies": _SUPERVISING,
    _TOLARIA + "WatchMetrics": frozenset({"trainer", "operator", "nissa"}),
    _URZA + "GetBlueprint": _LIBRARY,
    _URZA + "GetExtras": _LIBRARY,
    _URZA + "BatchGetExtras": _LIBRARY,
    _URZA + "ListBlueprints": _LIBRARY,
    _URZA + "FetchKernel": _LIBRARY,
    _URZA + "Prefetch": _LIBRARY,
    _URZA + "WatchCatalog": _LIBRARY,
    _URZA + "SaveBlueprint": _OPERATOR,
    _URZA + "UploadKernel": _OPERATOR,
    _IDENTITY + "RenewCertificate": ROLES,
    _IDENTITY + "Enroll": frozenset({STRANGER_ROLE}),
    "/grpc.health.v1.Health/Check": ROLES,
    "/grpc.health.v1.Health/Watch": ROLES,
    "/grpc.health.v1.Health/List": ROLES,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _OPERATOR,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _OPERATOR,
}


ADMIN_METHODS = frozenset(
    {
        _TAMIYO + "IngestPolicyUpdate",
        _TAMIYO + "RollbackPolicy",
        _TAMIYO + "SetConservativeMode",
        _TAMIYO + "RequestPause",
        _KASMINA + "ApplyCommand",
        _KASMINA + "TerminateSeed",
        _KASMINA + "EmergencyCleanup",
        _TOLARIA + "CreateCheckpoint",
        _TOLARIA + "Rollback",
        _TOLARIA + "SignalEmergency",
        _URZA + "SaveBlueprint",
        _URZA + "UploadKernel",
        _IDENTITY + "RenewCertificate",
        _IDENTITY + "Enroll",
    }
)
"""What changes something beyond the caller's own run: each call is written to the audit log."""


def rows_for(service: str, methods: Collection[str], roles: Mapping[str, AbstractSet[str]]) -> Rows:
    """Return the rows of a service of your own; raises ConfigError for a service of the table or an unknown method."""
    if any(method.startswith(f"/{service}/") for method in TABLE):
        raise ConfigError(f"Who may call {service} stands in the table of esper_rpc.identity.authorisation alone.")
    unknown = sorted(set(roles) - set(methods))
    if unknown:
        raise ConfigError(f"{service} has no method {unknown[0]!r}; it has {', '.join(sorted(methods))}.")
    return {f"/{service}/{method}": frozenset(names) for method, names in roles.items()}


def authorise(peer: SpiffeId, method: str, rows: Rows = TABLE) -> None:
    """Raise PermissionDenied unless the peer's role may call the method, given as `/package.Service/Method`."""
    roles = rows.get(method, frozenset())
    is_for_every_member = roles == ROLES and peer.role != STRANGER_ROLE
    if peer.role not in roles and not is_for_every_member:
        raise PermissionDenied(f"{peer} may not call {method}.", metadata={"role": peer.role, "method": method})
