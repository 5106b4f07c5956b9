"""`--lowering auto`: the form in which a network's additions run, chosen by measuring whole files on a runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bar_edge.bench import Measurement, bench_onnx, compare
from bar_edge.bench.statistics import median_ms
from bar_edge.lowering.lower import lower, stream_sizes
from bar_edge.network import Network
from bar_edge.progress import NoProgress, Progress
from bar_edge.records.lowering import Form, Lowering, Packing
from bar_edge.targets.onnx.file import Preprocessing, export_onnx
from bar_edge.targets.row import Forms
from bar_edge.targets.table import forms_for

REGULAR, PLAIN_WIDTHS = Lowering.parse("regular"), Lowering.parse("slices")
#: the dense network's file among those of lowerings
DENSE = "dense"
#: how long each file is measured, in seconds: to choose, and to judge the choice
CHOOSE_S, JUDGE_S = 0.5, 1.5
#: share of the time after which no further form is tried for the whole network
WHOLE = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A lowering, and what was measured to choose it."""

    lowering: Lowering
    #: whether the file is faster than the dense network's beyond doubt: in the 95 % interval
    faster: bool
    #: medians in ms of one fresh process: the lowering chosen, the regular form and the dense network
    chosen_ms: float
    regular_ms: float
    dense_ms: float
    #: lowering -> median in ms, of the measurement that it was chosen by
    tried_ms: dict[Lowering, float]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON data, lowerings as text."""
        tried = {str(lowering): ms for lowering, ms in self.tried_ms.items()}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "lowering": str(self.lowering), "tried_ms": tried}


def choose_lowering(
    network: Network,
    dense: Network,
    *,
    runtime: str = "onnxruntime-cpu",
    precision: str = "fp32",
    threads: int = 1,
    seconds: float = 60.0,
    preprocessing: Preprocessing | None = None,
    convert: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Measure whole-network candidates, then change the form stream by stream as long as that helps and time is left.

    First how pixels are packed, beginning with the first streams, which are the narrowest, then the form itself. The
    winner is measured anew in a fresh process, in turn with the regular form and the dense network: the
    faster of the two forms is chosen. seconds: for all but that last measurement. convert: what turns a file in
    float32 into one of the precision, in place, good enough to measure its speed. The same choice can be exported
    again by its text. Raises what `bench_onnx` and `export_onnx` raise.
    """
    progress, start = progress or NoProgress(), time.monotonic()
    sizes, known = stream_sizes(network), forms_for(runtime, precision)
    # what a file of integers computes in is in the file
    options = {"runtime": runtime, "threads": threads, "precision": precision if convert is None else "fp32"}
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(network, dense, sizes, Path(folder), preprocessing, convert, options)
        search = _Search(trial, progress, start, seconds, known if sizes else _roundings(known))
        best, tried = search.run()
        regular = REGULAR if sizes else PLAIN_WIDTHS
        # a fresh process: of many candidates the one that was lucky looks best
        last = list(dict.fromkeys([best, regular]))
        trial.export(regular)
        trial.export(None)
        measured = trial.bench([*last, None], JUDGE_S)
    *medians, dense_ms = map(median_ms, measured)
    judged = dict(zip(last, medians, strict=True))
    progress.done()
    chosen = min((best, regular), key=judged.__getitem__)
    progress.note(f"lowering {chosen}: {judged[chosen]:.3f} ms; regular {judged[regular]:.3f}, dense {dense_ms:.3f}")
    return Choice(
        lowering=chosen,
        faster=compare(measured[last.index(chosen)], measured[-1]).low > 1,
        chosen_ms=judged[chosen],
        regular_ms=judged[regular],
        dense_ms=dense_ms,
        tried_ms=tried,
        environment=measured[0].environment,
    )


def _roundings(known: Forms) -> Forms:
    """Return what is worth a try for a network without additions: each width as it is, or rounded up."""
    forms = [form for lowering in known.candidates for form in lowering.forms]
    plain = (Lowering((dataclasses.replace(form, kind="slices"),)) for form in forms)
    return Forms(candidates=tuple(dict.fromkeys(plain)))


@dataclasses.dataclass
class _Search:
    """First whole networks in one form, then how pixels are packed, then the other forms, stream by stream."""

    trial: _Trial
    progress: Progress
    start: float
    seconds: float
    known: Forms

    def run(self) -> tuple[Lowering, dict[Lowering, float]]:
        """Return the fastest lowering, and what each one took that was tried."""
        sizes, streams = self.trial.sizes, len(self.trial.sizes)
        whole = len(self.known.candidates)
        others = whole - 1 if streams > 1 else 0
        self.progress.phase("lowering", 1, whole + len(self.known.packings) + others)
        tried = self._whole()
        order = sorted(tried, key=tried.__getitem__)
        best = order[0]
        for done, packing in enumerate(self.known.packings, whole + 1):
            for size in dict.fromkeys(sizes):  # the largest images, and so the narrowest layers, first
                before = best
                if self._left() > 0:
                    which = [i for i in range(streams) if sizes[i] == size]
                    best = self.trial.changed(tried, best, which, packing=packing)
                if best == before:
                    break
            self._step(done)
        for done, other in enumerate(order[1 : others + 1], whole + len(self.known.packings) + 1):
            for i in range(streams):
                if self._left() > 0:
                    best = self.trial.changed(tried, best, [i], form=other.forms[0])
            self._step(done)
        return best, tried

    def _whole(self) -> dict[Lowering, float]:
        candidates, files = self.known.candidates, list[Lowering]()
        for i, candidate in enumerate([*candidates, REGULAR] if self.trial.sizes else candidates):
            due = i < 1 or candidate == REGULAR or self._left() > 1 - WHOLE
            if candidate not in files and due:
                self.trial.export(candidate)
                files.append(candidate)
            self._step(min(i + 1, len(candidates)))
        return self.trial.measure(files)

    def _step(self, step: int) -> None:
        self.progress.step({"phase": "lowering", "epoch": 1, "step": step})

    def _left(self) -> float:
        """Return which share of the time is left."""
        return 1 - (time.monotonic() - self.start) / self.seconds if self.seconds > 0 else 0.0


@dataclasses.dataclass
class _Trial:
    network: Network
    dense: Network
    #: of the images of each stream
    sizes: list[tuple[int, ...]]
    folder: Path
    preprocessing: Preprocessing | None
    convert: Callable[[Path], None] | None
    #: of `bench_onnx`
    options: dict[str, Any]

    def file(self, lowering: Lowering | None) -> Path:
        """Return a file named by its lowering, or by its hash where that would be too long; None: the dense network."""
        text = DENSE if lowering is None else str(lowering)
        short = text if len(text) < 200 else hashlib.sha256(text.encode()).hexdigest()
        return self.folder / f"{short.replace(':', '_')}.onnx"

    def export(self, lowering: Lowering | None) -> None:
        """Write the file of a lowering, or of the dense network, unless it is there."""
        file = self.file(lowering)
        if not file.is_file():
            form = self.dense if lowering is None else lower(self.network, lowering)
            export_onnx(form, form.input_shapes, file, preprocessing=self.preprocessing)
            if self.convert is not None:
                self.convert(file)

    def changed(
        self,
        tried: dict[Lowering, float],
        best: Lowering,
        which: list[int],
        *,
        form: Form | None = None,
        packing: Packing | None = None,
    ) -> Lowering:
        """Return the faster one of a lowering and the same with another form or packing of some of its streams."""
        forms = list(best.each(len(self.sizes)))
        for i in which:
            forms[i] = dataclasses.replace(form or forms[i], packing=packing or forms[i].packing)
        other = Lowering.of(forms)
        if other in tried:
            return best
        self.export(other)
        pair = self.bench([best, other])
        comparison = compare(pair[1], pair[0])
        tried[other] = tried[best] / comparison.speedup
        return other if comparison.low > 1 else best

    def bench(self, lowerings: Sequence[Lowering | None], seconds: float = CHOOSE_S) -> list[Measurement]:
        """Measure files in turn."""
        return bench_onnx([self.file(lowering) for lowering in lowerings], seconds=seconds, **self.options)

    def measure(self, lowerings: list[Lowering]) -> dict[Lowering, float]:
        """Return the medians of files, measured in turn."""
        return dict(zip(lowerings, map(median_ms, self.bench(lowerings)), strict=True))
