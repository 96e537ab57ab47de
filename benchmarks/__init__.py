"""What is measured, and how: each module here prints a table and can be run by anyone (`make bench`)."""
