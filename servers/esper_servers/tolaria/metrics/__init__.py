"""What a training measures of itself: each step, its trends, the device, traces."""

from __future__ import annotations
