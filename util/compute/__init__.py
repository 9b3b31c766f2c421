"""Processes and devices: how a step is computed, and what ends it."""
