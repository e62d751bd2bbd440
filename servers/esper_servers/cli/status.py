from __future__ import annotations

import asyncio
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2

from esper_client.client import MeshClient, TamiyoClient, UrzaClient
from esper_rpc.errors import EsperError
from esper_rpc.proto.tamiyo.v1 import GetPolicyRequest, GetStatusRequest

from .console import EXIT_UNREACHABLE, HomeOption, JsonOption, exit_code, explain, home_of, print_json, print_rows, run
from .home import Home

_CLIENTS: dict[str, type[MeshClient]] = {"tamiyo": TamiyoClient, "urza": UrzaClient}


def status(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show whether each service serves, and what Tamiyo is doing."""
    place = home_of(context, home)
    document = run(collect(place))
    if as_json:
        print_json(document)
    else:
        _print(document)
    if any(not row["reachable"] for row in document["services"]):
        raise typer.Exit(EXIT_UNREACHABLE)


async def collect(home: Home) -> dict[str, Any]:
    """Ask every service how it is, and Tamiyo what it does."""
    addresses = {name: home.address(name) for name in _CLIENTS}
    services = await asyncio.gather(*(_check(home, name, address) for name, address in addresses.items()))
    document: dict[str, Any] = {"services": services}
    if services[0]["reachable"]:
        document |= await _ask_tamiyo(home, addresses["tamiyo"])
    return document


async def _check(home: Home, name: str, address: str) -> dict[str, Any]:
    row = {"service": name, "address": address, "reachable": False, "health": "", "problem": ""}
    async with HealthClient(address, identity=home.identity(), role=name) as client:
        try:
            return row | {"reachable": True, "health": await client.check(_CLIENTS[name].service)}
        except EsperError as error:
            return row | {"reachable": exit_code(error) != EXIT_UNREACHABLE, "problem": explain(error)}


async def _ask_tamiyo(home: Home, address: str) -> dict[str, Any]:
    async with TamiyoClient(address, identity=home.identity()) as client:
        state = await client.get_status(GetStatusRequest())
        policy = await client.get_policy(GetPolicyRequest())
    return {
        "tamiyo": MessageToDict(state, preserving_proto_field_name=True),
        "policy": MessageToDict(policy, preserving_proto_field_name=True),
    }


class HealthClient(MeshClient):
    """Asks any service of the mesh how it does."""

    def __init__(self, address: str, *, identity: Any, role: str) -> None:
        self.role = role
        super().__init__(address, identity=identity)
        self.service = "grpc.health.v1.Health"

    async def check(self, service: str) -> str:
        """Return the name of the state, for example SERVING."""
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await self._unary("Check", request, health_pb2.HealthCheckResponse, 2.0)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _print(document: dict[str, Any]) -> None:
    print_rows("Services", document["services"], as_json=False)
    tamiyo = document.get("tamiyo")
    if not tamiyo:
        return
    policy = document["policy"]
    typer.echo(f"Policy {policy['policy_version']} ({policy['plan']} plan), {policy.get('origin', '')}")
    if tamiyo.get("plan_problem"):
        typer.echo(f"A plan that is wanted does not serve: {tamiyo['plan_problem']}")
    if tamiyo.get("conservative_mode"):
        typer.echo(f"Conservative mode: {tamiyo['conservative_reason']}")
    runs = [{"run": r["run_id"], "step": r.get("global_step", 0), "owner": r["owner"]} for r in tamiyo.get("runs", [])]
    print_rows("Runs", runs, as_json=False)
