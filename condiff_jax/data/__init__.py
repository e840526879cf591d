"""Data sources, augmentation with its control metadata, and the grain input pipeline."""
