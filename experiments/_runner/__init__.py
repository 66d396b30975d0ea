"""The machinery of an experiment: command line, settings, run directory and training."""
