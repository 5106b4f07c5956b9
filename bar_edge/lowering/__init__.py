"""How mixed additions run in a runtime: forms, placements, packing."""
