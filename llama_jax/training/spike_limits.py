"""The limits above which the loss or the gradient norm of a step is a spike.

They depend on recorded numbers alone, so a resumed run, and a replay, have the same ones.
"""

import math
from collections.abc import Sequence

import numpy as np

WINDOW = 128  # steps from which the limits are estimated
MIN_STEPS = 64  # as long as fewer are known, the limits are infinite
# A host dispatches a step while the devices compute the one before it, whose numbers it can't have.
LAG = 2
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
# Smallest standard deviation, divided by the median: however little a loss varies, its limit is
# this times `threshold` above the median, by default 7 %.
LEAST_DEVIATION = 0.01


class SpikeLimits:
    """The limits of the loss and the gradient norm of a step, given those of the steps before it.

    A limit is the median of the last `WINDOW` steps, plus `threshold` standard deviations. The
    standard deviation is estimated by the MAD (median absolute deviation), which a few outliers
    hardly change. There are no lower limits: a step that is easier than expected is harmless.

    Args:
        threshold: standard deviations; 0: no limits.
        recent: the attribute of this name that a checkpoint contains.

    Attributes:
        recent: step (1 is the first), loss and gradient norm of the last steps, if both are finite.
    """

    def __init__(self, threshold: float, recent: Sequence[list[float]] | None = None):
        self._threshold = threshold
        self.recent = [*(recent or [])]

    def add(self, step: int, loss: float, norm: float) -> None:
        """Adds the numbers of a step, unless one of them is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.recent = [*self.recent[1 - WINDOW - LAG :], [step, loss, norm]]

    def limits(self, step: int, first: int = 1) -> np.ndarray:
        """Returns the limits of the loss and the gradient norm of a step, float32 [2].

        They are infinite as long as too few steps are known, and NaN if the threshold is 0.

        Args:
            step: 1 is the first.
            first: the first step whose data is comparable with that of `step`.
        """
        if not self._threshold:
            return np.full(2, np.nan, np.float32)
        known = [(loss, norm) for at, loss, norm in self.recent if first <= at <= step - LAG]
        if len(known) < MIN_STEPS:
            return np.full(2, np.inf, np.float32)
        values = np.array(known[-WINDOW:])
        median = np.median(values, axis=0)
        mad = np.median(np.abs(values - median), axis=0)
        deviation = np.maximum(MAD_TO_DEVIATION * mad, LEAST_DEVIATION * np.abs(median))
        return (median + self._threshold * deviation).astype(np.float32)
