"""Signals are noticed while work goes on, and work is not held up by them."""

import os
import pathlib
import signal
import subprocess
import sys
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


ROOT = pathlib.Path(__file__).parent.parent.parent
# One call of C code that lasts for minutes, in which Python runs no signal handler.
BUSY = "print('busy', flush=True); import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**30)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
  ("context", "least", "said"),
  [
    ("preemption.Watch(longest_seconds=0.3)", 0.3, "to resume from the last checkpoint"),
    ("preemption.Watch() as watch, watch.nothing_to_save()", 0.0, "run the same command again"),
  ],
)
def test_a_busy_main_thread_is_ended_in_time(number, context, least, said):
  code = f"from hamu_jax.run import preemption\nwith {context}: {BUSY}"
  process = subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  assert process.stdout.readline() == "busy\n"
  asked = time.monotonic()
  process.send_signal(number)
  _, error = process.communicate(timeout=20)
  assert process.returncode == 128 + number
  assert least <= time.monotonic() - asked < least + 2
  assert error.startswith("interrupted: ") and said in error and error.count("\n") == 1


def test_a_second_ctrl_c_does_not_wait():
  code = f"from hamu_jax.run import preemption\nwith preemption.Watch(): {BUSY}"
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE)
  assert process.stdout.readline() == "busy\n"
  asked = time.monotonic()
  for _ in range(2):
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
  assert process.wait(20) == 128 + signal.SIGINT
  assert time.monotonic() - asked < 3


def test_a_watch_that_is_over_ends_nothing():
  with preemption.Watch(longest_seconds=0.1):
    os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(0.3)


@pytest.mark.parametrize(
  "module",
  [
    "main",
    "together",
    "plan",
    "merge",
    "report.__main__",
    "analysis.hardness",
    "analysis.geometry",
    "launch.sweep",
  ],
)
def test_programs_heed_signals_before_their_slow_imports(module):
  """At that moment nothing is imported that takes time."""
  code = (
    (ROOT / "hamu_jax" / f"{module.replace('.', '/')}.py").read_text().split("preemption.leave_on_signals()")
  )
  assert len(code) == 2
  before = {
    line.split()[1].split(".")[0] for line in code[0].splitlines() if line.startswith(("import ", "from "))
  }
  assert before - {"hamu_jax"} <= sys.stdlib_module_names
