"""Proves and measures a card: `python -m benchmarks.gpu`."""
