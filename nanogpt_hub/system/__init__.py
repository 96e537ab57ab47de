"""What this machine gives: files that survive, devices, installed packages; and sizes as people read them."""
