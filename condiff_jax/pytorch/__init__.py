"""PyTorch models, a diffusers pipeline, and export to and import from PyTorch."""
