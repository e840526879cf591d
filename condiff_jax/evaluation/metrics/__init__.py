"""Metrics of image quality and of control; `MEASURES` in evaluate.py calls them."""
