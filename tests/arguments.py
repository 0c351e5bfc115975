"""Command lines of the tests."""


def replaced(arguments, *others):
  """The arguments with others in place of those that give the same option or field, the rest at the end."""
  given = {_option(each) for each in others}
  return [*(each for each in arguments if _option(each) not in given), *others]


def _option(argument):
  return argument.partition("=")[0].replace("--noconfig.", "--config.")
