"""A run on disk: its folder, what a SPEC names, what can be pruned."""
