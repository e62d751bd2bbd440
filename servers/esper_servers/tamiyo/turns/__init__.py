"""Turns at the policy: who is next, who shares one, how it is run, and where its time went."""
