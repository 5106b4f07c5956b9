"""`--lowering auto`: the form in which a network's additions run, chosen by measuring whole files on a runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bar_edge.bench import bench_onnx, compare
from bar_edge.bench.statistics import median_ms
from bar_edge.lowering.lower import lower, stream_sizes
from bar_edge.lowering.packing import Packing
from bar_edge.lowering.placement import Form
from bar_edge.network import Network
from bar_edge.progress import NoProgress, Progress
from bar_edge.targets.onnx.file import Preprocessing, export_onnx

#: (runtime, precision) -> forms worth a try, the most promising first (docs/mixed_connectivity.md)
CANDIDATES = {
    ("onnxruntime-cpu", "fp32"): ("gather:4", "pointwise:16", "slices:4", "regular:16", "scatter", "regular"),
    ("openvino-cpu", "fp32"): ("slices", "pointwise", "slices:4", "pointwise:16", "regular:16", "regular"),
    ("onnxruntime-cpu", "int8"): (
        "pointwise:16",
        "deferred:4",
        "deferred:16",
        "gather:16",
        "slices:16",
        "gather:4",
        "regular:16",
        "regular",
    ),
    ("openvino-cpu", "int8"): (
        "zero-filled:32",
        "zero-filled:16",
        "pointwise:4-16",
        "zero-filled:4-16",
        "regular:16",
        "pointwise:16",
        "slices:16",
        "regular",
    ),
    ("openvino-cpu", "bf16"): (
        "pointwise:16",
        "pointwise:4-16",
        "zero-filled:32",
        "slices:16",
        "zero-filled:16",
        "regular:16",
        "pointwise:32",
        "regular",
    ),
}
#: (runtime, precision) -> packings worth a try; elsewhere few channels cost less than what packing adds
PACKINGS: dict[tuple[str, str], tuple[Packing, ...]] = {
    ("onnxruntime-cpu", "int8"): ((2, 2), (1, 2)),
    ("openvino-cpu", "int8"): ((2, 2),),
    ("openvino-cpu", "bf16"): ((2, 2),),
    ("openvino-cpu", "fp32"): ((2, 2),),
}
#: for a runtime that is not among them
ELSEWHERE = ("gather:4", "pointwise:16", "slices", "regular:16", "regular")
REGULAR, DENSE = "regular", "dense"
#: how long each file is measured, in seconds: to choose, and to judge the choice
CHOOSE_S, JUDGE_S = 0.5, 1.5
#: share of the time after which no further form is tried for the whole network
WHOLE = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A lowering, and what was measured to choose it."""

    lowering: str
    #: whether the file is faster than the dense network's beyond doubt: in the 95 % interval
    faster: bool
    #: medians in ms of one fresh process: the lowering chosen, the regular form and the dense network
    chosen_ms: float
    regular_ms: float
    dense_ms: float
    #: lowering -> median in ms, of the measurement that it was chosen by
    tried_ms: dict[str, float]
    environment: dict[str, Any]


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
    sizes = stream_sizes(network)
    streams = len(sizes)
    known: tuple[str, ...] = CANDIDATES.get((runtime, precision), ELSEWHERE)
    candidates = [c for c in known if streams or c.startswith("slices")]
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(network, dense, streams, Path(folder), preprocessing, convert)
        # what a file of integers computes in is in the file
        trial.options = {"runtime": runtime, "threads": threads, "precision": precision if convert is None else "fp32"}
        packings = PACKINGS.get((runtime, precision), ()) if streams else ()
        others = len(candidates) - 1 if streams > 1 else 0
        progress.phase("lowering", 1, len(candidates) + len(packings) + others)
        files: list[str] = []
        for i, candidate in enumerate([*candidates, REGULAR] if streams else candidates):
            if candidate not in files and (i < 1 or candidate == REGULAR or _left(start, seconds) > 1 - WHOLE):
                trial.export(candidate)
                files.append(candidate)
            progress.step({"phase": "lowering", "epoch": 1, "step": min(i + 1, len(candidates))})
        tried = trial.measure(files)
        order = sorted(tried, key=tried.__getitem__)
        best = order[0]
        for done, packing in enumerate(packings, len(candidates) + 1):
            for size in dict.fromkeys(sizes):  # the largest images, and so the narrowest layers, first
                before = best
                if _left(start, seconds) > 0:
                    best = trial.changed(tried, best, [i for i in range(streams) if sizes[i] == size], packing=packing)
                if best == before:
                    break
            progress.step({"phase": "lowering", "epoch": 1, "step": done})
        for done, other in enumerate(order[1 : others + 1], len(candidates) + len(packings) + 1):
            for i in range(streams):
                if _left(start, seconds) > 0:
                    best = trial.changed(tried, best, [i], form=other)
            progress.step({"phase": "lowering", "epoch": 1, "step": done})
        regular = REGULAR if streams else "slices"
        trial.export(regular)
        trial.export(DENSE)
        # a fresh process: of many candidates the one that was lucky looks best
        last = list(dict.fromkeys([best, regular, DENSE]))
        measured = trial.bench(last, JUDGE_S)
        medians = dict(zip(last, map(median_ms, measured), strict=True))
    progress.done()
    chosen = min((best, regular), key=medians.__getitem__)
    progress.note(
        f"lowering {chosen}: {medians[chosen]:.3f} ms; regular {medians[regular]:.3f}, dense {medians[DENSE]:.3f}"
    )
    return Choice(
        lowering=chosen,
        faster=compare(measured[last.index(chosen)], measured[last.index(DENSE)]).low > 1,
        chosen_ms=medians[chosen],
        regular_ms=medians[regular],
        dense_ms=medians[DENSE],
        tried_ms=tried,
        environment=measured[0].environment,
    )


@dataclasses.dataclass
class _Trial:
    network: Network
    dense: Network
    streams: int
    folder: Path
    preprocessing: Preprocessing | None
    convert: Callable[[Path], None] | None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def file(self, lowering: str) -> Path:
        """Return a file named by its lowering, or by its hash where that would be too long for a name."""
        short = lowering if len(lowering) < 200 else hashlib.sha256(lowering.encode()).hexdigest()
        return self.folder / f"{short.replace(':', '_')}.onnx"

    def export(self, lowering: str) -> None:
        file = self.file(lowering)
        if not file.is_file():
            form = self.dense if lowering == DENSE else lower(self.network, lowering)
            export_onnx(form, form.input_shapes, file, preprocessing=self.preprocessing)
            if self.convert is not None:
                self.convert(file)

    def changed(
        self,
        tried: dict[str, float],
        best: str,
        which: list[int],
        *,
        form: str | None = None,
        packing: Packing | None = None,
    ) -> str:
        """Return the faster one of a lowering and the same with another form or packing of some of its streams."""
        forms = [Form.parse(text) for text in best.split(",")]
        forms = forms if len(forms) > 1 else forms * self.streams
        for i in which:
            new = Form.parse(form) if form else forms[i]
            forms[i] = dataclasses.replace(new, packing=packing or forms[i].packing)
        text = ",".join(map(str, forms if len({*forms}) > 1 else forms[:1]))
        if text in tried:
            return best
        self.export(text)
        pair = self.bench([best, text])
        comparison = compare(pair[1], pair[0])
        tried[text] = tried[best] / comparison.speedup
        return text if comparison.low > 1 else best

    def bench(self, lowerings: list[str], seconds: float = CHOOSE_S) -> list[Any]:
        return bench_onnx([self.file(text) for text in lowerings], seconds=seconds, **self.options)

    def measure(self, lowerings: list[str]) -> dict[str, float]:
        return dict(zip(lowerings, map(median_ms, self.bench(lowerings)), strict=True))


def _left(start: float, seconds: float) -> float:
    """Return which share of the time is left."""
    return 1 - (time.monotonic() - start) / seconds if seconds > 0 else 0.0
