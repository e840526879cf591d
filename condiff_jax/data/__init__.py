"""Data sources, augmentation with its control metadata, and the grain pipeline."""
