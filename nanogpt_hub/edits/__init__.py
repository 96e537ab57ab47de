"""Whether model.py is the one that the families were verified with, and which of its parts were edited."""
