"""BAR as a method of `prune`: gates and weights trained for the epochs of the prune phase."""

from __future__ import annotations

from bar_edge.methods.bar.bar import BAR
from bar_edge.methods.method import Context, Scored
from bar_edge.network import Network
from bar_edge_calibration import reestimate_batchnorm


def score(dense: Network, context: Context) -> Scored:
    """Train gates and weights under the falling budget; return the folded network and the gates."""
    config, latency = context.config, context.layout.latency
    pruner = BAR(
        dense,
        budget=config.budget,
        steps=max(1, context.steps),
        teacher=context.teacher,
        config=config.bar,
        distill=config.distill,
        soft_loss=context.soft_loss,
        keep=config.keep,
        round_to=config.round_to,
        table=None if latency is None else latency.table,
        seed=config.seed,
    )
    context.train(pruner.network, pruner)
    if context.steps:  # sampled gates left statistics that the final gates do not have
        device = next(pruner.network.parameters()).device
        reestimate_batchnorm(pruner.network.eval(), (images for images, _ in context.batches(device)))
    return pruner.scored()
