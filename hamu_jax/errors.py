"""The one exception that reaches a user as a single line."""


class UserError(ValueError):
  """Bad input: a field, file or environment that the user can put right.

  `main` prints its message as one line without a traceback and exits with status 2, so a message names the
  field, the value it has, the choices, and the remedy.
  """
