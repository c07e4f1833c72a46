"""events.jsonl in a run folder: what happened in a run, besides its steps."""

import json
from datetime import UTC, datetime
from typing import Any

from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, read_file, read_many, write_file

EVENTS = "events.jsonl"


def read_events(folder: AnyPath, kind: str) -> list[dict[str, Any]]:
    """Returns the events of a kind, in the order in which they happened; none without a file.

    Raises:
        InputError: a line is not an event.
    """
    data = read_many(folder, [EVENTS])[EVENTS] or b""
    try:
        events = [json.loads(line) for line in data.splitlines()]
        return [event for event in events if event["event"] == kind]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / EVENTS} has a line that is not an event: put a copy in its place"
        ) from error


def record_events(folder: AnyPath, events: list[dict[str, Any]]) -> None:
    """Appends events to events.jsonl, with the time (UTC). Only host 0 calls this.

    Args:
        folder: of the run.
        events: each with `step` (number of steps done), `event` (its kind) and its other fields.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path = folder / EVENTS
    earlier = read_file(path) if path.exists() else b""
    lines = "".join(json.dumps({"time": now} | event) + "\n" for event in events)
    write_file(path, earlier + lines.encode())
