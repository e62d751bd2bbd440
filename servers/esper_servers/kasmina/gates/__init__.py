"""The gates G0 to G5, a file each (requirements 4.3): what a seed must show before it moves on."""

from __future__ import annotations
