"""Typed asyncio clients: one class per service, one method per RPC, errors of esper_rpc.errors."""

from __future__ import annotations

from .identity import IdentityClient
from .kasmina import KasminaClient
from .mesh_client import MeshClient
from .tamiyo import TamiyoClient
from .tolaria import TolariaClient
from .urza import UrzaClient

__all__ = ["IdentityClient", "KasminaClient", "MeshClient", "TamiyoClient", "TolariaClient", "UrzaClient"]
