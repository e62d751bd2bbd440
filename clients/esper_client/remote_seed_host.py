from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn, TypeVar

import structlog

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.config import Range, validate
from esper_rpc.errors import DeadlineExceeded, EsperError, Unavailable, Unimplemented
from esper_rpc.identity import Identity
from esper_rpc.proto.kasmina.v1 import (
    ApplyCommandRequest,
    ExportSeedStatesRequest,
    FinalizeStepRequest,
    FinalizeStepResponse,
    GetStatusRequest,
    GetStatusResponse,
    UpdateEpochRequest,
)
from esper_rpc.proto.leyline.v1 import CommandOutcome, SeedState, SignedEnvelope, TelemetryPacket

from .client import KasminaClient
from .event_loop import LoopThread
from .seed_host import RunDescription

log = structlog.get_logger(__name__)

UNREACHABLE, MISSED, REFUSED = "host_unreachable", "host_deadline_missed", "host_refused"
BREAKER_OPEN, WRONG_AUDIENCE, CLOSED = "host_breaker_open", "host_wrong_audience", "host_closed"
CONTROLLER = "tamiyo"
MAX_AWAITED = 256

Response = TypeVar("Response")
Call = Callable[[KasminaClient, float], Coroutine[Any, Any, Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteHostConfig:
    """How long a seed host in another process is waited for."""

    call_timeout_ms: Annotated[float, Range(2, 10_000)] = 50.0
    """Of one call in a step. A step makes one, one more when there is a command, and one more after a failed step."""
    describe_timeout_ms: Annotated[float, Range(2, 10_000)] = 2000.0
    """When the run is opened, which no step waits for."""
    breaker: BreakerConfig = field(
        default_factory=lambda: BreakerConfig(failures=5, cool_down_seconds=0.5, successes=1)
    )

    def __post_init__(self) -> None:
        validate(self)


class RemoteSeedHost:
    """The seed host of a model in another process, reached through its KasminaService.

    Nothing it does for a step raises or waits longer than `call_timeout_ms`: a host that does not answer gives a failed
    outcome or an empty result, is logged once per cause and counted in `reasons`; after a few failures a breaker spares
    the steps the wait. A step ends at `finalize_step`, in one call: only then is what was queued carried out. The
    outcome comes with the next `apply_pending`, and the seed states are those of the end of the last step.

    Both processes hold the identity of one trainer. Tamiyo addresses a command to the SPIFFE id that asked, and the
    host verifies it for its own: under another identity every command is refused as wrong_audience, and the calls that
    end a step are denied. Whoever holds that identity is trusted with the model; the host cannot tell two sessions that
    hold it apart, so run one.
    """

    def __init__(self, address: str, *, identity: Identity, config: RemoteHostConfig | None = None) -> None:
        self.config = config or RemoteHostConfig()
        self.reasons: Counter[str] = Counter()
        """Calls without an answer, by reason."""
        self._address = address
        self._identity = identity
        # Not the session's: `describe` waits, and is called there.
        self._thread = LoopThread("esper-kasmina")
        self._client: KasminaClient | None = None
        self._breaker = CircuitBreaker(config=self.config.breaker)
        self._closed = False
        self._epoch, self._last_sequence = b"", 0
        self._description = RunDescription((), (), b"{}")
        self._offset_ns: int | None = None
        self._loss: float | None = None
        self._moves_alphas = False
        self._seeds: list[SeedState] | None = None
        self._awaited: dict[str, None] = {}
        """Commands that the host has, or may have, in order."""
        self._settled: list[CommandOutcome] = []

    @property
    def receiver_epoch(self) -> bytes:
        """The challenge of the host as last heard, empty until it has been reached."""
        return self._epoch

    @property
    def last_sequence(self) -> int:
        """The last sequence that the host had accepted from Tamiyo when it was described."""
        return self._last_sequence

    def describe(self) -> RunDescription:
        """Describe the model as it is, or as it was when the host last answered."""
        request = GetStatusRequest(include_model=True)
        status = self._ask(lambda kasmina, t: kasmina.get_status(request, timeout=t), self.config.describe_timeout_ms)
        if not isinstance(status, str):
            self._learn(status)
        return self._description

    def submit(
        self,
        envelope: SignedEnvelope,
        *,
        expected_sequence: int | None = None,
        request_digest: bytes | None = None,
    ) -> CommandOutcome:
        """Have a command verified and queued there.

        When no answer comes the outcome is RESULT_FAILED. The command may have arrived all the same; it is carried out
        once, and its outcome follows.
        """
        request = ApplyCommandRequest(command=envelope, request_digest=request_digest or b"")
        if expected_sequence is not None:
            request.expected_sequence = expected_sequence
        if self._offset_ns is not None:
            request.issuer_time_ns = time.monotonic_ns() + self._offset_ns
        response = self._ask(lambda kasmina, t: kasmina.apply_command(request, timeout=t))
        outcome = response.outcome if not isinstance(response, str) else _lost(envelope, response)
        if outcome.result == CommandOutcome.RESULT_QUEUED or outcome.reason in (MISSED, UNREACHABLE):
            self._await(envelope.nonce)
        return outcome

    def observe(self, loss: float, global_step: int) -> None:
        """Note the loss, which goes out with the end of the step."""
        self._loss = loss

    def apply_pending(self) -> list[CommandOutcome]:
        """Return the outcomes that have become known since the last call."""
        settled, self._settled = self._settled, []
        return settled

    def advance_alphas(self) -> None:
        """Let the end of the step move every blending seed one step on."""
        self._moves_alphas = True

    def finalize_step(self, step_index: int) -> list[TelemetryPacket]:
        """End the step there: commands, alphas, optimizers."""
        awaited = list(self._awaited)
        request = FinalizeStepRequest(
            step_index=step_index, loss=self._loss, advance_alphas=self._moves_alphas, awaited_commands=awaited
        )
        self._loss, self._moves_alphas = None, False
        # Whatever happened there if no answer comes, what we knew is old.
        self._seeds = None
        response = self._ask(lambda kasmina, t: kasmina.finalize_step(request, timeout=t))
        return self._finalized(response, awaited) if not isinstance(response, str) else []

    def export_seed_states(self) -> list[SeedState]:
        """Return the state of every seed at the end of the last step, none while the host cannot be reached."""
        if self._seeds is None:
            request = ExportSeedStatesRequest()
            response = self._ask(lambda kasmina, t: kasmina.export_seed_states(request, timeout=t))
            self._seeds = list(response.seeds) if not isinstance(response, str) else None
        return list(self._seeds or ())

    def update_epoch(self, epoch: int) -> None:
        """Tell the host that an epoch begins."""
        request = UpdateEpochRequest(epoch=epoch)
        self._seeds = None
        self._ask(lambda kasmina, t: kasmina.update_epoch(request, timeout=t))

    def set_clock_offset(self, offset_ns: int) -> None:
        """Set the issuer's wall clock minus the local monotonic clock; the host is told the issuer's time."""
        self._offset_ns = offset_ns

    def state_dict(self) -> dict[str, Any]:
        """Raise Unimplemented: the weights are in the other process."""
        _refuse("state_dict")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise Unimplemented: the weights are in the other process."""
        _refuse("load_state_dict")

    def export(self) -> Any:
        """Raise Unimplemented: the weights are in the other process."""
        _refuse("export")

    def close(self) -> None:
        """Leave the host to itself. The model stays as it is."""
        if self._closed or self._thread.fork.is_child:
            return
        self._closed = True
        with contextlib.suppress(TimeoutError):
            self._thread.run(self._disconnect(), timeout=self.config.describe_timeout_ms / 1000)
        self._thread.stop()

    def _learn(self, status: GetStatusResponse) -> None:
        if status.audience != str(self._identity.spiffe_id):
            self._count(WRONG_AUDIENCE, f"it verifies for {status.audience}, we are {self._identity.spiffe_id}")
        fences = {fence.issuer: fence.sequence for fence in status.fences}
        self._last_sequence = fences.get(CONTROLLER, 0)
        self._epoch = status.receiver_epoch
        self._description = RunDescription(tuple(status.sites), tuple(status.run_seeds), status.host_topology)

    def _await(self, command_id: str) -> None:
        if len(self._awaited) >= MAX_AWAITED:
            del self._awaited[next(iter(self._awaited))]
        self._awaited[command_id] = None

    def _finalized(self, response: FinalizeStepResponse, awaited: Iterable[str]) -> list[TelemetryPacket]:
        self._seeds = list(response.seeds)
        self._epoch = response.receiver_epoch
        self._settle(response.outcomes, awaited)
        return list(response.packets)

    def _settle(self, outcomes: Iterable[CommandOutcome], awaited: Iterable[str]) -> None:
        known = list(outcomes)
        queued = {each.command_id for each in known if each.result == CommandOutcome.RESULT_QUEUED}
        self._settled += [each for each in known if each.command_id not in queued]
        # Those that the host does not know it will never settle.
        for command_id in set(awaited) - queued:
            self._awaited.pop(command_id, None)

    def _ask(self, call: Call[Response], timeout_ms: float | None = None) -> Response | str:
        """Make a call and wait for it; returns the reason, which is counted, when there is no answer."""
        if self._closed or self._thread.fork.is_child:
            return CLOSED
        if not self._breaker.allow():
            self.reasons[BREAKER_OPEN] += 1
            return BREAKER_OPEN
        timeout = (timeout_ms or self.config.call_timeout_ms) / 1000
        try:
            response = self._thread.run(self._call(call, timeout), timeout=timeout)
        except Exception as error:  # noqa: BLE001  # The edge to the mesh: nothing may pass into the loop.
            return self._failed(error)
        self._breaker.record_success()
        return response

    async def _call(self, call: Call[Response], timeout: float) -> Response:
        if self._client is None:
            self._client = KasminaClient(self._address, identity=self._identity)
        return await call(self._client, timeout)

    async def _disconnect(self) -> None:
        if self._client is not None:
            await self._client.close()

    def _failed(self, error: Exception) -> str:
        reason = _reason_of(error)
        if reason == REFUSED:
            self._breaker.record_success()
        else:
            self._breaker.record_failure()
        self._count(reason, str(error))
        return reason

    def _count(self, reason: str, detail: str) -> None:
        self.reasons[reason] += 1
        if self.reasons[reason] == 1:
            log.warning("seed_host_call_failed", reason=reason, address=self._address, detail=detail[:200])


def _reason_of(error: Exception) -> str:
    if isinstance(error, (TimeoutError, DeadlineExceeded)):
        return MISSED
    return REFUSED if isinstance(error, EsperError) and not isinstance(error, Unavailable) else UNREACHABLE


def _lost(envelope: SignedEnvelope, reason: str) -> CommandOutcome:
    return CommandOutcome(command_id=envelope.nonce, result=CommandOutcome.RESULT_FAILED, reason=reason)


def _refuse(method: str) -> NoReturn:
    raise Unimplemented(
        f"The model is in another process: call {method} there, on the seed host that serves KasminaService."
    )
