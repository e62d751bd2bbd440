from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from esper_rpc.envelope import Keyring
from esper_rpc.errors import ConfigError, EsperError, InvalidRequest, Unavailable
from esper_rpc.identity import Authority, Identity, SpiffeId
from esper_rpc.identity.enrolment import EnrolmentTokens
from esper_servers.contract.case import CASES, Case, NotApplicable, load_cases
from esper_servers.contract.field_rules import RuleCase, sample
from esper_servers.contract.methods import CLIENTS, SERVICES
from esper_servers.contract.refusals import run_rule_case
from esper_servers.contract.remote import RemoteTransport
from esper_servers.contract.runner import Result, Runner
from esper_servers.contract.templates import Surroundings

from .console import EXIT_FAILURE, HomeOption, JsonOption, home_of, print_json, print_rows, run
from .home import Home

CONNECT_SECONDS = 5.0
LEAF_LIFETIME = timedelta(hours=1)
TOKEN_LIFETIME = timedelta(minutes=5)
_MARKS = {"passed": "✓", "failed": "✗", "skipped": "-"}


def contract_test(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="host:port of the server.")],
    home: HomeOption = None,
    cases: Annotated[Path, typer.Option(help="A directory of case files.", show_default="the contract's own")] = CASES,
    only: Annotated[str, typer.Option(help="Run cases whose name or RPC matches, for example 'ApplyCommand'.")] = "*",
    service: Annotated[
        str, typer.Option(help="Which service, where the port has several: KasminaService or TolariaService.")
    ] = "",
    enrolment: Annotated[str | None, typer.Option(help="host:port where newcomers enrol, for Enroll.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Hold a server to the contract: every case of the service that its certificate names.

    It opens runs, saves blueprints and queues commands there: point it at a server for tests. The certificates of the
    callers come from the home, or are issued for an hour if its authority is at hand.
    """
    place = home_of(context, home)
    found = _service_at(address, place.identity(), service)
    chosen = _choose(found, cases, only)
    if not chosen:
        raise ConfigError(f"No case of {found} matches {only!r}.")
    strangers = {found: enrolment or place.read_mesh().get("enrolment", "")}
    results = run(_run_all({found: address}, strangers, place, chosen, report=None if as_json else _print_result))
    _print_summary(found, results, as_json=as_json)
    if any(result.verdict == "failed" for result in results):
        raise typer.Exit(EXIT_FAILURE)


def _service_at(address: str, identity: Identity, wanted: str) -> str:
    role = _role_at(address, identity)
    offered = [service for service, client in CLIENTS.items() if client.role == role]
    if not offered:
        raise ConfigError(f"{address} has the certificate of {role!r}, which serves nothing in this contract.")
    for service in offered:
        if service.endswith(wanted):
            return service
    raise ConfigError(f"{role!r} does not serve {wanted!r}; choose from {', '.join(offered)}.")


def _role_at(address: str, identity: Identity) -> str:
    """Read the role from the certificate of a server."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{address!r} is not an address; write host:port.")
    tls = ssl.create_default_context(cadata=identity.root_pem.decode())
    tls.check_hostname = False  # Its name is what is asked for.
    tls.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, int(port)), CONNECT_SECONDS) as plain, tls.wrap_socket(plain) as secured:
            names: Any = (secured.getpeercert() or {}).get("subjectAltName", ())
    except OSError as error:
        raise Unavailable(f"{address} does not answer under a certificate of this mesh: {error}.") from error
    try:
        return next(SpiffeId.parse(value).role for kind, value in names if kind == "URI")
    except (InvalidRequest, StopIteration):
        raise ConfigError(f"The certificate of {address} names no member of a mesh.") from None


def _choose(service: str, directory: Path, only: str) -> list[Case | RuleCase]:
    found: list[Case | RuleCase] = [case for case in load_cases(directory) if case.service == service]
    if directory == CASES:
        found += (case for method in SERVICES[service].methods for case in sample(method))
    return [case for case in found if _matches(case, only)]


def _matches(case: Case | RuleCase, pattern: str) -> bool:
    method = case.call.method if isinstance(case, Case) else case.method
    return fnmatch(case.name, pattern) or fnmatch(method.name, pattern)


async def _run_all(
    addresses: dict[str, str],
    strangers: dict[str, str],
    home: Home,
    cases: Sequence[Case | RuleCase],
    *,
    report: Callable[[Result], None] | None,
) -> list[Result]:
    callers = _Callers(home)
    known = {service: address for service, address in strangers.items() if address}
    results = []
    async with RemoteTransport(addresses, callers.identity, strangers=known) as transport:
        runner = Runner(transport, callers.surroundings())
        for case in cases:
            result = await (runner.run(case) if isinstance(case, Case) else run_rule_case(transport, case))
            results.append(result)
            if report is not None:
                report(result)
    return results


class _Callers:
    """Certificates, keys and tokens of those who call, from a home."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._issued: dict[SpiffeId, Identity] = {}

    def surroundings(self) -> Surroundings:
        return Surroundings(identity=self.identity, keyring=self._keyring, token=self._token)

    def identity(self, member: SpiffeId) -> Identity:
        if member not in self._issued:
            self._issued[member] = self._find(member)
        return self._issued[member]

    def _find(self, member: SpiffeId) -> Identity:
        if self._home.identity_dir(member.role, member.instance).exists():
            return self._home.identity(member.role, member.instance)
        try:
            return Identity.of(Authority.load(self._home.pki).issue(member, lifetime=LEAF_LIFETIME))
        except ConfigError:
            raise NotApplicable(f"there is no certificate of {member} in {self._home.directory}") from None

    def _keyring(self, role: str) -> Keyring:
        try:
            return self._home.keyring(role)
        except ConfigError:
            raise NotApplicable(f"there is no keyring of {role} in {self._home.directory}") from None

    def _token(self, member: SpiffeId) -> str:
        keyring = Keyring(role=member.role, active_key_id="contract", issuer_keys={}, received={})
        try:
            return EnrolmentTokens(self._home.tokens_dir).create(
                member, lifetime=TOKEN_LIFETIME, keyring_json=keyring.to_json().decode()
            )
        except (EsperError, OSError):
            raise NotApplicable(f"no enrolment token can be made in {self._home.directory}") from None


def _print_result(result: Result) -> None:
    tail = f" ({result.skipped})" if result.skipped else ""
    typer.echo(f"{_MARKS[result.verdict]} {result.rpc}: {result.name}{tail}")
    for problem in result.problems:
        typer.echo(f"    {problem}")


def _print_summary(service: str, results: Sequence[Result], *, as_json: bool) -> None:
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in _MARKS}
    if not as_json:
        print_rows("", [{"service": service, **counts}], as_json=False)
        return
    rows = [
        {"rpc": r.rpc, "case": r.name, "verdict": r.verdict, "problems": r.problems, "skipped": r.skipped}
        for r in results
    ]
    print_json({"service": service, **counts, "results": rows})
