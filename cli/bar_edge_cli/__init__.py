"""The command line of bar-edge; importing it loads no torch."""
