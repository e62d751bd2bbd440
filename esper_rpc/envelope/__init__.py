"""Signed envelopes: keys, signing, verification."""

from __future__ import annotations

from .authenticity import Rejected
from .encoding import mac_input
from .keys import Keyring, RootKeys
from .signing import sign
from .verification import Accepted, Verifier, VerifierConfig

__all__ = ["Accepted", "Keyring", "Rejected", "RootKeys", "Verifier", "VerifierConfig", "mac_input", "sign"]
