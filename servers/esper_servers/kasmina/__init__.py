"""Kasmina, the seed host: carries out signed commands on a live model."""

from __future__ import annotations
