"""Starts experiments from a clone of the repository: shell scripts, and `python -m launch.sweep`."""
