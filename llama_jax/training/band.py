"""The band of the loss and the gradient norm: a robust estimate from the last steps.

It depends on recorded numbers alone, so a resumed run, and a replay, have the same one.
"""

import math
from collections.abc import Sequence

import numpy as np

WINDOW = 128  # steps of the estimate
MIN_STEPS = 64  # without a limit until so many are known
# A host dispatches a step while the devices compute the one before it, whose numbers it can't have.
LAG = 2
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
# Of the median: a loss that hardly varies has no spike of a tenth.
LEAST_DEVIATION = 0.01


class Band:
    """The limits of the loss and the gradient norm of a step, given those of the steps before it.

    A limit is the median of the last `WINDOW` steps, plus `threshold` standard deviations. One is
    estimated by the MAD (median absolute deviation), which no outlier can change much, as long as
    it is one of few. There are no lower limits: a step that is easier than expected is harmless.

    Args:
        threshold: standard deviations; 0: no limits.
        recent: of a checkpoint.

    Attributes:
        recent: step (1 is the first), loss and gradient norm of the last steps, if both are finite.
    """

    def __init__(self, threshold: float, recent: Sequence[list[float]] | None = None):
        self._threshold = threshold
        self.recent = [*(recent or [])]

    def add(self, step: int, loss: float, norm: float) -> None:
        """Adds the numbers of a step; those that are not finite belong to no band."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.recent = [*self.recent[1 - WINDOW - LAG :], [step, loss, norm]]

    def limits(self, step: int, first: int = 1) -> np.ndarray:
        """Returns the limits of a step, float32 [2]; infinite as long as too few steps are known.

        Args:
            step: 1 is the first.
            first: step of which the data is comparable with that of `step`.
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
