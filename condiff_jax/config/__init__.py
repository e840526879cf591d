"""Configurations: their fields, how they are read, and which fields identify a training."""
