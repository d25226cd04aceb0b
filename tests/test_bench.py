"""The bench: what its figures are held to, how growth is fitted, and when the guard calls. No figure's size is asserted."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.__main__ import main as tool
from base.backends import DEFAULT_BACKEND
from base.errors import UserError
from measuring import bench, guard, parts, ssd300, work
from measuring.ceilings import Ceiling, Limit
from measuring.figures import Figure, table
from measuring.growth import AXES, Growth, fitted, in_words
from measuring.growth_page import growth_page
from measuring.timing import interleaved
from pages.charts import Line, line_chart
from tests.conftest import ROOT

BOTH = ["reference", DEFAULT_BACKEND]
TINY = {"num_classes": 81, "image_size": (64, 64), "strides": (1,) * 6, "backbone": "resnet18"}


def test_cases_take_turns_and_short_ones_are_repeated():
    called = []
    seconds = interleaved({name: lambda name=name: called.append(name) for name in "ab"}, 3)
    assert "".join(called) == "ab" + "ababab" and {name: len(runs) for name, runs in seconds.items()} == {"a": 3, "b": 3}
    called.clear()
    interleaved({name: lambda name=name: called.append(name) for name in "ab"}, 2, least=0.001)
    assert re.fullmatch("(aa+bb+){3}", "".join(called))


def test_ratios_are_medians_of_rounds_and_the_tightest_limit_binds():
    """Seconds as if measured: the second round was ten times as slow for all."""
    slow, fast, other = (Ceiling(name, "GB", 2.0, print) for name in ("slow", "fast", "other"))
    case = work.Case({"reference": print, "mine": print}, 4, "images/s", (Limit((slow, fast), 0.5, "a"), Limit((other,), 0.25, "b")))
    seconds = {"reference, x": [8.0, 80.0, 8.0], "mine, x": [2.0, 20.0, 2.0], "slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0], "other": [1.0] * 3}
    reference, mine, ceiling = parts.figures_of("loss", "x", case, {}, seconds, quick=True)
    assert (mine.value, mine.spread, mine.reference, mine.ceiling) == (2.0, (0.2, 2.0), 4.0, 0.5)
    assert (reference.reference, reference.ceiling) == (1.0, 0.125)
    assert (ceiling.name, ceiling.value, ceiling.reference, ceiling.ceiling) == ("ceiling, x (a, fast)", 4.0, 8.0, 1.0)
    assert "4 ×" in table([mine]) and "/ ceiling" in table([mine])


def test_what_work_takes_of_the_machine():
    assert ssd300.gflop(ssd300.SSD300) == pytest.approx(94.75, abs=0.005)
    (copy,) = work.matcher_case(["reference"], 2, 7).limits
    assert copy.need == pytest.approx(8739 * 24 / 1e9)


def test_figures_have_their_ratios(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert tool(["bench", "--name", *BOTH, "--part", "matcher", "--quick", "--json", str(file)]) == 0
    content, said = json.loads(file.read_text()), capsys.readouterr().out
    (part,) = content["parts"]
    by_name = {figure["name"]: figure for figure in part["figures"]}
    assert content["quick"] and "QUICK" in said and all(name in said for name in by_name)
    assert by_name["reference, 7 boxes"]["reference"] == 1
    own = by_name[f"{DEFAULT_BACKEND}, 7 boxes"]
    assert own["reference"] > 0 and own["ceiling"] > 0 and own["spread"][0] <= own["value"] <= own["spread"][1]
    rates = {rate["name"]: rate["unit"] for rate in content["rates"]}
    assert {"images/s", "GFLOP/s", "GB/s", "million/s"} == set(rates.values())
    assert {"bfloat16 matrix product", "float32 matrix product", "bfloat16 convolution", "float32 convolution", "PIL, 2 threads"} <= set(rates)


@pytest.mark.parametrize("part", ["loader", "loss", "decoder", "evaluator", "step", "train"])
def test_every_part_compares_backends(part, tmp_path):
    """On the least work: each backend, the ceiling, and of training the loader and the step alone."""
    make = {
        "loss": lambda: {"": work.loss_case(BOTH, 1, classes=4)},
        "decoder": lambda: {"": work.decoder_case(BOTH, 1, classes=4)},
        "evaluator": lambda: {"": work.evaluator_case(BOTH, 3, tmp_path, found=5)},
        "step": lambda: {"": work.step_case(BOTH, 1, TINY)},
    }
    if part in make:
        cases = make[part]()
    else:
        data = work.Photographs(tmp_path, 4)
        loaders = {name: data.loader(name, 2) for name in BOTH} if part == "loader" else {}
        cases = {"": work.loader_case(loaders, data, 2)} if loaders else work.train_cases(BOTH, data, 2, TINY)
    figures = parts.compared(part, cases, 1, warm_up=False, quick=True)
    assert [f.name for f in figures if not f.name.startswith("ceiling")] == [parts.said(n, label) for label in cases for n in BOTH]
    assert all(figure.value > 0 and figure.reference > 0 and figure.ceiling > 0 for figure in figures)
    assert set(cases) == ({"", "loader alone", "step alone"} if part == "train" else {""})


def test_a_bound_of_a_peer_or_the_ceiling_is_missed(monkeypatch):
    """A backend's peers.py asks for what no machine has."""
    peers = parts.peers_of(DEFAULT_BACKEND)
    monkeypatch.setitem(peers.AT_LEAST, "matcher", {"7 boxes": {"ceiling": 1e9, "a peer": 1e9}})
    monkeypatch.setattr(peers, "matcher", lambda given: {"a peer": lambda: given.boxes.sum(), "another": "pip install another"})
    found = {figure.name: figure for figure in parts.compared("matcher", {"7 boxes": work.matcher_case(BOTH, 1, 7)}, 1)}
    missed = {name for name, figure in found.items() if not figure.ok}
    assert missed == {f"{DEFAULT_BACKEND} / ceiling, 7 boxes", f"{DEFAULT_BACKEND} / a peer, 7 boxes"}
    assert found["another, 7 boxes"].note == "pip install another" and found["a peer, 7 boxes"].ceiling > 0


@given(
    exponent=st.floats(-2, 3), scale=st.floats(1e-6, 1e3), sizes=st.lists(st.integers(1, 100_000), min_size=2, max_size=6, unique=True).map(sorted)
)
def test_the_exponent_of_a_power_is_found(exponent, scale, sizes):
    fit = fitted(sizes, [scale * size**exponent for size in sizes])
    assert fit.exponent == pytest.approx(exponent, abs=1e-6) and fit.last == pytest.approx(exponent, abs=1e-6)
    assert fit.error is None if len(sizes) == 2 else fit.error < 1e-6


def test_the_exponents_error_and_its_words():
    fit = fitted([1, 10, 100, 1000], [10**y for y in (0.0, 1.1, 1.9, 3.0)])  # off a line of slope 0.98 by 0.02, 0.1, 0.08 and 0.04
    assert fit.exponent == pytest.approx(0.98) and fit.error == pytest.approx(math.sqrt(0.018 / 2 / 5), rel=1e-6) and fit.last == pytest.approx(1.1)
    words = {-1.0: "in inverse proportion", -0.5: "falling", 0.05: "constant", 0.5: "sub-linear", 0.95: "linear", 2.05: "quadratic"}
    words |= {1.5: "between linear and quadratic", 3.0: "steeper than quadratic", -2.0: "falling faster than in inverse proportion"}
    assert {e: in_words(fitted([1, 10, 100], [s**e for s in (1, 10, 100)])) for e in words} == words
    assert in_words(fitted([1, 2, 3, 4], [1, 9, 1, 20])) == "not clear"


def test_growth_is_measured_and_shown(tmp_path, capsys):
    assert bench.main(["--growth", "--quick", "--part", "matcher", "--name", "reference", "--out", str(tmp_path)]) == 0
    content, page = json.loads((tmp_path / "growth.json").read_text()), (tmp_path / "index.html").read_text()
    assert [one["what"] for one in content["growth"]] == ["batch", "boxes an image", "default boxes"]
    for one in content["growth"]:
        assert len(one["sizes"]) == len(one["seconds"]["reference"]) == 3 and math.isfinite(one["fits"]["reference"]["exponent"])
        assert f"matcher, seconds by {one['what']}" in page
    assert "QUICK" in page and "<script" not in page and "matcher" in capsys.readouterr().out


def test_the_page_shows_every_part():
    found = [Growth(axis.part, axis.what, (1.0, 2.0, 4.0), {"one": (1.0, 2.0, 4.0)}, {"one": ((1.0, 1.0),) * 3}) for axis in AXES]
    page = growth_page(found, {"cpu": "some <cpu>"}, quick=False)
    assert {part for part in bench.COMPONENTS if f'<h2 id="{part}">' in page} == set(bench.COMPONENTS) - {"train"}
    assert page.count("<figure") == len(AXES) and page.count("1.00 ± 0.00") == 2 * len(AXES) and "some &lt;cpu&gt;" in page


def test_a_power_is_a_straight_line():
    chart = line_chart("a power", [Line("square", [1, 10, 1000], [2, 200, 2_000_000])], logarithmic=True)
    (path,) = re.findall(r'class="l0" d="M([^"]+)"', chart)
    x, y = (list(map(float, path.split()))[start::2] for start in (0, 1))
    assert (y[1] - y[0]) / (x[1] - x[0]) == pytest.approx((y[2] - y[0]) / (x[2] - x[0]), rel=1e-3)
    assert 'left:66.67%">100<' in chart and 'left:100.00%">1,000<' in chart and "last 2,000,000" in chart


def test_the_guard_passes_what_it_stored_and_calls_what_is_slower(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "GUARDED", ("matcher",))
    file = tmp_path / "baseline.json"
    assert bench.main(["--guard", str(file), "--write"]) == 0
    assert bench.main(["--guard", str(file)]) == 0
    content = json.loads(file.read_text())
    content["ratios"]["matcher"][f"{DEFAULT_BACKEND}, 7 boxes"]["reference"] *= 1000
    file.write_text(json.dumps(content))
    capsys.readouterr()
    assert bench.main(["--guard", str(file)]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"^SLOWER: matcher: {DEFAULT_BACKEND}, 7 boxes / reference is \S+, stored \S+, bound \S+$", said, re.M)
    assert said.count("SLOWER: ") == 1 and f"--guard {file} --write renews it" in said


@given(stored=st.floats(1e-3, 1e3), share=st.floats(0.01, 3))
def test_bounds_of_the_guard(stored, share):
    ratios = {"loss": {"a": {"reference": stored * share, "ceiling": stored * share}}}
    by_kind = {one.kind: one.ok for one in guard.held(ratios, {"loss": {"a": {"reference": stored, "ceiling": stored}}})}
    if min(abs(share - margin) for margin in guard.MARGINS.values()) > 1e-9:
        assert by_kind == {kind: share > margin for kind, margin in guard.MARGINS.items()}


def test_stored_baselines_have_every_guarded_part():
    files = sorted(ROOT.glob("*/baseline.json"))
    assert files
    for file in files:
        content = guard.read(file)
        assert tuple(content["ratios"]) == guard.GUARDED and content["backend"] == file.parent.name


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--part", "index", "--quick"], "--quick knows no smaller index"),
        (["--growth", "--part", "train"], "--growth knows no sizes of train"),
        (["--write"], "without --guard"),
        (["--guard", "none.json"], "cannot be read"),
        (["--guard", "none.json", "--part", "loss"], "leave --part"),
        (["--guard", "none.json", "--write", "--name", "reference"], "holds one backend to the reference"),
    ],
)
def test_wrong_calls_are_named(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(says)):
        bench.main(flags)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"backend": "x", "ratios": {"loss": {"a": {"reference": 0}}}}', '{"backend": "x", "ratios": 3}']
)
def test_a_broken_baseline_is_named(content, tmp_path):
    file = tmp_path / "baseline.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"baseline\.json .*--write renews it"):
        guard.read(file)


def test_a_figure_that_was_not_measured_is_no_miss():
    assert Figure("a", None, "s", most=1.0, note="why").ok and not Figure("a", 2.0, "s", most=1.0).ok
    assert "not measured (why)" in table([Figure("a", None, "s", note="why")])
