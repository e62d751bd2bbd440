"""What a process tells about itself: metrics, packets and traces. Recording never waits and never raises."""

from __future__ import annotations

from .packets import PacketSink, record_packets

__all__ = ["PacketSink", "record_packets"]
