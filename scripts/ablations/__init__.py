"""Parts of `scripts/run_ablations.py`."""
