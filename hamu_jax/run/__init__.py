"""The side effects of a run: run directory, sinks, progress, checkpoints, stage cache, signals, hosts.

This package may import only the ground floor (`hamu_jax.errors`).
"""
