"""Inference with a trained flow: MALA, inpainting, imputation, exact Gaussian conditionals."""
