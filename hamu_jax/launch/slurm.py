"""Submits the members of a sweep to SLURM as one job array."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from hamu_jax.errors import UserError
from hamu_jax.launch.expand import Member, shared_stages
from hamu_jax.run import rundir

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{limit}
#SBATCH --output={output}
#SBATCH --open-mode=append
#SBATCH --requeue
# Written by hamu_jax.launch.sweep. Each task runs one member; if another task is computing a stage that it
# needs, it waits.
set -euo pipefail
cd {here}
members=(
{members}
)
exec {command} "--filter=${{members[$SLURM_ARRAY_TASK_ID]}}"
"""


def in_order(members: Sequence[Member]) -> list[Member]:
  """Orders the members so that those that compute a stage for others come first.

  The tasks of a job array start in order, so few of them wait in their allocation.
  """
  seen: set[str] = set()
  leaders: list[Member] = []
  followers: list[Member] = []
  for member in members:
    keys = set(shared_stages(member.config).values())
    (followers if keys <= seen else leaders).append(member)
    seen |= keys
  return leaders + followers


def write_script(
  path: pathlib.Path, members: Sequence[Member], *, name: str, jobs: int, arguments: Sequence[str]
) -> None:
  """Writes the script of the job array.

  Args:
    path: path of the script; its folder receives the output of the tasks.
    members: the member of each task.
    name: name of the job.
    jobs: number of tasks that run at a time; 0 for as many as the cluster allows.
    arguments: arguments of `hamu_jax.launch.sweep` for the sweep, without a filter.

  Raises:
    UserError: if the folder cannot be written.
  """
  command = [sys.executable, "-m", "hamu_jax.launch.sweep", *arguments, "--engine=local", "--jobs=1"]
  filters = (shlex.quote(f"^{re.escape(member.name)}$") for member in in_order(members))
  script = _SCRIPT.format(
    name=shlex.quote(name),
    last=len(members) - 1,
    limit=f"%{jobs}" if jobs else "",
    output=shlex.quote(f"{path.parent.absolute()}/%A_%a.txt"),
    here=shlex.quote(str(pathlib.Path.cwd())),
    members="\n".join(f"  {text}" for text in filters),
    command=shlex.join(command),
  )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror}; choose another --workdir") from error
  rundir.write_bytes(path, script.encode())


def submit(path: pathlib.Path, options: Sequence[str]) -> str:
  """Submits a script.

  Args:
    path: path of the script.
    options: options of sbatch, such as `--partition=gpu`.

  Returns:
    The output of sbatch.

  Raises:
    UserError: if sbatch is not installed or fails.
  """
  if shutil.which("sbatch") is None:
    raise UserError(
      "--engine=slurm: sbatch is not installed here; run it on a login node, or use --engine=local"
    )
  done = subprocess.run(["sbatch", *options, str(path)], capture_output=True, text=True, check=False)
  if done.returncode:
    lines = (done.stderr or done.stdout).split("\n")
    raise UserError(
      f"--engine=slurm: sbatch {path} failed: {' '.join(' '.join(lines).split())}; set its options with"
      " --sbatch"
    )
  return done.stdout.strip()
