"""Data people feed: toy densities, and tables of numbers."""
