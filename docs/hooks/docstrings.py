"""An extension of Griffe: what this project's docstrings have that Markdown does not know.

Equations are written as reStructuredText has them (`.. math::` and `:math:`), papers by their arXiv
number, and a field of a NamedTuple is often explained by the comment behind it.
"""

import re
import textwrap

import griffe

_DISPLAYED = re.compile(
  r"^(?P<indent> *)\.\. math::(?P<tex>.*(?:\n+(?P=indent) +\S.*(?:\n(?P=indent) +\S.*)*)?)", re.MULTILINE
)
# In a module's docstring: commands and lists, which Markdown takes for code where they are indented by 4.
_INDENTED = re.compile(r"(?<=\n\n)  (?=\S)(?:.*\n?)(?:  .*\n?)*")
_INLINE = re.compile(r":math:`([^`]*)`")
_PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{5})")
_COMMENT = re.compile(
  r"^\s*\w+\s*:[^#]*[^#\s][^#]*#\s*(?:type: ignore\[.*?\]\s*#\s*)?(?!type:)(?P<text>\S.*)$"
)

# More than any file has.
_AFTER = 1_000_000


def as_markdown(text: str) -> str:
  """A docstring with its equations and papers as Markdown has them."""

  def displayed(found):
    return f"\n{found['indent']}$$ {' '.join(found['tex'].split())} $$\n"

  text = _DISPLAYED.sub(displayed, text)
  text = _INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
  return _PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


class Docstrings(griffe.Extension):
  """Rewrites all docstrings, makes docstrings of fields' comments, and shows functions first."""

  def on_module_members(self, *, mod: griffe.Module, **unused) -> None:
    """Moves functions before classes and values, whose fields would fill the page before them."""
    del unused
    for member in mod.members.values():
      if not member.is_alias and not member.is_module and not member.is_function and member.lineno:
        member.lineno += _AFTER

  def on_object(self, *, obj: griffe.Object, **unused) -> None:
    """See the class."""
    del unused
    if obj.docstring:
      text = obj.docstring.value
      if obj.is_module:
        text = _INDENTED.sub(lambda found: textwrap.indent(found[0], "  "), text)
      obj.docstring.value = as_markdown(text)
    elif obj.is_attribute and obj.parent and obj.parent.is_class:
      found = _COMMENT.match(obj.lines[0]) if obj.lines else None
      if found:
        obj.docstring = griffe.Docstring(as_markdown(found["text"]), parent=obj)
