"""Data: toy densities, energies, tables, images and series."""
