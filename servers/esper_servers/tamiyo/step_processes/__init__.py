"""Several processes of one Tamiyo that answer steps at the same address."""

from __future__ import annotations
