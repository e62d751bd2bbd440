"""What a decision was made on: gathered, written down, explained, and decided again."""

from __future__ import annotations
