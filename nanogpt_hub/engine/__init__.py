"""What is fast and optional: the same tokens sooner. Everything goes in and out by select.py."""
