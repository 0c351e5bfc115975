"""Pages name only what exists: files, modules, fields, options, methods."""

import ast
import importlib
import importlib.util
import pathlib
import pkgutil
import re
import shlex

import ml_collections
import pytest
import yaml

from hamu_jax.config import command_line, paths
from hamu_jax.config import default as config_lib
from hamu_jax.engine import methods
from hamu_jax.launch import expand, sweep

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FIELDS = config_lib.field_names(config_lib.default_config())
# Words of commands that stand for something of the reader's.
PLACEHOLDERS = {"$method": "hamu-q"}

every_page = pytest.mark.parametrize(
  "page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT))
)


def nav_entries(nav):
  for entry in nav:
    for value in entry.values() if isinstance(entry, dict) else [entry]:
      yield from nav_entries(value) if isinstance(value, list) else [value]


def without_code(text):
  return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def slug(heading):
  """As the extension `toc` of Markdown makes an anchor of a heading."""
  return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def commands(text):
  """Command lines of the blocks of code, as words."""
  for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
    for line in block.replace("\\\n", " ").splitlines():
      if "--config" in line:
        yield shlex.split(line.partition("#")[0])


def test_the_navigation_has_every_page_once():
  nav = list(nav_entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
  assert sorted(nav) == [str(page.relative_to(DOCS)) for page in PAGES]


@every_page
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
    if re.match(r"\w+:", target):
      continue
    path, _, anchor = target.partition("#")
    linked = (page.parent / path) if path else page
    assert linked.exists(), target
    if anchor.startswith(("hamu_jax", "sam_jax")):
      assert f"::: {module_of(anchor)}\n" in linked.read_text(), target
    elif anchor:
      assert anchor in map(slug, re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)), target


def module_of(name):
  """The module of a dotted name, all of which exists."""
  parts = name.split(".")
  for end in range(len(parts), 0, -1):
    module = ".".join(parts[:end])
    try:
      found = importlib.import_module(module)
    except ModuleNotFoundError:
      continue
    for attribute in parts[end:]:
      found = getattr(found, attribute)
    return module
  raise AssertionError(name)


@every_page
def test_programs_exist(page):
  for module in re.findall(r"python3? -m ([\w.]+)", page.read_text()):
    if module.split(".")[0] in ("hamu_jax", "launch"):
      assert importlib.util.find_spec(module), module
  for path in re.findall(r"[ `](?:\./)?((?:launch|benchmarks|configs|docs)/[\w/]+\.\w+)", page.read_text()):
    assert (ROOT / path).is_file(), path


@every_page
def test_fields_exist(page):
  text = re.sub(r"^ *```(python|text)\n.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
  for name in re.findall(r"(?<![\w/.])config(?:\.\w+)+", text):
    is_section = any(field.startswith(f"{name}.") for field in FIELDS)
    assert name in FIELDS or is_section or name in ("config.json", "config.FIELD"), name


@every_page
def test_commands_are_understood(page, monkeypatch):
  # The files of the reader are not here.
  monkeypatch.setattr(paths, "check", lambda config, read: None)
  for words in commands(page.read_text()):
    (program,) = re.findall(
      r"launch\.sweep|hamu_jax(?!\.launch)\.\w+|benchmarks/\w+|launch/\w+", " ".join(words)
    )[:1]
    overrides = [word for word in words if word.startswith("--config.")]
    for placeholder, value in PLACEHOLDERS.items():
      overrides = [word.replace(placeholder, value) for word in overrides]
    (config,) = (word for word in words if word.startswith("--config="))
    if program == "launch.sweep":
      members = expand.expand(config.removeprefix("--config="), overrides, stage_cache="stages")
      (pattern,) = [w.removeprefix("--filter=") for w in words if w.startswith("--filter=")] or [""]
      assert any(re.search(pattern, member.name) for member in members), words
    elif "FILE" not in config and program != "benchmarks/sharpness_table":
      assert isinstance(command_line.parse(["", config, *overrides]).config, ml_collections.ConfigDict)


def test_every_method_has_its_section_and_no_other():
  text = (DOCS / "methods.md").read_text()
  headings = re.findall(r"^### (`.*)$", text, re.MULTILINE)
  assert sorted(re.findall(r"`([^`]+)`", " ".join(headings))) == sorted(methods.METHODS)


def test_every_section_of_a_method_says_when_to_use_it():
  text = (DOCS / "methods.md").read_text()
  for name, section in re.findall(r"^### (`.*?)$(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE):
    assert "*Use*" in section, name


def test_defaults_in_the_tables_of_fields_are_right():
  found = {}
  for page in PAGES:
    for names, values in re.findall(r"^\| (`config\.[^|]*) \| (`[^|]*`) \|", page.read_text(), re.MULTILINE):
      found |= zip(re.findall(r"`([^`]+)`", names), re.findall(r"`([^`]+)`", values), strict=True)
  assert len(found) > 30
  defaults = config_lib.default_config().to_dict()
  for name, value in found.items():
    default = defaults
    for part in name.split(".")[1:]:
      default = default[part]
    assert ast.literal_eval(value) == default, name


def test_fields_that_terms_and_coefficients_name_are_explained():
  text = (DOCS / "methods.md").read_text()
  named = {
    coefficient
    for method in methods.METHODS.values()
    for substep in method.substeps
    for role in (substep.retain, substep.forget)
    if role
    for coefficient in role.values()
    if isinstance(coefficient, str)
  }
  assert {f"config.method.{name}" for name in named} <= set(re.findall(r"config\.method\.\w+", text))


def test_engines_and_options_of_sweeps_are_explained():
  text = (DOCS / "sweeps.md").read_text()
  assert set(re.findall(r"^- `(\w+)`", text, re.MULTILINE)) >= set(sweep.ENGINES)
  options = {word.partition("=")[0] for word in re.findall(r"^  (--\S+)", sweep.__doc__, re.MULTILINE)}
  assert options <= set(re.findall(r"^\| `(--[^=`]+)", text, re.MULTILINE))
  assert set(re.findall(r"configs/sweeps/\w+\.py", text)) == {
    str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "sweeps").glob("*.py")
  }


def test_the_reference_has_every_module():
  pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
  shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
  there = set()
  for name in ("hamu_jax", "sam_jax"):
    package = importlib.import_module(name)
    there |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{name}.")}
  # Packages that only gather what their modules have.
  packages = {name for name in there if any(other.startswith(f"{name}.") for other in there)}
  assert there - packages <= shown <= there, (there - packages - shown, shown - there)


def test_snippets_are_there():
  for page in PAGES:
    for path, section in re.findall(r'--8<-- "([^":]+):?(\w*)"', page.read_text()):
      text = (ROOT / path).read_text()
      assert not section or f"[start:{section}]" in text, path
