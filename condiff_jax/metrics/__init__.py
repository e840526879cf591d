"""Measures of image and prompt quality."""

# What `evaluation.metrics` can name, see evaluate.py.
METRICS = ("prompt_accuracy", "frechet_shapes", "size_response")
