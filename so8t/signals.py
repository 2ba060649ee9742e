"""Ctrl-C and SIGTERM end the run after the current step; on Windows, Ctrl-Break and closing the console do so too.

When its console goes (closed, logged off, shut down), Windows tells a process and kills it about five seconds later. If
the step and its checkpoint take longer they are lost, and the run resumes from the checkpoint before, as after a power
cut.
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
    """While open, notes the first such signal in `received` (0 = none yet); a second one acts as usual."""

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
        """Called by Windows in a thread of its own; False hands the event on to Python, which makes it a signal.

        When the console closes, the process ends as soon as this returns. So it waits, which gives the step the few
        seconds that there are; Python alone would answer with SIGBREAK and return at once.
        """
        if event not in CONSOLE_ENDS:
            return False
        self.received = signal.SIGTERM
        time.sleep(60)
        return True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
