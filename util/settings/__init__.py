"""Groups of settings, each with its flags; nothing here imports PyTorch, so parsing is fast."""
