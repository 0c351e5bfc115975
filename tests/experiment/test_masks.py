"""The mask stage in a run: its masks are those of the forget set's gradient, kept, reused and exported."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hamu_jax import data
from hamu_jax.config import default as config_lib
from hamu_jax.config import share, validation
from hamu_jax.errors import UserError
from hamu_jax.experiment import experiment, masks
from hamu_jax.paired import Paired
from hamu_jax.run import preemption
from hamu_jax.run import stage_cache as stages

MEAN, STD = 0.3, 0.4
# 60 examples to forget: batches of 25, 25 and 10.
SIZE, BATCH = 300, 25


class Runs:
  """Runs of one model and forget set; they share their finished stages."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.stages = folder / "stages"

  def __call__(self, name, method=None, **mask):
    """Runs neggrad under a mask, and returns the run directory."""
    config = config_lib.default_config()
    config.stage_cache = str(self.stages)
    config.retrain = False
    config.model.name = "mlp"
    config.data.update(
      source="digits",
      mean=(MEAN,),
      std=(STD,),
      train_size=SIZE,
      test_size=100,
      forget="random",
      forget_fraction=0.2,
    )
    config.train.update(epochs=2, batch_size=100, evaluate_epochs=0.0)
    config.train.optimizer.learning_rate = 0.01
    config.method.update(name="neggrad", retain_weight=0.5, epochs=1.0, batch_size=60)
    # Weight decay and momentum must not move what the mask excludes either.
    config.method.optimizer.update(learning_rate=0.1, momentum=0.9, weight_decay=0.1)
    config.method.update(method or {})
    config.mask.update(batch_size=BATCH, **mask)
    share(config, "mask")
    validation.validate(config)
    with preemption.Watch() as watch:
      experiment.Experiment(config, self.folder / name, watch).run()
    return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def tenth(runs):
  """A run in which a tenth of the weights unlearns."""
  return runs("tenth", fraction=0.1)


@pytest.fixture(scope="module")
def magnitude(tenth):
  """|sum of the batches' mean gradients| of the original model, by tensor, computed by hand."""
  digits = data.load("digits", train_size=SIZE, test_size=100, seed=41)
  with np.load(tenth / "split.npz") as split:
    sets = Paired(split["retain"], split["forget"])
  plan = data.unlearning_plan(sets, "forget", batch_size=BATCH, seed=41, epoch="pass")
  images = (digits.train.images.reshape(SIZE, -1) / 255 - MEAN) / STD

  def mean_loss(weights, images, labels):
    hidden = images @ weights["hidden.0.weight"].T + weights["hidden.0.bias"][None]
    logits = jax.nn.relu(hidden) @ weights["classifier.weight"].T + weights["classifier.bias"][None]
    chosen = jnp.take_along_axis(logits, labels[:, None], 1)
    return jnp.mean(jax.nn.logsumexp(logits, 1, keepdims=True) - chosen)

  batches = [indices[indices >= 0] for indices in plan.indices(0, 3).forget]
  assert [len(indices) for indices in batches] == [25, 25, 10]
  np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.sort(sets.forget))
  original = load_file(tenth / "original.safetensors")
  gradient = jax.jit(jax.grad(mean_loss))
  gradients = [gradient(original, images[indices], digits.train.labels[indices]) for indices in batches]
  return {name: np.abs(sum(np.asarray(g[name], np.float64) for g in gradients)) for name in original}


def flat(tensors):
  return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def record(runs, **wanted):
  """The outcome of the one mask stage with these values."""
  outcomes = [json.loads(path.read_text()) for path in runs.stages.glob("mask-*/outcome.json")]
  (outcome,) = [o for o in outcomes if all(o[name] == value for name, value in wanted.items())]
  return outcome


def test_the_mask_is_that_of_the_forget_gradient(tenth, magnitude):
  mask, ranked = flat(load_file(tenth / "mask.safetensors")), flat(magnitude)
  assert mask.dtype == np.int8 and mask.sum() == len(ranked) // 10
  threshold = np.sort(ranked)[-int(mask.sum())]
  # Rounding may exchange weights at the threshold.
  clear = np.abs(ranked - threshold) > 1e-4 * threshold
  assert threshold > 0 and (~clear).sum() < 0.01 * len(ranked)
  np.testing.assert_array_equal(mask[clear], ranked[clear] > threshold)


def test_the_stage_says_what_its_masks_hold(tenth, runs, magnitude):
  del tenth
  outcome, ranked = record(runs, select="largest"), np.sort(flat(magnitude))[::-1]
  assert [mask["fraction"] for mask in outcome["masks"]] == [0.1, 0.3, 0.5]
  for mask in outcome["masks"]:
    assert mask["weights"] == int(mask["fraction"] * len(ranked))
    wanted = ranked[: mask["weights"]].sum() / ranked.sum()
    np.testing.assert_allclose(mask["gradient_share"], wanted, rtol=1e-4)


def test_other_weights_stay_exactly_where_they_are(tenth):
  mask, before, after = (
    flat(load_file(tenth / f"{name}.safetensors")) for name in ("mask", "original", "unlearned")
  )
  np.testing.assert_array_equal(after[mask == 0], before[mask == 0])
  assert (after != before)[mask == 1].mean() > 0.9


def test_another_fraction_is_there_already(tenth, runs, magnitude, monkeypatch):
  def unexpected(*arguments, **options):
    raise AssertionError("computed again")

  monkeypatch.setattr(masks, "forget_gradient", unexpected)
  smaller, larger = (
    flat(load_file(folder / "mask.safetensors")) for folder in (tenth, runs("half", fraction=0.5))
  )
  assert larger.sum() == larger.size // 2
  assert (larger[smaller == 1] == 1).all()


def test_an_exported_mask_gives_the_same_model(tenth, runs):
  again = runs("given", path=str(tenth / "mask.safetensors"))
  for name in ("mask", "unlearned"):
    one, other = (load_file(folder / f"{name}.safetensors") for folder in (tenth, again))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
      np.testing.assert_array_equal(other[key], tensor, err_msg=key)


def test_the_smallest_gradients_are_marked_on_request(tenth, runs, magnitude):
  folder = runs("smallest", select="smallest", fraction=0.5, fractions=(0.5,))
  largest = record(runs, select="largest")["masks"][2]["gradient_share"]
  (smallest,) = record(runs, select="smallest")["masks"]
  # Of 4,810 weights half are marked and half are not.
  np.testing.assert_allclose(smallest["gradient_share"], 1 - largest, rtol=1e-4)
  assert smallest["gradient_share"] < 0.2 < 0.8 < largest
  mask, ranked = flat(load_file(folder / "mask.safetensors")), flat(magnitude)
  assert ranked[mask == 1].max() <= ranked[mask == 0].min() * (1 + 1e-4)


DAMAGED = {
  "another value": (
    lambda mask: mask | {"hidden.0.bias": np.full(64, 2, np.int8)},
    "config.mask.path='.*': a mask holds zeros and ones only; give a mask.safetensors",
  ),
  "another shape": (
    lambda mask: mask | {"classifier.bias": np.zeros(7, np.int8)},
    r"config.mask.path: .*'classifier.bias' has shape \(7,\), this model's has \(10,\)",
  ),
  "another model": (
    lambda mask: {"fc.weight": np.zeros((10, 512), np.int8)},
    r"config.mask.path: .*tensor '.*' is missing \(4 in all\); give a file of this model",
  ),
  "more tensors": (
    lambda mask: mask | {"hidden.1.bias": np.zeros(64, np.int8)},
    "config.mask.path: .*tensor 'hidden.1.bias' is unknown",
  ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_mask_that_does_not_fit_is_one_clear_line(tenth, runs, tmp_path, damage, message):
  save_file(damage(load_file(tenth / "mask.safetensors")), tmp_path / "mask.safetensors")
  with pytest.raises(UserError, match=f"^{message}") as error:
    runs(tmp_path.name, path=str(tmp_path / "mask.safetensors"))
  assert "\n" not in str(error.value)
  # Before anything is done.
  assert not (runs.folder / tmp_path.name).exists()


def test_the_weights_of_a_model_are_no_mask(tenth, runs, tmp_path):
  """Their tensors have the names and the shapes of a mask's."""
  with pytest.raises(UserError, match="a mask holds zeros and ones only"):
    runs(tmp_path.name, path=str(tenth / "original.safetensors"))


def test_what_is_no_safetensors_file_is_one_clear_line(runs, tmp_path):
  (tmp_path / "mask.safetensors").write_bytes(b"not this")
  with pytest.raises(UserError, match="^config.mask.path: .*cannot be read as a safetensors file") as error:
    runs(tmp_path.name, path=str(tmp_path / "mask.safetensors"))
  assert "\n" not in str(error.value)
  # Before anything is done.
  assert not (runs.folder / tmp_path.name).exists()


def test_fractions_that_mark_no_weight_are_one_clear_line():
  config = config_lib.default_config().mask
  config.update(fraction=0.5, fractions=(0.1, 0.5))
  message = r"^config.mask.fractions=\(0.1, 0.5\): 0.1 of 5 weights is none; choose at least 0.2$"
  with pytest.raises(UserError, match=message):
    masks.check_fractions(config, {"w": jnp.zeros(5)})
  masks.check_fractions(config, {"w": jnp.zeros(10)})
  config.fraction = 0.0
  masks.check_fractions(config, {"w": jnp.zeros(5)})


def test_a_forget_set_without_any_gradient_has_a_mask(tmp_path):
  config = config_lib.default_config().mask
  config.update(fraction=0.5, fractions=(0.5,))
  cache = stages.StageCache(tmp_path)
  mask, record = masks.cached_mask(
    config, {"w": jnp.zeros(4)}, lambda: {"w": jnp.zeros(4)}, cache=cache, key="k", provenance={}
  )
  assert mask["w"].sum() == 2
  assert record == cache.outcome("mask", "k")
  assert record["masks"] == [{"fraction": 0.5, "weights": 2, "gradient_share": 0.0}]
