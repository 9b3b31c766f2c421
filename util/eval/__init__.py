"""Measurements and figures of a model."""
