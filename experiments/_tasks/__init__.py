"""Code shared by several experiments: their data, models and figures."""
