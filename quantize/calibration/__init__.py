"""Calibration: what a model's experts are given, gathered one decoder layer at a time."""
