"""Reading and writing of weights files."""
