"""Where the time goes: traces, rooflines, and one command for a machine with a GPU."""
