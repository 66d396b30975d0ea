"""Data people feed: toy densities, tables of numbers, and pictures."""
