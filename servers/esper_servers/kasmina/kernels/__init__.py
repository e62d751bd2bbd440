"""Kernels on their way to a seed: fetched, cached, built beside the training, planted."""

from __future__ import annotations
