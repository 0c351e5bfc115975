"""A hook of MkDocs: tables of all fields of a configuration, with the comments that explain them.

Names and defaults are those of `hamu_jax.config.default_config()`; a comment is what stands above a
field in the functions that declare it. The page gets them in place of `<!-- fields -->`.
"""

import ast
import inspect
import itertools
import re

from hamu_jax.config import default as config_lib
from hamu_jax.config import language as language_fields

_MARK = "<!-- fields -->"
_OPTIMIZER = "optimizer"


def on_page_markdown(markdown: str, **unused) -> str:
  """Puts the tables into the page that asks for them."""
  del unused
  return markdown.replace(_MARK, tables()) if _MARK in markdown else markdown


def tables() -> str:
  """A heading and a table for each section of the default configuration."""
  explained = _comments(config_lib) | _comments(language_fields)
  order = list(explained["default_config"])
  defaults = config_lib.default_config().to_dict()
  defaults = {name: defaults[name] for name in sorted(defaults, key=order.index)}
  top = {name: value for name, value in defaults.items() if not isinstance(value, dict)}
  sections = {name: value for name, value in defaults.items() if isinstance(value, dict)}
  parts = ["## Fields of the experiment", _table("config", top, explained["default_config"])]
  for name, values in sections.items():
    function = explained.get(f"_{name}_section") or explained.get(f"{name}_section")
    comments = function or _below(explained["default_config"], name)
    about = (function or explained["default_config"]).get("" if function else name, "")
    parts += [f"## `config.{name}`", about, _table(f"config.{name}", values, comments)]
  parts += [
    "## Optimizers",
    explained["optimizer_config"][""],
    _table("optimizer", defaults["method"][_OPTIMIZER], explained["optimizer_config"]),
  ]
  return "\n\n".join(parts)


def _table(prefix: str, values, comments) -> str:
  lines = ["| field | default | |", "| --- | --- | --- |"]
  declared = list(comments)
  for name, value in sorted(_leaves(values), key=lambda leaf: declared.index(leaf[0])):
    shown = "an [optimizer](#optimizers)" if name == _OPTIMIZER else f"`{value!r}`"
    lines.append(f"| `{prefix}.{name}` | {shown} | {comments.get(name, '').replace('|', '&#124;')} |")
  return "\n".join(lines)


def _leaves(values, prefix=""):
  """(dotted name, value) of all but sections; an optimizer counts as one value."""
  for name, value in values.items():
    if isinstance(value, dict) and name != _OPTIMIZER:
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _comments(module) -> dict[str, dict[str, str]]:
  """By function, the comment above each key or field; under "" what the function's docstring says."""
  source = inspect.getsource(module)
  lines = source.splitlines()
  found = {}
  for function in ast.parse(source).body:
    if isinstance(function, ast.FunctionDef):
      found[function.name] = {"": " ".join((ast.get_docstring(function) or "").split())}
      for name, line in _keys(function):
        found[function.name][name] = _above(lines, line)
  return found


def _keys(node, prefix=""):
  """(dotted name, line) of what the dictionaries and assignments inside of a node declare."""
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.Dict):
      for key, value in zip(child.keys, child.values):
        if isinstance(key, ast.Constant):
          yield prefix + key.value, key.lineno
          yield from _keys(ast.Expr(value), f"{prefix}{key.value}.")
    elif isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Attribute):
      name = child.targets[0].attr
      yield name, child.lineno
      yield from _keys(ast.Expr(child.value), f"{name}.")
    else:
      yield from _keys(child, prefix)


def _above(lines, number: int) -> str:
  """The comment right above a line, as one."""
  comments = itertools.takewhile(lambda line: line.strip().startswith("#"), reversed(lines[: number - 1]))
  text = " ".join(line.strip().lstrip("# ") for line in reversed(list(comments)))
  # What are names are code: a word with an underscore or a dot in it.
  return re.sub(r"(?<![`\w.*/-])([a-zA-Z]\w*(?:[._]\w+)+)(?![`\w*/])", r"`\1`", text)


def _below(comments, section: str):
  prefix = f"{section}."
  return {name.removeprefix(prefix): text for name, text in comments.items() if name.startswith(prefix)}
