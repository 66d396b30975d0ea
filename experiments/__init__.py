"""Runnable experiments, one module each: `python -m experiments.NAME` (see README.md here)."""

import os

# Before jaxlib is loaded. For each program that jaxlib 0.10 loads from the compilation cache, it
# logs errors of many lines about CPU features such as prefer-no-gather, which no host reports.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
