"""A hook of MkDocs: equations become MathML when the site is built.

Browsers draw MathML themselves, so that a page needs no script and no fonts from elsewhere.
"""

import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_NAMESPACE = "http://www.w3.org/1998/Math/MathML"
# What pymdownx.arithmatex makes of an equation.
_EQUATION = re.compile(
  r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
# Names of operators, whose letters the converter would set as a product of variables.
_OPERATOR = re.compile(r"\\operatorname\{([^{}]*)\}|\\(arg)(?![a-z])")
# Their range is below them in an equation on a line of its own; the converter puts it beside.
_WITH_RANGE = ("min", "max", "sup")
_THIN = "0.167em"
_BEFORE_A_SIGN = "(,=<\u2265\u2264\u2190"


def mathml(tex: str, *, display: bool) -> str:
  """An equation in LaTeX as MathML.

  Args:
    tex: without delimiters.
    display: whether it is on a line of its own.

  Raises:
    PluginError: it has a command that the converter does not know.
  """
  tex = _OPERATOR.sub(
    lambda found: rf"\text{{{(found[1] or found[2]).replace(chr(92) + ',', ' ')}}}\,", " ".join(tex.split())
  )
  text = convert(tex, display="block" if display else "inline")
  if "\\" in text:
    raise PluginError(f"the equation {tex!r} has a command that latex2mathml does not know")
  ElementTree.register_namespace("", _NAMESPACE)
  root = ElementTree.fromstring(text)
  for element in root.iter():
    if display and element.tag == _tag("msub") and element[0].text in _WITH_RANGE:
      element.tag = _tag("munder")
    for before, child, after in zip([None, *element], element, [*element[1:], None]):
      _space(before, child, after)
  return ElementTree.tostring(root, encoding="unicode")


def _tag(name: str) -> str:
  return f"{{{_NAMESPACE}}}{name}"


def _space(before, element, after) -> None:
  """Sets what is around a function's name, and a sign beside what it belongs to."""
  if element.tag == _tag("mi") and len(element.text or "") > 1:
    element.tag = _tag("mo")
    is_applied = after is not None and after.text == "("
    element.attrib = {"form": "prefix", "lspace": _THIN, "rspace": "0" if is_applied else _THIN}
  if element.text == "\u2212" and (before is None or (before.text or " ") in _BEFORE_A_SIGN):
    element.set("form", "prefix")


def on_page_content(content: str, **unused) -> str:
  """Replaces the equations of a page."""
  del unused
  return _EQUATION.sub(
    lambda found: mathml(html.unescape(found["tex"]), display=found["tag"] == "div"), content
  )
