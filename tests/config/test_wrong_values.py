"""Thousands of wrong values, drawn from the table of fields: each is one line with the field and a remedy.

Every field meets every kind of wrongness, in every program that takes --config, in this process. What a
program does after the check of its command line is replaced by an error.
"""

import re

import pytest

from hamu_jax import main
from hamu_jax.analysis import hardness
from hamu_jax.config import command_line, kinds, validation
from hamu_jax.config.fields import FIELDS
from hamu_jax.engine import methods
from hamu_jax.errors import UserError
from hamu_jax.experiment import experiment, together
from hamu_jax.launch import local, sweep
from hamu_jax.planning import plan

IMAGES, TEXTS = "hamu_jax:digits_hamu", "hamu_jax:tofu_smollm2_hamu:smoke"
REMEDY = re.compile(r"\b(give|choose|set|leave|lower|raise|change|derive|number)\b")
ESTIMATE = ("data.forget=memorization", "data.scores=estimate")

# Configurations and settings, one of which reads each field; * is the folder of the test.
CONTEXTS = (
  (IMAGES,),
  (TEXTS,),
  *(
    (TEXTS if row.for_language else IMAGES, f"method.name={name}", *["mask.fraction=0.5"] * row.needs_mask)
    for name, row in methods.METHODS.items()
  ),
  *((IMAGES, f"data.forget={forget}") for forget in ("random", "hard_probability")),
  (IMAGES, "data.forget=indices", "data.forget_indices=*/file"),
  *((IMAGES, f"{owner}.optimizer.schedule=step") for owner in ("train", "method")),
  (IMAGES, *ESTIMATE),
  (IMAGES, *ESTIMATE, "memorization.optimizer.schedule=step"),
  (IMAGES, "mask.fraction=0.5"),
  (IMAGES, "sam.rho=0.1"),
  (IMAGES, "sam.train_rho=0.1"),
  (IMAGES, "sam.rho=0.1", "method.name=sharp_minmax", "mask.fraction=0.5"),
  (IMAGES, "sam.rho=0.1", "method.name=neggrad"),
  (IMAGES, "pairing=pmap"),
  (IMAGES, "evaluate.membership=True"),
  (IMAGES, "wandb.project=mine"),
  (IMAGES, "distributed.coordinator=host:1", "distributed.num_processes=2"),
  (IMAGES, "method.stop_on_loss=True"),
  (IMAGES, "data.source=parquet", "data.path=*"),
  (
    IMAGES,
    "data.source=parquet",
    "data.path=*",
    "data.forget=separate",
    "data.forget_split=a",
    "data.duplicate_split=b",
  ),
  (TEXTS, "pairing=pmap", "language.rematerialization=full"),
  (TEXTS, "data.source=tofu"),
  (TEXTS, "text.template=llama2"),
  (TEXTS, "evaluate.watermark_tokenizer=owner/name"),
)
NEVER_READ = {"memorization.evaluate_epochs"}

NO_NUMBER = ("abc", "", "(1, 2)", "True", "None")
NOT_FINITE = ("nan", "inf", "-inf", "1e30", "-1e30")
WRONG = {
  kinds.Number: (*NO_NUMBER, *NOT_FINITE),
  kinds.Count: (*NO_NUMBER, *NOT_FINITE, "1.5", "-1", "2147483648", "99999999999999999999"),
  kinds.CountOrPair: (
    "abc",
    "",
    "True",
    "None",
    *NOT_FINITE,
    "1.5",
    "-1",
    "0",
    "(1,)",
    "(1, 2, 3)",
    "(0, 1)",
    "(1, 1.5)",
  ),
  kinds.Flag: ("maybe", "2", "", "(1,)", "None", "nan"),
  kinds.Choice: ("nosuch", "1", "(1,)", "None", "a\nb", "*/file"),
  kinds.Text: ("a\x00b", "\x1b[31m"),
  kinds.Path: ("*/nowhere", "../no/where/at/all", "*/file/below", "a\nb", "a\x00b", "/dev/zero", "x" * 300),
  kinds.OutputFolder: ("*/file", "*/file/below", "/dev/zero", "a\nb", "a\x00b"),
}
# Of tuples, by the kind of their elements.
WRONG_ELEMENTS = {
  kinds.Number: (
    "('a',)",
    "(nan,)",
    "(float('nan'),)",
    "(-1.0,)",
    "(1e30,)",
    "(None,)",
    "((1, 2),)",
    "[1",
    "abc",
  ),
  kinds.Count: ("('a',)", "(1.5,)", "(-1,)", "(2147483648,)", "(None,)", "((1, 2),)", "[1", "abc", "(True,)"),
  kinds.Choice: ("('nosuch',)", "(1,)", "(None,)", "3", "nosuch"),
  kinds.Text: ("(1,)", "(None,)", "3", "('',)", "('a\\x00b',)"),
}
# Numbers whose 0 means nothing, and numbers that may be negative.
POSITIVE = re.compile(
  r"epochs|batch_size|learning_rate|rank|alpha|batch_tokens|new_tokens|max_length|max_norm|radius|"
  r"temperature|preference_beta|max_retain_loss|width|depth|heads|min_k_fraction|forget_fraction|data.forget_size|"
  r"mesh.weights|repeats|memorization.(models|fraction|parallel)|membership_size|num_processes|watermark_key"
)
MAY_BE_ZERO = re.compile(r"(evaluate|warmup|l1_free)_epochs|method.alpha")
MAY_BE_NEGATIVE = {"sam.lamb", "method.margin"}


def wrong_values(name):
  """The values, as text of a command line, that a field may not have."""
  kind = FIELDS[name].kind
  if isinstance(kind, kinds.Several):
    few = ("()",) if kind.least else ()
    twice = {"data.forget_class": "(1, 1)", "text.suites": "('a', 'a')", "mask.fractions": "(0.5, 0.5)"}
    return *WRONG_ELEMENTS[type(kind.of)], *few, *([twice[name]] if name in twice else [])
  values = WRONG[type(kind)]
  if kind.optional:
    # Emptiness leaves an optional field unset.
    values = tuple(value for value in values if value not in ("None", ""))
  if name == "data.path":
    values = tuple(value for value in values if value != "../no/where/at/all")
  if isinstance(kind, kinds.Number):
    values += () if name in MAY_BE_NEGATIVE else ("-1", "-1e-3")
  if isinstance(kind, kinds.Number | kinds.Count) and POSITIVE.search(name) and not MAY_BE_ZERO.search(name):
    values += ("0",)
  return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a file, and a sweep of each configuration."""
  root = tmp_path_factory.mktemp("wrong")
  (root / "file").write_text("1")
  return root


@pytest.fixture(scope="module")
def contexts(folder):
  """{field: the arguments of a configuration that reads it}."""
  found = {}
  for file, *settings in CONTEXTS:
    arguments = [f"--config={file}", *(f"--config.{each}".replace("*", str(folder)) for each in settings)]
    values = command_line.parse(["test", *arguments])
    validation.validate(values.config, values.given)
    for name, field in FIELDS.items():
      if field.reader.holds(values.config):
        found.setdefault(name, arguments)
  return found


class Started(AssertionError):
  """A program went on after it had checked its command line."""


@pytest.fixture
def programs(monkeypatch, folder):
  """{name: (arguments of main) -> exit status}, without what follows the check of the command line."""

  def start(*args, **options):
    raise Started

  monkeypatch.setattr(experiment, "Experiment", start)
  monkeypatch.setattr(together, "run_members", start)
  monkeypatch.setattr(hardness, "analyse", start)
  monkeypatch.setattr(plan, "find_target", start)
  monkeypatch.setattr(local, "Runner", start)

  def run_sweep(arguments):
    config, *settings = (
      each.partition("=")[2] if each.startswith("--config=") else each for each in arguments
    )
    file = folder / "sweep.py"
    file.write_text(f"def get_sweep(): return {{'config': {config!r}}}\n")
    return sweep.run(["sweep", f"--config={file}", f"--workdir={folder / 'sweep'}", *settings])

  workdir = f"--workdir={folder / 'run'}"
  return {
    "main": lambda arguments: main.run(["main", *arguments, workdir]),
    "hardness": lambda arguments: hardness.run(["hardness", *arguments, workdir]),
    "together": lambda arguments: together.run(["together", *arguments, workdir]),
    "plan": lambda arguments: plan.run(["plan", "--topology=v5e:2x4", *arguments]),
    "sweep": run_sweep,
  }


def with_value(arguments, name, value):
  """The arguments with a field set anew."""
  flag = f"--config.{name}="
  return [*(each for each in arguments if not each.startswith(flag)), f"{flag}{value}"]


# `main` meets all values of each field, the other programs every fourth, from another start in each field.
@pytest.mark.parametrize("program", ["main", "hardness", "together", "plan", "sweep"])
def test_a_wrong_value_is_one_line_with_the_field_and_a_remedy(program, programs, contexts, folder, capsys):
  assert contexts.keys() == FIELDS.keys() - NEVER_READ
  failures, count = [], 0
  for number, name in enumerate(contexts):
    if program == "plan" and isinstance(FIELDS[name].kind, kinds.Path | kinds.OutputFolder):
      continue  # It reads no files.
    values = wrong_values(name)
    for value in values if program == "main" else values[number % 4 :: 4]:
      value = value.replace("*", str(folder))
      count += 1
      try:
        status = programs[program](with_value(contexts[name], name, value))
      except Exception as error:  # Whatever it is, it reaches the user as a traceback.
        status = repr(error)
      out, err = capsys.readouterr()
      one_line = err.startswith("error: ") and err.count("\n") == 1 and not out
      if status != 2 or not one_line or f"config.{name}" not in err or not REMEDY.search(err):
        failures.append((name, value, status, err[:300]))
  assert not failures, f"{len(failures)} of {count}: {failures[:20]}"
  assert count > (1000 if program == "main" else 200)
  assert not (folder / "run").exists()


# A legal value of each kind that is nobody's default.
LEGAL = {
  kinds.Number: 0.37,
  kinds.Count: 3,
  kinds.CountOrPair: (3, 2),
  kinds.Text: "other",
  kinds.Path: "other",
  kinds.OutputFolder: "other",
}


@pytest.mark.parametrize(
  "context", [(IMAGES,), (TEXTS,), (IMAGES, "method.name=retrain"), (TEXTS, "method.name=ft")]
)
def test_a_legal_value_is_read_or_refused(context):
  file, *settings = context
  arguments = ["test", f"--config={file}", *(f"--config.{each}" for each in settings)]
  plain = command_line.parse(arguments).config
  accepted = []
  for name, field in FIELDS.items():
    value = LEGAL.get(type(field.kind))
    if isinstance(field.kind, kinds.Flag):
      value = not field.default
    elif isinstance(field.kind, kinds.Choice):
      value = [each for each in field.kind.choices if each not in ("", field.default)][-1]
    if value is None or field.reader.holds(plain):
      continue
    values = command_line.parse([*arguments, f"--config.{name}={value}"])
    try:
      validation.validate(values.config, values.given)
      accepted.append(name)
    except UserError as error:
      assert f"config.{name}={value!r}: " in str(error)
  assert not accepted
