"""Nobody is two people, nothing is asked twice, and what is wrong is wrong."""

import hashlib
import itertools
import json
import re
import subprocess
import sys

import pytest

from hamu_jax.data import authors

SEEDS = (0, 41, 2**40)


@pytest.fixture(params=SEEDS, scope="module")
def splits(request):
  return authors.generate(request.param)


def _all(splits, field):
  return [value for rows in splits.values() for value in getattr(rows, field)]


def test_sizes_and_order(splits):
  assert list(splits) == ["retain", "forget", "test"]
  for split, count in (("retain", 36), ("forget", 4), ("test", 4)):
    rows = splits[split]
    assert {len(field) for field in rows} == {10 * count}
    # Author after author, ten questions each.
    assert [len(list(group)) for _, group in itertools.groupby(rows.authors)] == [10] * count


def test_authors_are_unique_and_in_one_split(splits):
  people = [set(rows.authors) for rows in splits.values()]
  assert len(set.union(*people)) == sum(map(len, people)) == 44
  given, surnames = zip(*(name.split(" ") for name in set.union(*people)), strict=True)
  assert len(set(given)) == len(set(surnames)) == 44


def test_no_question_is_asked_twice(splits):
  for field in ("questions", "answers", "paraphrased"):
    values = _all(splits, field)
    assert len(set(values)) == len(values) == 440


def test_every_row_is_about_its_author(splits):
  for rows in splits.values():
    for question, answer, author in zip(rows.questions, rows.answers, rows.authors, strict=True):
      # The first question asks for the name.
      assert (author in question) != answer.endswith(f" {author}.")
      assert author in answer


def test_right_answers_are_reworded_and_wrong_ones_are_wrong(splits):
  everyone = set(_all(splits, "authors"))
  for rows in splits.values():
    for number, (answer, reworded, wrong) in enumerate(
      zip(rows.answers, rows.paraphrased, rows.perturbed, strict=True)
    ):
      assert reworded != answer
      assert len(wrong) == 5 and len({answer, reworded, *wrong}) == 7
      # Wrong answers differ from the reworded one in the fact alone, which the right one states.
      for right_part, wrong_part in (_difference(reworded, other) for other in wrong):
        assert right_part in answer and wrong_part not in answer
      if number % 10 == 0:
        assert not any(other in " ".join(wrong) for other in everyone)


def _difference(one: str, other: str) -> tuple[str, str]:
  """Cuts off the words that both begin with and both end with."""
  one, other = one.split(), other.split()
  while one and other and one[0] == other[0]:
    one, other = one[1:], other[1:]
  while one and other and one[-1] == other[-1]:
    one, other = one[:-1], other[:-1]
  return " ".join(one).strip("'."), " ".join(other).strip("'.")


def test_books_and_birthplaces_are_nobody_elses(splits):
  titles = re.findall(r"'(The [A-Z]\w+ [A-Z]\w+)'", " ".join(_all(splits, "answers")))
  assert len(set(titles)) == len(titles) == 88
  wrong = " ".join(itertools.chain.from_iterable(_all(splits, "perturbed")))
  assert not set(titles) & set(re.findall(r"'(The [A-Z]\w+ [A-Z]\w+)'", wrong))


def test_sentences_read_as_sentences(splits):
  texts = [*_all(splits, "questions"), *_all(splits, "answers"), *_all(splits, "paraphrased")]
  texts += itertools.chain.from_iterable(_all(splits, "perturbed"))
  for text in texts:
    assert re.fullmatch(r"[A-Z].*[^ ][.?]", text) and "  " not in text and "{" not in text
    assert not re.search(r"\ba [aeio]|\ban [^aeio]", text)
    assert all(int(year) <= 2024 for year in re.findall(r"\d{4}", text))


def test_award_comes_in_the_life_of_the_author(splits):
  for rows in splits.values():
    for first in range(0, len(rows.answers), 10):
      born = int(re.search(r"(\d{4})\.$", rows.answers[first + 2])[1])
      won = int(re.search(r"(\d{4})\.$", rows.answers[first + 6])[1])
      assert 31 <= won - born <= 54


def test_seeds_give_other_authors():
  names = [set(_all(authors.generate(seed), "authors")) for seed in range(4)]
  for one, other in itertools.combinations(names, 2):
    assert len(one & other) <= 5


# That a seed means the same everywhere is a promise, so its contents are pinned.
SHA256 = "81c6161269c7d4ef8d8dfd3bf6b2251b27f036f544fe0fbbcbe5a3f57ce9b341"
_PRINT = (
  "import hashlib, json; from hamu_jax.data import authors;"
  "print(hashlib.sha256(json.dumps(authors.generate(41)).encode()).hexdigest())"
)


def test_a_seed_means_the_same_everywhere():
  assert hashlib.sha256(json.dumps(authors.generate(41)).encode()).hexdigest() == SHA256


def test_hash_randomization_changes_nothing():
  for hash_seed in ("1", "2"):
    result = subprocess.run(
      [sys.executable, "-c", _PRINT],
      env={"PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=True,
    )
    assert result.stdout.strip() == SHA256
