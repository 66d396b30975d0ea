"""Inference with a trained flow: inpainting, imputation, and exact Gaussian conditionals."""
