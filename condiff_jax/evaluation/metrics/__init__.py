"""Measures of image and prompt quality."""

# What `evaluation.metrics` can name: the first three of `shapes` alone, see evaluate.py; the
# distributions' in fidelity.py.
METRICS = (
    "prompt_accuracy",
    "frechet_shapes",
    "size_response",
    "fid",
    "kid",
    "precision_recall",
    "clip_score",
)
