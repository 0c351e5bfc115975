"""The site builds, strictly and without the network, and shows equations; needs the extra `docs`."""

import os
import re
import subprocess
import sys

import pytest

from hamu_jax.config.fields import FIELDS

pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")
pytest.importorskip("latex2mathml")
pytest.importorskip("nbconvert")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The folder of the built site; its notebooks have no outputs, which take minutes."""
  folder = tmp_path_factory.mktemp("site")
  subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}"],
    check=True,
    env=os.environ | {"EXECUTE_NOTEBOOKS": "false"},
  )
  return folder


def test_equations_are_drawn(site):
  pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
  for name, least in (("methods.html", 60), ("reference/transforms.html", 2), ("reference/metrics.html", 20)):
    assert pages[name].count("<math") >= least, name
  for name, text in pages.items():
    assert "arithmatex" not in text, name
    assert ":math:" not in text and ".. math::" not in text, name


def test_notebooks_are_pages(site):
  page = (site / "notebooks" / "gradient_alignment.html").read_text()
  assert '<span class="n">hardness_plots</span>' in page
  assert "notebooks/gradient_alignment.html" in (site / "index.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site):
  loaded = re.compile(r'(?:<script[^>]*src|<link[^>]*href|<img[^>]*src)="?https?:')
  for path in site.rglob("*.html"):
    assert not loaded.findall(path.read_text()), path


def test_fields_have_what_the_comment_behind_them_says(site):
  text = (site / "reference" / "transforms.html").read_text()
  assert "change of the weights, same structure and dtypes as the gradients" in text


def test_every_field_of_a_configuration_is_in_its_table(site):
  text = (site / "reference" / "configuration.html").read_text()
  shown = set(re.findall(r"<td><code>([\w.]+)</code></td>", text))
  assert {f"config.{name}" for name in FIELDS} <= shown
  assert "Whether the reference model is trained without the forget set" in text
