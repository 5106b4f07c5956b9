"""`python -m bar_edge_cli`: the same as `bar-edge`."""

from bar_edge_cli.main import run

run()
