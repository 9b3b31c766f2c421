"""Processes and devices: how a step is computed, and how failures and signals end a run."""
