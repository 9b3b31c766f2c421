"""How a run starts, trains, resumes, is logged and is saved."""
