from __future__ import annotations

from typing import Any

import typer

from esper_client.client import TamiyoClient
from esper_rpc.proto.tamiyo.v1 import ListPauseGrantsRequest, PauseGrant

from .console import AddressOption, HomeOption, JsonOption, home_of, print_rows, run
from .home import Home
from .pages import LARGEST, pages


def pauses(
    context: typer.Context, address: AddressOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """List who asked Tamiyo for pauses and what was granted, oldest first."""
    grants = run(_list(home_of(context, home), address))
    print_rows("Pauses", [_row(grant) for grant in grants], as_json=as_json)


async def _list(home: Home, address: str | None) -> list[PauseGrant]:
    async with TamiyoClient(home.address("tamiyo", address), identity=home.identity()) as client:
        found = await pages(client.list_pause_grants, ListPauseGrantsRequest(page_size=LARGEST))
    return [grant for page in found for grant in page.grants]


def _row(grant: PauseGrant) -> dict[str, Any]:
    return {
        "at": grant.granted_at.ToJsonString(),
        "principal": grant.principal,
        "run": grant.run_id,
        "asked_ms": grant.requested_units,
        "granted_ms": grant.granted_units,
        "reason": grant.reason,
    }
