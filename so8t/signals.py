"""Ctrl-C and SIGTERM end the run after the current step; on Windows, so do Ctrl-Break and closing the console.

When the console is closed, or the user logs off or shuts down, Windows gives a process about five seconds and then ends
it. A step and its checkpoint that take longer are lost, and the run resumes from the checkpoint before it, as after a
power cut.
"""

import signal
import sys
import time
from types import FrameType, TracebackType

HANDLED = [signal.SIGINT, signal.SIGTERM]
CONSOLE_ENDS = (2, 5, 6)  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT
if sys.platform == "win32":
    import ctypes

    HANDLED.append(signal.SIGBREAK)
    ConsoleHandler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)


class StopSignals:
    """While open, `received` is the number of the first such signal, 0 until then. A second one acts as usual."""

    received: int = 0

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in HANDLED}
        if sys.platform == "win32":
            self._console_handler = ConsoleHandler(self._note_console)
            ctypes.windll.kernel32.SetConsoleCtrlHandler(self._console_handler, True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if sys.platform == "win32":
            ctypes.windll.kernel32.SetConsoleCtrlHandler(self._console_handler, False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _note_console(self, event: int) -> bool:
        """Called by Windows in a thread of its own; False passes the event on to Python, which turns it into a signal.

        When the console is closed, Windows ends the process as soon as this function returns. So it sleeps, and the
        training step has the remaining seconds. Python's own handler would raise SIGBREAK and return at once.
        """
        if event not in CONSOLE_ENDS:
            return False
        self.received = signal.SIGTERM
        time.sleep(60)
        return True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
