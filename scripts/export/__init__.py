"""The formats of `scripts/export_encoder.py`, a file each."""
