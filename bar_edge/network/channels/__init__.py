"""Channel rules: how the channels of a tensor pass through every operator.

A `Passage` says along which axis a tensor carries channels, how many the dense network has there, and
from which channels of which inputs each of them comes. An operator without a rule is opaque: it gets its
inputs at full width (absent channels are zeros) and what it makes is always there. `network.channels` holds the
passages of a network, found once.
"""

from bar_edge.network.channels.analysis import called_again, passages
from bar_edge.network.channels.arithmetic import COMPARISONS, has_pole
from bar_edge.network.channels.constants import (
    MAKERS,
    attribute,
    constant_nodes,
    cut_parameters,
    is_parameter,
    parameter_axis,
    reads,
)
from bar_edge.network.channels.layers import operands
from bar_edge.network.channels.moves import element_numbers, numbers_from
from bar_edge.network.channels.passage import (
    CONVOLUTIONS,
    READERS,
    TRANSPOSED,
    Link,
    Passage,
    Passages,
    is_depthwise,
    is_whole,
)
from bar_edge.network.channels.table import ELEMENTWISE, LEAVES, RULES

__all__ = [
    "COMPARISONS",
    "CONVOLUTIONS",
    "ELEMENTWISE",
    "LEAVES",
    "MAKERS",
    "READERS",
    "RULES",
    "TRANSPOSED",
    "Link",
    "Passage",
    "Passages",
    "attribute",
    "called_again",
    "constant_nodes",
    "cut_parameters",
    "element_numbers",
    "has_pole",
    "is_depthwise",
    "is_parameter",
    "is_whole",
    "numbers_from",
    "operands",
    "parameter_axis",
    "passages",
    "reads",
]
