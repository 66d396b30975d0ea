"""Runnable experiments, one module each: `python -m experiments.NAME` (see README.md here)."""
