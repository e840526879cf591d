"""Training objectives, and validation of configurations."""
