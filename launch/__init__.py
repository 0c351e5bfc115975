"""What starts experiments from a clone: shell scripts, and `python -m launch.sweep`."""
