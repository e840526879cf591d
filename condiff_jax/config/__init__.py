"""Configurations: what fields there are, how they are read, and which make two runs the same."""
