"""One file for each signal; `read` returns None when what it needs is not known."""

from __future__ import annotations
