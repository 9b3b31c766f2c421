"""Parts of the analysis scripts."""
