"""The promise of the front page: one command trains the demo to the target, and its log passes MLPerf's checker."""

import json
import subprocess
import sys

import pytest

from base import checkpoint
from base.backend import list_backends, load_backend
from base.config import read_run
from tests.conftest import Started


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in list_backends() if load_backend(name).device in ("auto", "cpu")])
def test_the_demo_reaches_the_target_and_its_log_is_compliant(tmp_path, name):
    flags = ["--name", name, "--runs_dir", str(tmp_path), "--run_name", "demo"]
    done = Started(tmp_path, flags).wait_done(seconds=2400)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "demo"
    target = read_run(run / "config.yaml").target
    assert target >= 0.23 and f"target {target} reached" in done.stdout and str(run) in done.stdout
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in metrics if line["kind"] == "evaluation"]
    assert evaluations[-1]["AP"] >= target
    assert "AP a class" in (run / "report.html").read_text(encoding="utf-8") and f"report  {run / 'report.html'}" in done.stdout

    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "1.0.0", str(run / "mlperf.log")]
    verdict = subprocess.run(checker, capture_output=True, text=True, cwd=tmp_path)
    assert verdict.returncode == 0 and "SUCCESS" in verdict.stdout + verdict.stderr

    best = run / "checkpoints" / "best.pt"
    assert checkpoint.read(best)["progress"]["evaluations"][-1]["AP"] == evaluations[-1]["AP"]
    figures = subprocess.run([sys.executable, "-m", "base", "evaluate", "--name", name, "--checkpoint", str(best)], capture_output=True, text=True)
    assert f"AP  {evaluations[-1]['AP']:.4f}" in figures.stdout, figures.stderr
