"""Step time of a run that watches itself, compared with a loop of bare steps.

    python benchmarks/run_overhead.py [--rounds 20] [--steps 5] [--check-every 1000] [--json FILE]

`on` is `llama-jax train` with the quickstart's model, and the watchdog, the flight recorder, the
ledger, metrics, TensorBoard's files and `training.check_every`. `off` compiles the same step and
reads the same batches, and does nothing else but read the loss of the step before. Each side has
its own process, and the sides run some steps alternately. Checkpoints and validations are off on
both sides. The result is the median of the ratios of pairs, for seconds and for seconds of CPU: the
second is the one to read on a machine that also does something else.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from result import Result, add_json_option, append_result

os.environ["JAX_PLATFORMS"] = "cpu"  # even where an accelerator, or its compiler, is installed

if TYPE_CHECKING:
    from llama_jax.config.run import Config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
WARM_UP = 2  # rounds


def make_config(folder: Path, on: bool, check_every: int) -> "Config":
    """Returns the configuration of a side; its token shards are `folder`/tokens."""
    from llama_jax.config import yaml_file

    config = yaml_file.load(QUICKSTART)
    out = str(folder / ("on" if on else "off"))
    training = replace(
        config.training, out=out, steps=10**6, eval_every=0, check_every=check_every * on
    )
    return replace(
        config,
        data=replace(config.data, mixture={str(folder / "tokens"): 1.0}, corpus=()),
        checkpoint=replace(config.checkpoint, every=10**6),
        logging=replace(config.logging, samples=(), progress=False),
        training=training,
    )


def run_bare_steps(config: "Config", pace: Callable[[int], None]) -> None:
    """Computes steps, and reads the loss of each while the device computes the next one.

    Args:
        config: of the run.
        pace: called before each step, with its number (0 is the first).
    """
    import jax
    import numpy as np

    from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
    from llama_jax.data.batches import Batches
    from llama_jax.parallel.mesh import make_mesh
    from llama_jax.runtime.process_memory import retain_freed_memory
    from llama_jax.training.start import TrainingState
    from llama_jax.training.step import train_step

    retain_freed_memory()  # as `llama-jax train` does
    with jax.set_mesh(make_mesh(config.mesh)):
        data = Batches(config.data, config.training.micro_batches)
        folder = Path(config.training.out) / "checkpoints"
        state = TrainingState(config, data, TrainingCheckpoints(folder, config.checkpoint), None)
        example = state.trained, state.opt_state, data.train(0), np.int32(0), state.base
        step_function, loss = train_step.lower(config, *example).compile(), None
        for step in range(config.training.steps):
            pace(step)
            state.trained, state.opt_state, metrics = step_function(
                state.trained, state.opt_state, data.train(step), np.int32(step), state.base
            )
            if loss is not None:
                float(loss)
            loss = metrics.loss


def run_side(folder: Path, on: bool, steps: int, check_every: int, requests: Connection) -> None:
    """Runs `steps` steps for each request, and sends their seconds and seconds of CPU."""
    import jax

    from llama_jax.training import loop

    marks = list[tuple[float, float]]()

    def pace(step: int, _: str | None = None) -> None:
        if step % steps == 0:
            jax.block_until_ready(jax.live_arrays())  # the other side must not compete with a step
            now = time.perf_counter(), time.process_time()
            if marks:
                requests.send([b - a for a, b in zip(marks[-1], now, strict=True)])
            if not requests.recv():
                os._exit(0)
            marks.append((time.perf_counter(), time.process_time()))

    config = make_config(folder, on, check_every)
    if on:
        loop.hosts.stop_before = pace  # which the loop calls before each step
        loop.run(config)
    else:
        run_bare_steps(config, pace)


def alternate(
    sides: list[Callable[[Connection], None]], rounds: int
) -> Iterator[list[tuple[float, float]]]:
    """Yields the seconds, and seconds of CPU, of each side in each round."""
    spawn = multiprocessing.get_context("spawn")
    connections = []
    for side in sides:
        ours, theirs = spawn.Pipe()
        spawn.Process(target=side, args=[theirs], daemon=True).start()
        theirs.close()  # the end of the side then ends `recv`
        connections.append(ours)
    for number in range(WARM_UP + rounds):
        pair = []
        order = connections if number % 2 else connections[::-1]
        for connection in order:
            connection.send(True)
            pair.append(connection.recv())
        if number >= WARM_UP:
            yield pair if number % 2 else pair[::-1]
    for connection in connections:
        connection.send(False)


def main() -> None:
    """Prints the medians and the ratio of each kind of seconds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of each (20)")
    parser.add_argument("--steps", type=int, default=5, help="of a round (5)")
    parser.add_argument("--check-every", type=int, default=1000, help="training.check_every (1000)")
    add_json_option(parser)
    args = parser.parse_args()
    from kill_runs import write_tokens

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokens(folder / "texts.jsonl", folder / "tokens")
        sides = [
            partial(run_side, folder, on, args.steps, args.check_every) for on in (True, False)
        ]
        pairs = [*alternate(sides, args.rounds)]
    for kind, name in enumerate(("seconds", "seconds of CPU")):
        on, off = ([pair[side][kind] / args.steps for pair in pairs] for side in (0, 1))
        ratios = [a / b for a, b in zip(on, off, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name} of a step: on {statistics.median(on):.4f}, off {statistics.median(off):.4f};"
            f" on / off, median of {len(ratios)} pairs: {middle:.4f} (quartiles {low:.4f} to"
            f" {high:.4f})"
        )
        if kind == 0:
            rates = 1 / statistics.median(on), 1 / statistics.median(off)
            result = Result(
                name="a step of the quickstart, watched", unit="steps/s", ours=rates[0],
                peer="bare steps", theirs=rates[1], ratio=1 / middle,
            )  # fmt: skip
            append_result(args.json, result)


if __name__ == "__main__":
    main()
