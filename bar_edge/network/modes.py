"""Modules that compute something else in training than in eval mode, as far as their source tells."""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn


def modes_apart(module: nn.Module) -> list[str]:
    """Return the types of modules whose forward decides something by self.training.

    torch's own modules aside: what they do in training is known. Code that cannot be read is not named.
    """
    kinds = {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if _decides_by_mode(kind))


def _decides_by_mode(kind: type[nn.Module]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.While)]
    inside = [part for test in tests for part in ast.walk(test)]
    return any(isinstance(part, ast.Attribute) and part.attr == "training" for part in inside)
