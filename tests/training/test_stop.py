"""Signals are noted, and processes that get them at different steps leave at the same one."""

import os
import signal

import jax
import pytest

from gpt4v_jax import config, sharding
from gpt4v_jax.training import stop


def kill(number):
    os.kill(os.getpid(), number)


@pytest.fixture
def mesh():
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(mesh, number):
    before = signal.getsignal(number)
    with stop.Stop(mesh) as asked:
        assert not asked.asked()
        asked.check()
        kill(number)
        assert asked.asked() and asked.asked()
        with pytest.raises(stop.Interrupted):
            asked.check()
        kill(signal.SIGTERM)  # again: nothing more happens
        if number == signal.SIGTERM:
            kill(signal.SIGINT)  # some launchers send both
        with pytest.raises(KeyboardInterrupt):  # but who presses Ctrl-C again means it
            kill(signal.SIGINT)
    assert signal.getsignal(number) is before


def test_several_processes_answer_one_step_late_and_alike(mesh, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with stop.Stop(mesh) as asked:
        assert not asked.asked()
        kill(signal.SIGTERM)
        asked.check()  # work is not left undone by one of several
        assert not asked.asked(), "the others do not know yet"
        assert asked.asked()
