"""The parts of `experiments.benchmark`: cases, timing, one file per suite, and the peers."""
