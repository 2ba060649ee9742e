"""Ctrl-C and SIGTERM end the run after the step that is under way."""

import signal
from types import FrameType, TracebackType

HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While open, the first SIGINT or SIGTERM is noted in `received`, 0 before; a second one acts as it always did."""

    received: int = 0

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
