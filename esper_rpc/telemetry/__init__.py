"""What a process tells about itself: metrics, packets and traces. Recording never waits and never raises."""

from __future__ import annotations

import os

from . import shared_files

shared_files.reserve(os.environ)  # prometheus_client looks at the environment when it is imported.

from .packets import PacketSink, record_packets  # noqa: E402

__all__ = ["PacketSink", "record_packets"]
