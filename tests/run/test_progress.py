"""Progress on and off a terminal, and a table of results that lines up."""

import io
import re
import time

import numpy as np
import pytest

from hamu_jax.run import progress as progress_lib
from hamu_jax.run.progress import Progress
from hamu_jax.run.tables import results_table


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def _run(stream, steps=range(10, 101, 10), **options):
  with Progress("unlearn", 100, stream=stream, **options) as progress:
    for step in steps:
      progress.update(step, {"retain_loss": np.float32(0.25), "forget_loss": 1e9, "angle": [1, 2]})
  return stream.getvalue()


class _Clock:
  """Seconds that pass when a test says so."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def _drawn(text):
  """What a terminal was sent, without control sequences."""
  return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)


def test_off_a_terminal_lines_are_plain_and_rare():
  lines = _run(io.StringIO(), seconds_between_lines=60.0).splitlines()
  assert len(lines) == 2
  assert lines[0] == "unlearn: 0/100 steps"
  assert re.fullmatch(r"unlearn: 100/100 steps, .* steps/s, retain_loss 0.2500, forget_loss 1e\+09", lines[1])


def test_off_a_terminal_every_update_may_be_a_line():
  text = _run(io.StringIO(), seconds_between_lines=0.0)
  assert not {"\r", "\x1b"} & set(text) and text.endswith("\n")
  positions = [int(n) for n in re.findall(r"unlearn: (\d+)/100", text)]
  assert positions[:11] == list(range(0, 101, 10))


def test_a_terminal_has_one_line_that_redraws():
  text = _run(_Terminal())
  assert text.count("\n") == 1 and "100/100 steps" in text
  assert "retain_loss 0.2500" in text


def test_other_messages_begin_at_the_start_of_the_line():
  """Libraries write to the terminal themselves: the cursor rests where nothing of the line is before them."""
  stream = _Terminal()
  with Progress("unlearn", 100, stream=stream) as progress:
    progress.phase("compiling")
    deadline = time.monotonic() + 10
    while "compiling" not in stream.getvalue():
      assert time.monotonic() < deadline
      time.sleep(0.01)
    drawn = _drawn(stream.getvalue())
    # A process that is killed leaves the cursor visible.
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
  assert drawn.endswith("\r") and "\n" not in drawn


def test_the_line_of_a_terminal_fits_its_width(monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  last = re.split(r"[\r\n]+", _drawn(_run(_Terminal())).strip())[-1]
  assert len(last) <= 60 and re.match("unlearn .* 100/100 steps ", last), last


def test_what_starts_within_takes_the_place():
  stream = io.StringIO()
  with Progress("unlearn", 100, stream=stream, seconds_between_lines=0.0) as outer:
    with Progress("evaluating original 1/2", stream=stream):
      outer.update(10)
    outer.update(20)
  positions = [line.partition(" steps")[0] for line in stream.getvalue().splitlines()]
  assert list(dict.fromkeys(positions)) == ["unlearn: 0/100", "evaluating original 1/2", "unlearn: 20/100"]


def test_the_clock_goes_on_while_nothing_changes(monkeypatch):
  """The work sleeps; a thread says how long it has taken."""
  monkeypatch.setattr(progress_lib, "_TICK_SECONDS", 0.01)
  stream, clock = io.StringIO(), _Clock()
  with Progress("unlearn", 100, stream=stream, clock=clock) as progress:
    progress.phase("compiling")
    clock.now += 65
    deadline = time.monotonic() + 10
    while "1:05" not in stream.getvalue():
      assert time.monotonic() < deadline
      time.sleep(0.01)
  assert "unlearn, compiling: 0/100 steps, 1:05\n" in stream.getvalue()


def test_a_resumed_stage_starts_where_it_was():
  text = _run(io.StringIO(), steps=(), initial=40)
  assert text.startswith("unlearn: 40/100 steps")


def test_a_stage_that_stops_early_shows_where():
  assert "unlearn: 30/100" in _run(io.StringIO(), steps=(10, 30)).splitlines()[-1]


@pytest.mark.parametrize("stream", (io.StringIO(), _Terminal()))
def test_other_hosts_show_nothing(stream):
  assert _run(stream, enabled=False) == ""


def test_phases_are_said_until_the_next_update():
  stream = io.StringIO()
  with Progress("unlearn", 100, stream=stream, seconds_between_lines=60.0) as progress:
    progress.phase("compiling")
    progress.update(10)
    for _ in range(5):
      progress.phase("evaluating")
      progress.phase("")
  # A phase is news only once.
  assert stream.getvalue().splitlines() == [
    "unlearn: 0/100 steps",
    "unlearn, compiling: 0/100 steps",
    "unlearn, evaluating: 10/100 steps",
    "unlearn: 10/100 steps",
  ]


def test_the_remaining_time_is_that_of_steps():
  """The first step takes a minute to compile, the others a second each, and evaluations half a minute."""
  stream, clock = io.StringIO(), _Clock()
  with Progress("unlearn", 100, stream=stream, clock=clock) as progress:
    clock.now += 60
    progress.update(1)
    for step in range(2, 12):
      progress.phase("evaluating")
      clock.now += 30
      progress.phase("")
      clock.now += 1
      progress.update(step)
  lines = stream.getvalue().splitlines()
  assert lines[1] == "unlearn: 1/100 steps, 1:00"
  assert lines[-1] == "unlearn: 11/100 steps, 6:10, 1 steps/s, 1:29 left"


@pytest.mark.parametrize(
  "seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_clock_text(seconds, text):
  assert progress_lib.clock_text(seconds) == text


def test_names_on_the_display():
  stream = io.StringIO()
  with Progress("pretrain", 2, stream=stream, shown={"retain_loss": "loss"}) as progress:
    progress.update(2, {"retain_loss": 0.5, "forget_loss": 3})
  assert stream.getvalue().splitlines()[-1].endswith(", loss 0.5000")


@pytest.mark.parametrize("argument", ["--help", "--config.distributed.coordinator=auto"])
def test_a_program_that_starts_says_so_unless_it_should_not(argument, capsys):
  with progress_lib.starting(["main", "--config=a.py"]):
    pass
  assert capsys.readouterr() == ("starting\n", "")
  with progress_lib.starting(["main", argument]):
    pass
  assert capsys.readouterr() == ("", "")


def test_updates_without_metrics():
  stream = io.StringIO()
  with Progress("retrain", 2, stream=stream) as progress:
    progress.update(2)
  assert "retrain: 2/2" in stream.getvalue()


# The table


def _model(accuracy, loss, **more):
  split = {"accuracy": accuracy, "loss": loss, "entropy": 0.1, "count": 10}
  return {"retain": split, "forget": split, "test": split, "forget_test_auc": 0.75} | more


def _summary(**results):
  return {
    "method": "hamu-q",
    "results": results,
    "seconds": {"pretrain": 123.44, "retrain": 99.0, "unlearn": 1.25},
  }


FULL = _summary(
  original=_model(0.9, 0.5, tug_of_war=0.25),
  retrained=_model(0.8, 1.5),
  unlearned=_model(1.0, 123456.789, tug_of_war=1.0),
)


def _cells(line):
  return re.split(r"\s{2,}", line.strip())


def test_values_and_rows():
  *_, original, retrained, unlearned = results_table(FULL).splitlines()
  assert _cells(original) == ["original", *3 * ["90.00", "0.5000"], "0.7500", "0.2500", "123.4"]
  assert _cells(retrained)[-3:] == ["0.7500", "-", "99.0"]
  assert _cells(unlearned)[:3] == ["unlearned", "100.00", "1.235e+05"]


@pytest.mark.parametrize(
  "summary",
  (
    FULL,
    _summary(original=_model(0.9, 0.5), unlearned=_model(0.1, 2.0)),
    _summary(unlearned={}),
    _summary(unlearned=_model(None, None, tug_of_war=None)),
    _summary(original=_model(1e-9, 1e300), unlearned=_model(1.0, -1e-300)),
    _summary(original=_model(0.9, 0.5, test_retain={"accuracy": 0.5}), retrained=_model(1, 2)),
    _summary(
      **{
        name: _model(
          1,
          2,
          tug_of_war=0.5,
          membership={"confidence": 0.5},
          test_retain={"accuracy": 1.0},
          test_forget={"accuracy": 1.0},
        )
        for name in ("original", "retrained", "unlearned")
      }
    ),
    {"results": {}},
  ),
)
@pytest.mark.parametrize("width", [60, 100])
def test_columns_line_up_within_the_width(summary, width):
  for block in results_table(summary, width).split("\n\n"):
    lines = block.splitlines()
    assert len(lines) == 3 + len(summary["results"])
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= width
    # Right-aligned: where a column ends in one line, it ends in all of them.
    ends = {match.end() for match in re.finditer(r"\S+(?=\s{2}|$)", lines[1])}
    for line in lines[3:]:
      first = re.match(r"\S+", line).end()
      row_ends = {match.end() for match in re.finditer(r"\S+", line) if match.end() > first}
      assert row_ends == ends


def test_columns_that_do_not_fit_come_below():
  above, below = results_table(FULL, 70).split("\n\n")
  assert _cells(above.splitlines()[-1]) == ["unlearned", *3 * ["100.00", "1.235e+05"]]
  assert _cells(below.splitlines()[-1]) == ["unlearned", "0.7500", "1.0000", "1.2"]
  assert "\n\n" not in results_table(FULL, 120)


def test_missing_row_and_missing_values():
  table = results_table(_summary(unlearned=_model(None, None)))
  assert "retrained" not in table and "original" not in table
  row = _cells(table.splitlines()[-1])
  assert row == ["unlearned"] + 6 * ["nan"] + ["0.7500", "-", "1.2"]


def test_classes_that_are_kept_and_forgotten_have_their_own_columns():
  split = {"test_retain": {"accuracy": 0.5}, "test_forget": {"accuracy": 0.125}}
  lines = results_table(_summary(unlearned=_model(0.9, 0.5) | split), width=120).splitlines()
  assert "kept" in lines[1] and "forgotten" in lines[1]
  assert _cells(lines[-1])[7:9] == ["50.00", "12.50"]


def test_membership_has_a_column_where_it_was_inferred():
  """The share of the forget set that the attack by confidence takes for rows the model never saw."""
  attacks = {"correctness": 0.1, "confidence": 0.375, "entropy": 0.2, "modified_entropy": 0.3, "prob": 0.4}
  lines = results_table(
    _summary(original=_model(0.9, 0.5), unlearned=_model(0.9, 0.5, membership=attacks, tug_of_war=0.5))
  ).splitlines()
  assert _cells(lines[0])[-3:] == ["forget/test", "unseen", "tug of"]
  assert _cells(lines[1])[-4:] == ["loss AUC", "% MIA", "war", "seconds"]
  original, unlearned = lines[-2:]
  assert _cells(original)[-3:] == ["-", "-", "123.4"]
  assert _cells(unlearned)[-3:] == ["37.50", "0.5000", "1.2"]
  assert "MIA" not in results_table(FULL)
