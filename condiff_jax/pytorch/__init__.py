"""PyTorch in and out: tensor layouts, published checkpoints, and the PyTorch twin."""
