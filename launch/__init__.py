"""Launchers: sweeps over experiments, on local devices or under SLURM. They hold no hyper-parameter."""
