"""Ctrl-C and SIGTERM end the run after the step that is under way; on Windows so do Ctrl-Break and the console's end.

Windows ends a process that has no console any more (closed, logged off, shut down) about five seconds after it has said
so, whatever the process does. A step and its checkpoint that take longer are lost: the run goes on from the checkpoint
before, as after a power cut.
"""

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType

HANDLED = [signal.SIGINT, signal.SIGTERM]
if sys.platform == "win32":
    import ctypes

    HANDLED.append(signal.SIGBREAK)
    CONSOLE_ENDS = (2, 5, 6)  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT
    _Handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)


class StopSignals:
    """While open, the first such signal is noted in `received`, 0 before; a second one acts as it always did."""

    received: int = 0

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in HANDLED}
        self._forget_console = _watch_console(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        self._forget_console()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _watch_console(signals: StopSignals) -> Callable[[], None]:
    """On Windows, note the console's end as SIGTERM; returns what ends the watch.

    Windows calls the handler in a thread of its own and ends the process when the handler returns: it must not, so that
    the step has the seconds that there are. Python alone would answer with SIGBREAK and return at once.
    """
    if sys.platform == "win32":

        def note(event: int) -> bool:
            if event not in CONSOLE_ENDS:
                return False  # Python's own handler is next
            signals.received = signal.SIGTERM
            time.sleep(60)
            return True

        handler = _Handler(note)
        set_handler = ctypes.windll.kernel32.SetConsoleCtrlHandler
        set_handler(handler, True)
        return lambda: set_handler(handler, False)
    return lambda: None
