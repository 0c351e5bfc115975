"""What a run says before it begins."""

import pathlib

from hamu_jax import main
from hamu_jax.engine import loop as loop_lib

SMALL = [
  "hamu_jax.main",
  "--config=hamu_jax:digits_hamu",
  "--config.model.name=mlp",
  "--config.train.epochs=1",
  "--config.retrain=False",
  "--config.method.max_steps=1",
]


def test_the_model_the_sets_and_what_the_cache_has(tmp_path, capfd):
  # 1438 digits in batches of 128.
  steps = ": pretrain (12 steps), unlearn (1 step)"
  for computed, cached in ((steps, ""), ("", ": pretrain, unlearn")):
    assert main.run([*SMALL, f"--workdir={tmp_path / 'run'}"]) == 0
    said = capfd.readouterr().err
    # 64 inputs, 64 hidden units and 10 classes, each with a bias.
    assert "hamu-q: mlp, 4,810 trained parameters, on 1 x cpu\n" in said
    assert "examples: 1,296 to retain, 142 to forget\n" in said
    assert (f"stages to compute{computed}\n" in said) == bool(computed)
    assert (f"stages from the cache{cached}\n" in said) == bool(cached)
  assert pathlib.Path(tmp_path / "run" / "summary.json").exists()


def test_a_dry_run_says_it_and_leaves_nothing(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(loop_lib.Loop, "run", None)
  folder = tmp_path / "run"
  mask = ["--config.mask.fraction=0.5", "--config.mask.fractions=(0.5,)"]
  assert main.run([*SMALL, f"--workdir={folder}", "--dry-run", *mask]) == 0
  said = capfd.readouterr().out
  assert "hamu-q: mlp, 4,810 trained parameters, on 1 x cpu\n" in said
  assert "stages to compute: pretrain (12 steps), mask, unlearn (1 step)\n" in said
  scores = [
    "--config.data.forget=memorization",
    "--config.data.scores=estimate",
    "--config.data.forget_size=9",
  ]
  assert (
    main.run([*SMALL, f"--workdir={folder}", "--dry-run", *scores, "--config.memorization.models=40"]) == 0
  )
  assert "to compute: memorization (40 models), pretrain" in capfd.readouterr().out
  assert not list(tmp_path.iterdir())
  # It refuses what the run would refuse.
  folder.mkdir()
  (folder / "thesis.tex").touch()
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "config.json").write_text('{"seed": 7}')
  for name, refusal in (("run", "not a run directory"), ("other", "belongs to another experiment")):
    assert main.run([*SMALL, f"--workdir={tmp_path / name}", "--dry-run"]) == 2
    assert refusal in capfd.readouterr().err
    assert len(list((tmp_path / name).iterdir())) == 1
