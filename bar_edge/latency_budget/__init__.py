"""Budgets in milliseconds: tables of a device, and the loop that measures."""
