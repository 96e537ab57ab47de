"""What is fast and optional: the same tokens sooner. Everything goes in and out by select.py."""

ENGINES = ("auto", "plain", "torch", "numba")  # by name; select.py says what each is
