"""Reads run directories: the tables, figures and page of `python -m hamu_jax.report`.

This package may import `config` and the packages below it. It trains nothing and loads no data.
"""
