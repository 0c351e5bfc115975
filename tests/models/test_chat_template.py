"""Chat templates of strangers: whatever they do, one line comes back soon, and the process stays usable."""

import resource
import time

import pytest

from hamu_jax.errors import UserError
from hamu_jax.models import chat_template, tokenizer

_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_DOUBLE = (
  "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)
_MACRO = "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}"


def _rendered(template):
  words = tokenizer.byte_tokenizer()
  words._fast.chat_template = template
  return words.chat_prompt("Who?")


@pytest.mark.parametrize(
  "template, message",
  [
    (_LOOP, "it takes longer than 0.5 seconds"),
    (_DOUBLE, "it needs too much memory|takes longer"),
    ("{{ 'a'.center(999999999999) }}", "it needs too much memory"),
    ("{{ '%9999999999d' % 1 }}", "it needs too much memory"),
    ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 10000000 characters"),
    ("{{ range(999999999) | list }}", "[Rr]ange too big"),
    (_MACRO, "recursion"),
    ("{{ 10 ** 10 ** 10 }}", r"has the operator '\*\*', by which it can run for hours"),
    ("{% set x = 'a' * messages[0].content | length %}", r"has the operator '\*'"),
    ("{{ 99999 * 99999 }}", r"has the operator '\*'"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{% if %}", "refuses messages of user|refuses to be read"),
  ],
)
def test_hostile_templates(template, message, monkeypatch):
  monkeypatch.setattr(chat_template, "SECONDS", 0.5)
  limits = resource.getrlimit(resource.RLIMIT_AS)
  start = time.monotonic()
  with pytest.raises(UserError, match=message) as refusal:
    _rendered(template)
  assert time.monotonic() - start < 20 and "\n" not in str(refusal.value)
  assert resource.getrlimit(resource.RLIMIT_AS) == limits
  # What was to interrupt the template interrupts nothing later.
  time.sleep(0.01)
  assert _rendered("{{ messages[0].content }}{{ '-' * 3 }}") == "Who?---"


def test_published_templates_pass():
  """Products and sums that templates of models on the hub have."""
  chat_template.check("{% if (loop.index0 % 2 == 0) %}{{ 2 * loop.index }}{% endif %}", "a model")
