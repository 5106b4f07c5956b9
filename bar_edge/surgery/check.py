"""Does a plan belong to this network?"""

from __future__ import annotations

from bar_edge.errors import InputError
from bar_edge.network import Network, prunable
from bar_edge.records import ChannelPlan


def check_plan(network: Network, plan: ChannelPlan) -> None:
    """Raise InputError unless the plan was made for this network and names only channels that can be pruned."""
    if plan.network != network.fingerprint:
        raise InputError(
            f"a plan for network {network.fingerprint}",
            got=f"a plan for network {plan.network}",
            consequence="its channels would mean other channels",
            remedy="use the plan.json of the run that pruned this network, with the same --model and input shape",
        )
    widths = {str(node.target): passage.width for node, passage in network.channels.items()}
    reasons = prunable(network)
    for name, ids in plan.kept.items():
        if reasons.get(name) != "" or any(not 0 <= i < widths[name] for i in ids):
            reason = reasons.get(name, "there is no such convolution") or f"channels 0 to {widths[name] - 1} exist"
            raise InputError("a plan of channels that can be pruned", got=f"layer '{name}' in the plan: {reason}")
