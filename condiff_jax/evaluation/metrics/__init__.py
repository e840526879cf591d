"""Metrics of image quality and of control."""

# Choices of `evaluation.metrics`. The first two need data.name=shapes, see evaluate.py; fid to
# clip_score are measured in image_quality.py.
METRICS = (
    "prompt_accuracy",
    "frechet_shapes",
    "size_response",
    "fid",
    "kid",
    "precision_recall",
    "clip_score",
)
