"""Prints a step that was computed again: `llama-jax train CONFIG --replay STEP`."""

import json

from llama_jax.config.run import Config
from llama_jax.runtime import hosts
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
    print("\n".join([*_describe_step(found), "", *_describe_norms(found), "", *_list_rows(found)]))
    if rows:
        from llama_jax.cli.show_windows import show_step

        shown = [row.row - 1 for row in _by_loss(found)[:rows]]
        print(f"\n{show_step(config.data, step, shown)}")
    return 0


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


def _describe_norms(found: Replay) -> list[str]:
    weights, gradients = (by_layer(found.norms[kind]) for kind in ("weights", "gradients"))
    width = max(map(len, weights))
    lines = [f"{'norms':{width}}  {'weights':>12}  {'gradient':>12}"]
    for name, norm in weights.items():
        numbers = ("not finite" if x is None else f"{x:.5g}" for x in (norm, gradients[name]))
        lines.append(f"{name:{width}}  " + "  ".join(f"{number:>12}" for number in numbers))
    return lines


def _by_loss(found: Replay) -> list:
    """Returns the rows, the highest loss first; rows without one last."""
    return sorted(found.rows, key=lambda row: (row.loss is None, -(row.loss or 0.0)))


def _list_rows(found: Replay) -> list[str]:
    lines = [f"{'row':>6}  {'loss':>9}  {'targets':>7}  source, window, epoch"]
    for row in _by_loss(found):
        loss = "" if row.loss is None else f"{row.loss:.5f}"
        targets = "" if row.targets is None else f"{row.targets:,}"
        lines.append(
            f"{row.row:6}  {loss:>9}  {targets:>7}  {row.source}, {row.window:,}, {row.epoch}"
        )
    return lines
