from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from esper_rpc import rules
from esper_rpc.breaker import CircuitBreaker
from esper_rpc.envelope import Keyring, Rejected
from esper_rpc.errors import (
    DataLoss,
    EsperError,
    FailedPrecondition,
    InvalidRequest,
    ResourceExhausted,
    Unavailable,
)
from esper_rpc.proto.leyline.v1 import PolicyUpdate, TelemetryLevel
from esper_rpc.proto.tamiyo.v1 import IngestPolicyUpdateRequest, IngestPolicyUpdateResponse
from esper_rpc.telemetry.events import Detail, tell_event
from esper_rpc.telemetry.metrics import observe_policy_update
from esper_servers.policy.checkpoint import CheckpointRejected
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.aside import Aside

from .shadow import Shadow
from .store import Entry, Lineage, PolicyStore
from .validation import Validated, validate
from .verification import number_of, open_update

Result = TypeVar("Result")
INFO, WARNING, ERROR = (
    TelemetryLevel.TELEMETRY_LEVEL_INFO, TelemetryLevel.TELEMETRY_LEVEL_WARNING, TelemetryLevel.TELEMETRY_LEVEL_ERROR,
)  # fmt: skip
VALIDATION_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """By what an update is judged."""

    keyring: Keyring
    clock_ns: Callable[[], int]
    journal: Path
    registries: Callable[[], Mapping[str, str]]
    prior: PriorConfig


class PolicyUpdates:
    """Takes policies in, one after the other, and goes back to those before.

    A policy is verified, written down, validated aside, and only then loaded and taken up between two steps. Whatever
    fails on the way leaves the live policy as it is: the lineage on the disk names the new one in one rename.
    """

    def __init__(
        self,
        *,
        store: PolicyStore,
        admission: Admission,
        aside: Aside,
        shadow: Shadow,
        load: Callable[[Path | None], Policy],
        take_up: Callable[[Policy], None],
        breaker: CircuitBreaker,
    ) -> None:
        """Wire it.

        `load` makes a policy fit to serve, on a thread, and without a path the shipped one; `take_up` serves it from
        the next step on, on the loop.
        """
        self._store = store
        self._admission = admission
        self._aside = aside
        self.shadow = shadow
        self._load = load
        self._take_up = take_up
        self._lineage = store.start
        self.live_since_ns = admission.clock_ns()
        self._one_at_a_time = asyncio.Lock()
        self._working: set[asyncio.Task[Any]] = set()
        self._retreat: asyncio.Task[None] | None = None
        self.breaker = breaker

    @property
    def live_file(self) -> Path | None:
        """Where the live policy lies; None for the shipped one."""
        return self._store.path_of(self._lineage.live) if self._lineage.live.file else None

    @property
    def previous(self) -> list[str]:
        """The versions that a rollback leads back to, the nearest last."""
        return [entry.version for entry in self._lineage.entries[:-1]]

    def resume(self) -> None:
        """Take up the policy that was live last, before anything is served; one that cannot be used is left out."""
        self._lineage = self._store.read()
        self._store.sweep(self._lineage.entries)  # Of an update during which the process died.
        while self._lineage.live.file:
            try:
                self._take_up(self._load_entry(self._lineage.live))
            except (CheckpointRejected, OSError) as error:
                version = self._lineage.live.version
                _tell("policy_lost", ERROR, reason=str(error)[:200], version=version)
                self._lineage = self._lineage.shortened()
            else:
                return

    async def ingest(self, raw: bytes) -> IngestPolicyUpdateResponse:
        """Take in a serialised IngestPolicyUpdateRequest, or say why not.

        Raises EsperError when it could not be judged; then it may be sent again.
        """
        return await self._see_through(self._ingest_guarded(raw))

    async def roll_back(self, why: str, *, validate_only: bool = False) -> str:
        """Return to the policy before the live one, or only see that this would work, and say which it is.

        Raises FailedPrecondition when there is none, DataLoss when its file cannot be used.
        """
        return await self._see_through(self._roll_back(why, validate_only))

    def distrust(self) -> None:
        """Return to the policy before when an update does not work in service; call it on the loop."""
        if self._lineage.live.file and (self._retreat is None or self._retreat.done()):
            self._retreat = asyncio.create_task(self._give_way())

    async def _give_way(self) -> None:
        try:
            await self.roll_back("inference_failed")
        except (EsperError, OSError) as error:
            _tell("policy_rollback_failed", ERROR, reason=str(error)[:200])

    async def _see_through(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Finish a change whatever becomes of its caller: half of it, and the disk would know more than the loop."""
        task = asyncio.create_task(self._alone(work))
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return await asyncio.shield(task)

    async def _alone(self, work: Coroutine[Any, Any, Result]) -> Result:
        async with self._one_at_a_time:
            return await work

    async def _ingest_guarded(self, raw: bytes) -> IngestPolicyUpdateResponse:
        if not self.breaker.allow():
            raise Unavailable("Policy updates failed too often; try again in half a minute.", reason="BREAKER_OPEN")
        try:
            response = await self._ingest(raw)
        except InvalidRequest:
            self.breaker.record_success()  # The caller's fault, not ours.
            raise
        except OSError as error:
            self._note_failure(error)
            raise _storage(error) from error
        except Exception as error:
            self._note_failure(error)
            raise
        self.breaker.record_success()
        return response

    async def _roll_back(self, why: str, validate_only: bool) -> str:
        lineage = self._lineage.shortened()
        if lineage == self._lineage:
            raise FailedPrecondition("No policy was live before this one.", reason="NO_POLICY_BEFORE")
        policy = await asyncio.to_thread(self._load_before, lineage.live)
        if validate_only:
            return lineage.live.version
        left = self._lineage.live.version
        await self._make_live(lineage, policy)
        observe_policy_update("rolled_back", "")
        _tell("policy_rolled_back", ERROR, reason=why, version=lineage.live.version, left=left)
        return lineage.live.version

    async def _ingest(self, raw: bytes) -> IngestPolicyUpdateResponse:
        request = await asyncio.to_thread(_parse, raw)
        version = ""
        try:
            update = await asyncio.to_thread(self._open, request)
            version = update.tamiyo_policy_version
            await self._admit(update, is_shadow=request.shadow)
        except (Rejected, CheckpointRejected) as rejected:
            _tell("policy_update_rejected", WARNING, reason=rejected.reason, version=version, detail=str(rejected))
            observe_policy_update("rejected", rejected.reason)
            return self._response(reason=str(rejected))
        return self._response(applied=not request.shadow, shadowed=request.shadow)

    def _response(self, **fields: Any) -> IngestPolicyUpdateResponse:
        return IngestPolicyUpdateResponse(policy_version=self._lineage.live.version, **fields)

    def _open(self, request: IngestPolicyUpdateRequest) -> PolicyUpdate:
        admission = self._admission
        return open_update(
            request.update, keyring=admission.keyring, now_ns=admission.clock_ns(), highest=self._lineage.highest
        )

    async def _admit(self, update: PolicyUpdate, *, is_shadow: bool) -> None:
        entry = await asyncio.to_thread(self._store.keep, update.tamiyo_policy_version, update.payload)
        try:
            found = await self._validate(entry)
            if is_shadow:
                self.shadow.start(entry, self._store.path_of(entry))
            else:
                policy = await asyncio.to_thread(self._load_entry, entry)
                await self._make_live(self._lineage.grown(entry, number_of(entry.version)), policy)
        finally:
            await asyncio.to_thread(self._store.sweep, self._used())
        result = "shadow" if is_shadow else "applied"
        observe_policy_update(result, "")
        _tell(
            "policy_update_applied", INFO, reason=result, version=entry.version, parent=found.manifest.parent,
            compared=found.compared, disagreed=found.disagreed,
        )  # fmt: skip

    async def _validate(self, entry: Entry) -> Validated:
        admission = self._admission
        return await self._aside.run(
            VALIDATION_SECONDS,
            validate,
            self._store.path_of(entry),
            entry.version,
            dict(admission.registries()),
            admission.prior,
            admission.journal,
        )

    async def _make_live(self, lineage: Lineage, policy: Policy) -> None:
        await asyncio.to_thread(self._store.write, lineage)
        self._lineage = lineage
        self._take_up(policy)
        self.live_since_ns = self._admission.clock_ns()
        if self.shadow.entry == lineage.live:
            self.shadow.stop()

    def _load_before(self, entry: Entry) -> Policy:
        try:
            return self._load_entry(entry)
        except (CheckpointRejected, OSError) as error:
            raise DataLoss(f"{entry.version} cannot be loaded any more: {error}", reason="POLICY_LOST") from error

    def _load_entry(self, entry: Entry) -> Policy:
        return self._load(self._store.path_of(entry) if entry.file else None)

    def _used(self) -> list[Entry]:
        return [*self._lineage.entries, *filter(None, [self.shadow.entry])]

    def _note_failure(self, error: Exception) -> None:
        self.breaker.record_failure()
        observe_policy_update("failed", type(error).__name__)
        _tell("policy_update_failed", ERROR, reason=type(error).__name__, error=str(error)[:200])


def _tell(name: str, level: TelemetryLevel.ValueType, *, reason: str, **details: Detail) -> None:
    tell_event("tamiyo", name, level, reason=reason, step_index=None, **details)


def _parse(raw: bytes) -> IngestPolicyUpdateRequest:
    try:
        request = IngestPolicyUpdateRequest.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest("The message is not an IngestPolicyUpdateRequest.") from error
    rules.check(request)
    return request


def _storage(error: OSError) -> ResourceExhausted:
    return ResourceExhausted(
        f"The policy cannot be written ({error.strerror}); free space on the disk of Tamiyo's state and send it again."
        " The live policy is unchanged.",
        reason="STORAGE",
    )
