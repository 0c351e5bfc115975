"""A hook of MkDocs: the notebooks are run when the site is built, and take the place of their pages.

The environment variable `EXECUTE_NOTEBOOKS=false` shows them without outputs, for a quick look at the site.
"""

import functools
import os
import pathlib

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

_FOLDER = pathlib.Path(__file__).parent.parent.parent / "notebooks"
# Seconds that a cell may take.
_TIMEOUT = 1200


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Replaces the page of each notebook, and puts its figures beside it."""
  execute = os.environ.get("EXECUTE_NOTEBOOKS") != "false"
  for path in sorted(_FOLDER.glob("*.ipynb")):
    text, figures = _page(path.read_text(), execute)
    page = files.src_uris[f"notebooks/{path.stem}.md"]
    files.remove(page)
    files.append(File.generated(config, page.src_uri, content=text))
    for name, content in figures.items():
      files.append(File.generated(config, f"notebooks/{name}", content=content))
  return files


# A site that is served is built again after each change of a page.
@functools.cache
def _page(source: str, execute: bool) -> tuple[str, dict[str, bytes]]:
  """A notebook as Markdown, and the figures of its outputs by name."""
  notebook = nbformat.reads(source, as_version=4)
  if execute:
    NotebookClient(
      notebook,
      timeout=_TIMEOUT,
      resources={"metadata": {"path": str(_FOLDER)}},
      # It warns that others on this machine can read what the kernel is sent.
      extra_arguments=["--log-level=ERROR"],
    ).execute()
  for cell in notebook.cells:
    # What is printed and the values of cells, without progress and warnings.
    cell["outputs"] = [
      each
      for each in cell.get("outputs", ())
      if each.get("name") == "stdout" or each["output_type"] == "execute_result"
    ]
  text, resources = MarkdownExporter().from_notebook_node(notebook)
  return text, resources["outputs"]
