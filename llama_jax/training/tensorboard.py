"""The scalars of a run for TensorBoard.

tensorboardX's SummaryWriter passes scalars to a thread through a bounded queue. After a full disk
has ended that thread, the eleventh scalar blocks the run. Here a write that fails raises.
"""

import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.summary import scalar

# protobuf creates these classes when their modules are imported.
_events: Any = event_pb2
_summaries: Any = summary_pb2
FLUSH_SECONDS = 60.0  # between two flushes, which wait for the disk


class TensorBoardLog:
    """Writes scalars to an event file.

    Args:
        folder: for the file.
        step: the first one that is written; TensorBoard hides later ones of earlier files.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = 0.0
        self._write(
            _events.Event(
                step=step, session_log=_events.SessionLog(status=_events.SessionLog.START)
            )
        )

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Writes the values of `step`.

        Raises:
            OSError: the file can't be written.
        """
        scalars = [value for name, x in values.items() for value in scalar(name, x).value]
        self._write(_events.Event(step=step, summary=_summaries.Summary(value=scalars)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all scalars to the disk.

        Raises:
            OSError: the file can't be written.
        """
        self._flushed = time.monotonic()
        self._writer.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
            OSError: the file can't be written.
        """
        self._writer.close()
