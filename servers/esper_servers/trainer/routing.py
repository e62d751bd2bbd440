from __future__ import annotations

from collections.abc import Mapping

from esper_rpc.breaker import CircuitBreaker
from esper_rpc.proto.leyline.v1 import CommandType
from esper_rpc.verdict import Verdict
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.inbox import Queued
from esper_servers.kasmina.learning_rate import LearningRateAuthority
from esper_servers.optim.controller import UnifiedLRController
from esper_servers.optim.telemetry import BREAKER as LEARNING_RATE
from esper_servers.tolaria.commands import move_breaker, raise_level
from esper_servers.tolaria.emergency.emergencies import Emergencies
from esper_servers.tolaria.epoch_guard import BREAKER as EPOCH
from esper_servers.tolaria.epoch_guard import EpochGuard

FEATURES = ("emergency", "circuit_breaker")


def breakers_of(
    host: InProcessSeedHost, guard: EpochGuard, learning_rate: LearningRateAuthority | None = None
) -> dict[str, CircuitBreaker]:
    """Return the breakers of a trainer by the names by which they are told."""
    breakers = {EPOCH: guard.breaker, **host.breakers}
    if isinstance(learning_rate, UnifiedLRController):
        breakers[LEARNING_RATE] = learning_rate.breaker
    return breakers


def route_commands(
    host: InProcessSeedHost, emergencies: Emergencies, breakers: Mapping[str, CircuitBreaker]
) -> tuple[str, ...]:
    """Have emergencies and moves of breakers that are commanded carried out at the safe point; returns the features."""

    def raise_it(queued: Queued) -> Verdict:
        return raise_level(queued.command, emergencies, issuer=queued.issuer)

    host.route(CommandType.COMMAND_TYPE_EMERGENCY, raise_it)
    route_moves(host, breakers)
    return FEATURES


def route_moves(host: InProcessSeedHost, breakers: Mapping[str, CircuitBreaker]) -> None:
    """Have moves of these breakers carried out at the safe point."""

    def move_it(queued: Queued) -> Verdict:
        return move_breaker(queued.command, breakers, issuer=queued.issuer)

    host.route(CommandType.COMMAND_TYPE_CIRCUIT_BREAKER, move_it)
