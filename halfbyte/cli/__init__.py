"""The command line: one file a command, and each only composes what the other layers offer."""
