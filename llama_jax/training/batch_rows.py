"""Where the rows of a batch are from, and their losses."""

import math
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.batches import Batches


class DescribedRow(NamedTuple):
    """Where a row of a batch is from, and its loss."""

    row: int  # from 1
    source: str  # folder of token shards
    epoch: int  # of the source, from 1
    window: int  # of the source, from 1
    loss: float | None  # mean of its targets [nats per token]; None: no targets, not finite, or DPO
    targets: int | None  # None: DPO


def describe_rows(data: Batches, step: int, sums: Any) -> list[DescribedRow]:
    """Returns where the rows of the batch of a step (1 is the first) are from, and their losses.

    Args:
        data: of the run.
        step: of the run.
        sums: `StepMetrics.rows` of the step; None: DPO.
    """
    B = data.config.batch_size
    nll, targets = (np.asarray(s).reshape(-1).tolist() for s in sums) if sums else (None, None)
    rows = list[DescribedRow]()
    for row in range(B):
        at = data.samples.locate(data.samples.batch_number(step - 1) * B + row)
        loss = nll[row] / targets[row] if nll and targets and targets[row] else math.nan
        shown = loss if math.isfinite(loss) else None
        count = targets[row] if targets else None
        rows.append(
            DescribedRow(row + 1, str(at.tokens.folder), at.epoch + 1, at.window + 1, shown, count)
        )
    return rows
