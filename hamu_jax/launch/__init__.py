"""Sweeps over experiments, on local devices or under SLURM: what a sweep's members are, and who runs them.

Holds no hyper-parameter. May import everything below the programs, which it starts as processes.
"""
