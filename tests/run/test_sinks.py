"""TensorBoard events read back by their file layout, and the calls that Weights & Biases gets."""

import struct
import sys
import types

import pytest

from hamu_jax.errors import UserError
from hamu_jax.run import sinks
from hamu_jax.run.rundir import RunDir, read_metrics

CONFIG = {"seed": 41, "wandb": {"project": ""}}


@pytest.fixture
def run(tmp_path):
  run = RunDir.open(tmp_path / "run", CONFIG)
  yield run
  run.close()


def _events(folder):
  """The events of one TensorBoard run, read by the TFRecord layout alone."""
  from tensorboardX.proto.event_pb2 import Event

  events = []
  for path in sorted(folder.iterdir(), key=lambda p: p.name.rsplit(".", 1)[-1]):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      events.append(Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return events


def test_tensorboard_scalars_and_histograms(run):
  run.write(
    "unlearn",
    3,
    "step",
    {"loss": 0.25, "angle": [0.0, 90.0, None], "none": None, "text": "x", "empty": [], "met": True},
  )
  run.write("retrain", 3, "test", {"accuracy": 0.5})
  events = _events(run.path / "tb" / "unlearn")
  values = {value.tag: value for event in events for value in event.summary.value}
  assert values.keys() == {"step/loss", "step/angle", "step/met"}
  assert values["step/loss"].simple_value == 0.25 and values["step/met"].simple_value == 1.0
  histogram = values["step/angle"].histo
  assert (histogram.num, histogram.min, histogram.max) == (2, 0.0, 90.0)
  assert [event.step for event in events if event.summary.value] == [3]
  assert [value.tag for event in _events(run.path / "tb" / "retrain") for value in event.summary.value] == [
    "test/accuracy"
  ]


def test_tensorboard_purges_what_a_resumed_stage_repeats(run):
  for step in range(3):
    run.write("unlearn", step, "step", {"loss": 1.0})
  run.close()
  again = RunDir.open(run.path, CONFIG)
  again.truncate("unlearn", 0)
  again.truncate("retrain", -1)  # has no events: nothing to purge
  again.write("unlearn", 1, "step", {"loss": 2.0})
  again.close()
  purges = [e.step for e in _events(run.path / "tb" / "unlearn") if e.session_log.status]
  assert purges == [1]
  assert len(list((run.path / "tb" / "unlearn").iterdir())) == 2
  assert not (run.path / "tb" / "retrain").exists()


def test_full_disk_under_tensorboard_is_said_once_and_the_run_goes_on(run, monkeypatch, capsys):
  """The library's own asynchronous writer would block for ever here."""
  import tensorboardX.record_writer

  monkeypatch.setattr(tensorboardX.record_writer, "open_file", lambda path: open("/dev/full", "wb"))
  for step in range(50):
    run.write("unlearn", step, "step", {"loss": 1.0})
  run.close()
  (note,) = capsys.readouterr().err.splitlines()
  assert "TensorBoardSink failed (" in note and "No space left" in note and "switched off" in note
  assert len(read_metrics(run.path).rows) == 50


class _Broken:
  """A sink that always raises, also something unheard of."""

  def write(self, stage, step, split, values):
    raise KeyError("unheard of")

  def rewind(self, stage, step):
    raise RuntimeError

  def close(self):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("first", ["write", "rewind", "close"])
def test_a_broken_sink_ends_nothing_and_keeps_no_other_from_its_rows(tmp_path, capsys, first):
  class Kept(list):
    write = lambda self, *row: self.append(row)
    rewind = lambda self, *at: self.append(at)
    close = lambda self: self.append("closed")

  kept, arguments = (
    Kept(),
    {"write": ("unlearn", 1, "step", {"loss": 1.0}), "rewind": ("unlearn", 1), "close": ()},
  )
  all_sinks = sinks.Sinks([_Broken(), kept])
  for name in (first, "write", "rewind", "close"):
    getattr(all_sinks, name)(*arguments[name])
  assert kept == [arguments[first] or "closed", arguments["write"], arguments["rewind"], "closed"]
  assert capsys.readouterr().err.count("_Broken failed") == 1


@pytest.mark.parametrize(
  "numbers", [[1e20] * 3, [3.4e38, 3.4e38], [-1e20], [0.0, 0.0], [1e20, 1e20 * (1 + 1e-15)]]
)
def test_equal_and_large_numbers_have_a_histogram(run, capsys, numbers):
  run.write("unlearn", 1, "step", {"norm": numbers})
  (value,) = [value for event in _events(run.path / "tb" / "unlearn") for value in event.summary.value]
  assert sum(value.histo.bucket) == len(numbers) == value.histo.num
  assert not capsys.readouterr().err


class _Wandb(types.ModuleType):
  """Records what the real module would be asked to do."""

  class Error(Exception):
    pass

  def __init__(self):
    super().__init__("wandb")
    self.started, self.rows, self.defined, self.finished = [], [], [], 0
    self.Histogram = lambda numbers: ("histogram", numbers)

  def init(self, **arguments):
    self.started.append(arguments)
    if arguments["mode"] == "broken":
      raise self.Error("no\nnetwork")
    return self

  def define_metric(self, name, step_metric=None):
    self.defined.append((name, step_metric))

  def log(self, row):
    self.rows.append(row)

  def finish(self):
    self.finished += 1


def _wandb_config(**section):
  section = {"project": "p", "name": "", "entity": "", "mode": "offline", **section}
  return {**CONFIG, "wandb": section}


def test_wandb_receives_the_rows_and_resumes_under_one_id(tmp_path, monkeypatch):
  wandb = _Wandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  for _ in range(2):
    run = RunDir.open(tmp_path / "run", _wandb_config(tags=("a", "b"), group="sweep"))
    run.write("unlearn", 2, "step", {"loss": 0.5, "angle": [1.0, None], "nan": float("nan")})
    run.close()
  first, second = wandb.started
  assert first["id"] == second["id"] and first["resume"] == "allow"
  assert (first["project"], first["name"], first["entity"]) == ("p", "run", None)
  assert (first["tags"], first["group"], first["notes"]) == (["a", "b"], "sweep", None)
  assert first["config"]["seed"] == 41
  assert wandb.rows[0] == {
    "unlearn/step": 2,
    "unlearn/step/loss": 0.5,
    "unlearn/step/angle": ("histogram", [1.0]),
  }
  assert ("unlearn/*", "unlearn/step") in wandb.defined and wandb.finished == 2


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"hamu-jax\[wandb\]"):
    RunDir.open(tmp_path / "run", _wandb_config())


def test_wandb_refusal_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", _Wandb())
  with pytest.raises(UserError, match=r"did not start \(no network\).*config.wandb.mode"):
    RunDir.open(tmp_path / "run", _wandb_config(mode="broken"))


def test_wandb_is_not_imported_unless_asked_for(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  RunDir.open(tmp_path / "run", CONFIG)
