"""What surrounds a computation: run directory, sinks, progress, checkpoints, stage cache, signals, hosts.

All side effects are here. May import the ground floor (`hamu_jax.errors`) only.
"""
