"""SDK of the Esper mesh: typed clients, TrainingSession and attach. Loads no torch."""

from __future__ import annotations

import os

# Spinning OpenMP threads double the tail of every step; this must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .attach import attach
from .blocking import (
    BlockingIdentityClient,
    BlockingKasminaClient,
    BlockingTamiyoClient,
    BlockingTolariaClient,
    BlockingUrzaClient,
)
from .client import IdentityClient, KasminaClient, TamiyoClient, TolariaClient, UrzaClient
from .discovery import MeshAddress, find_mesh
from .event_loop import LoopThread
from .follower_session import FollowerSession
from .halt import HaltSwitch
from .remote_seed_host import RemoteHostConfig, RemoteSeedHost
from .seed_host import OutOfStep, RunDescription, SeedHost
from .session import SessionConfig, TrainingSession

__all__ = [
    "BlockingIdentityClient",
    "BlockingKasminaClient",
    "BlockingTamiyoClient",
    "BlockingTolariaClient",
    "BlockingUrzaClient",
    "FollowerSession",
    "HaltSwitch",
    "IdentityClient",
    "KasminaClient",
    "LoopThread",
    "MeshAddress",
    "OutOfStep",
    "RemoteHostConfig",
    "RemoteSeedHost",
    "RunDescription",
    "SeedHost",
    "SessionConfig",
    "TamiyoClient",
    "TolariaClient",
    "TrainingSession",
    "UrzaClient",
    "attach",
    "find_mesh",
]
