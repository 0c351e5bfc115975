"""Two processes of two devices each are one run of four devices."""

import json
import socket

import numpy as np
import pytest
from safetensors.numpy import load_file

from hamu_jax.config import default as config_lib
from hamu_jax.errors import UserError
from hamu_jax.run import hosts


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_and_unlearn_as_one(small, launch, tmp_path):
  # 63 rows a role leave one device of each half with fewer; checkpoints are written by both processes.
  pmap = [
    "--config.pairing=pmap",
    "--config.method.batch_size=63",
    "--config.checkpoint_seconds=0",
  ]
  single = launch(small("single", *pmap), devices=4)
  assert single.wait(300) == 0, single.stdout.read()

  def several():
    address = f"localhost:{free_port()}"
    return [
      launch(
        small(
          "several",
          *pmap,
          f"--config.distributed.coordinator={address}",
          "--config.distributed.num_processes=2",
          f"--config.distributed.process_id={index}",
        ),
        devices=2,
      )
      for index in range(2)
    ]

  processes = several()
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
  # One writer: one table, one log.
  assert "retrained" in outputs[0]
  assert "retrained" not in outputs[1]

  one, both = tmp_path / "single", tmp_path / "several"
  rows = [(both / "metrics.jsonl").read_text(), (one / "metrics.jsonl").read_text()]
  assert rows[0].count("\n") == rows[1].count("\n")
  expected = load_file(one / "unlearned.safetensors")
  for name, tensor in load_file(both / "unlearned.safetensors").items():
    np.testing.assert_allclose(tensor, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
  # Run again, both take the finished stages from the cache.
  again = several()
  outputs = [process.communicate(timeout=300)[0] for process in again]
  assert [process.returncode for process in again] == [0, 0], "\n".join(outputs)
  summary = json.loads((both / "summary.json").read_text())
  assert summary["provenance"]["processes"] == 2
  assert summary["provenance"]["devices"] == 4


def test_one_process_agrees_with_itself():
  np.testing.assert_array_equal(hosts.agree([3, -1]), [3, -1])
  assert hosts.is_writer()
  hosts.barrier("alone")


def test_one_process_does_not_start_a_coordinator():
  hosts.initialize(config_lib.default_config().distributed)


def test_starting_too_late_is_one_clear_line():
  config = config_lib.default_config().distributed
  config.coordinator = "localhost:1"
  with pytest.raises(UserError, match="config.distributed: could not join process 0 of 1"):
    hosts.initialize(config)
