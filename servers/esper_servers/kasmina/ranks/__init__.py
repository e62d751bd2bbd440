"""Several ranks that train one model: the first decides, the others do as it did."""

from __future__ import annotations
