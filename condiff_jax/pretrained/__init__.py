"""Published weights: locating and reading files, and mapping tensor names and layouts."""
