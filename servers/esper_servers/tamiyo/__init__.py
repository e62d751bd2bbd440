"""Tamiyo, the controller: decides what a run does next."""

from __future__ import annotations
