"""Machine unlearning in JAX: HAMU, its baselines, and the experiments around them."""

__version__ = "0.1.0"
