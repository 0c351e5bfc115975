"""Runs the chat template of a model: a program by a stranger, in a sandbox with bounds.

Jinja's sandbox keeps a template from the files and the network, but not from using all memory and time.
"""

import contextlib
import ctypes
import os
import pathlib
import threading
from collections.abc import Callable, Iterator

from hamu_jax.errors import UserError, brief

# A text takes milliseconds and a few MiB.
SECONDS = 5.0
MEMORY_BYTES = 2**30
TEXT_CHARACTERS = 10_000_000
# The largest factor of a product in a template. Products of large numbers can take hours in one instruction.
_FACTOR = 10_000


def check(template: str, where: str) -> None:
  """Refuses a template with an operation that nothing can interrupt.

  Args:
    template: the template's source.
    where: name of the tokenizer, for error messages.

  Raises:
    UserError: if it raises to a power, or multiplies by anything but a small number that it spells out.
  """
  import jinja2

  with _refusals(where, "to be read"):
    found = [(kind, value) for _, kind, value in jinja2.Environment().lex(template) if kind != "whitespace"]
  for place, (kind, value) in enumerate(found):
    if kind != "operator" or value not in ("*", "**"):
      continue
    factors = [found[place + side] for side in (-1, 1) if 0 <= place + side < len(found)]
    small = [text for name, text in factors if name == "integer" and int(text.replace("_", ""), 0) <= _FACTOR]
    if value == "**" or not small:
      raise UserError(
        f"config.text.template='chat': the chat template of {where} has the operator {value!r}, by which it"
        " can run for hours; choose 'llama2', 'question_answer' or 'none', or change the template"
      )


def render(function: Callable[[], str], where: str, what: str) -> str:
  """Runs a template within the bounds of time, memory and length.

  Args:
    function: renders the text.
    where: name of the tokenizer, for error messages.
    what: what it renders, for error messages.

  Returns:
    The text.

  Raises:
    UserError: if the template refuses, fails or leaves its bounds.
  """
  with _refusals(where, what):
    with _bounded(SECONDS, MEMORY_BYTES):
      text = function()
    if len(text) > TEXT_CHARACTERS:
      raise ValueError(f"it renders more than {TEXT_CHARACTERS} characters")
  return text


@contextlib.contextmanager
def _refusals(where: str, what: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # A template can raise whatever Python can.
    bounds: dict[type, str] = {
      TimeoutError: f"it takes longer than {SECONDS:g} seconds",
      MemoryError: "it needs too much memory",
    }
    raise UserError(
      f"config.text.template='chat': the chat template of {where} refuses {what}"
      f" ({bounds.get(type(error), brief(error))}); leave config.text.system_prompt empty, or"
      " choose another template"
    ) from None


@contextlib.contextmanager
def _bounded(seconds: float, memory: int) -> Iterator[None]:
  """Raises TimeoutError or MemoryError in this thread if its code leaves the bounds.

  The memory is bounded by the address space of the process, which no other thread can extend by more either.
  """
  thread = ctypes.c_ulong(threading.get_ident())
  lock, ended = threading.Lock(), False

  def interrupt():
    with lock:
      if not ended:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeoutError))

  timer = threading.Timer(seconds, interrupt)
  timer.daemon = True
  timer.start()
  try:
    with _address_space(memory):
      yield
  finally:
    with lock:
      ended = True
      ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
    timer.cancel()


@contextlib.contextmanager
def _address_space(extra: int) -> Iterator[None]:
  """Bounds the growth of the process's address space, where the system can."""
  statm = pathlib.Path("/proc/self/statm")
  if not statm.exists():
    yield
    return
  import resource

  before = resource.getrlimit(resource.RLIMIT_AS)
  used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  limits = [used + extra, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
  resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, before)
