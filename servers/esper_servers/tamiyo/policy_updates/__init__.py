"""From a signed PolicyUpdate to the live policy, and back."""

from __future__ import annotations
