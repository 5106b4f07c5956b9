"""The page holds what the run's files say, says what is missing, and asks for nothing else."""

import html.parser
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bar_edge.errors import InputError
from bar_edge.records import Latency
from bar_edge.report import plots, write_comparison, write_report
from bar_edge.report.page import removed_blocks

LAYERS = [
    {"name": "conv1", "kind": "Conv2d", "width": 16, "kept": 7, "area": 64},
    {"name": "layer1.0.conv1", "kind": "Conv2d", "width": 16, "kept": 0, "area": 64},
    {"name": "layer1.0.conv2", "kind": "Conv2d", "width": 16, "kept": 0, "area": 64},
    {"name": "layer2.0.conv1", "kind": "Conv2d", "width": 32, "kept": 5, "area": 16},
    {"name": "layer2.0.conv2", "kind": "Conv2d", "width": 32, "kept": 0, "area": 16},
]


def result(**changes: object) -> dict[str, Any]:
    return {
        "schema": 1,
        "verdict": True,
        "method": "bar",
        "model": "resnet20",
        "data": "digits",
        "seed": 3,
        "metric": {"name": "accuracy", "higher_is_better": True},
        "budget": {
            "text": "8x",
            "unit": "volume",
            "limit": 1568.0,
            "achieved": 1500,
            "within": True,
            "basis": "counted",
        },
        "dense": {"volume": 12544, "flops": 5064704, "params": 272186, "metric": 0.9875},
        "sliced": {
            "volume": 1500,
            "flops": 100000,
            "params": 20000,
            "metric": 0.9833,
            "volume_regular": 2192,
            "flops_regular": 200000,
        },
        "parity": {"masked_vs_sliced": 7.3e-16, "sliced_vs_onnx": None},
        "latency": [],
        "layers": LAYERS,
        "versions": {"torch": "2.13.0"},
    } | changes


def lines() -> Iterator[dict[str, Any]]:
    for phase, steps in (("dense", 40), ("prune", 40), ("tune", 20)):
        for step in range(10, steps + 1, 10):
            cost = {"volume": 12544 - 250 * step, "budget": 12600.0 - 250 * step} if phase == "prune" else {}
            yield {"step": step, "epoch": step // 10, "phase": phase, "loss": 1.0, "metric": step / 50, **cost}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    artifact = folder / "artifacts" / "onnx-fp32"
    artifact.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result()))
    (folder / "config.toml").write_text('model = "resnet20"\nbudget = "8x"\n')
    (folder / "plan.json").write_text(json.dumps({"schema": 1, "network": "f", "kept": {}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    (artifact / "manifest.json").write_text(json.dumps({"schema": 1, "note": "<b>&"}))
    bench = {
        "name": "onnx-fp32",
        "samples_ms": [0.2 + 0.001 * (i % 50) for i in range(200)] + [9.0],
        "warmup_runs": 50,
        "batch": 1,
        "environment": {"cpu": "Some CPU", "threads": 1},
        "budget": {"text": "8ms", "limit_ms": 8.0, "within": True},
        "comparison": {"against": "dense.onnx", "speedup": 2.5, "low": 2.4, "high": 2.6},
    }
    (artifact / "bench-onnxruntime-cpu-t1-b1.json").write_text(json.dumps(bench))
    return folder


class Page(html.parser.HTMLParser):
    """Visible text, and whatever a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.fetched: list[str] = []
        self._hidden = False
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._hidden = tag in ("style", "script", "defs")
        for key, value in attributes:
            fetches = key in ("src", "href", "xlink:href", "srcset", "data", "action")
            if fetches and value and not value.startswith(("#", "data:")):
                self.fetched.append(value)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


def test_page_says_how_the_file_was_made(run: Path) -> None:
    manifest = {
        "precision": "int8",
        "lowering": "gather:4",
        "choice": {"lowering": "gather:4", "chosen_ms": 1.25, "regular_ms": 2.5, "dense_ms": 9.75},
    }
    (run / "artifacts" / "onnx-fp32" / "manifest.json").write_text(json.dumps(manifest))
    text = Page(write_report(run).read_text()).text
    for said in ("gather:4 (chosen) 1.250", "regular blocks 2.500", "dense network 9.750"):
        assert said in text


def test_page_sets_precisions_side_by_side(run: Path) -> None:
    manifests = {
        "onnx-int8": {
            "precision": "int8",
            "lowering": "slices",
            "difference_from_fp32": 0.07,
            "parity": {"error": 0.0},
            "held_out": {"fp32": 0.91, "int8": 0.905, "drop_points": 0.5},
            "speedup_over_fp32": {"speedup": 1.5, "low": 1.4, "high": 1.6},
        },
        "openvino-bf16": {"precision": "bf16", "lowering": "pad", "parity": {"error": 0.004}},
        "onnx-fp32": {"precision": "fp32", "lowering": "gather:4", "parity": {"error": 3e-7}},
    }
    for name, manifest in manifests.items():
        folder = run / "artifacts" / name
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "model.onnx").write_bytes(bytes(1500))
    text = Page(write_report(run).read_text()).text
    rows = (
        "onnx-fp32 gather:4 1.5 0.225 , threads 1, batch 1 - - 3.0e-07",
        "openvino-bf16 pad 1.5 not measured - not measured 4.0e-03",
        "onnx-int8 slices 1.5 not measured 1.50x (1.40 to 1.60) 91.00 % → 90.50 % (-0.50) 7.0e-02",
    )
    for said in rows:
        assert said in text
    assert sorted(rows, key=text.index) == list(rows)


def test_page_says_what_the_files_say(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    text = Page(path.read_text()).text
    for said in (
        "resnet20 on digits, pruned to 8x",
        "method bar, seed 3",
        "✓ met 1,500 of at most 1,568 activations, counted",
        "98.75 % → 98.33 % -0.42 points",
        "12,544 1,500 8.36x less 2,192 5.72x less",
        "7.3e-16",
        "sliced vs onnx not compared",
        "✗ removed whole: layer1.0 , layer2.0.conv2",
        "Some CPU",
        "median 0.225 ms",
        "99th percentile too few runs",
        "2.50x (2.40 to 2.60)",
        "torch 2.13.0",
        'model = "resnet20"',
    ):
        assert said in text, said
    assert "Not in this run" not in text


def test_page_is_one_file(run: Path) -> None:
    text = write_report(run).read_text()
    assert Page(text).fetched == []
    assert "<script" not in text and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    # the SVG name spaces are names, not requests
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert text.count("<svg") == 4
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_page_escapes_what_it_was_given(run: Path) -> None:
    data = result(model="<script>alert(1)</script>", versions={"a": '"><img src=x>'})
    data["metric"]["name"] = "acc<b>"
    data["layers"] = [{**LAYERS[0], "name": "<i>x</i>"}]
    (run / "result.json").write_text(json.dumps(data))
    text = write_report(run).read_text()
    assert "<script" not in text and "<img" not in text and "<i>" not in text and "<b>" not in text


def test_missing_parts_are_said_to_be_missing(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    data = result(parity={"masked_vs_sliced": None, "sliced_vs_onnx": None}, versions={})
    del data["layers"], data["verdict"]
    data["budget"] |= {"within": None, "achieved": None}
    data["dense"]["metric"] = data["sliced"]["metric"] = None
    (bare / "result.json").write_text(json.dumps(data))
    text = Page(write_report(bare).read_text()).text
    assert text.count("Not in this run") == 7
    for said in ("not judged yet", "not measured", "bar-edge export bare --target onnx", "not compared"):
        assert said in text
    assert "None" not in text and "nan" not in text


def test_missed_budget_and_verdict_are_shown(run: Path) -> None:
    data = result(verdict=False, max_drop=0.25)
    (run / "result.json").write_text(json.dumps(data))
    assert (
        "Verdict of the whole run ✗ no accuracy may drop by at most 0.25 points"
        in Page(write_report(run).read_text()).text
    )
    data["budget"]["within"] = False
    (run / "result.json").write_text(json.dumps(data))
    text = Page(write_report(run).read_text()).text
    assert "✗ missed" in text and "Verdict of the whole run" not in text


def test_comparison(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "result.json").write_text(json.dumps(result(method="random", seed=4)))
    out = write_comparison([run, other], tmp_path / "both.html")
    text = Page(out.read_text()).text
    assert "2 runs side by side" in text and "random" in text and "8.36x less" in text
    assert Page(out.read_text()).fetched == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("result.json", None, "without one"),
        ("result.json", "{", "JSONDecodeError"),
        ("result.json", '{"schema": 2}', "schema 2"),
        ("metrics.jsonl", '{"step": 1}\nnot json\n', "metrics.jsonl"),
    ],
)
def test_damaged_files_are_named_and_the_old_page_stays(run: Path, name: str, content: str | None, said: str) -> None:
    before = write_report(run).read_bytes()
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(InputError, match=said):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a place to write"):
        write_report(run, tmp_path / "none" / "report.html")


def test_removed_blocks() -> None:
    assert removed_blocks(LAYERS) == ["layer1.0", "layer2.0.conv2"]
    assert removed_blocks(LAYERS[:1]) == []


def test_steps_of_phases_follow_each_other() -> None:
    placed = [x for x, _ in plots._with_steps(list(lines()))]
    assert placed == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_figures_take_their_colours_from_the_page_and_repeat() -> None:
    drawn = plots.widths(LAYERS)
    assert drawn is not None
    assert "currentColor" in drawn and "var(--one)" in drawn
    # none of the stand-in colours is left: #010101 to #050505
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", drawn)
    assert 'role="img" aria-label="Output channels' in drawn
    assert drawn == plots.widths(LAYERS)


def test_long_runs_make_small_figures() -> None:
    metrics = [{"step": i, "phase": "prune", "volume": 1e6 - i, "budget": 1e6 - i} for i in range(100_000)]
    # 500 points of each of two curves, about 20 characters a point
    drawn = plots.budget_curve(metrics, 1e5, "activations")
    assert drawn is not None and len(drawn) < 60_000


def test_histogram_says_what_it_leaves_out() -> None:
    assert "(1 slower runs not drawn)" in plots.histogram([1.0, 1.1, 1.2, 1.1, 50.0])
    assert "slower" not in plots.histogram([1.0, 1.0, 1.0])


def test_percentiles_come_from_the_records(run: Path) -> None:
    samples = [float(i) for i in range(1, 101)]
    latency = Latency(name="a", samples_ms=tuple(samples), warmup_runs=0, batch=1, environment={})
    file = run / "artifacts" / "onnx-fp32" / "bench-onnxruntime-cpu-t1-b1.json"
    file.write_text(json.dumps({"name": "a", "samples_ms": samples, "warmup_runs": 0, "batch": 1}))
    assert f"90th percentile {latency.percentile_ms(90):.3f} ms" in Page(write_report(run).read_text()).text
