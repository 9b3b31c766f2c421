"""From a path to a batch on the device."""
