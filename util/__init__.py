"""Everything around the models, one module per job."""
