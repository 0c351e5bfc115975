"""Sharpness-aware unlearning on ImageNet-1k with ResNet-50 (arXiv 2506.13715).

  python -m hamu_jax.main --config=configs/imagenet_resnet50.py:neggrad,high,sam \
    --config.data.scores=imagenet_index.npz --config.pairing=pmap --workdir=runs/imagenet

The words after the colon choose method, memorization level and sharpness; they are explained in
`hamu_jax.config.sharpness_paper`. Images are decoded when they are needed; each host decodes those of its own
devices. The scores are Feldman and Zhang's published ones. A pretrained model saves most of the time:
`--config.model.weights=FILE` reads torchvision's ResNet-50. `smoke` runs on the embedded digits with a narrow
ResNet-18.
"""

from hamu_jax.config.digits import on_digits
from hamu_jax.config.sharpness_paper import sharp_config


def get_config(variant: str = ""):
  """See the module."""
  config, smoke = sharp_config(variant)
  config.data.update(
    name="ILSVRC/imagenet-1k",
    test_split="validation",
    image_size=224,
    stream=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    scores="imagenet_index.npz",
  )
  config.model.name = "resnet50_imagenet"
  config.train.update(epochs=90, augment="random_resized_crop")
  config.train.optimizer.update(warmup_epochs=5.0, weight_decay=1e-4)
  # An evaluation decodes all of ImageNet, which takes as long as many steps.
  config.method.update(augment="random_resized_crop", evaluate_epochs=0.0)
  return on_digits(config, "resnet18", width=16) if smoke else config
