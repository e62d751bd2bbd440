from __future__ import annotations

import itertools

import numpy as np

from esper_rpc.journal import JournalReader
from esper_rpc.proto.leyline.v1 import AdaptationCommand
from esper_rpc.proto.tamiyo.v1 import ExplainDecisionResponse, RunStructure
from esper_servers.policy.checkpoint import NOT_FINITE, CheckpointRejected
from esper_servers.policy.policy import Policy
from esper_servers.tamiyo.choosing import UNDECIDED
from esper_servers.tamiyo.records import decisions
from esper_servers.tamiyo.records.arrays import read_array
from esper_servers.tamiyo.records.replay import decide_again

MOST = 32


def decide_recent_again(policy: Policy, journal: JournalReader) -> tuple[int, int]:
    """Return how many recent decisions a policy made again, and how many of them otherwise.

    Raises CheckpointRejected when it puts out NaN or infinity on what really happened.
    """
    compared = disagreed = 0
    for record in itertools.islice(journal.newest(decisions.KIND), MOST):
        recorded = ExplainDecisionResponse.FromString(record.body)
        if recorded.reason in UNDECIDED:
            continue
        structure = journal.find(decisions.STRUCTURE, recorded.evidence.structure_digest.hex())
        if structure is None:
            continue
        again = decide_again(recorded, RunStructure.FromString(structure.body), policy, is_other=True)
        _check_finite(again)
        compared += 1
        disagreed += _what(again.command) != _what(recorded.command)
    return compared, disagreed


def _check_finite(decided: ExplainDecisionResponse) -> None:
    if not all(np.isfinite(read_array(array)).all() for array in decided.evidence.outputs.values()):
        raise CheckpointRejected(NOT_FINITE, "its outputs on a recent decision")


def _what(command: AdaptationCommand) -> tuple[int, str, int, str]:
    change = command.seed_operation
    return command.command_type, command.target_seed_id, change.operation, change.blueprint_id
