"""A lowering: in which form the mixed additions of every residual stream run."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import ClassVar, Literal, get_args

from bar_edge.errors import InputError

Kind = Literal["slices", "pad", "gather", "scatter", "pointwise", "deferred", "blocks", "zero-filled", "regular"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: to which multiples widths are filled up: those below the second number to multiples of the first only
Rounding = tuple[int, int]
#: rows and columns of pixels that become channels of one pixel
Packing = tuple[int, int]
PLAIN: Packing = (1, 1)
#: texts of a lowering that is measured, and of the one without forms
AUTO, PAPER = "auto", "paper"


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How the additions of one residual stream run, as in `blocks:16`, `slices:4-16` or `deferred:16@1x2`.

    slices, pad, gather, scatter, pointwise
                  a writer makes its own channels, which go to their places by Slice, Add and Concat, by Pad and
                  Add, by Gather from a padded tensor, by ScatterND, or by a convolution of 1x1 that adds
    deferred      nothing is added where it is written: writers' channels are joined, and summed where the stream is
                  read, by a convolution of 1x1 that the BatchNorm behind the sum is part of
    blocks        a writer makes whole blocks of `rounding` channels, one convolution per block or run of blocks
    zero-filled   a writer makes all channels of the stream so far, and zeros in advance where they cost less than the
                  Pad by which the stream grows: plain additions
    regular       all tensors of the stream hold the union of its channels, plain additions
    rounding      widths are filled up to multiples of it
    narrow        widths below the rounding are filled up to multiples of this only
    packing       blocks of so many rows and columns of pixels are channels, in all tensors of the stream's size
    """

    kind: Kind
    rounding: int = 1
    packing: Packing = PLAIN
    narrow: int = 0

    @property
    def filled(self) -> Rounding:
        """How channels are filled up before they are packed."""
        k = math.prod(self.packing)
        narrow, rounding = (n // math.gcd(n, k) for n in (self.narrow or self.rounding, self.rounding))
        return narrow, rounding

    def __str__(self) -> str:
        rounding = (
            "" if self.rounding == 1 else f":{self.narrow}-{self.rounding}" if self.narrow else f":{self.rounding}"
        )
        return f"{self.kind}{rounding}" + ("" if self.packing == PLAIN else "@{}x{}".format(*self.packing))

    @staticmethod
    def parse(text: str) -> Form:
        """Read `slices`, `blocks:16`, `slices:4-16` or `regular@2x2`; raises InputError for anything else."""
        found = re.fullmatch(r"([a-z-]+)(?::(?:([1-9]\d{0,2})-)?([1-9]\d{0,2}))?(?:@([1-8])x([1-8]))?", text)
        kind = next((kind for kind in KINDS if found and kind == found[1]), None)
        narrow, rounding, height, width = (int(n or 0) for n in found.groups()[1:]) if found else (0, 0, 0, 0)
        if kind is None or rounding > 256 or (narrow and (narrow >= rounding or rounding % narrow)):
            raise InputError(
                f"a lowering: {', '.join(KINDS)}, or with widths rounded up to multiples of at most 256, as in "
                "slices:16, those below 16 to multiples of a part of it, as in slices:4-16, and blocks of at most 8x8 "
                "pixels packed into channels, as in regular:16@2x2",
                got=repr(text),
                remedy="choose one of these, or one per residual stream with commas between them",
            )
        return Form(kind, rounding or 1, (height or 1, width or 1), narrow)


@dataclasses.dataclass(frozen=True, slots=True)
class Lowering:
    """One form for all residual streams of a network, or one per stream in graph order.

    Without forms it is `paper`: a stream at the width of its union, a gather before every reader and a scatter-add
    after every writer. As text, `slices:4` or `blocks:16,slices:4,regular@2x2`.
    """

    forms: tuple[Form, ...]
    paper: ClassVar[Lowering]

    def __str__(self) -> str:
        return ",".join(map(str, self.forms)) or PAPER

    @property
    def scatters(self) -> bool:
        """Whether files in this form may hold a Scatter, which several runtimes lack or compute otherwise."""
        return not self.forms or any(form.kind == "scatter" for form in self.forms)

    def each(self, streams: int) -> tuple[Form, ...]:
        """Return one form per stream; raises InputError where there is neither one form nor one for each."""
        if len(self.forms) not in (1, streams):
            raise InputError(
                f"a lowering for all {streams} residual streams, or one for each",
                got=f"{len(self.forms)} in {str(self)!r}",
            )
        return self.forms if len(self.forms) == streams else self.forms * max(1, streams)

    @staticmethod
    def of(forms: list[Form]) -> Lowering:
        """Return the lowering of so many streams, short where all have one form."""
        return Lowering(tuple(forms if len({*forms}) > 1 else forms[:1]))

    @staticmethod
    def parse(text: str) -> Lowering:
        """Read a lowering; raises InputError for a form that does not exist."""
        return Lowering(() if text == PAPER else tuple(map(Form.parse, text.split(","))))

    @staticmethod
    def parse_or_auto(text: str) -> Lowering | None:
        """Read a lowering, or None for `auto`, which is measured."""
        return None if text == AUTO else Lowering.parse(text)


Lowering.paper = Lowering(())
