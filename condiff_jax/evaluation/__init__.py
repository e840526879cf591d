"""Evaluation of trained models: metrics, reference data and records."""
