from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

from esper_client.client import TamiyoClient
from esper_rpc.config import load
from esper_rpc.envelope import Keyring, sign
from esper_rpc.errors import ConfigError
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import PolicyUpdate, SignedEnvelope
from esper_rpc.proto.tamiyo.v1 import (
    GetPolicyRequest,
    GetPolicyResponse,
    IngestPolicyUpdateRequest,
    IngestPolicyUpdateResponse,
    RollbackPolicyRequest,
)

from .console import (
    EXIT_FAILURE,
    AddressOption,
    Commands,
    HomeOption,
    JsonOption,
    environ_of,
    home_of,
    print_json,
    print_rows,
    run,
)
from .home import INSTANCE, Home

_ISSUER = "simic"
_AUDIENCE = "tamiyo"
_VALIDATION_SECONDS = 120.0

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The policy that decides, and those before and after it.")
FileArgument = Annotated[Path, typer.Argument(help="A policy with its manifest, in the safetensors format.")]
VersionOption = Annotated[str, typer.Option(help="A version that ends in a number above every one before.")]


@app.command(epilog="Example: esper policy show --json")
def show(
    context: typer.Context, address: AddressOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Show which policy decides, since when, what it can be rolled back to, and how its shadow does."""
    row = _row(run(_get(home_of(context, home), address)))
    if as_json:
        print_json(row)
    else:
        print_rows("Policy", [{"name": name, "value": value} for name, value in row.items()], as_json=False)


@app.command(epilog="Example: esper policy export --version gnn_v1-2 policy.safetensors")
def export(
    context: typer.Context,
    file: FileArgument,
    version: VersionOption,
    seed: Annotated[int, typer.Option(help="Draw other weights than those of the shipped policy.")] = 0,
    home: HomeOption = None,
) -> None:
    """Write the shipped policy under a version of its own, to start from or to try an update with."""
    from esper_servers.policy import checkpoint
    from esper_servers.policy.policy import Policy
    from esper_servers.policy.prior import PriorConfig
    from esper_servers.policy.registries import Registries

    prior = load(PriorConfig, "prior", path=home_of(context, home).settings_file, environ=environ_of(context))
    shipped = Policy.initial(seed=seed, prior_config=prior)
    parent, shipped.version = shipped.version, version
    # These vocabularies are the same in every installation of this version.
    registries = Registries.load(None).policy_digests()
    file.write_bytes(checkpoint.write(shipped, parent=parent, registries=registries))
    typer.echo(f"{file} holds {version}.")


@app.command(epilog="Example: esper policy push policy.safetensors --shadow")
def push(
    context: typer.Context,
    file: FileArgument,
    shadow: Annotated[bool, typer.Option("--shadow", help="Let it run along, without effect.")] = False,
    address: AddressOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a policy as simic and hand it to Tamiyo; exits with 1 when it is rejected, and then nothing has changed."""
    place = home_of(context, home)
    answer = run(_push(place, address, seal(place, file), shadow=shadow))
    document = {
        "applied": answer.applied,
        "shadowed": answer.shadowed,
        "reason": answer.reason,
        "policy_version": answer.policy_version,
    }
    if as_json:
        print_json(document)
    else:
        typer.echo(_sentence(answer))
    if answer.reason:
        raise typer.Exit(EXIT_FAILURE)


@app.command(epilog="Example: esper policy rollback --reason 'more culls than before'")
def rollback(
    context: typer.Context,
    reason: Annotated[str, typer.Option(help="Why, for the log.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which would decide, and change nothing.")] = False,
    address: AddressOption = None,
    home: HomeOption = None,
) -> None:
    """Return to the policy that was live before."""
    request = RollbackPolicyRequest(reason=reason, validate_only=dry_run)
    version = run(_roll_back(home_of(context, home), address, request))
    typer.echo(f"{version} would decide." if dry_run else f"{version} decides.")


def seal(home: Home, file: Path) -> SignedEnvelope:
    """Sign the policy of a file; raises ConfigError for a file that is none."""
    from esper_servers.policy import checkpoint
    from esper_servers.policy.checkpoint import CheckpointRejected

    try:
        version, payload = checkpoint.read_manifest(file).version, file.read_bytes()
    except (CheckpointRejected, OSError) as error:
        raise ConfigError(f"{file} is not a policy: {error}") from error
    now = time.time_ns()
    update = PolicyUpdate(version=1, policy_id=str(uuid.uuid4()), tamiyo_policy_version=version, payload=payload)
    update.issued_at.FromNanoseconds(now)
    return sign(
        update.SerializeToString(),
        payload_type=PolicyUpdate.DESCRIPTOR.full_name,
        keyring=_keyring(home),
        audience=_AUDIENCE,
        issued_at_ns=now,
        nonce=update.policy_id,
    )


def _keyring(home: Home) -> Keyring:
    """The keyring of simic, derived now where the roots lie and nobody has done it."""
    member = SpiffeId(_ISSUER, INSTANCE)
    if not (home.identity_dir(_ISSUER) / "keyring.json").exists() and home.root_keys.exists():
        return home.issue_keyring(member)
    return home.keyring(_ISSUER)


async def _push(home: Home, address: str | None, update: SignedEnvelope, *, shadow: bool) -> IngestPolicyUpdateResponse:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        request = IngestPolicyUpdateRequest(update=update, shadow=shadow)
        return await client.ingest_policy_update(request, timeout=_VALIDATION_SECONDS)


async def _get(home: Home, address: str | None) -> GetPolicyResponse:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        return await client.get_policy(GetPolicyRequest())


async def _roll_back(home: Home, address: str | None, request: RollbackPolicyRequest) -> str:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        return (await client.rollback_policy(request)).policy_version


def _sentence(answer: IngestPolicyUpdateResponse) -> str:
    if answer.reason:
        return f"Rejected: {answer.reason}. {answer.policy_version} decides as before."
    return f"It runs along with {answer.policy_version}." if answer.shadowed else f"{answer.policy_version} decides."


def _row(policy: GetPolicyResponse) -> dict[str, Any]:
    row: dict[str, Any] = {
        "version": policy.policy_version,
        "since": policy.live_since.ToJsonString(),
        "plan": policy.plan,
        "origin": policy.origin,
        "before": ", ".join(policy.previous_versions),
        "shadow": policy.shadow_version,
    }
    if policy.shadow_compared:
        row["shadow_disagrees"] = f"{policy.shadow_disagreed / policy.shadow_compared:.2%} of {policy.shadow_compared}"
    return row
