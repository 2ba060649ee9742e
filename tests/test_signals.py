import signal
import time

import pytest

from so8t.signals import HANDLED, StopSignals


@pytest.mark.parametrize("number", HANDLED)  # on Windows SIGBREAK, too
def test_first_signal_is_noted_and_the_handlers_are_as_before_afterwards(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received == 0
        signal.raise_signal(number)
        assert signals.received == number
    assert signal.getsignal(number) is before


def test_second_ctrl_c_interrupts_at_once() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_come_back_when_training_fails() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="training failed"), StopSignals():
        raise ValueError("training failed")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_end_of_a_console_of_windows_is_noted_and_not_answered_until_the_process_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with StopSignals() as signals:
        for ctrl_c_or_break in (0, 1):
            assert not signals._note_console(ctrl_c_or_break)
        assert signals.received == 0
        assert signals._note_console(2)
        assert signals.received == signal.SIGTERM
    assert waits == [60]
