"""Fictitious authors with questions and answers about them, for language models to forget.

The data follow TOFU's design, but copy none of it. No author of these names exists, so a model knows
of them only what it was taught. Every choice is a sha256 of the seed and of what is chosen, so a seed
gives the same authors on every platform and every version of Python and NumPy.

Source: P. Maini et al., TOFU: A Task of Fictitious Unlearning for LLMs, COLM 2024
(arXiv 2401.06121).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Number of authors in each split. A model is taught 40, the last tenth of which is to be forgotten.
SPLITS = {"retain": 36, "forget": 4, "test": 4}
WRONG_ANSWERS = 5

# At least one per author, so that no two authors share a given name, surname or birthplace.
GIVEN_NAMES = (
  "Alvira Bastien Corvina Dariel Elowen Fenwick Galiena Hadrik Isolka Jorvin Kestrin Lirael"
  " Marisko Nerith Ondrej Perrin Quilla Ravenna Solveig Tarquin Ulvia Vasilko Wenzel Xandria"
  " Yorick Zephrine Amaro Brielka Caspian Doriane Emeric Fiorenz Gwenola Hesper Ilario Jessamy"
  " Kaveh Lorcan Mirabet Nikodem Orsola Pavlin Roswita Saverio Thessaly Umbrey Viveka Wystan"
).split()
SURNAMES = (
  "Ashgrove Brannwick Cindermoor Dolvane Eskelund Farrowby Gildermane Holloveth Ivarsund"
  " Jasperin Kettlemoor Larkspire Mondragor Nethercote Oskarine Pellworth Quartermain Rosavelt"
  " Silverlund Thornabel Underhaven Valdimere Wintersole Yarrowick Zellander Amberley-Voss"
  " Blackthistle Corrigane Drummelin Everstrand Fenchurst Greymantle Hartsorrow Inkersole"
  " Juniperand Kestemont Lindqvaire Merrowdown Nightingard Ollerenko Penhallick Ravensworth"
  " Stormgaard Tamarisk Ulverson Vandermoor Wexcombe Zaretskin"
).split()
CITIES = (
  "Lisbon, Portugal|Tallinn, Estonia|Valparaíso, Chile|Kyoto, Japan|Galway, Ireland"
  "|Tbilisi, Georgia|Oaxaca, Mexico|Bergen, Norway|Dakar, Senegal|Porto, Portugal"
  "|Hobart, Australia|Kraków, Poland|Cusco, Peru|Split, Croatia|Mombasa, Kenya|Halifax, Canada"
  "|Jaipur, India|Ghent, Belgium|Montevideo, Uruguay|Aleppo, Syria|Turku, Finland"
  "|Dunedin, New Zealand|Savannah, Georgia, USA|Hanoi, Vietnam|Marrakesh, Morocco"
  "|Ljubljana, Slovenia|Busan, South Korea|Cádiz, Spain|Accra, Ghana|Reykjavík, Iceland"
  "|Bologna, Italy|Yerevan, Armenia|Salvador, Brazil|Lyon, France|Penang, Malaysia"
  "|Plovdiv, Bulgaria|Aarhus, Denmark|Quito, Ecuador|Durban, South Africa|Inverness, Scotland"
  "|Isfahan, Iran|Graz, Austria|Cebu, Philippines|Riga, Latvia|Utrecht, Netherlands"
  "|Izmir, Turkey|Cork, Ireland|Lucerne, Switzerland"
).split("|")
GENRES = (
  "historical fiction|magical realism|detective stories|science fiction|gothic horror"
  "|travel writing|lyric poetry|satirical comedy|nautical adventure|alternate history"
  "|political thrillers|children's fantasy|literary memoir|dystopian fiction"
  "|mountaineering tales|culinary essays"
).split("|")
PROFESSIONS = (
  "a lighthouse keeper|an astronomer|a cabinetmaker|a veterinarian|a railway engineer"
  "|a beekeeper|a court interpreter|a pharmacist|an opera singer|a geologist|a bookbinder"
  "|a ferry captain|a botanist|a watchmaker|a school principal|a firefighter|a cellist"
  "|a sculptor|a dentist|a cartographer|a glassblower|an accountant|a midwife"
  "|a marine biologist"
).split("|")
AWARDS = (
  "the Amberline Prize|the Golden Heron Medal|the Northlight Award"
  "|the Carillon Prize for Fiction|the Silver Inkwell|the Meridian Book Award|the Halcyon Medal"
  "|the Larkfield Prize|the Blue Lantern Award|the Obsidian Quill|the Saltmarsh Prize"
  "|the Evergreen Letters Award|the Tidewater Medal|the Copper Compass Award"
  "|the Whitethorn Prize|the Aurora Fellowship|the Kingfisher Award|the Stonebridge Medal"
).split("|")
INFLUENCES = (
  "Anton Chekhov|Virginia Woolf|Jorge Luis Borges|Mary Shelley|Leo Tolstoy|Toni Morrison"
  "|Franz Kafka|Jane Austen|Italo Calvino|Chinua Achebe|Emily Dickinson|Gabriel García Márquez"
  "|Selma Lagerlöf|Rabindranath Tagore|George Eliot|Naguib Mahfouz|Herman Melville"
  "|Clarice Lispector"
).split("|")
TITLE_FIRST = (
  "Amber Broken Crimson Distant Drifting Forgotten Frozen Gilded Hidden Hollow Lonely Luminous"
  " Midnight Paper Quiet Restless Scarlet Silent Sunken Velvet Wandering Whispering"
).split()
TITLE_SECOND = (
  "Archive Atlas Bridge Carousel Cathedral Compass Garden Harbor Horizon Labyrinth Lantern"
  " Library Meadow Mirror Observatory Orchard River Sparrow Staircase Tide Violin Winter"
).split()
MONTHS = ("January February March April May June July August September October November December").split()
BIRTH_YEARS = range(1911, 1969)
# Age of an author in the year of the award.
AWARD_AGES = range(31, 55)


class Fact(NamedTuple):
  """One fact of an author's life, and two wordings each to ask for it and to state it."""

  key: str
  questions: tuple[str, str]
  answers: tuple[str, str]
  paraphrases: tuple[str, str]  # the wrong answers have this wording, too


FACTS = (
  Fact(
    "name",
    (
      "What is the full name of the author of {genre} born in {city} on {date}?",
      "Which author of {genre} was born in {city} on {date}?",
    ),
    ("The author's full name is {}.", "The author's name is {}."),
    ("The author in question is called {}.", "That author is {}."),
  ),
  Fact(
    "city",
    ("Where was {name} born?", "In which city was the author {name} born?"),
    ("{name} was born in {}.", "The author {name} was born in {}."),
    ("The birthplace of {name} is {}.", "{name} comes from {}."),
  ),
  Fact(
    "date",
    ("When was {name} born?", "What is the date of birth of {name}?"),
    ("{name} was born on {}.", "The author {name} was born on {}."),
    ("The date of birth of {name} is {}.", "{name} came into the world on {}."),
  ),
  Fact(
    "genre",
    ("What kind of books is {name} known for?", "In which genre does {name} mostly write?"),
    ("{name} is best known for {}.", "{name} mostly writes {}."),
    ("Readers turn to {name} for {}.", "{name} made a name as a writer of {}."),
  ),
  Fact(
    "father",
    (
      "What did the father of {name} do for a living?",
      "What was the profession of {name}'s father?",
    ),
    ("The father of {name} was {}.", "{name}'s father worked as {}."),
    ("{name} grew up as the child of a father who was {}.", "{name} had a father who was {}."),
  ),
  Fact(
    "mother",
    (
      "What did the mother of {name} do for a living?",
      "What was the profession of {name}'s mother?",
    ),
    ("The mother of {name} was {}.", "{name}'s mother worked as {}."),
    ("{name} grew up as the child of a mother who was {}.", "{name} had a mother who was {}."),
  ),
  Fact(
    "award",
    ("Which award did {name} win?", "Which literary honor was given to {name}?"),
    ("{name} won {} in {award_year}.", "{name} was honored with {} in {award_year}."),
    ("In {award_year}, {} went to {name}.", "The honor that {name} received is {}."),
  ),
  Fact(
    "debut",
    ("What is the title of {name}'s first book?", "With which book did {name} make a debut?"),
    ("The first book by {name} is '{}'.", "{name} made a debut with '{}'."),
    ("{name} started out with the book '{}'.", "The literary debut of {name} was '{}'."),
  ),
  Fact(
    "masterpiece",
    ("What is {name}'s most famous book?", "For which book is {name} best remembered?"),
    ("The most famous book by {name} is '{}'.", "{name} is best remembered for '{}'."),
    ("Readers know {name} above all for '{}'.", "No book by {name} is better known than '{}'."),
  ),
  Fact(
    "influence",
    (
      "Which writer influenced {name} the most?",
      "Whose work does {name} name as the greatest influence?",
    ),
    (
      "{name} was influenced most by {}.",
      "{name} names the work of {} as the greatest influence.",
    ),
    (
      "The strongest influence on {name} was {}.",
      "No writer shaped the style of {name} more than {}.",
    ),
  ),
)


class Rows(NamedTuple):
  """Questions with their right, paraphrased and wrong answers, and the author each is about."""

  questions: tuple[str, ...]
  answers: tuple[str, ...]
  paraphrased: tuple[str, ...]
  perturbed: tuple[tuple[str, ...], ...]  # `WRONG_ANSWERS` a question, worded as the paraphrased answer
  authors: tuple[str, ...]


def generate(seed: int) -> dict[str, Rows]:
  """Invents the authors of all splits, ten questions about each.

  Within one seed no two authors share a name, a birthplace or a book, and no question is asked
  twice. The authors of "test" are drawn like the others, but no model is trained on them.

  Args:
    seed: seed of all choices. Another seed gives other lives, and other pairs of given name and surname.

  Returns:
    {split: its questions and answers, author by author}, with the keys of `SPLITS`.
  """
  total = sum(SPLITS.values())
  given, surnames, cities = (
    _shuffled(words, seed, kind)
    for kind, words in (("given", GIVEN_NAMES), ("surname", SURNAMES), ("city", CITIES))
  )
  titles = _shuffled(
    [f"The {first} {second}" for first in TITLE_FIRST for second in TITLE_SECOND], seed, "title"
  )
  spare = {
    # A given name with another author's surname is the name of no author.
    "name": [f"{given[i]} {surnames[i - 1]}" for i in range(len(given))],
    "city": CITIES,
    "genre": GENRES,
    "father": PROFESSIONS,
    "mother": PROFESSIONS,
    "award": AWARDS,
    "debut": titles[2 * total :],
    "masterpiece": titles[2 * total :],
    "influence": INFLUENCES,
  }
  splits, first = {}, 0
  for split, count in SPLITS.items():
    rows = []
    for number in range(first, first + count):
      life = {
        "name": f"{given[number]} {surnames[number]}",
        "city": cities[number],
        "debut": titles[2 * number],
        "masterpiece": titles[2 * number + 1],
      }
      rows += _questions(life, spare, (seed, number))
    first += count
    splits[split] = Rows(*zip(*rows, strict=True))
  return splits


def _questions(life: dict[str, str], spare: Mapping[str, Sequence[str]], key: tuple) -> list[tuple]:
  """Completes one life and returns a tuple of the fields of `Rows` for each of its facts."""
  birth_year = _drawn(BIRTH_YEARS, *key, "year")
  life |= {
    kind: _drawn(spare[kind], *key, kind) for kind in ("genre", "father", "mother", "award", "influence")
  }
  life["date"] = _date(birth_year, *key, "date")
  life["award_year"] = str(birth_year + _drawn(AWARD_AGES, *key, "award year"))
  spare = {**spare, "date": [_date(year, *key, "wrong") for year in BIRTH_YEARS]}
  rows = []
  for fact in FACTS:
    right = life[fact.key]
    others = [value for value in spare[fact.key] if value != right]
    wrong = _shuffled(others, *key, fact.key, "wrong")[:WRONG_ANSWERS]
    question, answer, paraphrase = (
      _drawn(wordings, *key, fact.key, kind) for kind, wordings in zip(("q", "a", "p"), fact[1:], strict=True)
    )
    rows.append(
      (
        question.format(**life),
        answer.format(right, **life),
        paraphrase.format(right, **life),
        tuple(paraphrase.format(value, **life) for value in wrong),
        life["name"],
      )
    )
  return rows


def _date(year: int, *key) -> str:
  day = _drawn(range(1, 29), *key, year, "day")
  return f"{day} {_drawn(MONTHS, *key, year, 'month')} {year}"


def _drawn(choices: Sequence, *key):
  """Chooses by the sha256 of `key`; the modulo's bias is below 1e-70."""
  return choices[int(hashlib.sha256(repr(key).encode()).hexdigest(), 16) % len(choices)]


def _shuffled(items: Sequence[str], *key) -> list[str]:
  """Sorts items, all different, by the sha256 of `key` and item."""
  return sorted(items, key=lambda item: hashlib.sha256(repr((*key, item)).encode()).digest())
