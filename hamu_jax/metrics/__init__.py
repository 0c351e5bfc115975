"""What is measured of predictions and texts: pure functions of arrays and strings.

May import the ground floor (`hamu_jax.errors`) only.
"""
