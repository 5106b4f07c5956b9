"""Measures model files in a process of its own: a JSON request on stdin, a JSON answer on stdout.

This folder, packed (bench/packed.py), is what runs, on this machine and on a device: Python 3.8, numpy and the runtime,
nothing of the rest of bar_edge.
"""
