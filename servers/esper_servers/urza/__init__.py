"""Urza, the library of blueprints."""

from __future__ import annotations
