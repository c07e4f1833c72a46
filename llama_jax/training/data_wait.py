"""How long the devices wait for data."""

from llama_jax.runtime.console import print_status

WARN_SHARE = 0.02  # of the step time
WARN_SECONDS = 60.0  # over which the share is measured


class DataWait:
    """Measures the share of the step time in which the devices wait for data.

    A share of more than `WARN_SHARE` over `WARN_SECONDS` is reported once.
    """

    def __init__(self):
        self._waited = 0.0  # since the last step ended
        self._sums = [0.0, 0.0]  # seconds waited, and of all steps, since the last check
        self._warned = False

    def add(self, seconds: float) -> None:
        """Adds a time in which the devices waited."""
        self._waited += seconds

    def end_step(self, seconds: float) -> float:
        """Returns the share of a step that took `seconds`."""
        waited, self._waited = min(self._waited, seconds), 0.0
        self._sums = [self._sums[0] + waited, self._sums[1] + seconds]
        if self._sums[1] >= WARN_SECONDS:
            self._check(self._sums[0] / self._sums[1])
            self._sums = [0.0, 0.0]
        return waited / seconds

    def _check(self, share: float) -> None:
        if share > WARN_SHARE and not self._warned:
            self._warned = True
            print_status(
                f"warning: the devices wait for data in {share:.1%} of the step time (data_wait in"
                " metrics.jsonl): read the token shards from a faster disk or a nearer bucket, or"
                " give this host more CPU cores"
            )
