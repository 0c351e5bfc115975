"""What compiles a step without devices: memory, time and collectives of `python -m hamu_jax.plan`.

May import everything below the programs.
"""
