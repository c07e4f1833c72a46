"""Prints a step in detail: `train CONFIG --replay STEP`, and `info RUN --spike STEP`."""

import json
from typing import Any

from llama_jax.checkpoint.folders import read_run_config
from llama_jax.config.run import Config
from llama_jax.runtime import hosts
from llama_jax.runtime.storage import AnyPath
from llama_jax.training.batch_rows import DescribedRow
from llama_jax.training.flight_recorder import read_record
from llama_jax.training.layer_norms import by_layer
from llama_jax.training.replay import Replay, replay


def show_replay(config: Config, step: int, rows: int, as_json: bool) -> int:
    """Computes a step again and prints it on host 0; returns the exit code.

    Args:
        config: of the run.
        step: 1 is the first.
        rows: number of rows whose text is printed.
        as_json: print JSON, without text.

    Raises:
        InputError: as `replay`.
    """
    found = replay(config, step)
    if not hosts.is_host_zero():
        return 0
    if as_json:
        described = found._asdict() | {"equal": found.equal}
        described["rows"] = [row._asdict() for row in found.rows]
        print(json.dumps(described, indent=1))
        return 0
    norms = _describe_norms(found.norms)
    print("\n".join([*_describe_step(found), "", *norms, "", *_list_rows(found.rows)]))
    _show_texts(config, step, found.batch, found.rows, rows)
    return 0


def show_spike(folder: AnyPath, name: str, rows: int) -> None:
    """Prints the record of a spike, with the text of `rows` rows, from the run's token shards.

    Args:
        folder: of the run.
        name: the step, or 'STEP-2' for its second spike.
        rows: number of rows whose text is printed.

    Raises:
        InputError: there is no such record, or the token shards are missing.
    """
    found = read_record(folder, name)
    described = [DescribedRow(**row) for row in found["rows"]]
    lines = [f"spike in step {found['step']}, batch {found['batch']} (on_spike: {found['action']})"]
    for label, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        value, limit = found[key], found["limits"][key]
        shown = "not finite" if value is None else f"{value:.5g}"
        lines.append(f"{label:13}  {shown}" + ("" if limit is None else f"  (limit {limit:.5g})"))
    norms = [] if found["norms"] is None else ["", *_describe_norms(found["norms"])]
    print("\n".join([*lines, *norms, "", *_list_rows(described)]))
    _show_texts(read_run_config(folder), found["step"], found["batch"], described, rows)


def _show_texts(
    config: Config, step: int, batch: int, described: list[DescribedRow], rows: int
) -> None:
    """Prints the text of the `rows` rows with the highest losses."""
    if rows:
        from llama_jax.cli.show_windows import show_step

        shown = [row.row - 1 for row in _by_loss(described)[:rows]]
        print(f"\n{show_step(config.data, step, shown, batch)}")


def _describe_step(found: Replay) -> list[str]:
    start = f"checkpoint {found.start}" if found.start else "the initial weights"
    lines = [
        f"step {found.step}, computed from {start}",
        f"loss           {found.loss!r}",
        f"gradient norm  {found.grad_norm!r}",
    ]
    recorded = found.recorded
    if recorded is None:
        return [*lines, "metrics.jsonl doesn't have this step (logging.every)"]
    if found.equal:
        return [*lines, "equal to metrics.jsonl bit for bit"]
    return [
        *lines,
        f"metrics.jsonl has loss {recorded['loss']!r}, gradient norm {recorded['grad_norm']!r}: on"
        " another mesh, kind of device or version of JAX the difference is rounding; otherwise the"
        " configuration has changed since this step, or a device computes wrongly",
    ]


def _describe_norms(norms: dict[str, Any]) -> list[str]:
    columns = {"weights": "weights", "gradients": "gradient", "activations": "output RMS"}
    kinds = [by_layer(norms[kind]) for kind in columns]
    width = max(map(len, kinds[0]))
    titles = "  ".join(f"{title:>12}" for title in columns.values())
    lines = [f"{'norms':{width}}  {titles}"]
    for name in kinds[0]:
        found = [kind[name] for kind in kinds if name in kind]
        numbers = ("not finite" if x is None else f"{x:.5g}" for x in found)
        lines.append(f"{name:{width}}  " + "  ".join(f"{number:>12}" for number in numbers))
    return lines


def _by_loss(rows: list[DescribedRow]) -> list[DescribedRow]:
    """Returns the rows, the highest loss first; rows without one last."""
    return sorted(rows, key=lambda row: (row.loss is None, -(row.loss or 0.0)))


def _list_rows(rows: list[DescribedRow]) -> list[str]:
    lines = [f"{'row':>6}  {'loss':>9}  {'targets':>7}  source, window, epoch"]
    for row in _by_loss(rows):
        loss = "" if row.loss is None else f"{row.loss:.5f}"
        targets = "" if row.targets is None else f"{row.targets:,}"
        lines.append(
            f"{row.row:6}  {loss:>9}  {targets:>7}  {row.source}, {row.window:,}, {row.epoch}"
        )
    return lines
