"""The sharpness paper's experiment from the command line, and one clear line for each kind of bad input."""

import io
import json
import os
import pathlib
import re
import shutil
import signal

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from hamu_jax import data, main
from hamu_jax.engine import loop
from sam_jax.memorization import select
from tests.arguments import replaced
from tests.test_resume import assert_same, checkpoint_in_the_making, final, stage_has_checkpoint, wait_for

ROOT = pathlib.Path(__file__).parent.parent
SPLITS = ("retain", "forget", "test", "validation", "high", "mid", "low")
RESULTS = ("original", "retrained", "unlearned")
FULL = "sharp_minmax,high,sam,pretrain_sam"


class CommandLine:
  """Runs of the digits' configuration in one folder; they share their finished stages."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.cache = folder, folder / "stages"

  def arguments(self, name, variant=FULL, *overrides):
    config = f"--config=tests/configs/small_sharp.py:{variant}"
    paths = f"--workdir={self.folder / name}", f"--config.stage_cache={self.cache}"
    return replaced(["hamu_jax.main", config, *paths], *overrides)

  def __call__(self, name, variant=FULL, *overrides):
    assert main.run(self.arguments(name, variant, *overrides)) == 0
    return self.folder / name


@pytest.fixture(scope="module", autouse=True)
def _in_the_root():
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    yield patch


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
  return CommandLine(tmp_path_factory.mktemp("sharp"))


@pytest.fixture(scope="module")
def whole(sharp):
  """The run directory of one run of everything."""
  return sharp("whole")


@pytest.fixture
def untrainable(monkeypatch):
  def run(loop_, members, path):
    raise AssertionError(f"{members[0].stage.name} is trained")

  monkeypatch.setattr(loop.Loop, "run", run)


def results(workdir):
  return json.loads((workdir / "summary.json").read_text())["results"]


def rows_of(workdir):
  """{split of the training rows: rows}."""
  with np.load(workdir / "split.npz") as split, np.load(workdir / "memorization.npz") as memorization:
    rows = dict(split)
    scores = memorization["memorization"]
  available = np.sort(np.concatenate([rows["retain"], rows["forget"]]))
  assert len(scores) == len(available)
  size = len(rows["forget"])
  return rows | {level: available[select(scores, size, level)] for level in ("high", "mid", "low")}


def test_the_training_rows_are_parted(whole):
  rows = rows_of(whole)
  parts = [rows[name] for name in ("retain", "forget", "validation")]
  assert [len(part) for part in parts] == [320, 40, 40]
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(400))
  digits = data.load("digits", train_size=400, test_size=150, seed=41)
  # A tenth of each class.
  np.testing.assert_array_equal(np.bincount(digits.train.labels[rows["validation"]]), [4] * 10)
  np.testing.assert_array_equal(rows["forget"], rows["high"])
  with np.load(whole / "memorization.npz") as memorization:
    available = np.sort(np.concatenate(parts[:2]))
    np.testing.assert_array_equal(memorization["rows"], digits.train_indices[available])


def test_accuracies_are_those_of_the_exported_models(whole):
  """Of all three models on all sets, by hand."""
  digits = data.load("digits", train_size=400, test_size=150, seed=41)
  rows, summary = rows_of(whole), results(whole)
  config = json.loads((whole / "config.json").read_text())
  accuracies = {}
  for model in RESULTS:
    weights = load_file(whole / f"{model}.safetensors")
    for name in SPLITS:
      images, labels = digits.test if name == "test" else (part[rows[name]] for part in digits.train)
      pixels = (images.reshape(len(images), -1) / 255 - config["data"]["mean"]) / config["data"]["std"]
      hidden = np.maximum(pixels @ weights["hidden.0.weight"].T + weights["hidden.0.bias"], 0)
      logits = hidden @ weights["classifier.weight"].T + weights["classifier.bias"]
      accuracies[model, name] = np.mean(logits.argmax(1) == labels)
      got = summary[model][name]
      assert got["count"] == len(labels)
      np.testing.assert_allclose(got["accuracy"], accuracies[model, name], atol=1.5 / len(labels))
  # The sets differ, so that none can stand for another.
  assert len({accuracies["original", name] for name in SPLITS}) > 4
  for model in ("original", "unlearned"):
    retain, forget, test = (
      summary[model][name]["accuracy"] - summary["retrained"][name]["accuracy"]
      for name in ("retain", "forget", "test")
    )
    np.testing.assert_allclose(
      summary[model]["tug_of_war"], (1 - abs(retain)) * (1 - abs(forget)) * (1 - abs(test))
    )
    np.testing.assert_allclose(summary[model]["tug_of_war_signed"], (1 + retain) * (1 - forget) * (1 + test))
  assert "tug_of_war" not in summary["retrained"]


def test_membership_is_inferred_of_all_models(whole):
  attacks = [results(whole)[model]["membership"] for model in RESULTS]
  for values in attacks:
    assert set(values) == {"correctness", "confidence", "entropy", "modified_entropy", "probability"}
    assert all(0 <= value <= 1 for value in values.values())
  assert attacks[0] != attacks[1]


def test_every_step_is_logged_once(whole):
  log = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
  steps = {}
  for row in log:
    if row["split"] == "step":
      steps.setdefault(row["stage"], []).append(row["step"])
  # 360 rows in batches of 64, 320 of them retained; 180 in batches of 60; 320 in batches of 32.
  lengths = {"memorization0": 9, "memorization8": 9, "pretrain": 18, "retrain": 15, "unlearn": 20}
  assert steps == {stage: list(range(1, length + 1)) for stage, length in lengths.items()}
  unlearning = [row for row in log if row["stage"] == "unlearn" and row["split"] == "step"]
  # Both halves of each step have moved something.
  assert all(row["retain_update_norm"] > 0 and row["forget_update_norm"] > 0 for row in unlearning)


def test_a_second_run_takes_everything_from_the_cache(whole, sharp, untrainable):
  before = json.loads((whole / "summary.json").read_text())
  (whole / "summary.json").unlink()
  sharp("whole")
  assert json.loads((whole / "summary.json").read_text()) == before


def test_estimated_scores_can_be_given_as_a_file(whole, sharp, untrainable):
  """They choose the same rows, so that every stage but theirs is there."""
  given = sharp("given", FULL, f"--config.data.scores={whole / 'memorization.npz'}")
  with np.load(given / "split.npz") as one, np.load(whole / "split.npz") as other:
    assert set(one) == {"retain", "forget", "validation"}
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  assert results(given) == results(whole)
  low = sharp.arguments("low", "retrain,low", f"--config.data.scores={whole / 'memorization.npz'}")
  with pytest.raises(AssertionError, match="pretrain is trained"):
    main.run(low)


def test_retraining_is_the_best_that_can_be_had(whole, sharp, untrainable):
  retrained = sharp("retrained", "retrain,high,pretrain_sam")
  summary = results(retrained)
  assert summary["unlearned"]["tug_of_war"] == summary["unlearned"]["tug_of_war_signed"] == 1
  for name in SPLITS:
    assert summary["unlearned"][name] == summary["retrained"][name] == results(whole)["retrained"][name]
  one, other = (load_file(retrained / f"{name}.safetensors") for name in ("unlearned", "retrained"))
  for name, tensor in one.items():
    np.testing.assert_array_equal(tensor, other[name])
  assert not (retrained / "mask.safetensors").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, _in_the_root):
  """A folder of digits as coloured PNG of twice their size."""
  folder = tmp_path_factory.mktemp("pictures")
  # What is converted to be streamed.
  _in_the_root.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
  digits = data.load("digits", train_size=200, test_size=80)
  features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
  for split, part in (("train", digits.train), ("test", digits.test)):
    cells = []
    for image in part.images[..., 0]:
      encoded = io.BytesIO()
      Image.fromarray(image).convert("RGB").resize((16, 16)).save(encoded, "png")
      cells.append({"bytes": encoded.getvalue(), "path": None})
    table = datasets.Dataset.from_dict({"image": cells, "label": part.labels.tolist()}, features=features)
    table.to_parquet(str(folder / f"{split}.parquet"))
  return folder


class Pictures(CommandLine):
  """Runs on a folder of images, which are flipped at random, with a random forget set."""

  def __init__(self, folder, pictures):
    super().__init__(folder)
    self._pictures = pictures

  def arguments(self, name, *overrides):
    arguments = super().arguments(
      name,
      FULL,
      "--config.data.source=parquet",
      f"--config.data.path={self._pictures}",
      "--config.data.image_size=8",
      "--config.data.mean=(.3,.3,.3)",
      "--config.data.std=(.4,.4,.4)",
      "--config.data.train_size=0",
      "--config.data.test_size=0",
      "--config.data.forget=random",
      "--config.data.forget_fraction=0.2",
      "--config.retrain=False",
      "--config.train.augment=flip",
      "--config.method.augment=flip",
    )
    return replaced(arguments, *overrides)

  def __call__(self, name, *overrides):
    assert main.run(self.arguments(name, *overrides)) == 0
    return self.folder / name


@pytest.fixture(scope="module")
def on_pictures(tmp_path_factory, pictures):
  return Pictures(tmp_path_factory.mktemp("on_pictures"), pictures)


@pytest.fixture(scope="module")
def in_memory(on_pictures):
  return on_pictures("in_memory")


@pytest.fixture(scope="module")
def streamed(on_pictures):
  return on_pictures("streamed", "--config.data.stream=True")


def copy_original(cache, target):
  """Of the finished stages only the original model."""
  for stage in cache.glob("pretrain-*"):
    shutil.copytree(stage, target / stage.name)


def assert_close(one, other, names, **tolerance):
  for name in names:
    tensors = load_file(other / f"{name}.safetensors")
    for key, tensor in load_file(one / f"{name}.safetensors").items():
      np.testing.assert_allclose(tensor, tensors[key], err_msg=f"{name} {key}", **tolerance)


def test_streamed_images_give_the_same_models(in_memory, streamed):
  """Augmentation goes by the row of the dataset, wherever a window has put it."""
  assert_close(streamed, in_memory, ("original", "mask", "unlearned"), rtol=1e-4, atol=1e-5)
  for model, wanted in results(in_memory).items():
    for split in ("retain", "forget", "test", "validation"):
      assert results(streamed)[model][split] == pytest.approx(wanted[split], rel=1e-4)
  losses = [
    [
      row["retain_loss"]
      for row in map(json.loads, (folder / "metrics.jsonl").open())
      if row["split"] == "step"
    ]
    for folder in (in_memory, streamed)
  ]
  assert len(losses[0]) == 19
  np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "devices"), [("streamed", 2), ("streamed", 4), ("in_memory", 4)])
def test_devices_unlearn_as_one(request, on_pictures, tmp_path, origin, devices):
  """Their mask is the same to the last weight; what they unlearn differs by rounding."""
  alone = request.getfixturevalue(origin)
  several = Pictures(tmp_path, on_pictures._pictures)
  copy_original(on_pictures.cache, several.cache)
  workdir = several(
    "several",
    f"--config.data.stream={origin == 'streamed'}",
    "--config.pairing=pmap",
    f"--config.devices={devices}",
  )
  assert json.loads((workdir / "summary.json").read_text())["provenance"]["devices"] == devices
  assert_close(workdir, alone, ("original", "mask"), rtol=0, atol=0)
  assert_close(workdir, alone, ("unlearned",), rtol=1e-3, atol=1e-4)
  moved, original = (load_file(workdir / f"{name}.safetensors") for name in ("unlearned", "original"))
  # What they have done is far from nothing, compared with that tolerance.
  assert max(np.abs(moved[name] - original[name]).max() for name in moved) > 1e-2


@pytest.mark.slow
def test_devices_estimate_train_and_unlearn_as_one(whole, tmp_path):
  """Everything from scratch on four devices: the same forget set, and models of the same quality."""
  workdir = CommandLine(tmp_path)("several", FULL, "--config.pairing=pmap", "--config.devices=4")
  with np.load(workdir / "split.npz") as one, np.load(whole / "split.npz") as other:
    np.testing.assert_array_equal(one["forget"], other["forget"])
  assert_close(workdir, whole, ("original", "retrained"), rtol=1e-3, atol=1e-4)
  masks = [load_file(folder / "mask.safetensors") for folder in (workdir, whole)]
  assert np.mean([np.mean(masks[0][name] == masks[1][name]) for name in masks[0]]) > 0.99
  for name in SPLITS:
    one, other = (results(folder)["unlearned"][name]["accuracy"] for folder in (workdir, whole))
    assert abs(one - other) < 0.05


@pytest.mark.slow
def test_killed_and_rerun_ends_the_same(launch, tmp_path):
  """scrub_distill with SAM, whose two sub-steps take turns; it is killed while it writes a checkpoint."""
  lines = CommandLine(tmp_path)
  eager = [
    "--config.checkpoint_seconds=0",
    "--config.method.epochs=16",
    "--config.method.msteps=10",
    "--config.method.batch_size=16",
    "--config.data.forget=random",
    "--config.retrain=False",
    "--config.method.evaluate_epochs=5",
  ]

  def start(name):
    # Each in a cache of its own, and compiled as quickly as in this process.
    arguments = lines.arguments(name, "scrub_distill,sam", *eager, "--config.stage_cache=")
    return launch(arguments, XLA_FLAGS=os.environ["XLA_FLAGS"])

  process = start("undisturbed")
  assert process.wait(300) == 0, process.stdout.read()
  workdir = tmp_path / "killed"
  copy_original(tmp_path / "undisturbed" / "stages", workdir / "stages")
  process = start("killed")
  saved, saving = (moment(workdir, "unlearn") for moment in (stage_has_checkpoint, checkpoint_in_the_making))
  assert wait_for(lambda: saved() and saving(), process)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  process = start("killed")
  assert process.wait(300) == 0, process.stdout.read()
  wanted = final(tmp_path / "undisturbed")
  assert_same(workdir, (*wanted[:2], [row for row in wanted[2] if row[0] == "unlearn"]))


# Words of the variant, fields with their values, and what the line must say.
BAD_INPUT = {
  "no such score file": (
    "",
    "data.scores=/no/such.npz",
    r"scores='/no/such.npz': no such file; .*'estimate'",
  ),
  "scores of another dataset": (
    "",
    "data.scores=short.npy",
    r"config.data.scores='short.npy': 7 scores for 1438 training examples; it was",
  ),
  "no scores": ("", "data.scores=", r"config.data.scores='': forget sets by memorization need a score file"),
  "mask fraction above 1": (
    "",
    "mask.fraction=1.2",
    r"config.mask.fraction=1.2: must be at least 0 and at most 1",
  ),
  "negative mask fraction": ("", "mask.fraction=-0.1", r"config.mask.fraction=-0.1: must be at least 0"),
  "mask fraction is no number": ("", "mask.fraction=nan", r"config.mask.fraction=nan: must be at least 0"),
  "mask fraction that is not made": (
    "",
    "mask.fraction=0.2",
    r"mask.fraction=0.2: choose from config.mask.fractions=\(0.1, 0.3, 0.5\), or add it",
  ),
  "mask fractions": (
    "",
    "mask.fractions=(0.1,1.2)",
    r"config.mask.fractions=1.2: must be above 0 and at most 1",
  ),
  "salun without a mask": (
    "salun",
    "mask.fraction=0.0",
    r"salun needs a mask; choose from config.mask.fractions=",
  ),
  "sharp_minmax without a mask": (
    "sharp_minmax",
    "mask.fraction=0.0",
    r"sharp_minmax needs a mask; choose from config.mask.fractions=",
  ),
  "no such mask": (
    "sharp_minmax",
    "mask.path=/no/mask.safetensors",
    r"path='/no/mask.safetensors': no such file; give a mask",
  ),
  "negative radius": ("", "sam.rho=-0.1", r"config.sam.rho=-0.1: must be at least 0"),
  "negative radius of training": ("", "sam.train_rho=-1.0", r"config.sam.train_rho=-1.0: must be at least 0"),
  "infinite radius": ("", "sam.rho=inf", r"config.sam.rho=inf: must be at least 0 and at most"),
  "infinite weight": ("", "sam.lamb=inf", r"config.sam.lamb=inf: must be at least"),
  "radius is no number": ("", "sam.rho=nan", r"config.sam.rho=nan: must be at least 0"),
  "one perturbation of two losses": (
    "hamu-q,sam",
    "sam.scope=step",
    r"config.sam.scope='step': hamu-q has no joint loss .*; set it to 'role'",
  ),
  "unknown sharpness mode": ("", "sam.mode=mim", r"config.sam.mode='mim': choose from min, max"),
  "unknown retain mode": (
    "",
    "method.retain_mode=no",
    r"config.method.retain_mode='no': choose from min, max",
  ),
  "unknown level": ("", "data.memorization_level=hihg", r"level='hihg': choose from high, .*mean 'high'"),
  "unknown shuffle": ("", "method.shuffle=no", r"config.method.shuffle='no': choose from each_epoch, once"),
  "unknown epoch": ("", "method.epoch=no", r"config.method.epoch='no': choose from matched, pass"),
  "unknown batch norm": (
    "",
    "method.batch_norm=no",
    r"config.method.batch_norm='no': choose from frozen, batch",
  ),
  "unknown mask scope": (
    "",
    "mask.scope=no",
    r"config.mask.scope='no': choose from update, gradient, perturbed",
  ),
  "unknown mask selection": ("", "mask.select=large", r"select='large': choose from .*mean 'largest'"),
  "batch statistics of a part": (
    "",
    "method.microbatch=10",
    r"config.method.microbatch=10: .*set it to 0 or config.method.batch_norm to",
  ),
  "streamed images of any size": (
    "",
    "data.stream=True",
    r"config.data.stream=True: .*set config.data.image_size",
  ),
  "streamed digits": (
    "",
    "data.stream=True data.image_size=8",
    r"config.data.stream=True: .*choose config.data.source huggingface",
  ),
  "nothing but validation": (
    "",
    "data.validation_fraction=1.0",
    r"config.data.validation_fraction=1.0: must be",
  ),
  "more to forget than there is": (
    "",
    "data.forget_size=5000",
    r"forget_size=5000: there are 1295 training examples, so choose 1..1294",
  ),
  "forgetting what is held out": (
    "",
    "data.forget=indices data.forget_indices=held_out.txt",
    r"example \d+ is held out for validation \(3 such examples\); .*config.data.validation_fraction=0",
  ),
  "too few models": (
    "",
    "memorization.models=3",
    r"config.memorization.models=3: .* train more than 3 models",
  ),
  "subsets without rows": (
    "",
    "memorization.fraction=0.0001",
    r"config.memorization.fraction=0.0001: .*at least one",
  ),
  "batch larger than a subset": (
    "",
    "memorization.batch_size=900",
    r"config.memorization.batch_size=900: a model sees 648 of 1295 examples",
  ),
  "unknown word": (
    "sharp_minmx",
    "",
    r"variant word 'sharp_minmx' is unknown; choose from ft, .*sharp_minmax",
  ),
  "two methods": ("ft,ga", "", r"variant word 'ga' is the second method; give one"),
  "an option of another model": (
    "",
    "model.depth=20",
    r"config.model.depth=20: model 'mlp' has no such option",
  ),
}


@pytest.mark.parametrize(("variant", "fields", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, capsys, variant, fields, message):
  np.save(tmp_path / "short.npy", np.zeros(7))
  (tmp_path / "held_out.txt").write_text(" ".join(map(str, range(21))))
  monkeypatch.chdir(tmp_path)
  config = ROOT / "configs" / "digits_sharp.py"
  arguments = ["hamu_jax.main", f"--config={config}:{variant}", "--workdir=run", "--config.model.name=mlp"]
  assert main.run(arguments + [f"--config.{field}" for field in fields.split()]) == 2
  error = capsys.readouterr().err.strip()
  assert error.startswith("error: ")
  assert len(error.splitlines()) == 1
  assert re.search(message, error), error
  assert not (tmp_path / "run").exists()
