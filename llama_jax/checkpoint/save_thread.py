"""A thread that saves one checkpoint, and whose end never goes unnoticed."""

import threading
from collections.abc import Callable


class SaveThread:
    """Calls `save` in a thread of its own.

    A pool of threads would wait for ever for a thread that was killed.

    Args:
        name: of the thread, for stack traces.
        save: writes the checkpoint.
    """

    def __init__(self, name: str, save: Callable[[], None]):
        self._save, self._saved = save, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._save()
            self._saved = True
        except BaseException as error:  # raised by `result`
            self._error = error

    def done(self) -> bool:
        """Returns whether the thread has ended."""
        return not self._thread.is_alive()

    def result(self) -> None:
        """Waits until the checkpoint is saved.

        Raises:
            Exception: as `save` does.
            OSError: the thread was killed.
        """
        self._thread.join()
        if isinstance(self._error, Exception):
            raise self._error
        if not self._saved:
            reason = f" ({type(self._error).__name__})" if self._error else ""
            raise OSError(f"the thread that writes it was killed{reason}")
