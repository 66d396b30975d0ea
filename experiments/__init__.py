"""Experiments: `python -m experiments.<name>`, one module each."""
