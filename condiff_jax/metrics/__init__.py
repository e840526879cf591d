"""Measures of image and prompt quality."""
