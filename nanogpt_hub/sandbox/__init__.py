"""Chat templates are programs by somebody else: they run here, in a process with limits."""
