STOPPED = "stopped; the same command runs it again"
"""What Ctrl-C and SIGTERM print where a command has nothing more to say."""
