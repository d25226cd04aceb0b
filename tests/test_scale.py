"""The planner: its formulas by what must hold of them, its output of a real run, and its predictions beside steps that really average."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.__main__ import main as tool
from base.config import Config
from base.errors import UserError
from base.schedule import evaluates_after
from planning import averaging
from planning.formulas import CONVERGENCE, Link, Network, Work, epochs_to_target, fitted
from planning.scale import evaluations, main, measured, published
from tests.conftest import start_training

SSD300 = {"num_classes": 81, "image_size": (300, 300), "strides": (1, 1, 2, 2, 2, 1), "backbone": "resnet34"}
links = st.builds(Link, st.floats(1e-7, 1e-2), st.floats(1e6, 1e12))
networks = st.builds(Network, links, st.none()) | st.builds(Network, links, st.sampled_from([2, 4, 8]), links)
devices = st.sampled_from([1, 2, 4, 8, 64, 1024])
steps = st.builds(
    lambda seconds, ends, sizes, **rest: Work(seconds, 32, tuple(zip(sorted(ends), sizes, strict=True)), **rest),
    st.floats(1e-3, 10),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.just(1.0)),
    st.tuples(*[st.floats(1, 1e9)] * 3),
    backward=st.floats(0.1, 0.9),
    parts=st.integers(1, 4),
    statistics=st.floats(0, 1e5),
    norms=st.just((256.0, 1024.0)),
    norm_ranks=st.sampled_from([0, 1, 2]),
)


@given(work=steps, network=networks, count=devices)
def test_no_number_of_devices_is_faster_than_as_many_alone(work, network, count):
    assert work.on(1, network) == work.seconds
    assert work.on(count, network) >= work.seconds
    assert work.on(count, network, work.batch / 2) >= work.seconds / 2


@given(work=steps, network=networks, count=devices, faster=st.floats(1, 100))
def test_a_better_link_is_never_slower(work, network, count, faster):
    for better in (Link(network.inside.latency, network.inside.bandwidth * faster), Link(network.inside.latency / faster, network.inside.bandwidth)):
        assert work.on(count, replace(network, inside=better)) <= work.on(count, network)


@given(work=steps, network=networks, count=devices)
def test_buckets_beside_the_backward_pass_are_never_slower_than_after_it(work, network, count):
    after = replace(work, buckets=tuple((1.0, size) for _, size in work.buckets))
    assert work.on(count, network) <= after.on(count, network) * (1 + 1e-12)


def test_steps_worked_out_by_hand():
    slow = Network(Link(0.0, 10.0))  # 10 bytes a second: a ring of two sends each byte once
    work = Work(6.0, 1, ((0.5, 30.0), (1.0, 20.0)), backward=4 / 6)
    assert work.on(2, slow) == pytest.approx(2 + 2 + 3 + 2)  # forward, half of backward, then one bucket after the other
    assert replace(work, parts=2).on(2, slow) == pytest.approx(4 + 1 + 3 + 2)  # the first part's gradients wait for the second's
    assert replace(work, buckets=((1.0, 30.0),)).on(2, slow) == pytest.approx(6 + 3)
    assert Link(1.0, 4.0).ring(4, 8.0) == 6 * (1 + 0.5) and Link(1.0, 4.0).tree(8, 8.0) == 6 * 1 + 2 * 2
    nodes = Network(Link(1.0, 4.0), 2, Link(3.0, 1.0))
    assert nodes.all_reduce(4, 8.0) == Link(1.0, 4.0).ring(2, 8.0) + Link(3.0, 1.0).ring(2, 8.0)


def test_the_work_of_ssd300():
    whole = averaging.work(SSD300, 1.0, 32, 0, "none")
    assert whole.buckets == ((1.0, 4 * 19_972_534),) and len(whole.norms) == 29  # its parameters
    halved = averaging.work(SSD300, 1.0, 32, 8, "bf16")
    assert sum(size for _, size in halved.buckets) == 2 * 19_972_534 and len(halved.buckets) > 4
    ends = [ready for ready, _ in halved.buckets]
    assert ends == sorted(ends) and ends[-1] == 1 and ends[0] < 0.05  # heads first: many weights, few operations


def test_a_link_is_found_again():
    link, sizes = Link(3e-5, 2e9), [2.0**power for power in range(12, 26)]
    found = fitted(4, sizes, [link.ring(4, size) for size in sizes])
    assert (found.latency, found.bandwidth) == (pytest.approx(link.latency), pytest.approx(link.bandwidth))


def test_epochs_follow_the_published_points():
    assert all(epochs_to_target(batch) == epochs for batch, epochs in CONVERGENCE.items())
    assert epochs_to_target(1792) == (60, 60) and epochs_to_target(3072) == (75, 77.5)
    assert epochs_to_target(1023) is epochs_to_target(4097) is None
    config = Config(eval_every=0, eval_epochs=(40, 50, 55), epochs=80)
    assert evaluations(config, 52.0) == 2 and evaluates_after(config, 50)


def test_published_points_come_from_the_backends():
    points = {(row["system"], row["software"]): row for row in published()}
    assert {row["devices"] for row in points.values()} >= {8, 16, 64, 1024}
    for row in points.values():  # the columns of a run agree: epochs of 117,266 images in so many minutes
        if row["minutes"]:
            assert row["epochs"] * 117_266 / (row["minutes"] * 60) == pytest.approx(row["images_per_second"], rel=0.04)


@pytest.fixture(scope="module")
def run(demo_data, tmp_path_factory):
    """A run of nine steps on one device."""
    folder = tmp_path_factory.mktemp("scale")
    short = ["--image_size", "48", "48", "--batch_size", "4", "--max_steps", "9", "--log_every", "2", "--target", "null"]
    done = start_training(folder, demo_data, short).wait_done()
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_plan_from_a_run(run, capsys, tmp_path):
    link = ["--latency", "5", "--bandwidth", "100", "--devices-per-node", "8", "--node-latency", "10", "--node-bandwidth", "100"]
    found = measured(run)
    assert (found.classes, found.images, found.device) == (6, 71, "cpu") and found.detection > 0 and found.figures > 0
    assert main(["--from", str(run), *link, "--gradient-bucket-mb", "4", "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "plan.json").read_text())
    assert [row["devices"] for row in content["predicted"]] == [1 << power for power in range(11)]
    first, *others = content["predicted"]
    assert first["step_seconds"] == found.step and first["efficiency"] == 1 and first["epoch_seconds"] == 71 // 4 * found.step
    assert all(0 < row["efficiency"] <= 1 for row in others) and others[-1]["epoch_seconds"] is None  # fewer images than a global batch
    assert all(row["epochs"] is row["minutes"] is None for row in content["predicted"])  # it is not COCO
    assert main(["--from", str(run), *link, "--images", "117266", "--json", str(tmp_path / "plan.json")]) == 0
    rows = json.loads((tmp_path / "plan.json").read_text())["predicted"]
    assert [row["epochs"] for row in rows[7:]] == [None, [50, 50], [65, 65], [85, 90]]  # global batches of 512 … 4096
    spent = 50 * rows[8]["epoch_seconds"] + evaluations(found.config, 50) * (found.detection / 256 + found.figures)
    assert rows[8]["minutes"] == pytest.approx([spent / 60] * 2) and rows[8]["epoch_seconds"] == 114 * rows[8]["step_seconds"]
    for text in ("128×DGX A100", "336,302", "not known", "other hardware"):
        assert text in shown


def test_a_fixed_global_batch_and_limits(run, capsys, tmp_path):
    def steps(*flags: str) -> dict[int, float]:
        assert main(["--from", str(run), "--latency", "5", "--bandwidth", "100", *flags, "--json", str(tmp_path / "plan.json")]) == 0
        return {row["devices"]: row["step_seconds"] for row in json.loads((tmp_path / "plan.json").read_text())["predicted"]}

    plain = steps()
    fixed = steps("--global_batch", "8")
    assert list(fixed) == [1, 2, 4, 8] and fixed[2] == plain[2] and fixed[1] == 2 * plain[1] and fixed[8] < fixed[4]
    assert steps("--loader", "1")[4] == 16  # seconds for 16 images at one a second
    assert steps("--host_latency", "1000000")[2] == pytest.approx(plain[2] + 4)  # on a CPU: two sums over a ring of two, beside the step
    assert steps("--norm_ranks", "0")[2] > plain[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--latency", "5"], "a link is --latency and --bandwidth together"),
        (["--latency", "5", "--bandwidth", "9", "--devices_per_node", "8"], "several nodes are --devices_per_node, --node_latency and"),
        (["--latency", "5", "--bandwidth", "9", "--global_batch", "6", "--devices", "4", "8"], "cannot be shared out over any of --devices 4 8"),
        (["--latency", "5", "--bandwidth", "9", "--norm_ranks", "3", "--devices", "4"], "norm_ranks 3 must divide the 4 ranks"),
    ],
)
def test_what_cannot_be_planned_is_said(run, capsys, flags, said):
    assert tool(["scale", "--from", str(run), *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_run_on_several_devices_is_refused(run, tmp_path):
    for name in ("environment.json", "metrics.jsonl", "mlperf.log"):
        (tmp_path / name).symlink_to(run / name)
    with pytest.raises(UserError, match="no finished run's folder: it has no config.yaml"):
        measured(tmp_path)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text().replace("\ndevices: 1 ", "\ndevices: 2 "))
    with pytest.raises(UserError, match="ran on 2 devices; scale needs the step of one"):
        measured(tmp_path)


@pytest.mark.long
@pytest.mark.alone
def test_predictions_beside_measured_steps(tmp_path):
    """1, 2 and 4 processes with Gloo. The bounds are wide, as cores are shared and the machine may be busy: `scale --check` has the figures."""
    rows = averaging.check(rounds=3)
    assert [(row["processes"], row["bucket_mb"]) for row in rows] == [(1, 0), (1, 4), (2, 0), (2, 4), (4, 0), (4, 4)]
    for row in rows:
        assert 0.5 < row["predicted"] / row["measured"] < 2, row
        assert row["processes"] == 1 or 1e5 < row["bandwidth"] < 1e12
    assert all(row["predicted"] > row["alone"] for row in rows[2:])
