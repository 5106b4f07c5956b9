"""Families of forms: each makes some nodes of a lowered graph."""
