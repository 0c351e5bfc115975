"""Small made-up datasets in the schemas of the published ones."""

import io
import pathlib
from typing import NamedTuple

import datasets
import numpy as np
import pytest
from PIL import Image

RNG = np.random.default_rng(7)


class Published(NamedTuple):
  """A dataset as its hub repository lays it out."""

  name: str
  subset: str
  folder: str  # of the parquet files, in the repository
  image_key: str
  labels: dict[str, int]  # class-label columns and their numbers of classes
  splits: tuple[str, ...]
  sizes: tuple[tuple[int, ...], ...]  # shapes of the images, in turn
  suffix: str
  options: dict  # what `load` must be told


PUBLISHED = {
  "cifar100": Published(
    "uoft-cs/cifar100",
    "",
    "cifar100",
    "img",
    {"fine_label": 100, "coarse_label": 20},
    ("train", "test"),
    ((32, 32, 3),),
    "png",
    {"label_key": "fine_label"},
  ),
  "svhn": Published(
    "ufldl-stanford/svhn",
    "cropped_digits",
    "cropped_digits",
    "image",
    {"label": 10},
    ("train", "test", "extra"),
    ((32, 32, 3),),
    "png",
    {"subset": "cropped_digits"},
  ),
  # Some of Tiny-ImageNet's JPEG files are grey.
  "tiny_imagenet": Published(
    "zh-plus/tiny-imagenet",
    "",
    "data",
    "image",
    {"label": 200},
    ("train", "valid"),
    ((64, 64, 3), (64, 64, 3), (64, 64)),
    "jpeg",
    {"test_split": "valid"},
  ),
  "imagenet": Published(
    "ILSVRC/imagenet-1k",
    "",
    "data",
    "image",
    {"label": 1000},
    ("train", "validation", "test"),
    ((300, 200, 3), (160, 240, 3), (230, 230), (40, 500, 3)),
    "jpeg",
    {"test_split": "validation", "image_size": 224},
  ),
}


class Made(NamedTuple):
  """What was written: the repository's folder and, by split, images, labels and file names."""

  spec: Published
  path: str
  files: dict[str, str]
  images: dict[str, list[np.ndarray]]
  labels: dict[str, np.ndarray]
  names: dict[str, list[str]]


@pytest.fixture(params=PUBLISHED)
def published(request, tmp_path) -> Made:
  """One published dataset after the other, of a dozen images a split."""
  spec = PUBLISHED[request.param]
  made = Made(spec, str(tmp_path / "repository"), {}, {}, {}, {})
  features = {key: datasets.ClassLabel(num_classes=count) for key, count in spec.labels.items()}
  features = datasets.Features({spec.image_key: datasets.Image(), **features})
  for split in spec.splits:
    cells, images, names = [], [], []
    for row in range(12):
      pixels = RNG.integers(0, 256, spec.sizes[row % len(spec.sizes)], dtype=np.uint8)
      encoded = io.BytesIO()
      Image.fromarray(pixels).save(encoded, spec.suffix)
      images.append(np.asarray(Image.open(encoded).convert("RGB")))
      names.append(f"n0000000{row % 3}_{row}_n0000000{row % 3}.{spec.suffix}")
      cells.append({"bytes": encoded.getvalue(), "path": names[-1]})
    # ImageNet's test labels are secret.
    first = -1 if spec.name.startswith("ILSVRC") and split == "test" else 0
    labels = {key: RNG.integers(first, count if first == 0 else 0, 12) for key, count in spec.labels.items()}
    table = datasets.Dataset.from_dict({spec.image_key: cells, **labels}, features=features)
    file = pathlib.Path(made.path, spec.folder, f"{split}-00000-of-00001.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(file))
    made.files[split], made.images[split], made.names[split] = str(file), images, names
    made.labels[split] = labels[next(iter(spec.labels))]
  return made


@pytest.fixture
def arrow_cache(tmp_path, monkeypatch):
  """Keeps what `datasets` converts in the test's own folder."""
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
