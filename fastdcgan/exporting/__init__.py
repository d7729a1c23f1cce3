"""Trained nets for others: files that run without this package, and model cards. Not here: the
command line (export.py), and weights in our own layout (training/checkpoints.py)."""
