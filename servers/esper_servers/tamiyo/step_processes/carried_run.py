from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_servers.tamiyo.awaited_outcomes import AwaitedOutcomes
from esper_servers.tamiyo.command_rest import CommandRest
from esper_servers.tamiyo.records.memory import Memory
from esper_servers.tamiyo.run_state import RunState


@dataclass(frozen=True, kw_only=True, slots=True)
class CarriedRun:
    """What a run takes along to another process: everything but its graph, which is built there again."""

    request: OpenRunRequest
    owner: str
    protocol_version: int
    memory: Memory
    global_step: int
    commands: int
    last_sequence: int
    last_digest: bytes
    last_reply: bytes
    planted: Mapping[str, str]
    attached: Mapping[str, str]
    """What grew in the seeds of its graph."""
    told: Mapping[str, int]
    awaited: AwaitedOutcomes
    rest: CommandRest
    held_because: str
    """Why the run is in conservative mode; empty while it is not."""

    @classmethod
    def of(cls, run: RunState) -> Self:
        """Take it from a run that no process decides on any more."""
        return cls(
            request=run.request,
            owner=run.owner,
            protocol_version=run.protocol_version,
            memory=Memory.of(run),
            global_step=run.global_step,
            commands=run.commands,
            last_sequence=run.last_sequence,
            last_digest=run.last_digest,
            last_reply=run.last_reply,
            planted=run.planted,
            attached=run.graph.attached,
            told=run.risk.told,
            awaited=run.awaited,
            rest=run.rest,
            held_because=run.mode.reason if run.mode.enabled else "",
        )

    def give_to(self, run: RunState) -> None:
        """Have a run that was just opened go on from here."""
        self.memory.give_to(run)
        run.global_step, run.commands, run.awaited = self.global_step, self.commands, self.awaited
        run.rest = self.rest
        run.last_sequence, run.last_digest, run.last_reply = self.last_sequence, self.last_digest, self.last_reply
        run.planted = {**self.planted, **{name: planted for name, planted in run.planted.items() if planted}}
        run.risk.told.update(self.told)
        if self.held_because:
            run.mode.enter(self.held_because)
