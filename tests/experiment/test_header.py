"""What a run says before it begins."""

import pathlib

from hamu_jax import main

_SMALL = [
  "hamu_jax.main",
  "--config=hamu_jax:digits_hamu",
  "--config.model.name=mlp",
  "--config.train.epochs=1",
  "--config.retrain=False",
  "--config.method.max_steps=1",
]


def test_the_model_the_sets_and_what_the_cache_has(tmp_path, capfd):
  for computed, cached in ((": pretrain, unlearn", ""), ("", ": pretrain, unlearn")):
    assert main.run([*_SMALL, f"--workdir={tmp_path / 'run'}"]) == 0
    said = capfd.readouterr().err
    # 64 inputs, 64 hidden units and 10 classes, each with a bias.
    assert "hamu-q: mlp, 4,810 trained parameters, on 1 x cpu\n" in said
    assert "examples: 1,296 to retain, 142 to forget\n" in said
    assert (f"stages to compute{computed}\n" in said) == bool(computed)
    assert (f"stages from the cache{cached}\n" in said) == bool(cached)
  assert pathlib.Path(tmp_path / "run" / "summary.json").exists()
