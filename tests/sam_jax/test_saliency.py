"""Saliency masks: the reference's numbers, and a sort by hand."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from hamu_jax.data.batching import BatchPlan, Stream
from hamu_jax.experiment.masks import forget_gradient
from hamu_jax.paired import Paired
from hamu_jax.vision.feed import ImageData, ResidentImages
from hamu_jax.vision.task import make_fetch
from sam_jax import apply_mask, complement, saliency_mask
from tests.sam_jax import nets

CLASSES = 10
BATCH = 8
SELECTIONS = {"largest": "documented", "smallest": "as_coded"}


@pytest.fixture(scope="module")
def masks(request):
  folder = request.path.parent.parent / "golden" / "sam"
  with np.load(folder / "masks.npz", allow_pickle=False) as archive:
    return dict(archive)


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_reproduces_the_reference_mask(x64, masks, net, fraction, select):
  gradients = nets.params(net, CLASSES, masks[f"{net}/grad_sum"])
  got = saliency_mask(gradients, fraction, select=select)
  np.testing.assert_array_equal(
    nets.flat_params(net, CLASSES, got), masks[f"{net}/{SELECTIONS[select]}/{fraction}"]
  )


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("microbatch", [0, 5])
def test_gradient_of_the_forget_set_is_the_reference_one(x64, golden, masks, net, microbatch):
  """Batches of 8, the last of 3: their means add up, which is not the gradient of the set's."""
  with np.load(golden / "sam" / "methods.npz", allow_pickle=False) as archive:
    arrays = {
      name: archive[f"{net}/{name}"] for name in ("forget_x", "forget_y", "init_params", "init_buffers")
    }
  count = len(arrays["forget_y"])
  data = ImageData(
    np.asarray(nets.inputs(net, arrays["forget_x"])),
    arrays["forget_y"].astype(np.int32),
    np.ones(count, bool),
    np.arange(count, dtype=np.int32),
  )
  variables = {
    "params": nets.params(net, CLASSES, arrays["init_params"]),
    "batch_stats": nets.batch_stats(net, arrays["init_buffers"]),
  }
  got = forget_gradient(
    nets.forward(nets.make(net, CLASSES)),
    make_fetch("none"),
    ResidentImages(data),
    BatchPlan(BATCH, Paired(None, Stream(data.ids, BATCH))),
    variables,
    base={},
    microbatch=microbatch,
  )
  np.testing.assert_allclose(
    nets.flat_params(net, CLASSES, got), np.abs(masks[f"{net}/grad_sum"]), rtol=0, atol=1e-9
  )


VALUES = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 3.0, 1e-30, -1e30])
# One structure, so that nothing is compiled anew.
SHAPES = ((2, 3), (5,), ())


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
  values=st.lists(VALUES, min_size=12, max_size=12),
  fraction=st.floats(1 / 12, 1),
  select=st.sampled_from(list(SELECTIONS)),
)
def test_marks_so_many_of_the_extreme_weights_of_the_whole_model(values, fraction, select):
  pieces = np.split(np.array(values, np.float32), np.cumsum([6, 5]))
  gradients = [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES)]
  mask = saliency_mask(gradients, fraction, select=select)
  assert [leaf.shape for leaf in mask] == list(SHAPES)
  assert {leaf.dtype for leaf in mask} == {jnp.dtype("int8")}
  mask = np.concatenate([np.ravel(leaf) for leaf in mask])
  magnitude = np.abs(np.array(values, np.float32))
  # Python's sort is stable: equal magnitudes in the order of the leaves.
  order = sorted(range(12), key=lambda i: -magnitude[i] if select == "largest" else magnitude[i])
  wanted = np.zeros(12)
  wanted[order[: int(12 * fraction)]] = 1
  np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize("fraction", [0, 1.2, -0.1, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction):
  with pytest.raises(ValueError, match=rf"^fraction={fraction!r}: .*\(0, 1\]$"):
    saliency_mask(jnp.arange(10.0), fraction)


def test_a_share_that_marks_nothing_is_refused():
  with pytest.raises(ValueError, match=r"^fraction=0\.05 marks none of 10 .*at least 0\.1$"):
    saliency_mask(jnp.arange(10.0), 0.05)


def test_an_unknown_selection_is_refused():
  with pytest.raises(ValueError, match="^select='most': choose from largest, smallest$"):
    saliency_mask(jnp.arange(10.0), 0.5, select="most")


def test_a_mask_and_its_complement_part_a_tree_even_where_it_is_not_finite():
  tree = {"a": jnp.array([1.0, jnp.nan, 3.0]), "b": jnp.array([[jnp.inf], [-2.0]])}
  mask = {"a": jnp.array([1, 0, 1], jnp.int8), "b": jnp.array([[0], [1]], jnp.int8)}
  chosen, rest = apply_mask(tree, mask), apply_mask(tree, complement(mask))
  np.testing.assert_array_equal(chosen["a"], [1, 0, 3])
  np.testing.assert_array_equal(chosen["b"], [[0], [-2]])
  jax.tree.map(lambda leaf, one, other: np.testing.assert_array_equal(leaf, one + other), tree, chosen, rest)
