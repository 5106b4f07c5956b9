"""What stands in every model.py, and our own modules as source."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from torch import nn

from bar_edge.network import leaves

TOP = '''"""A network in plain PyTorch, written by bar-edge with torch {torch}.

    from model import load

    net = load()  # in eval mode; net.train() to go on training it

Model needs torch alone; load() reads model.safetensors through the package safetensors.
The names in the state dict are those of the original network.
"""

from __future__ import annotations

'''
IMPORTS = """\
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
"""
PARTS = '''
class Parts(nn.Module):
    """Modules and weights under the names that they had in the original network; parts[0] is the one named "0"."""

    def __getitem__(self, name):
        return getattr(self, str(name))

    def __setitem__(self, name, part):
        setattr(self, str(name), part)

'''
LOAD = '''
def load(path: str | Path = Path(__file__).with_name("model.safetensors")) -> Model:
    """Return the network with its weights, in eval mode, on the CPU; needs the package safetensors."""
    from safetensors.torch import load_file

    model = Model()
    model.load_state_dict(load_file(path))
    return model.eval()
'''


def our_leaves(kinds: set[type[nn.Module]]) -> tuple[str, list[str]]:
    """Return further imports, and the source of our own modules among `kinds` and of what they use of their file."""
    wanted: list[Any] = [kind for kind in kinds if kind.__module__ == leaves.__name__]
    found: dict[Any, str] = {}
    while wanted:
        thing = wanted.pop()
        found[thing] = inspect.getsource(thing)
        used = {node.id for node in ast.walk(ast.parse(found[thing])) if isinstance(node, ast.Name)}
        ours = [
            vars(leaves)[name] for name in used if getattr(vars(leaves).get(name), "__module__", "") == leaves.__name__
        ]
        wanted += [other for other in ours if other not in found]
    statements = ast.parse(inspect.getsource(leaves)).body if found else []
    imports = [ast.unparse(s) for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    known = {*IMPORTS.splitlines(), "from __future__ import annotations"}
    further = "".join(f"{line}\n" for line in imports if line not in known and "bar_edge" not in line)
    ordered = sorted(found, key=lambda thing: inspect.getsourcelines(thing)[1])
    return further, [f"\n{found[thing]}" for thing in ordered]
