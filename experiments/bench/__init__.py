"""The parts of `experiments.benchmark`: cases, timing, one module per suite, and the peers."""
