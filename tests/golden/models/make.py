"""Writes the golden files of tests/models/test_torch.py from torchvision's and timm's own models.

    pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31
    python make.py

`numbers.npz` holds what small models compute in float64 from the weights and images of `recipe`,
which the tests make again: `{case}/logits`, `{case}/features`, and of one step of SGD what TRAINING
says. `shapes.json` holds the names and shapes of their tensors and of those of the full models.
"""

import json
import pathlib
import zlib

import numpy as np

BATCH, CLASSES = 4, 5
# Height and width of the images of each case; none fits its model's strides, but for the ViT's.
SIZES = {
  "resnet18": (7, 10),
  "resnet50_imagenet": (45, 38),
  "vgg16_bn": (9, 11),
  "vgg16_bn_imagenet": (33, 38),
  "vit_s": (8, 12),
}
# The step is `resnet18`'s. Recorded are its loss and logits, a digest of the gradient by every
# parameter and of every running average after it, and the new model's logits in evaluation.
TRAINING, LEARNING_RATE = "resnet18", 0.01


def recipe(name, shape):
  """The float32 values of a tensor, from its name alone: NumPy keeps this generator as it is."""
  values = 2 * np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape) - 1
  match name.rpartition(".")[2], len(shape):
    case "num_batches_tracked", _:
      return np.zeros(shape, np.int64)
    case ("running_var", _) | ("weight", 1):
      values = 1 + values / 2
    case "weight", _:
      values *= np.sqrt(6 / np.prod(shape[1:]))
    case "images", _:
      values *= 2
    case _:
      values /= 4
  return values.astype(np.float32)


def digest(tensor):
  """Norm and two projections, which together tell a tensor from its permutations."""
  flat, index = np.float64(tensor).reshape(-1), np.arange(tensor.size)
  return np.array([np.linalg.norm(flat), flat @ np.cos(index), flat @ np.sin(1.7 * index)])


def small_models():
  """{case: PyTorch model}."""
  import timm
  import torchvision
  from torch import nn

  resnet = torchvision.models.resnet
  basic = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
  basic.conv1, basic.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()

  def vgg(classifier):
    layers = torchvision.models.vgg.make_layers([4, "M", 8, 8, "M"], batch_norm=True)
    model = torchvision.models.VGG(layers, init_weights=False)
    model.classifier = classifier
    return model

  hidden = vgg(
    nn.Sequential(
      nn.Linear(8 * 7 * 7, 12),
      nn.ReLU(),
      nn.Dropout(),
      nn.Linear(12, 9),
      nn.ReLU(),
      nn.Dropout(),
      nn.Linear(9, CLASSES),
    )
  )
  linear = vgg(nn.Linear(8, CLASSES))
  linear.avgpool = nn.AdaptiveAvgPool2d((1, 1))
  return {
    "resnet18": basic,
    "resnet50_imagenet": resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=CLASSES),
    "vgg16_bn": linear,
    "vgg16_bn_imagenet": hidden,
    "vit_s": timm.models.vision_transformer.VisionTransformer(
      img_size=SIZES["vit_s"], patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=CLASSES
    ),
  }


def full_models():
  """{name: PyTorch model as published}."""
  import timm
  import torchvision

  names = ("resnet18", "resnet34", "resnet50", "vgg16_bn")
  models = {name: getattr(torchvision.models, name)() for name in names}
  return models | {"vit_small_patch16_224": timm.create_model("vit_small_patch16_224")}


def shapes(model):
  return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def evaluate(model, images):
  """-> logits, and features: what the last linear layer is given."""
  import torch
  from torch import nn

  last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
  given = []
  handle = last.register_forward_hook(lambda _, inputs, output: given.append(inputs[0]))
  with torch.no_grad():
    logits = model.eval()(images)
  handle.remove()
  return logits.numpy(), given[0].numpy()


def train(model, images):
  """{what TRAINING says} of one step on labels 0, 1, 2, ..."""
  import torch

  optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
  logits = model.train()(images)
  loss = torch.nn.functional.cross_entropy(logits, torch.arange(BATCH) % CLASSES)
  loss.backward()
  optimizer.step()
  numbers = {"loss": loss.item(), "logits": logits.detach().numpy()}
  for name, parameter in model.named_parameters():
    numbers[f"gradient/{name}"] = digest(parameter.grad.numpy())
  for name, tensor in model.state_dict().items():
    if "running" in name:
      numbers[f"statistic/{name}"] = digest(tensor.numpy())
  numbers["logits_after"], _ = evaluate(model, images)
  return numbers


def main():
  import torch

  folder = pathlib.Path(__file__).parent
  numbers, small = {}, small_models()
  layouts = {
    "small": {name: shapes(model) for name, model in small.items()},
    "full": {name: shapes(model) for name, model in full_models().items()},
  }
  for name, model in small.items():
    state = {key: torch.tensor(recipe(key, shape)) for key, shape in shapes(model).items()}
    model.load_state_dict(state)
    model.double()
    images = torch.tensor(recipe("images", (BATCH, 3, *SIZES[name]))).double()
    numbers[f"{name}/logits"], numbers[f"{name}/features"] = evaluate(model, images)
    if name == TRAINING:
      numbers |= {f"training/{key}": value for key, value in train(model, images).items()}
  np.savez_compressed(folder / "numbers.npz", **numbers)
  (folder / "shapes.json").write_text(json.dumps(layouts, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
