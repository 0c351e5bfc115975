"""Images that stay encoded, wherever their source keeps them, until they are indexed."""

import concurrent.futures
import hashlib
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from hamu_jax.errors import UserError, first_line

# Images of at least this size are cut out of a larger one, as in the evaluation on ImageNet: 224 of 256.
MARGIN_FROM = 128
MARGIN = 256 / 224
# Formats that are decoded. Others can start programs (EPS starts Ghostscript) or are rarely tested decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
# Bounds of one image: encoded, and decoded. The second is Pillow's own for images from outside.
IMAGE_BYTES = 256 * 2**20
IMAGE_PIXELS = 89_478_485
# Number of images that one task of the thread pool decodes or hashes.
CHUNK = 256


def resize(image: Image.Image, size: int) -> Image.Image:
  """Scales the shorter side, then crops the centre.

  The shorter side becomes `size` or, from 128 pixels on, round(size 256 / 224), with Pillow's bilinear
  filter.

  Args:
    image: image of any size.
    size: height and width of the result in pixels.

  Returns:
    The square image.

  Source: the evaluation transforms Resize and CenterCrop of torchvision.
  """
  shorter = round(size * MARGIN) if size >= MARGIN_FROM else size
  width, height = image.size
  longer = int(shorter * max(width, height) / min(width, height))
  width, height = (shorter, longer) if width <= height else (longer, shorter)
  image = image.resize((width, height), Image.Resampling.BILINEAR)
  left, top = round((width - size) / 2), round((height - size) / 2)
  return image.crop((left, top, left + size, top + size))


def resized(images: np.ndarray, size: int) -> np.ndarray:
  """Applies `resize` to images that are already decoded.

  Args:
    images: [N, H, W, C] uint8, C = 1 or 3.
    size: height and width of the result in pixels.

  Returns:
    [N, size, size, C] uint8.
  """
  channels = images.shape[-1]
  plain = images[..., 0] if channels == 1 else images
  result = [np.asarray(resize(Image.fromarray(image), size)) for image in plain]
  return np.stack(result).reshape(-1, size, size, channels)


class EncodedImages:
  """Encoded images that threads decode when they are indexed; none is held in memory.

  An object stands in for a [N, H, W, 3] uint8 array that is only indexed by its first axis: it has `len`,
  `shape`, `dtype` and `images[indices]`. Grey images have their channel repeated.

  Attributes:
    shape: [N, image_size, image_size, 3].
    dtype: uint8.
  """

  dtype = np.dtype(np.uint8)

  def __init__(
    self, read: Callable[[int], bytes | memoryview], rows: np.ndarray, what: str, image_size: int = 0
  ):
    """Refers to some rows of a source.

    Args:
      read: (row of the source) -> encoded image; called from several threads.
      rows: [N] int64, the row of the source that holds each image.
      what: name of an image, for error messages.
      image_size: height and width in pixels to which `resize` brings every image; 0 keeps their sizes, and
        then `shape` is undefined.
    """
    self._read, self._rows, self._what, self._size = read, rows, what, image_size

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return len(self), self._size, self._size, 3

  @classmethod
  def joined(cls, parts: "Sequence[EncodedImages]", what: str) -> "EncodedImages":
    """Returns all images of several objects, one after the other.

    Args:
      parts: images that are brought to one size, or keep theirs.
      what: name of an image, for error messages.
    """
    ends = np.cumsum([len(part) for part in parts])

    def read(row: int) -> memoryview:
      number = int(np.searchsorted(ends, row, side="right"))
      part = parts[number]
      return part._bytes(part._rows[row - ends[number] + len(part)])

    return cls(read, np.arange(ends[-1]), what, parts[0]._size)

  def select(self, rows: slice | np.ndarray) -> "EncodedImages":
    """Returns some of the images, still encoded."""
    return EncodedImages(self._read, self._rows[rows], self._what, self._size)

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """Decodes some of the images into [n, H, W, 3] uint8."""
    chosen = self._rows[rows]
    if not len(chosen):
      return np.empty((0, *self.shape[1:]), np.uint8)
    return self._stack([_coloured(image) for image in self._decode(chosen)])

  def whole(self) -> np.ndarray:
    """Decodes all images into [N, H, W, C] uint8, C = 1 if all of them are grey, else 3."""
    images = self._decode(self._rows)
    if any(image.ndim == 3 for image in images):
      images = [_coloured(image) for image in images]
    stacked = self._stack(images)
    return stacked if stacked.ndim == 4 else stacked[..., None]

  def digest(self) -> bytes:
    """Hashes the encoded images in order, without decoding them."""

    def of(rows: np.ndarray) -> bytes:
      digest = hashlib.sha256()
      for row in rows:
        value = self._bytes(row)
        # The length comes first, so that two sequences of images never give the same sequence of bytes.
        digest.update(len(value).to_bytes(8, "little"))
        digest.update(value)
      return digest.digest()

    return hashlib.sha256(b"".join(_in_threads(of, self._rows))).digest()

  def _decode(self, rows: np.ndarray) -> list[np.ndarray]:
    """Returns [H, W] for each grey image and [H, W, 3] for each colour image."""
    chunks = _in_threads(lambda part: [self._image(row) for row in part], rows)
    return [image for chunk in chunks for image in chunk]

  def _stack(self, images: list[np.ndarray]) -> np.ndarray:
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
      raise UserError(
        f"{self._what}s have {len(shapes)} shapes, one is needed: {shapes[:3]}; resize them to"
        " one with config.data.image_size"
      )
    return np.stack(images)

  def _bytes(self, row: int) -> memoryview:
    try:
      return memoryview(self._read(int(row)))
    except UserError:  # Of one of the parts of joined images.
      raise
    except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
      raise self._refusal(row, error) from None

  def _image(self, row: int) -> np.ndarray:
    value = self._bytes(row)
    try:
      image = _decoded(value)
    except UnidentifiedImageError:
      raise self._refusal(row, ValueError(f"not of a format that is read: {', '.join(FORMATS)}")) from None
    except Exception as error:  # Pillow's decoders raise many types for a damaged image.
      raise self._refusal(row, error) from None
    return np.asarray(resize(image, self._size) if self._size else image)

  def _refusal(self, row: int, error: Exception) -> UserError:
    return UserError(
      f"{self._what} {row} cannot be decoded ({first_line(error)}); remove it from the dataset, or save"
      " it again"
    )


def _decoded(value: memoryview) -> Image.Image:
  """Decodes an image, turned as its EXIF orientation says, into mode L or RGB."""
  if value.nbytes > IMAGE_BYTES:
    raise ValueError(f"larger than {IMAGE_BYTES >> 20} MiB")
  image: Image.Image = Image.open(io.BytesIO(value), formats=FORMATS)
  if image.width * image.height > IMAGE_PIXELS:
    raise ValueError(f"{image.width} x {image.height} pixels are more than {IMAGE_PIXELS}")
  if image.mode.startswith(("I", "F")):
    raise ValueError(f"mode {image.mode}: more than 8 bits a channel")
  if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
    image = ImageOps.exif_transpose(image)
  return image.convert("L" if image.mode in ("L", "1") else "RGB")


def _coloured(image: np.ndarray) -> np.ndarray:
  return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _in_threads(function: Callable, rows: np.ndarray) -> list:
  """Maps a function over chunks of rows in threads; Pillow and hashlib release the interpreter lock."""
  chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(function, chunks))
