"""The policy: graph, network, prior, masks."""

from __future__ import annotations
