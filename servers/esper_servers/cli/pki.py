from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from esper_rpc.errors import ConfigError
from esper_rpc.identity import Authority, Identity, SpiffeId
from esper_rpc.identity.authority import utc_now

from .console import Commands, HomeOption, JsonOption, home_of, print_json, print_rows
from .home import INSTANCE, Home

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


@app.command(epilog="Example: esper pki status --json")
def status(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show the authority and every certificate that was issued here."""
    place = home_of(context, home)
    authority = Authority.load(place.pki)
    rows = [_describe(place, directory.name) for directory in sorted((place.directory / "identities").glob("*-*"))]
    if as_json:
        print_json({"intermediate_not_after": authority.not_after.isoformat(), "identities": rows})
        return
    typer.echo(f"Intermediate until {authority.not_after:%F}")
    print_rows("Identities", rows, as_json=False)


def _describe(home: Home, name: str) -> dict[str, Any]:
    directory = home.directory / "identities" / name
    try:
        identity = Identity.load(directory)
    except ConfigError as error:
        return {"identity": name, "valid": False, "not_after": "", "hours_left": 0.0, "problem": error.message}
    left = (identity.not_after - utc_now()).total_seconds() / 3600
    return {
        "identity": str(identity.spiffe_id),
        "valid": True,
        "not_after": identity.not_after.isoformat(),
        "hours_left": round(left, 1),
        "problem": "",
    }
