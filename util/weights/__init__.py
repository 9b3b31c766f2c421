"""Files of weights, in and out."""
