"""The losses of the sources of a mixture: of a training step, and on held-out data."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llama_jax.config.run import Config
from llama_jax.data.batches import Batches, weighted_mean
from llama_jax.model.lora import Trained
from llama_jax.model.weights import Llama
from llama_jax.training.dpo import PreferenceSums, preference_means
from llama_jax.training.loss import RowSums
from llama_jax.training.step import eval_step


def split_loss(rows: RowSums, folders: Sequence[str]) -> dict[str, float | int]:
    """Returns 'loss/FOLDER' [nats per token] and 'targets/FOLDER' of a step, by source.

    The sum of loss · targets over the sources is that of the step. A source without targets in the
    step is absent.

    Args:
        rows: of the step.
        folders: the source of each row.
    """
    nll, targets = (np.asarray(sums).reshape(-1) for sums in rows)
    found = dict[str, float | int]()
    for folder in dict.fromkeys(folders):
        own = np.array([name == folder for name in folders])
        if count := int(targets[own].sum()):
            found[f"loss/{folder}"] = math.fsum(nll[own].tolist()) / count
            found[f"targets/{folder}"] = count
    return found


def held_out_means(
    config: Config, data: Batches, step: int, trained: Trained, base: Llama | None
) -> dict[str, float]:
    """Returns the mean loss on held-out data after `step` steps, and for DPO more, by name.

    Each source that the mixture has had until then is evaluated on its own held-out windows. With
    several sources in the run, their losses are 'loss/FOLDER', and each mean is that of the
    sources, weighted with their shares in the mixture: what a training step would find on text that
    the run doesn't train on. Sources without held-out targets are left out.
    """
    shares = data.shares(step)
    batches = max(1, config.training.eval_batches // len(shares))
    found = {
        source: means
        for source in shares
        if (means := _evaluate(config, data, source, batches, trained, base))
    }
    means = dict[str, float]()
    for name in next(iter(found.values()), {}):
        values = {source: of_source[name] for source, of_source in found.items()}
        mean = (
            math.fsum(values.values()) if name == "preferences" else weighted_mean(values, shares)
        )
        means |= {} if mean is None else {name: mean}
    folders = config.data.folders
    if len(folders) > 1:
        means |= {f"loss/{folders[source]}": own["loss"] for source, own in found.items()}
    return means


def _evaluate(
    config: Config, data: Batches, source: int, limit: int, trained: Trained, base: Llama | None
) -> dict[str, float]:
    """Returns the means over at most `limit` held-out batches of a source; {} without targets."""
    batches = data.count_validation_batches(source, limit)
    if not batches:
        return {}
    sums, program = [], config.program
    for i in range(batches):
        of_batch: Any = eval_step(program, trained, data.validation(source, i, batches), base)
        sums.append(jax.tree.map(lambda x: np.asarray(x).item(), of_batch))
    totals = jax.tree.map(lambda *numbers: sum(numbers), *sums)
    if isinstance(totals, PreferenceSums):
        loss, preferences = preference_means(config, totals)
        means = {"loss": loss, **preferences._asdict()} if totals.preferences else {}
        return {name: np.asarray(mean).item() for name, mean in means.items()}
    nll, targets = totals
    return {"loss": nll / targets} if targets else {}
