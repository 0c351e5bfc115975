"""Each text source on small files, what becomes of its rows, and every refusal in one line."""

import json

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamu_jax.data import authors
from hamu_jax.data.text import TEXT_SOURCES, load
from hamu_jax.errors import UserError


def _rows(name, count, start=0, **columns):
  """`count` questions that say where they are from; a column's function makes its cells."""
  return [
    {
      "question": f"{name} {row}?",
      "answer": f"{name} {row}.",
      **{key: make(f"{name} {row}") for key, make in columns.items()},
    }
    for row in range(start, start + count)
  ]


def _answers(name, rows):
  return tuple(f"{name} {row}." for row in rows)


COMPLETE = {
  "paraphrased_answer": lambda text: f"It is {text}.",
  "perturbed_answer": lambda text: [f"{text} {wrong}." for wrong in "xyz"],
}
FULL = _rows("full", 20)
TOFU = {
  "full": FULL,
  "retain90": FULL[:16],
  "forget10": FULL[16:],
  "forget10_perturbed": _rows("full", 4, 16, **COMPLETE)[::-1],
  "retain_perturbed": _rows("full", 5, 8, **COMPLETE),
  "holdout10": _rows("new", 4),
  "real_authors": _rows("real", 3),
  "real_authors_perturbed": _rows("real", 3, perturbed_answer=COMPLETE["perturbed_answer"]),
}


def _write(path, rows):
  """One file, of the kind that its suffix names."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".parquet":
    pq.write_table(pa.Table.from_pylist(rows), path)
  elif path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
  else:
    path.write_text(json.dumps(rows, indent=1), "utf-8")


def _folder(folder, tables, suffix=".jsonl"):
  for name, rows in tables.items():
    _write(folder / f"{name}{suffix}", rows)
  return str(folder)


@pytest.fixture
def tofu(tmp_path):
  return _folder(tmp_path / "tofu", TOFU)


def _refused(source, message, **options):
  with pytest.raises(UserError, match=message) as error:
    load(source, **options)
  assert "\n" not in str(error.value)


def _hub(monkeypatch, configurations, info=None):
  """Replaces the hub: {configuration: {split: rows}}, an exception, or what it says of the id."""
  calls = []

  def load_dataset(name, subset, cache_dir):
    assert cache_dir is None
    calls.append((name, subset))
    if isinstance(configurations, Exception):
      raise configurations
    if subset not in configurations:  # The words of `datasets`.
      raise ValueError(f"BuilderConfig '{subset}' not found. Available: {list(configurations)}")
    return datasets.DatasetDict(
      {split: datasets.Dataset.from_list(rows) for split, rows in configurations[subset].items()}
    )

  def dataset_info(self, name, timeout):
    assert timeout <= 10
    if info is not None:
      raise info

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
  return calls


# --- what every source goes through ---


def test_unknown_choices_name_all():
  _refused("autors", r"config.data.source='autors' \(did you mean 'authors'\?\)")
  _refused("?", "choose one of authors, tofu, waterdrum, question_answer, text")
  _refused("authors", "duplicates='twice': choose one of none, exact, sem", duplicates="twice")
  assert set(TEXT_SOURCES) == {"authors", "tofu", "waterdrum", "question_answer", "text"}


@pytest.mark.parametrize(
  "spec, rows",
  [
    ("full", range(20)),
    ("full[3:5]", (3, 4)),
    ("full[17:]", (17, 18, 19)),
    ("full[:2]", (0, 1)),
    ("full[-2:]", (18, 19)),
    ("full[:-18]", (0, 1)),
    ("full[:10%]", (0, 1)),
    ("full[18:90]", (18, 19)),  # As `datasets` has it.
    ("full[:1] + full[2:3]", (0, 2)),
  ],
)
def test_rows_are_sliced_as_datasets_does(tofu, spec, rows):
  options = {"question_key": "question", "answer_key": "answer", "retain_split": "holdout10"}
  split = load("tofu", path=tofu, forget_split=spec, **options).splits["forget"]
  assert split.answers == _answers("full", rows)
  assert split.prompts == tuple(f"full {row}?" for row in rows)


@pytest.mark.parametrize("spec", ["full[", "full[1]", "", "[1:2]", "full[:300%]", "full-[1:2]"])
def test_what_is_no_slice_is_refused(tofu, spec):
  message = r"config.text.forget_split='.*names no rows.*such as 'forget10\[300:400\]'"
  _refused("tofu", message, path=tofu, forget_split=spec)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
  rows = _rows("forget", 30, **COMPLETE, owner=lambda text: text[-1])
  return _folder(tmp_path_factory.mktemp("numbered"), {"forget": rows, "retain": rows[:1]})


@given(size=st.integers(1, 20), larger=st.integers(0, 10), seed=st.integers(0, 2**32 - 1))
def test_draws_are_ordered_nested_and_seeded(numbered, size, larger, seed):
  everything, small, large = (
    load(
      "question_answer",
      path=numbered,
      retain_split="retain",
      duplicates="exact",
      forget_size=count,
      seed=seed,
    ).splits["forget"]
    for count in (0, size, size + larger)
  )
  places = [everything.prompts.index(prompt) for prompt in large.prompts]
  assert places == sorted(set(places)) and len(places) == size + larger
  assert set(small.prompts) <= set(large.prompts) and len(small.prompts) == size
  for whole, drawn in zip(everything, large, strict=True):
    assert drawn == tuple(whole[place] for place in places)


def test_draws_depend_on_the_seed_and_may_not_exceed_the_split(tofu):
  options = {"path": tofu, "forget_split": "forget10", "test_split": "holdout10"}
  draws = {load("tofu", **options, retain_size=8, seed=seed).splits["retain"] for seed in range(4)}
  assert len(draws) > 1 and {len(split.answers) for split in draws} == {8}
  _refused("tofu", "config.text.retain_size=17: choose 1..16", **options, retain_size=17)
  _refused("tofu", "config.text.forget_size=-1: choose 1..4", **options, forget_size=-1)
  _refused("tofu", "config.text.test_size=5: choose 1..4", **options, test_size=5)
  del options["test_split"]
  _refused("tofu", "test_size=5 needs config.text.test_split", **options, test_size=5)


def test_fingerprint_changes_with_anything_in_it(tmp_path):
  def of(forget=("forget", 3), **options):
    rows = {"retain": _rows("retain", 3), "forget": _rows(*forget, **COMPLETE)}
    rows["other"] = _rows("other", 1)
    path = _folder(tmp_path / "data", rows)
    options = {"forget_split": "forget", "retain_split": "retain"} | options
    return load("question_answer", path=path, **options).fingerprint

  def with_changed(field):
    rows = _rows("forget", 3, **COMPLETE, owner=lambda text: "someone")
    rows[1][field] = ["1", "2", "3"] if field == "perturbed_answer" else "else"
    path = _folder(tmp_path / field, {"forget": rows, "retain": _rows("retain", 3)})
    return load("question_answer", path=path, retain_split="retain").fingerprint

  everything = [
    *map(with_changed, _rows("forget", 1, **COMPLETE, owner=str)[0]),
    of(),
    of(("forget", 2)),
    of(("forgot", 3)),
    of(retain_split="retain[:2]", suites=("other",)),
    of(test_split="forget[2:]", forget_split="forget[:2]"),
    of(retain_split="retain[1:]"),
    of(retain_split="retain[:2]"),
    of(retain_size=2),
    of(answer_key="paraphrased_answer", forget_split="forget[:2]", retain_split="forget[2:]"),
    of(forget_split="forget[:2]", retain_split="forget[2:]"),
    of(duplicates="exact"),
    of(duplicates="semantic"),
  ]
  assert len(set(everything)) == len(everything) and of() == everything[5]
  assert all(len(digest) == 64 for digest in everything)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"answer": ""}, "answer_key: row 2 of 'forget' has an empty answer"),
    ({"answer": None}, "answer_key: row 2 of 'forget' has an empty answer"),
    ({"question": " \n"}, "question_key: row 2 of 'forget' has an empty question"),
    ({"answer": 7}, "row 2 of 'forget' has the answer '7', which is int, not text"),
    ({"perturbed_answer": ["a"]}, "row 2 of 'forget' has 1 perturbed_answers, row 0 has 3"),
    ({"perturbed_answer": []}, "row 2 of 'forget' has no list of perturbed_answers"),
    ({"perturbed_answer": None}, "row 2 of 'forget' has no list of perturbed_answers"),
    ({"perturbed_answer": "abc"}, "row 2 of 'forget' has no list of perturbed_answers"),
    ({"perturbed_answer": ["a", "", "b"]}, "row 2 of 'forget' has an empty perturbed_answer"),
    ({"paraphrased_answer": ""}, "row 2 of 'forget' has an empty paraphrased_answer"),
    ({"owner": None}, "row 2 of 'forget' has no owner"),
  ],
)
def test_bad_rows_are_refused(tmp_path, change, message):
  rows = _rows("forget", 4, **COMPLETE, owner=lambda text: 3)
  rows[2] |= change
  path = _folder(tmp_path, {"forget": rows, "retain": _rows("retain", 2)})
  _refused("question_answer", message, path=path, retain_split="retain")
  # A key that a row lacks is no different from an empty one.
  if list(change.values()) == [None]:
    del rows[2][next(iter(change))]
    _folder(tmp_path, {"forget": rows})
    _refused("question_answer", message, path=path, retain_split="retain")
  # Rows that are not read are not judged, and are counted from the split's first.
  load("question_answer", path=path, retain_split="retain", forget_split="forget[:2]")
  options = {"retain_split": "retain", "forget_split": "forget[1:]"}
  _refused("question_answer", "row 2 of", path=path, **options)


def test_unknown_columns_are_refused_and_listed(tofu):
  for field in ("question_key", "answer_key"):
    message = f"config.text.{field}='text' is not a column of 'forget10': choose from question, answer"
    _refused("tofu", message, path=tofu, forget_split="forget10", **{field: "text"})


def test_a_text_in_two_roles_is_refused(tofu):
  options = {"path": tofu, "forget_split": "forget10[1:]"}
  message = r"forget_split: 2 of its rows are also in the retain set, .*row 1 \('full 18.'\).*dupl"
  _refused("tofu", message, **options, retain_split="full[18:]")
  load("tofu", **options, retain_split="full[18:]", duplicates="exact")
  for options["duplicates"] in ("none", "exact"):
    message = "test_split: 1 of its rows are also in the forget set, .*'full 17.'"
    _refused("tofu", message, **options, retain_split="full[:5]", test_split="full[15:18]")
    message = "test_split: 2 of its rows are also in the retain set"
    _refused("tofu", message, **options, retain_split="full[:5]", test_split="full[3:7]")


def test_suites_may_not_take_the_place_of_others(tofu):
  options = {"path": tofu, "forget_split": "forget10"}
  message = "config.text.suites: 'real_authors.1:.' would be the second split named 'real_authors'"
  _refused("tofu", message, **options, suites=("real_authors", "real_authors[1:]"))
  message = "'retain' would be the second split named 'retain'"
  _refused("authors", message, suites=("retain",))


def test_own_columns_say_whose_a_row_is(tmp_path):
  for owner in ("owner", "author"):
    rows = _rows("forget", 2, **{owner: lambda text: text[-1]})
    path = _folder(tmp_path / owner, {"forget": rows, "retain": _rows("retain", 2)})
    splits = load("question_answer", path=path, retain_split="retain").splits
    assert splits["forget"].owners == ("0", "1") and splits["retain"].owners is None


# --- duplicates ---


def test_exact_duplicates_are_the_chosen_forget_rows(tofu):
  options = {"path": tofu, "forget_split": "forget10", "forget_size": 2, "retain_size": 3}
  plain, with_copies = (
    load("tofu", **options, duplicates=duplicates).splits for duplicates in ("none", "exact")
  )
  assert with_copies["forget"] == plain["forget"] and len(plain["forget"].answers) == 2
  assert with_copies["retain"].answers == plain["retain"].answers + plain["forget"].answers
  assert with_copies["retain"].prompts == plain["retain"].prompts + plain["forget"].prompts


def test_semantic_duplicates_are_paraphrased(tofu):
  splits = load("tofu", path=tofu, forget_split="forget10", duplicates="semantic").splits
  assert splits["retain"].answers[:16] == _answers("full", range(16))
  assert splits["retain"].answers[16:] == tuple(f"It is full {row}." for row in range(16, 20))
  assert splits["retain"].prompts[16:] == splits["forget"].prompts
  message = "duplicates='semantic': the forget set has no paraphrased answers"
  _refused("tofu", message, path=tofu, forget_split="retain90[:2]", duplicates="semantic")


# --- TOFU ---


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_tofu_files(tmp_path, suffix):
  path = _folder(tmp_path, TOFU, suffix)
  options = {"forget_split": "forget10", "test_split": "holdout10", "suites": ("real_authors",)}
  splits = load("tofu", path=path, retain_split="retain90", **options).splits
  assert list(splits) == ["retain", "forget", "test", "real_authors"]
  assert splits["retain"].answers == _answers("full", range(16))
  assert splits["test"].answers == _answers("new", range(4))
  # The wrong answers are those of the question, whatever the order of their file.
  assert splits["forget"].answers == _answers("full", range(16, 20))
  assert splits["forget"].paraphrased == tuple(f"It is full {row}." for row in range(16, 20))
  for row, wrong in enumerate(splits["forget"].perturbed, 16):
    assert wrong == (f"full {row} x.", f"full {row} y.", f"full {row} z.")
  for role in ("retain", "test"):
    assert splits[role].perturbed is splits[role].paraphrased is splits[role].owners is None
  assert splits["real_authors"].perturbed[1] == ("real 1 x.", "real 1 y.", "real 1 z.")
  assert splits["real_authors"].paraphrased is None


def test_tofu_layouts_read_the_same(tmp_path, tofu):
  for name, rows in TOFU.items():
    _write(tmp_path / "folders" / name / "train-00000-of-00002.parquet", rows[:1])
    _write(tmp_path / "folders" / name / "train-00001-of-00002.parquet", rows[1:])
    # The files called .json on TOFU's page are JSON lines.
    lines = tmp_path / "hub" / "part" / f"{name}.json"
    _write(lines.with_suffix(".jsonl"), rows)
    lines.with_suffix(".jsonl").rename(lines)
  options = {"forget_split": "forget10[1:]", "suites": ("retain_perturbed", "real_authors[:2]")}
  expected = load("tofu", path=tofu, **options)
  assert load("tofu", path=str(tmp_path / "folders"), **options) == expected
  assert load("tofu", path=str(tmp_path / "hub"), subset="part", **options) == expected


def test_tofu_retains_all_that_is_not_forgotten(tofu):
  splits = load("tofu", path=tofu, forget_split="forget10[:2]").splits
  assert splits["retain"].answers == _answers("full", (*range(16), 18, 19))
  splits = load("tofu", path=tofu, forget_split="full[2:5]+full[10:]").splits
  assert splits["retain"].answers == _answers("full", (0, 1, 5, 6, 7, 8, 9))
  message = "retain_split='' means all rows but those of .*'full', which leaves none"
  _refused("tofu", message, path=tofu, forget_split="full")
  _refused("tofu", message.replace("full", "retain90.forget10"), path=tofu, forget_split="retain90+forget10")
  message = "retain_split='' .*4 of these are not in the source's split 'full'"
  _refused("tofu", message, path=tofu, forget_split="holdout10")


def test_tofu_retain_perturbed_completes_only_what_it_covers(tofu):
  options = {"path": tofu, "forget_split": "forget10"}
  covered = load("tofu", **options, retain_split="retain90[8:12]").splits["retain"]
  assert covered.paraphrased == tuple(f"It is full {row}." for row in range(8, 12))
  assert load("tofu", **options, retain_split="retain90[7:12]").splits["retain"].perturbed is None
  suite = load("tofu", **options, suites=("retain_perturbed",)).splits["retain_perturbed"]
  assert suite.answers == _answers("full", range(8, 13)) and suite.perturbed is not None
  suite = load("tofu", **options, suites=("retain90[:3]",)).splits["retain90"]
  assert suite.answers == _answers("full", range(3))


def test_tofu_wrong_answers_must_be_to_the_questions(tmp_path):
  path = _folder(tmp_path, TOFU | {"forget10_perturbed": _rows("other", 4, **COMPLETE)})
  message = "forget_split: 'full 16.' of 'forget10' is not among the questions of 'forget10_pert"
  _refused("tofu", message, path=path, forget_split="forget10")


def test_tofu_questions_asked_twice_are_told_apart_by_their_answers(tmp_path):
  rows = _rows("a", 2, **COMPLETE)
  for row in rows:
    row["question"] = "Who?"
  plain = [{key: row[key] for key in ("question", "answer")} for row in rows]
  tables = {"forget01": plain, "forget01_perturbed": rows[::-1], "retain99": _rows("b", 2)}
  options = {"path": _folder(tmp_path, tables), "retain_split": "retain99"}
  forget = load("tofu", forget_split="forget01", **options).splits["forget"]
  assert forget.paraphrased == ("It is a 0.", "It is a 1.")
  plain[1]["answer"] = "someone else"
  _folder(tmp_path, {"forget01": plain})
  _refused("tofu", "'Who.' of 'forget01' is not among", forget_split="forget01", **options)


def test_tofu_answers_may_differ_where_the_question_tells(tmp_path):
  rows = _rows("a", 2, **COMPLETE)
  plain = [row | {"answer": row["answer"] + " "} for row in _rows("a", 2)]
  tables = {"forget01": plain, "forget01_perturbed": rows[::-1], "retain99": _rows("b", 2)}
  options = {"path": _folder(tmp_path, tables), "retain_split": "retain99"}
  forget = load("tofu", forget_split="forget01", **options).splits["forget"]
  assert forget.answers == ("a 0. ", "a 1. ")
  assert forget.paraphrased == ("It is a 0.", "It is a 1.")


def test_tofu_unknown_splits_list_the_files(tofu):
  names = ", ".join(sorted(TOFU))
  for field in ("retain_split", "forget_split", "test_split"):
    options = {"forget_split": "forget10", field: "forget20"}
    _refused(
      "tofu", f"config.text.{field}: .*has no split 'forget20'; choose from {names}", path=tofu, **options
    )
  _refused(
    "tofu",
    "config.text.suites: .*no split 'world_facts'",
    path=tofu,
    forget_split="forget10",
    suites=("world_facts",),
  )


def test_tofu_of_the_hub(monkeypatch, tofu):
  calls = _hub(monkeypatch, {name: {"train": rows} for name, rows in TOFU.items()})
  options = {"test_split": "holdout10", "suites": ("real_authors", "retain_perturbed[1:3]")}
  dataset = load("tofu", forget_split="forget10[:3]", **options)
  assert dataset == load("tofu", path=tofu, forget_split="forget10[:3]", **options)
  assert {name for name, _ in calls} == {"locuslab/TOFU"}
  # What TOFU does not have is not asked for, and nothing is loaded twice.
  subsets = [subset for _, subset in calls]
  assert sorted(set(subsets)) == sorted(subsets) and "holdout10_perturbed" not in subsets
  del calls[:]
  load("tofu", name="someone/tofu", retain_split="retain90", forget_split="full[16:]")
  assert {name for name, _ in calls} == {"someone/tofu"}


def test_tofu_of_the_hub_without_wrong_answers(monkeypatch):
  _hub(monkeypatch, {name: {"train": TOFU[name]} for name in ("full", "forget10")})
  splits = load("tofu", forget_split="forget10").splits
  assert splits["forget"].perturbed is None and len(splits["retain"].answers) == 16


def test_tofu_refusals_of_the_hub(monkeypatch):
  _hub(monkeypatch, {"full": {"train": FULL}, "forget10": {"a": FULL[:1], "b": FULL[1:]}})
  message = "forget_split='forget11' .*Config 'forget11' not found. Available: .'full', 'forget10'"
  _refused("tofu", message, forget_split="forget11")
  _refused(
    "tofu", "'forget10' of 'locuslab/TOFU' has several splits .a, b.*question_answer", forget_split="forget10"
  )
  _refused("tofu", "config.data.subset='forget10' has no meaning for tofu", subset="forget10")


# --- WaterDrum ---

WATERDRUM = {
  "full": _rows("full", 10),
  "retain": _rows("full", 8),
  "forget": _rows("full", 2, 8),
  "exact_duplicate": _rows("exact", 2),
  "semantic_duplicate": _rows("semantic", 2),
}


@pytest.fixture
def waterdrum(tmp_path):
  for subset in ("forget_10", "unwatermarked_forget_10", "forget_01"):
    for split, rows in WATERDRUM.items():
      if subset != "forget_01" or "duplicate" not in split:
        _write(tmp_path / "waterdrum" / subset / f"{split}-00000-of-00001.parquet", rows)
  return str(tmp_path / "waterdrum")


@pytest.mark.parametrize("retain_split", ["", "retain"])
def test_waterdrum_keeps_the_keys(waterdrum, retain_split):
  options = {"path": waterdrum, "retain_split": retain_split}
  splits = load("waterdrum", subset="forget_10", **options).splits
  assert list(splits) == ["retain", "forget"]
  assert splits["retain"].answers == _answers("full", range(8))
  assert splits["forget"].answers == _answers("full", (8, 9))
  assert splits["retain"].owners == ("0",) * 8 and splits["forget"].owners == ("1",) * 2
  splits = load("waterdrum", subset="unwatermarked_forget_10", **options).splits
  assert splits["retain"].owners is splits["forget"].owners is None


@pytest.mark.parametrize("kind", ["exact", "semantic"])
def test_waterdrum_adds_its_duplicates(monkeypatch, waterdrum, kind):
  options = {"subset": "forget_10", "retain_split": "retain", "duplicates": kind}
  dataset = load("waterdrum", path=waterdrum, **options)
  assert dataset.splits["retain"].answers == _answers("full", range(8)) + _answers(kind, (0, 1))
  assert dataset.splits["retain"].owners == ("0",) * 10
  sliced = load("waterdrum", path=waterdrum, forget_split="forget[1:]", **options).splits
  assert sliced["retain"].answers[8:] == _answers(kind, (1,))
  spec = "forget[1:]+forget[:1]"
  swapped = load("waterdrum", path=waterdrum, forget_split=spec, **options).splits
  assert swapped["retain"].answers[8:] == _answers(kind, (1, 0))
  twins = {"full 8.": f"{kind} 0.", "full 9.": f"{kind} 1."}
  drawn = [load("waterdrum", path=waterdrum, forget_size=1, seed=seed, **options).splits for seed in range(8)]
  assert {splits["forget"].answers[0] for splits in drawn} == set(twins)
  for splits in drawn:
    assert splits["retain"].answers[8:] == (twins[splits["forget"].answers[0]],)
  calls = _hub(monkeypatch, {"forget_10": WATERDRUM})
  assert load("waterdrum", **options) == dataset
  assert calls == [("Glow-AI/WaterDrum-TOFU", "forget_10")]


def test_waterdrum_refusals(waterdrum, tmp_path):
  message = "config.text.duplicates: .*has no split 'exact_duplicate'; choose from forget, full, retain"
  _refused("waterdrum", message, path=waterdrum, subset="forget_01", duplicates="exact")
  message = "holds no file .*config.data.subset chooses one of its folders: forget_01, forget_10"
  _refused("waterdrum", message, path=waterdrum)
  message = "config.data.path=.*, config.data.subset='forget_20' does not exist"
  _refused("waterdrum", message, path=waterdrum, subset="forget_20")
  path = _folder(tmp_path / "uneven", WATERDRUM | {"exact_duplicate": _rows("exact", 3)})
  _refused("waterdrum", "'exact_duplicate' has 3 rows for the 2 of", path=path, duplicates="exact")


# --- any questions and answers, any text ---


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_one_file_is_split_by_rows(tmp_path, suffix):
  rows = [{"ask": f"Größe {row}?", "reply": f"{row}\u2028\n.", "row": row} for row in range(10)]
  _write(tmp_path / f"mine{suffix}", rows)
  options = {"path": str(tmp_path / f"mine{suffix}"), "test_split": ""}
  options |= {"question_key": "ask", "answer_key": "reply", "forget_split": "train[2:4]"}
  splits = load("question_answer", **options).splits
  assert list(splits) == ["retain", "forget"]
  assert splits["forget"].prompts == ("Größe 2?", "Größe 3?")
  assert splits["retain"].answers == tuple(f"{row}\u2028\n." for row in (0, 1, *range(4, 10)))
  message = "retain_split='' means all rows but those of .*'train', which leaves none"
  _refused("question_answer", message, **options | {"forget_split": "train"})
  # Texts need no question.
  for source, key in (("text", "ask"), ("text", ""), ("question_answer", "")):
    plain = load(source, **options | {"question_key": key}).splits
    assert plain["forget"].prompts == ("", "")
    assert plain["retain"].answers == splits["retain"].answers


def test_snapshot_of_a_hub_repository(tmp_path):
  for part in range(2):
    _write(tmp_path / "data" / f"train-0000{part}-of-00002.parquet", _rows("train", 3, 3 * part))
  _write(tmp_path / "data" / "test-00000-of-00001.parquet", _rows("test", 2))
  splits = load("question_answer", path=str(tmp_path), forget_split="train[:2]", test_split="test").splits
  assert splits["retain"].answers == _answers("train", range(2, 6))
  assert splits["test"].answers == _answers("test", range(2))


def test_retain_split_of_several_splits_must_be_named(tmp_path):
  path = _folder(tmp_path, {"a": _rows("a", 3), "b": _rows("b", 3)})
  message = "retain_split='' cannot be told from .*'a.:1.*b.:1.', of several splits: name"
  _refused("question_answer", message, path=path, forget_split="a[:1]+b[:1]")
  options = {"forget_split": "a[:1]+b[:1]", "retain_split": "a[1:]+b[1:]"}
  splits = load("question_answer", path=path, **options).splits
  assert splits["retain"].answers == _answers("a", (1, 2)) + _answers("b", (1, 2))


def test_joined_splits_keep_what_all_have(tmp_path):
  two = lambda text: [text + "x", text + "y"]
  tables = {
    "a": _rows("a", 1, **COMPLETE),
    "b": _rows("b", 1, **COMPLETE),
    "c": _rows("c", 1),
    "d": _rows("d", 1, **COMPLETE | {"perturbed_answer": two}),
  }
  path = _folder(tmp_path, tables)

  def joined(spec):
    return load("question_answer", path=path, forget_split="c", retain_split=spec).splits["retain"]

  assert joined("a+b").perturbed == (("a 0 x.", "a 0 y.", "a 0 z."), ("b 0 x.", "b 0 y.", "b 0 z."))
  assert joined("a+d").perturbed is None and len(joined("a+d").paraphrased) == 2
  splits = load("question_answer", path=path, forget_split="a", retain_split="b+c").splits
  assert splits["retain"].paraphrased is None and splits["retain"].answers == ("b 0.", "c 0.")


def test_files_that_are_not_there(tmp_path):
  _refused("question_answer", "config.data.path='.*missing' does not exist", path=str(tmp_path / "missing"))
  _refused("question_answer", "holds no file named after a split", path=str(tmp_path))
  (tmp_path / "table.csv").write_text("question,answer\n")
  _refused(
    "text",
    "table.csv' has an unknown type; give a file of type .parquet, .json, .jsonl",
    path=str(tmp_path / "table.csv"),
  )
  _write(tmp_path / "forget.json", _rows("forget", 2))
  _write(tmp_path / "forget.jsonl", _rows("forget", 2))
  _refused(
    "question_answer", "forget.json and .*forget.jsonl are files of one split: keep one", path=str(tmp_path)
  )


@pytest.mark.parametrize("name", ["train.parquet", "train.json", "train.jsonl"])
@pytest.mark.parametrize(
  "damage",
  [
    b"",
    b"\xff\xfe no text",
    b"[1, 2]",
    b"[null]",
    b'{"question": "a"',
    b'{"a": 1}\n2\n',
    b"[{},",
  ],
)
def test_corrupt_files_are_refused(tmp_path, name, damage):
  (tmp_path / name).write_bytes(damage)
  kinds = "cannot be read as (a parquet file|a JSON list or JSON lines)|holds (1|2|null);"
  message = f"{name}'.*({kinds})"
  if not damage and name != "train.parquet":
    message = "forget_split='train' is empty: 'train' has 0 rows"
  _refused("question_answer", message, path=str(tmp_path), forget_split="train")


def test_shards_must_have_one_schema(tmp_path):
  _write(tmp_path / "train-00000-of-00002.parquet", [{"question": "a", "answer": "b"}])
  _write(tmp_path / "train-00001-of-00002.parquet", [{"question": "a", "answer": 3}])
  _refused(
    "question_answer",
    "train-00000-of-00002.parquet' and those beside it have different columns",
    path=str(tmp_path),
    forget_split="train",
  )


@pytest.mark.parametrize("rows", [[], _rows("a", 3)])
def test_empty_splits_are_refused(tmp_path, rows):
  path = _folder(tmp_path, {"forget": rows, "retain": _rows("b", 1)})
  message = r"forget_split='forget\[3:\]' is empty: 'forget' has . rows"
  _refused("question_answer", message, path=path, forget_split="forget[3:]", retain_split="retain")


# --- the hub ---


def test_hub_splits(monkeypatch):
  configurations = {"english": {"train": _rows("train", 6), "test": _rows("test", 2)}}
  calls = _hub(monkeypatch, configurations | {None: {"train": _rows("default", 2)}})
  options = {"name": "someone/questions", "forget_split": "train[:2]"}
  splits = load("question_answer", subset="english", test_split="test", **options).splits
  assert splits["retain"].answers == _answers("train", range(2, 6))
  assert splits["test"].answers == _answers("test", range(2))
  assert calls == [("someone/questions", "english")]
  message = "config.text.test_split: config.data.name='someone/questions' has no split 'test'"
  options["forget_split"] = "train[:1]"
  _refused("text", message + "; choose from train", test_split="test", **options)


def test_no_network_names_the_ways_out():
  # conftest switches the hub off.
  for source in ("tofu", "waterdrum", "question_answer", "text"):
    message = "cannot download '.*' from the Hugging Face .*offline.*config.data.path.*'authors'"
    _refused(source, message, name="" if source in ("tofu", "waterdrum") else "a/b")


def test_refusals_of_the_hub(monkeypatch):
  unknown = huggingface_hub.errors.HFValidationError("no repo id")
  _hub(monkeypatch, {}, info=unknown)
  message = "config.data.name='x': unknown on the .*private or gated .*TOFU is 'locuslab/TOFU'"
  _refused("question_answer", message, name="x")
  gated = datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub.")
  _hub(monkeypatch, gated)
  message = "config.data.name='a/b': unknown on the .*is a gated.*hf auth login"
  for source in ("tofu", "text"):
    _refused(source, message, name="a/b")
  _hub(monkeypatch, {"forget_01": {}})
  message = r"config.data.subset='forget_02' .*Available: \['forget_01'\]"
  _refused("waterdrum", message, subset="forget_02")


# --- the embedded authors ---


def test_authors_are_those_of_the_seed():
  options = {"retain_split": "retain", "test_split": "test"}
  dataset = load("authors", **options, seed=5)
  for split, rows in authors.generate(5).items():
    assert dataset.splits[split] == tuple(rows)
  assert load("authors", **options, seed=5) == dataset
  assert load("authors", **options, seed=6).fingerprint != dataset.fingerprint
  # Nothing said of the retain set means the other authors.
  assert load("authors", test_split="test", seed=5) == dataset
  _refused("authors", "config.data.path='x' has no meaning for the embedded authors", path="x")
  _refused("authors", "config.data.subset='x' has no meaning", subset="x")
  message = "suites: config.data.source='authors' has no split 'world_facts'; choose from retain, forget"
  _refused("authors", message, suites=("world_facts",))


def test_authors_duplicates_say_the_same_in_other_words():
  splits = load("authors", duplicates="semantic", forget_size=7).splits
  assert splits["retain"].answers[360:] == splits["forget"].paraphrased
  assert splits["retain"].owners[360:] == splits["forget"].owners
  assert not set(splits["retain"].answers) & set(splits["forget"].answers)
  assert np.array(splits["retain"].perturbed).shape == (367, 5)
