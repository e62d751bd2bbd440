"""Blueprints: module factories, manifests, extras and kernels."""

from __future__ import annotations
