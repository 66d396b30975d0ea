"""What several experiments share: their data, models and figures."""
