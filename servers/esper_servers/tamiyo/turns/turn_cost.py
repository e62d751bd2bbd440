from __future__ import annotations

SMOOTHING = 0.05


class TurnCost:
    """What a turn takes by how many share it: so much for the first, so much for each further one. Smoothed.

    A straight line: what was measured of one size tells of the others too, and none is known only from long ago. As
    long as only single turns were measured, several are taken to cost as much as one after the other; never more.
    """

    __slots__ = ("first", "further")

    def __init__(self, seconds: float) -> None:
        self.first = self.further = seconds

    def of(self, size: int) -> float:
        """Predict a turn that so many share, in seconds."""
        return self.first + (size - 1) * self.further

    def learn(self, size: int, seconds: float, smoothing: float = SMOOTHING) -> None:
        """Take in how long a turn took that so many shared: what is predicted for as many moves there by a share."""
        if size > 1:
            self._lean(size - 1, smoothing * (seconds - self.of(size)))
            return
        change = smoothing * (seconds - self.first)
        if self.first:
            # A machine that is slower is so for all of them.
            self.further += change * self.further / self.first
        self.first += change

    def _lean(self, others: int, change: float) -> None:
        """Split a change by how much of the prediction each part makes up: the least that accounts for it."""
        share = change / (1 + others * others)
        self.first += share
        self.further = max(0.0, self.further + others * share)
        if self.further > self.first:
            self.first = self.further = self.of(others + 1) / (others + 1)

    def approach(self, other: TurnCost, share: float) -> None:
        """Move towards another by a share of the way."""
        self.first += share * (other.first - self.first)
        self.further += share * (other.further - self.further)
