"""Evaluates a model without training one.

  python -m hamu_jax.evaluate --config=configs/digits_hamu.py --model=runs/digits/unlearned \\
      --retrained=runs/digits --workdir=runs/evaluation

evaluates the model on the sets of the configuration and writes `evaluation.json`. `--model` is

- of images: a safetensors file with PyTorch's names, a folder that holds `model.safetensors`, RUN/MODEL for a
  model of a run directory (original, retrained, unlearned, kept/unlearn-000200), or a run directory for its
  unlearned model;
- of language models: the folder of an adapter in PEFT's format, RUN/MODEL, a run directory, or what
  `config.language.path` may be (a Hugging Face folder or hub id), whose adapter `--adapter` may name.

`--retrained` is another such model; the results are then compared with its results. `--config.FIELD=VALUE`
sets fields as for `hamu_jax.main`. If memorization scores that are yet to be estimated choose the forget set,
they are estimated first.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from hamu_jax.config import command_line as config_command_line
from hamu_jax.config import modalities, validation
from hamu_jax.errors import UserError
from hamu_jax.experiment import experiment, given, results, stage_plan
from hamu_jax.models import peft_config
from hamu_jax.run import command_line, disk, hosts, preemption, tables
from hamu_jax.run import rundir as rundir_lib
from hamu_jax.run.stage_cache import fingerprint

Tree = Any
FILE = "evaluation.json"
_MODEL = "model"


def evaluate(
  config: Any, workdir: pathlib.Path, watch: preemption.Watch, *, model: str, adapter: str, retrained: str
) -> dict[str, Any]:
  """Evaluates a model, writes `evaluation.json` and prints the table.

  Args:
    config: validated configuration; the method and its fields do not count.
    workdir: folder for the results and, unless `config.stage_cache` names another, cached evaluations.
    watch: watcher of signals.
    model: the model, see the module.
    adapter: its adapter; "" without one.
    retrained: model to compare with; "" for none.

  Returns:
    The content of `evaluation.json`.

  Raises:
    UserError: a model is missing, or does not fit the configuration.
  """
  config = config.copy_and_resolve_references()
  # Nothing is trained or read for the stages of a run.
  config.update(retrain=False, retrained="")
  config.method.name = "none"
  config.model.weights = config.mask.path = ""
  config.mask.fraction = 0.0
  option, weights = ("--adapter", adapter) if adapter else ("--model", model)
  if modalities.is_language(config) and (adapter or not _is_adapter(model)):
    config.language.path, weights = model, adapter
  run = experiment.Experiment(config, workdir, watch, record=False)
  prepared = run.prepared
  models, keys = {}, {}
  with watch.nothing_to_save():
    for name, field, path, of_run in (
      (_MODEL, option, weights, "unlearned"),
      ("retrained", "--retrained", retrained, "retrained"),
    ):
      if path:
        models[name] = given.read(prepared.task, field, path, of_run)
        keys[name] = stage_plan.given_key(
          stage_plan.model_inputs(config, prepared.task), prepared.task, path, of_run
        )
    if not weights:
      # A new adapter changes nothing of its base.
      models = {_MODEL: prepared.init(config.seed), **models}
      keys[_MODEL] = fingerprint(stage_plan.model_inputs(config, prepared.task) | {"weights": None})
  run.stages.prepare()
  prepared.plan.keys.update({"retrain" if name == "retrained" else name: key for name, key in keys.items()})
  values, examples = results.evaluate_models(run.stages, models)
  evaluation = {
    "models": {"model": model, "adapter": adapter, "retrained": retrained},
    "results": values,
    "provenance": results.origin(prepared),
  }
  if hosts.is_writer():
    with disk.writing(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      results.leave_examples(workdir, examples)
      rundir_lib.write_json(workdir / FILE, evaluation)
    tables.print_results(evaluation)
    print(f"{model}: everything is in {workdir / FILE}")
  return evaluation


def _is_adapter(path: str) -> bool:
  """Whether a path leads to an adapter, of which a run directory holds several."""
  return (pathlib.Path(given.find(path, "unlearned")) / peft_config.CONFIG_FILE).is_file()


def _run(arguments: Sequence[str]) -> None:
  parser = command_line.Parser(add_help=False)
  for option in ("--model", "--adapter", "--retrained"):
    parser.add_argument(option, default="")
  options, rest = parser.parse_known_args(arguments[1:])
  values = config_command_line.parse([arguments[0], *rest])
  validation.validate(values.config, values.given)
  if not options.model:
    raise UserError("--model is missing; give a file or folder of weights, or a run directory")
  if options.adapter and not modalities.is_language(values.config):
    raise UserError(
      f"--adapter={options.adapter}: adapters are for language models; give the weights as --model"
    )
  hosts.initialize(values.config.distributed)
  with preemption.Watch() as watch:
    evaluate(values.config, config_command_line.workdir_of(values), watch, **vars(options))


def run(arguments: Sequence[str]) -> int:
  """Parses a command line and evaluates.

  Args:
    arguments: as `sys.argv`, the program's name first.

  Returns:
    The exit status: 0, or 2 for bad input.
  """
  return command_line.run(lambda: _run(arguments), arguments, lambda: __doc__)
