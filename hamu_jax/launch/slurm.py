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
# Written by hamu_jax.launch.sweep. A task runs one member; one that needs a stage which another is computing
# waits.
set -euo pipefail
cd {here}
members=(
{members}
)
exec {command} "--filter=${{members[$SLURM_ARRAY_TASK_ID]}}"
"""


def in_order(members: Sequence[Member]) -> list[Member]:
  """The members, those first that compute a stage for the ones after them.

  Tasks of a job array start in order, so that few of them sit waiting in their allocation.
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
    path: of the script; its folder receives the output of the tasks.
    members: one for each task.
    name: of the job.
    jobs: how many tasks run at a time; 0: as many as the cluster allows.
    arguments: of `hamu_jax.launch.sweep`, for the sweep without a filter.

  Raises:
    UserError: the folder cannot be written.
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
    path: of the script.
    options: for sbatch, such as `--partition=gpu`.

  Returns:
    What sbatch says.

  Raises:
    UserError: there is no sbatch, or it refuses.
  """
  if shutil.which("sbatch") is None:
    raise UserError("--engine=slurm: there is no sbatch here; run it on a login node, or use --engine=local")
  done = subprocess.run(["sbatch", *options, str(path)], capture_output=True, text=True, check=False)
  if done.returncode:
    lines = (done.stderr or done.stdout).split("\n")
    raise UserError(f"--engine=slurm: sbatch {path} failed: {' '.join(' '.join(lines).split())}")
  return done.stdout.strip()
