from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from esper_client.halt import HaltSwitch
from esper_rpc.envelope import Keyring, Rejected, reasons
from esper_rpc.envelope.emergency import ANNOUNCED, SCHEMA_VERSION, SignalVerifier, Verified, seal
from esper_rpc.proto.leyline.v1 import EmergencySignal, SignedEnvelope, TelemetryLevel
from esper_rpc.telemetry.metrics import EMERGENCIES
from esper_servers.tolaria.conservative_mode import ConservativeMode
from esper_servers.tolaria.telemetry import SOURCE, show, tell

from .escalation import EmergencyConfig
from .levels import HALT, NONE, RESPONSES, Level, name_of
from .shared_signal import SharedRecord, SharedSignal

LOWERS = "lowers"
"""The attribute, `true`, of a signal that sets the level instead of raising it."""
CAUSE = "emergency"
OPERATOR = "operator"
_TRUSTED = ("trainer", OPERATOR)
DEGRADED = "tolaria.emergency.shared_signal_degraded"
SWITCHED_OFF = "[emergency] share is off"

Announcement = tuple[EmergencySignal, SignedEnvelope]
Listener = Callable[[Announcement | None], None]
"""Gets None when the run is over."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a signal that came. Without a reason it was accepted."""

    reason: str = ""
    duplicate: bool = False


class Emergencies:
    """The emergency in force in one run, and all who are told of it. Safe to call from any thread.

    A level is raised by anybody who may, and only lowered on purpose. The training thread is stopped first, then the
    other processes on the host are told, then those who watch.
    """

    def __init__(
        self,
        *,
        run_id: str,
        keyring: Keyring,
        audience: str,
        halt: HaltSwitch,
        mode: ConservativeMode,
        config: EmergencyConfig | None = None,
        shared: SharedSignal | None = None,
        problem: str = "",
        now_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
        step_of: Callable[[], int] = lambda: 0,
    ) -> None:
        """`shared` is None, with the `problem`, where there is no shared memory: only this process is told then."""
        self.config = config or EmergencyConfig()
        self.halt = halt
        self.verifier = SignalVerifier(keyring=keyring, audience=audience, run_id=run_id, now_ns=now_ns, clock=clock)
        self._run_id = run_id
        self._keyring = keyring
        self._mode = mode
        self._now_ns = now_ns
        self._clock = clock
        self._step_of = step_of
        self._shared = shared
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._issued_at_ns = 0
        self.in_force: Announcement | None = None
        self.shared_problem = problem
        show({DEGRADED: float(self.is_degraded)})
        halt.check_with(self.poll)

    @property
    def level(self) -> Level:
        """The level in force; while a signal is acted on, the one that comes of it."""
        with self._lock:
            return self.in_force[0].level if self.in_force is not None else NONE

    @property
    def is_degraded(self) -> bool:
        """Whether other processes on the host ought to be told, and are not."""
        return self.shared_problem not in ("", SWITCHED_OFF)

    def begin(self) -> None:
        """Have what an earlier process of this run left in the shared memory forgotten; for the owner of the run."""
        self._write(NONE, "the run begins")

    def alarm(
        self, level: Level, reason: str, *, origin: str = SOURCE, attributes: Mapping[str, str] | None = None
    ) -> None:
        """Raise the level from within this process; a lower one than that in force changes nothing and is told."""
        self._act(self._signal(level, reason, origin, attributes or {}), self._now_ns())

    def lower(self, level: Level, reason: str, *, origin: str = SOURCE) -> None:
        """Set the level from within this process, for example to NOTICE when all is well again."""
        self._act(self._signal(level, reason, origin, {LOWERS: "true"}), self._now_ns())

    def receive(self, envelope: SignedEnvelope, *, peer: str) -> Receipt:
        """Act on a signal that somebody sent; one that is refused changes nothing."""
        try:
            verified = self.verifier.verify(envelope)
            if not verified.duplicate:
                self._admit(verified, peer)
                self._act(verified.signal, verified.issued_at_ns, issuer=verified.issuer)
        except Rejected as refusal:
            return Receipt(reason=refusal.reason)
        return Receipt(duplicate=verified.duplicate)

    def obeys(self, level: Level, issuer: str) -> bool:
        """Whether somebody may have this level: a HALT of the mesh only where that is allowed."""
        return level != HALT or issuer in _TRUSTED or self.config.allow_remote_halt

    def poll(self) -> None:
        """Take over what another process on the host has put in force. Cheap; it never raises."""
        with self._lock:
            if self._shared is None:
                return
            try:
                found = self._shared.poll()
            except OSError as error:
                self._degrade(str(error))
                return
            if found is not None:
                self._follow(found)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a function with each announcement, from whatever thread it happens in; returns how to stop."""
        self._listeners.append(listener)

        def stop() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def close(self) -> None:
        """End those who listen: the run is over."""
        for listener in tuple(self._listeners):
            listener(None)
        self._listeners.clear()
        with self._lock:
            # Who has it open would stand still for ever.
            if self.level == HALT:
                self._write(NONE, "the run is over")
            if self._shared is not None:
                self._shared.remove()
                self._shared = None

    def _admit(self, verified: Verified, peer: str) -> None:
        """Raise Rejected for what is signed well, and not obeyed."""
        if verified.issuer == "trainer" and peer != self.verifier.audience:
            self._refuse(reasons.WRONG_ISSUER, "another trainer sent it")
        is_about_halting = HALT in (verified.signal.level, self.level)
        if is_about_halting and not self.obeys(HALT, verified.issuer):
            self._refuse(reasons.LOCAL_LIMIT, "allow_remote_halt is off")
        if _lowers(verified.signal) and verified.issued_at_ns < self._issued_at_ns:
            self._refuse(reasons.STALE_COMMAND, "it is older than the signal in force")

    def _refuse(self, reason: str, detail: str) -> None:
        self.verifier.count(reason)
        raise Rejected(reason, detail)

    def _act(self, signal: EmergencySignal, issued_at_ns: int, issuer: str = "trainer") -> None:
        with self._lock:
            self.poll()
            before = self.level
            if signal.level > before or _lowers(signal):
                self._issued_at_ns = max(self._issued_at_ns, issued_at_ns)
                self._take_effect(signal.level, signal.reason)
                self._write(signal.level, signal.reason)
                self._announce(signal, in_force=True)
            else:
                self._announce(signal, in_force=False)
        self._tell(signal, before, issuer)

    def _follow(self, record: SharedRecord) -> None:
        before = self.level
        signal = self._signal(record.level, record.reason, "shared_memory", {})
        signal.monotonic_time_ms = record.raised_at_ns // 1_000_000
        self._issued_at_ns = self._now_ns()
        self._take_effect(record.level, record.reason)
        if self._shared is not None:
            self._shared.acknowledge(SOURCE)
        if record.level == NONE:
            self.in_force = None
            return
        self._announce(signal, in_force=True)
        self._tell(signal, before, "trainer")

    def _take_effect(self, level: Level, reason: str) -> None:
        response = RESPONSES.get(level)
        if response is not None and response.halts:
            self.halt.engage(reason)
        else:
            self.halt.release(reason)
        if response is not None and response.is_conservative:
            self._mode.enter(CAUSE)
        else:
            self._mode.leave(CAUSE)

    def _write(self, level: Level, reason: str) -> None:
        with self._lock:
            if self._shared is None:
                return
            try:
                self._shared.write(level, reason)
            except OSError as error:
                self._degrade(str(error))

    def _degrade(self, problem: str) -> None:
        """Go on without shared memory: this process is told, others are not."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        self.shared_problem = problem
        show({DEGRADED: 1.0})
        tell("shared_signal_degraded", TelemetryLevel.TELEMETRY_LEVEL_ERROR, reason=problem, step_index=self._step_of())

    def _announce(self, signal: EmergencySignal, *, in_force: bool) -> None:
        announced = EmergencySignal()
        announced.CopyFrom(signal)
        announced.run_id = self._run_id
        envelope = seal(
            announced, keyring=self._keyring, audience=ANNOUNCED, run_id=self._run_id, issued_at_ns=self._now_ns()
        )
        if in_force:
            self.in_force = (announced, envelope)
        for listener in tuple(self._listeners):
            listener((announced, envelope))

    def _tell(self, signal: EmergencySignal, before: Level, issuer: str) -> None:
        EMERGENCIES.labels(name_of(signal.level)).inc()
        show({"tolaria.emergency.level": float(self.level)})
        tell(
            "emergency_signal", RESPONSES[signal.level].event, reason=signal.reason, step_index=self._step_of(),
            emergency=name_of(signal.level), before=name_of(before), in_force=name_of(self.level),
            origin=signal.origin, issuer=issuer, run_id=self._run_id,
        )  # fmt: skip

    def _signal(self, level: Level, reason: str, origin: str, attributes: Mapping[str, str]) -> EmergencySignal:
        signal = EmergencySignal(
            version=SCHEMA_VERSION,
            level=level,
            reason=reason,
            origin=origin,
            monotonic_time_ms=int(self._clock() * 1000),
            run_id=self._run_id,
            attributes=attributes,
        )
        signal.triggered_at.FromNanoseconds(self._now_ns())
        return signal


def _lowers(signal: EmergencySignal) -> bool:
    return signal.attributes.get(LOWERS) == "true"
