"""PyTorch out and in: models in plain PyTorch, a diffusers pipeline, exports and imports."""
