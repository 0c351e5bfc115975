"""Why a run of updates stopped: one code for the transforms and the loop around them."""

import enum


class Stop(enum.IntEnum):
  """Reasons to stop. Device code stores the values; reports show the names.

  A transform sets the first three and NONFINITE; the loop adds the codes of its loss thresholds.
  """

  NONE = 0  # go on
  INFEASIBLE = 1  # some block cannot meet its constraint within its radius
  CRITERION = 2  # HAMU's aggregate stopping criterion is met
  RETAIN_LOSS = 3  # the retain loss rose above its threshold
  FORGET_LOSS = 4  # the forget loss fell below its threshold
  NONFINITE = 5  # a gradient, loss or step size is NaN or infinite
