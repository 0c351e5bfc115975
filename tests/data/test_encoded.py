"""Images decoded by rows: the resizing rule, what is read and when, and every refusal."""

import io

import numpy as np
import pytest
from PIL import Image

from hamu_jax.data.encoded import EncodedImages, resize, resized
from hamu_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (9, 6, 7, 3), dtype=np.uint8)


def _png(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "png")
  return buffer.getvalue()


class _Source:
  """Encoded images that count which rows are read."""

  def __init__(self, images):
    self.encoded = [image if isinstance(image, bytes) else _png(image) for image in images]
    self.read = []

  def __call__(self, row):
    self.read.append(row)
    return self.encoded[row]


def _open(images, image_size=0):
  source = _Source(images)
  return source, EncodedImages(source, np.arange(len(images)), "train image", image_size)


@pytest.mark.parametrize(
  "width, height, size, new_width, new_height",
  [
    (240, 160, 128, 219, 146),  # 128 of round(128 256 / 224) = 146.
    (160, 240, 128, 146, 219),
    (250, 200, 224, 320, 256),
    (90, 120, 64, 64, 85),  # Below 128 without a margin.
    (40, 40, 64, 64, 64),
    (64, 64, 64, 64, 64),
  ],
)
def test_resizing_keeps_ramps_and_cuts_the_centre(width, height, size, new_width, new_height):
  # A linear ramp passes any bilinear filter unchanged, but for its ends.
  ramp = np.zeros((height, width, 3), np.uint8)
  ramp[..., 0], ramp[..., 1] = np.arange(width), np.arange(height)[:, None]
  result = np.asarray(resize(Image.fromarray(ramp), size), np.float64)
  assert result.shape == (size, size, 3)
  at = np.arange(size) + 0.5
  x = (at + round((new_width - size) / 2)) * width / new_width - 0.5
  y = (at + round((new_height - size) / 2)) * height / new_height - 0.5
  inner_x, inner_y = (x > 2) & (x < width - 3), (y > 2) & (y < height - 3)
  assert inner_x.sum() > size / 2 and inner_y.sum() > size / 2
  # Pillow rounds twice, once an axis.
  assert np.abs(result[..., 0] - x[None])[:, inner_x].max() <= 1.01
  assert np.abs(result[..., 1] - y[:, None])[inner_y].max() <= 1.01


def test_decoded_arrays_are_resized_like_encoded_images():
  expected = [np.asarray(resize(Image.fromarray(image), 12)) for image in IMAGES]
  np.testing.assert_array_equal(resized(IMAGES, 12), expected)
  grey = IMAGES[..., :1]
  assert resized(grey, 12).shape == (9, 12, 12, 1)
  # Of a square of the right size nothing changes.
  np.testing.assert_array_equal(resized(IMAGES[:, :, :6], 6), IMAGES[:, :, :6])


def test_only_the_rows_that_are_indexed_are_read():
  source, images = _open(IMAGES, image_size=6)
  assert len(images) == 9 and images.shape == (9, 6, 6, 3) and images.dtype == np.uint8
  part = images.select(np.array([8, 2, 5, 0]))
  assert isinstance(part, EncodedImages) and part.shape == (4, 6, 6, 3)
  assert source.read == []
  result = part[np.array([3, 1, 1])]
  # The shorter side is 6 already, and the middle 6 of 7 columns start at round(0.5) = 0.
  np.testing.assert_array_equal(result, IMAGES[[0, 2, 2], :, :6])
  assert result.dtype == np.uint8 and set(source.read) == {0, 2}
  np.testing.assert_array_equal(part[1:3], IMAGES[[2, 5], :, :6])
  assert part[np.zeros(4, bool)].shape == (0, 6, 6, 3)


def test_more_rows_than_one_thread_takes_keep_their_order():
  rows = RNG.integers(0, 9, 700)
  _, images = _open(IMAGES, image_size=6)
  np.testing.assert_array_equal(images[rows], IMAGES[rows, :, :6])


def test_grey_images_stay_so_only_where_all_are_decoded_and_grey():
  grey = IMAGES[:3, ..., 0]
  _, images = _open(list(grey), image_size=6)
  np.testing.assert_array_equal(images.whole(), grey[:, :, :6, None])
  repeated = np.repeat(grey[:, :, :6, None], 3, axis=3)
  # Streamed images have one shape, whatever the others are.
  np.testing.assert_array_equal(images[:], repeated)
  _, mixed = _open([*grey, IMAGES[3]], image_size=6)
  for result in (mixed.whole(), mixed[:]):
    np.testing.assert_array_equal(result, [*repeated, IMAGES[3, :, :6]])


def test_other_encodings_are_brought_to_eight_bits_of_colour():
  image = Image.fromarray(IMAGES[0])
  encoded = []
  for mode, kind in (("CMYK", "tiff"), ("RGBA", "png"), ("P", "png")):
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind)
    encoded.append(buffer.getvalue())
  _, images = _open(encoded)
  result = images.whole()
  assert result.shape == (3, 6, 7, 3)
  np.testing.assert_array_equal(result[1], IMAGES[0])


def test_digest_depends_on_every_image_its_length_and_its_place():
  def of(*encoded):
    return _open(encoded)[1].digest()

  # These are no images: the digest decodes nothing.
  digests = [of(b"ab", b"c"), of(b"a", b"bc"), of(b"c", b"ab"), of(b"ab"), of(b"ab", b"d")]
  assert len(set(digests)) == len(digests)
  assert of(b"ab", b"c") == digests[0]
  _, images = _open([b"x", b"c", b"ab"])
  assert images.select(np.array([2, 1])).digest() == digests[0]


@pytest.mark.parametrize(
  "value, message",
  [
    (b"no image", "train image 1 cannot be decoded .not of a format that is read: JPEG, PNG"),
    (_png(IMAGES[0])[:60], "train image 1 cannot be decoded"),
    (None, "train image 1 cannot be decoded"),
    (_png(np.zeros((4, 5), np.uint16)), "more than 8 bits a channel"),
    (_png(IMAGES[0, :5]), "train images have 2 shapes.*one with config.data.image_size"),
  ],
)
def test_bad_images_are_one_line_that_names_the_row(value, message):
  source, images = _open([IMAGES[0], b""])
  source.encoded[1] = value
  for decode in (images.whole, lambda: images[:]):
    with pytest.raises(UserError, match=message) as error:
      decode()
    assert "\n" not in str(error.value)
