"""A lowering is read once, written as it was read, and says what it is."""

import itertools

import pytest

from bar_edge.errors import InputError
from bar_edge.records.lowering import KINDS, Form, Lowering

TEXTS = ["paper", *KINDS, "slices:4", "slices:4-16", "regular@2x2", "blocks:16,slices:4,regular:3@1x2", "pad,pad"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_there_and_back(text: str) -> None:
    assert str(Lowering.parse(text)) == text
    assert Lowering.parse(text) == Lowering.parse_or_auto(text)
    assert hash(Lowering.parse(text)) == hash(Lowering.parse(text))


def test_auto_is_no_lowering() -> None:
    assert Lowering.parse_or_auto("auto") is None
    for text in ("auto", "", "slcies", "slices,", "slices:0", "slices:16-4", "paper,slices", "regular@9x1"):
        with pytest.raises(InputError, match="a lowering"):
            Lowering.parse(text)


def test_one_form_is_for_all_streams() -> None:
    one, two = Lowering.parse("slices:4"), Lowering.parse("slices:4,regular")
    assert one.each(3) == (Form("slices", 4),) * 3 and one.each(0) == (Form("slices", 4),)
    assert two.each(2) == (Form("slices", 4), Form("regular"))
    for lowering, streams in itertools.product((two, Lowering.parse("pad,pad,pad")), (0, 1, 4)):
        with pytest.raises(InputError, match=f"all {streams} residual streams"):
            lowering.each(streams)
    assert Lowering.of(list(one.each(3))) == one and Lowering.of(list(two.each(2))) == two


def test_which_forms_scatter() -> None:
    assert {text for text in TEXTS if Lowering.parse(text).scatters} == {"paper", "scatter"}
    assert Lowering.parse("slices,scatter:4").scatters
