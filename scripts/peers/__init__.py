"""Training scripts of other libraries, to compare this project with."""
