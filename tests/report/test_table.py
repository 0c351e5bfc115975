"""A table in each of its formats."""

import csv
import io
import math
import re

import numpy as np
import pytest

from hamu_jax.report import table as table_lib
from hamu_jax.report.study import Estimate
from tests.report import reported


def test_markdown_has_one_line_a_row(runs):
  lines = table_lib.markdown(reported.tables(runs)["runs"]).splitlines()
  assert len(lines) == 2 + 5
  assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
  assert r"finished \| &lt;b&gt;" in lines[2]
  lines = table_lib.markdown(reported.tables(runs)["results"]).splitlines()
  assert lines[1].startswith("| --- | --- | ---: |")
  assert lines[5].startswith("| hamu-q | 3 | 0.6667 ± 0.2082 | 0.00 ± 0.00 | 66.67 ± 20.82 |")


def test_a_column_has_one_format():
  numbers = [table_lib.Number(Estimate(mean, std, 2), 4) for mean, std in ((0.5, 1e-9), (0, 0), (1e-7, 0.25))]
  rows = table_lib.with_one_format(
    [("a", number, table_lib.Number(Estimate(1, 1e-9, 2), 2)) for number in numbers]
  )
  assert [row[1].text() for row in rows] == [
    "5.00e-01 ± 1.00e-09",
    "0.00e+00 ± 0.00e+00",
    "1.00e-07 ± 2.50e-01",
  ]
  # A deviation alone does not change the format.
  assert {row[2].text() for row in rows} == {"1.00 ± 0.00"} and rows[0][0] == "a"


def test_csv_has_every_digit(runs):
  rows = list(csv.DictReader(io.StringIO(table_lib.comma_separated(reported.tables(runs)["values"]))))
  row = rows[-1]
  assert row["method"] == "hamu-q"
  assert float(row["forget.accuracy mean"]) == np.mean([0.5, 0.6, 0.9])
  assert float(row["forget.accuracy std"]) == np.std([0.5, 0.6, 0.9], ddof=1)
  assert row["forget.accuracy n"] == "3"
  assert rows[2]["method"] == "ft" and rows[2]["forget.accuracy std"] == ""
  assert rows[1]["tug_of_war mean"] == ""


def test_latex_has_no_special_character_of_its_text(runs):
  text = table_lib.latex(reported.tables(runs)["runs"])
  body = [line for line in text.splitlines()[1:] if line.endswith(r"\\")]
  assert len(body) == 1 + 5
  assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1
  assert not re.search(r"(?<!\\)[%#_]", "\n".join(text.splitlines()[1:]))
  text = table_lib.latex(reported.tables(runs)["results"])
  assert r"$66.67 \pm 20.82$" in text and r"retain acc \%" in text
  assert text.count("{") == text.count("}")
  assert r"$1.00\mathrm{e}{-}06 \pm" in table_lib.latex(reported.tables(runs)["losses"])


def test_a_number_that_is_not_finite_is_a_word():
  number = table_lib.Number(Estimate(math.nan, math.nan, 2), 2)
  table = table_lib.Table("a", "A", ("x",), ((number,),))
  assert "| nan |" in table_lib.markdown(table)
  assert "  nan " in table_lib.latex(table)
  assert table_lib.comma_separated(table) == "x mean,x std,x n\nnan,nan,2\n"


HOSTILE = [
  "=1+1",
  "+cmd|' /C calc'!A0",
  "-2+3",
  "@SUM(1)",
  "\t=1",
  "a\nb",
  "a\r\n| b | c |",
  "<img src=x onerror=alert(1)>",
  "[x](javascript:alert(1))",
  "`a`",
  "a|b",
  "a\u2028b",
  "[1]",
  "\\\\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_break_no_format_and_are_no_formula_markup_or_link(text):
  table = table_lib.Table("a", "A", (text, "x"), ((text, "1"), ("b", "2")))
  lines = table_lib.markdown(table).splitlines()
  assert len(lines) == 4
  assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}
  assert not re.search(r"<|(?<!\\)(?:\\\\)*[\[\]`]", "\n".join(lines))
  rows = list(csv.reader(io.StringIO(table_lib.comma_separated(table))))
  assert len(rows) == 3 and {len(row) for row in rows} == {2}
  assert not re.match(r"[=+\-@\t\r]", rows[1][0]) and rows[0][0] == rows[1][0]
  assert len([line for line in table_lib.latex(table).splitlines() if line.endswith(r"\\")]) == 3
  assert not re.match(r"\s*\[", table_lib.latex(table).splitlines()[5])


@pytest.mark.parametrize("text", ["-1", "+0.5", "-1e-05", "0.1"])
def test_numbers_in_csv_stay_numbers(text):
  table = table_lib.Table("a", "A", ("x",), ((text,),))
  assert table_lib.comma_separated(table) == f"x\n{text}\n"
