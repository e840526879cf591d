"""Processes, devices, shardings and files."""
