"""Compiles a step without devices, for the memory, time and collectives of `python -m hamu_jax.plan`.

May import all packages that experiments are made of.
"""
