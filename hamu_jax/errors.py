"""The one exception that reaches a user as a single line."""


class UserError(ValueError):
  """Bad input: a field, file or environment that the user can correct.

  `main` prints the message as one line without a traceback and exits with status 2. A message names the
  field, its value, the choices and the remedy.
  """


CONNECT_SECONDS = 10.0


def first_line(error: BaseException) -> str:
  """Returns the first line of an exception's message, or its type if it has none."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def brief(error: BaseException) -> str:
  """Returns the first line of a library's error, in at most 200 characters."""
  return first_line(error).strip()[:200]


def unreachable(what: str, error: Exception) -> UserError:
  """Builds the error for a download that failed, with the ways to go on without a network.

  Args:
    what: dataset and its location.
    error: error of the client library.

  Returns:
    The one-line error, to be raised.
  """
  return UserError(
    f"cannot download {what} ({first_line(error)}): point config.data.path at local files with"
    " config.data.source 'parquet' or 'cifar10_binary', or run the embedded digits with"
    " --config=hamu_jax:digits_hamu"
  )
