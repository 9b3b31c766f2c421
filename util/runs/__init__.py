"""How a run starts, goes on, is logged and is saved."""
