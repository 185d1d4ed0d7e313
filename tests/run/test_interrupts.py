from __future__ import annotations

import os
import signal

import pytest

from rlalign.run.interrupts import Interrupts, Terminated


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_outside_a_shield_it_raises_at_once_and_nothing_is_torn():
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        press()
        pytest.fail("not reached")
    assert not interrupts.torn


def test_a_shielded_part_is_finished_first():
    done = []
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.shield():
            press()
            done.append("the rest of it")
        assert done == ["the rest of it"] and not interrupts.torn


def test_pressed_twice_it_does_not_wait_and_says_that_the_step_is_torn():
    done = []
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.shield():
            press()
            press()
            done.append("the rest of it")
        assert done == [] and interrupts.torn


def test_sigterm_exits_as_a_shell_would_report_it():
    with Interrupts(), pytest.raises(Terminated) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
