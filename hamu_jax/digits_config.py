"""Deprecated name of `hamu_jax.config.digits`, which the documentation showed before that module moved."""

import warnings

from hamu_jax.config.digits import on_digits

__all__ = ["on_digits"]

warnings.warn("hamu_jax.digits_config is now hamu_jax.config.digits", DeprecationWarning, stacklevel=2)
