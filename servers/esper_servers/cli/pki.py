from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from esper_rpc.envelope import RootKeys
from esper_rpc.envelope.trust import keyring_for
from esper_rpc.errors import ConfigError
from esper_rpc.identity import Authority, Identity, SpiffeId
from esper_rpc.identity.authority import utc_now
from esper_rpc.identity.deny_list import read_denied, write_denied
from esper_rpc.identity.enrolment import EnrolmentTokens, Invitation

from .console import AddressOption, Commands, HomeOption, JsonOption, home_of, print_json, print_rows, run
from .home import INSTANCE, Home

INTERMEDIATE_WARNING_DAYS = 7

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Certificates: who a process is.")


@app.command(epilog="Example: esper pki init --home ~/.esper")
def init(context: typer.Context, home: HomeOption = None) -> None:
    """Make a root and an intermediate authority."""
    place = home_of(context, home)
    authority = Authority.create(place.pki)
    typer.echo(f"{place.pki}: authority made; its intermediate ends {authority.not_after:%F}. Keep root.key offline.")


@app.command(epilog="Example: esper pki issue trainer gpu-3")
def issue(
    context: typer.Context,
    role: Annotated[str, typer.Argument(help="trainer, tamiyo, urza, operator, ...")],
    instance: Annotated[str, typer.Argument(help="Which one of that role.")] = INSTANCE,
    hours: Annotated[float, typer.Option(min=0.1, max=720, help="How long the certificate lives.")] = 24,
    home: HomeOption = None,
) -> None:
    """Issue a certificate and its key."""
    place = home_of(context, home)
    identity = place.issue_identity(SpiffeId(role, instance), lifetime=timedelta(hours=hours))
    typer.echo(f"{identity.spiffe_id} until {identity.not_after:%F %T} UTC in {identity.directory}")


@app.command(epilog="Example: esper pki token trainer gpu-3 --minutes 10")
def token(
    context: typer.Context,
    role: Annotated[str, typer.Argument(help="trainer, tamiyo, urza, operator, ...")],
    instance: Annotated[str, typer.Argument(help="Which one of that role.")],
    minutes: Annotated[float, typer.Option(min=0.1, max=1440, help="How long it can be redeemed.")] = 10,
    address: AddressOption = None,
    home: HomeOption = None,
) -> None:
    """Print a one-time token: who holds it gets one certificate of this name, and its keyring."""
    place = home_of(context, home)
    spiffe_id = SpiffeId(role, instance)
    keyring = keyring_for(RootKeys.load(place.root_keys), spiffe_id)
    secret = EnrolmentTokens(place.tokens_dir).create(
        spiffe_id, lifetime=timedelta(minutes=minutes), keyring_json=keyring.to_json().decode()
    )
    invitation = Invitation(
        secret=secret,
        address=place.address("enrolment", address),
        root_pem=Authority.load(place.pki).root_pem.decode(),
    )
    typer.echo(invitation.encode())


@app.command(epilog="Example: esper pki enroll < token.txt")
def enroll(
    context: typer.Context,
    source: Annotated[typer.FileText, typer.Argument(help="A file that holds the token, - for standard input.")] = "-",  # type: ignore[assignment]  # typer opens it.
    directory: Annotated[Path | None, typer.Option(help="Where the identity goes. Default: in the home.")] = None,
    address: AddressOption = None,
    home: HomeOption = None,
) -> None:
    """Redeem a token of `esper pki token`: the key is drawn here and never leaves this machine."""
    invitation = Invitation.decode(source.read().strip())
    if address:
        invitation = replace(invitation, address=address)
    place = home_of(context, home)
    identity = run(enroll_at(invitation, place, directory))
    typer.echo(f"{identity.spiffe_id} until {identity.not_after:%F %T} UTC in {identity.directory}")


async def enroll_at(invitation: Invitation, home: Home, directory: Path | None) -> Identity:
    """Enrol into a directory, by default the one where a home keeps members of that name."""
    from esper_client.enrolment import enroll as redeem

    if directory is not None:
        return await redeem(invitation, directory)
    scratch = home.directory / "identities" / ".enrolling"
    identity = await redeem(invitation, scratch)
    target = home.identity_dir(identity.spiffe_id.role, identity.spiffe_id.instance)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    return Identity.load(target)


@app.command(epilog="Example: esper pki deny trainer gpu-3 --reason 'laptop lost'")
def deny(
    context: typer.Context,
    role: Annotated[str, typer.Argument(help="The role of the member.")],
    instance: Annotated[str, typer.Argument(help="Which one of that role.")],
    reason: Annotated[str, typer.Option(help="Shown to the member and in the audit log.")] = "denied by an operator",
    home: HomeOption = None,
) -> None:
    """Refuse a member from now on, although its certificate is valid. Servers read the list within a second."""
    place = home_of(context, home)
    denied = {**read_denied(place.deny_list), str(SpiffeId(role, instance)): reason}
    write_denied(place.deny_list, denied)
    typer.echo(f"{len(denied)} denied in {place.deny_list}")


@app.command(epilog="Example: esper pki allow trainer gpu-3")
def allow(
    context: typer.Context,
    role: Annotated[str, typer.Argument(help="The role of the member.")],
    instance: Annotated[str, typer.Argument(help="Which one of that role.")],
    home: HomeOption = None,
) -> None:
    """Take a member off the deny list."""
    place = home_of(context, home)
    denied = read_denied(place.deny_list)
    if denied.pop(str(SpiffeId(role, instance)), None) is None:
        raise ConfigError(f"{SpiffeId(role, instance)} is not on {place.deny_list}.")
    write_denied(place.deny_list, denied)
    typer.echo(f"{len(denied)} denied in {place.deny_list}")


@app.command(epilog="Example: esper pki intermediate")
def intermediate(context: typer.Context, home: HomeOption = None) -> None:
    """Sign a new intermediate with the root key, which must lie here for it. A running mesh takes it up."""
    place = home_of(context, home)
    authority = Authority.renew_intermediate(place.pki)
    typer.echo(f"intermediate until {authority.not_after:%F}")


@app.command(epilog="Example: esper pki status --json")
def status(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show the authority and every certificate that was issued here."""
    place = home_of(context, home)
    authority = Authority.load(place.pki)
    rows = [_describe(place, directory.name) for directory in sorted((place.directory / "identities").glob("*-*"))]
    denied = read_denied(place.deny_list)
    days = (authority.not_after - utc_now()).total_seconds() / 86_400
    if as_json:
        print_json(
            {
                "intermediate_not_after": authority.not_after.isoformat(),
                "intermediate_days_left": round(days, 1),
                "identities": rows,
                "denied": denied,
            }
        )
        return
    warning = "" if days > INTERMEDIATE_WARNING_DAYS else "  renew it: esper pki intermediate"
    typer.echo(f"Intermediate until {authority.not_after:%F} ({days:.0f} days){warning}")
    print_rows("Identities", rows, as_json=False)
    if denied:
        print_rows("Denied", [{"identity": k, "reason": v} for k, v in denied.items()], as_json=False)


def _describe(home: Home, name: str) -> dict[str, Any]:
    directory = home.directory / "identities" / name
    try:
        identity = Identity.load(directory)
    except ConfigError as error:
        return {
            "identity": name, "valid": False, "not_after": "", "hours_left": 0.0, "renewal_due": "",
            "problem": error.message,
        }  # fmt: skip
    left = (identity.not_after - utc_now()).total_seconds() / 3600
    return {
        "identity": str(identity.spiffe_id),
        "valid": True,
        "not_after": identity.not_after.isoformat(),
        "hours_left": round(left, 1),
        "renewal_due": identity.renewal_due.isoformat(),
        "problem": "",
    }
