"""A run hears that it must stop, and Ctrl-C is answered at once where nothing can be lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from marten.interrupt import SIGNALS, Interrupt


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_is_a_reason(number: signal.Signals) -> None:
    interrupt = Interrupt()
    assert interrupt.reason == ""
    signal.raise_signal(number)
    assert interrupt.reason == number.name


def test_ctrl_c_is_answered_at_once_and_twice_ends(capfd: pytest.CaptureFixture[str]) -> None:
    # it was noted without a word
    interrupt = Interrupt()
    signal.raise_signal(signal.SIGINT)
    assert "Stopping after the batch in hand" in capfd.readouterr().err
    assert interrupt.reason == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_before_the_first_batch_ends() -> None:
    # 25,000 pictures were checked to the end first
    Interrupt(patient=False)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_time_runs_out() -> None:
    assert Interrupt(1000).reason == ""
    assert Interrupt(1e-9).reason == "--max_runtime"
