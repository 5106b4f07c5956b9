"""Accuracy at equal measured latency (or at equal FLOPs): our default against the field."""
