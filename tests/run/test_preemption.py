"""Signals are noticed while work goes on, and work is not held up by them."""

import os
import signal
import threading
import time

import pytest

from hamu_jax.run import preemption


def test_work_returns_its_value_and_raises_its_error():
  with preemption.Watch() as watch:
    assert watch.run(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
      watch.run(lambda: 1 // 0)
    assert not watch.requested


def test_short_work_finishes_after_a_signal():
  with preemption.Watch(grace_seconds=5) as watch:

    def work():
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.2)
      return "done"

    assert watch.run(work) == "done"
    assert watch.requested


def test_long_work_is_left_behind():
  released = threading.Event()
  with preemption.Watch(grace_seconds=0.1) as watch:

    def work():
      os.kill(os.getpid(), signal.SIGINT)
      released.wait(30)

    began = time.monotonic()
    with pytest.raises(preemption.Preempted):
      watch.run(work)
    assert time.monotonic() - began < 5
  released.set()


def test_handlers_are_restored():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.Watch():
    assert signal.getsignal(signal.SIGTERM) != before
  assert signal.getsignal(signal.SIGTERM) == before
