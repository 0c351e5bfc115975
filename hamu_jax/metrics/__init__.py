"""Metrics of predictions and texts: pure functions of arrays and strings.

This package may import only the ground floor (`hamu_jax.errors`).
"""
