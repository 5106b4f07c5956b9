"""Costs: one table, one way to write them, and nobody else asks which cost it is."""

import ast
from pathlib import Path

import pytest

from bar_edge.errors import InputError
from bar_edge.records import COSTS, Budget
from bar_edge.records.cost import Rates, write_cost


class Call:
    """A 3x3 convolution at 8x8, eight filters of it computed by the network itself."""

    area, flop_rate, weights, vectors, constant, whole = 64, 1152, 9, 1, 5, (512, 9216)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("volume", Rates(per_output=64, constant=512)),
        ("flops", Rates(per_pair=1152, constant=9216)),
        ("params", Rates(per_output=1, per_pair=9, constant=5)),
        ("ms", Rates(per_pair=1152, constant=9216)),  # by which the cheapest path is found
    ],
)
def test_rates(name: str, rates: Rates) -> None:
    assert COSTS[name].rates(Call()) == rates


@pytest.mark.parametrize(
    ("value", "text", "short"),
    [
        (1234567, "1,234,567", "1.235 M"),
        (81_625_088.0, "81,625,088", "81.63 M"),
        (15_087_796_224, "15,087,796,224", "15.09 G"),
        (12544, "12,544", "12,544"),
        (66901.33, "66,901", "66,901"),
        (37, "37", "37"),
        (0.0421234, "0.04212", "0.04212"),
        (8.5, "8.5", "8.5"),
        (0, "0", "0"),
    ],
)
def test_a_person_reads_costs_alike_everywhere(value: float, text: str, short: str) -> None:
    assert (write_cost(value), write_cost(value, short=True)) == (text, short)
    assert COSTS["volume"].say(value) == f"{text} activations"


@pytest.mark.parametrize(
    ("text", "metric", "absolute"),
    [("8ms", "ms", 8), ("1.2Mparams", "params", 1.2e6), ("50MFLOPs", "flops", 50e6), ("10act", "volume", 10)],
)
def test_units_come_from_the_table(text: str, metric: str, absolute: float) -> None:
    budget = Budget.parse(text)
    assert (budget.metric, budget.absolute) == (metric, absolute)
    assert budget.cost is COSTS[metric]
    assert budget.cost.basis == ("table" if text == "8ms" else "counted")


@pytest.mark.parametrize("text", ["2x:ms", "50%:ms", "2x:energy", "8s", "8ms:volume", "8MS", "x:flops"])
def test_what_no_line_of_the_table_says_is_no_budget(text: str) -> None:
    with pytest.raises(InputError, match="a budget with a unit"):
        Budget.parse(text)


def test_no_two_costs_share_a_unit() -> None:
    suffixes = [suffix for cost in COSTS.values() for suffix in cost.suffixes]
    assert len(suffixes) == len(set(suffixes))
    assert not {"x", "%"} & set(suffixes)


def asks_which_cost(tree: ast.AST) -> list[int]:
    """The lines that compare something with the name of a cost."""
    compared = [(node, [node.left, *node.comparators]) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    names = [(node.lineno, part.value) for node, parts in compared for part in parts if isinstance(part, ast.Constant)]
    return [line for line, value in names if value in COSTS]


def test_the_search_finds_what_it_looks_for() -> None:
    assert asks_which_cost(ast.parse("if budget.metric == 'ms': pass\nx = 'volume' != name\ny = a == 'bar'")) == [1, 2]


def test_nobody_asks_which_cost_it_is(repository: Path) -> None:
    folders = (repository / "bar_edge", repository / "cli", repository / "calibration")
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    found = {path.name: asks_which_cost(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}
