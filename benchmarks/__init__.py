"""Benchmarks: measurements against originals and PyTorch, and checks of the tests."""
