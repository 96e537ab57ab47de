"""What the commands of `nanogpt-hub` do: one function each, which reads the arguments that cli.py has parsed."""
