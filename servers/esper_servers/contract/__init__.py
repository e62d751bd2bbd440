"""The contract as cases: what every RPC answers, whoever serves it and however it is reached."""

from __future__ import annotations
