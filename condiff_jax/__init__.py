"""Conditioning mechanisms and pre-training strategies for diffusion models, in JAX."""

__version__ = "0.1.0"
