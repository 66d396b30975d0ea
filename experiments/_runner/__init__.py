"""What runs an experiment: command line, settings, run directory and training."""
