"""MLPerf's learning-rate rules and evaluation times, against figures written out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.config import Config
from base.schedule import evaluates_after, learning_rate, scaled_rate, warmup_steps

IMAGES = 117_266  # of train2017 with boxes


def rates(config, steps, steps_per_epoch=100, images=IMAGES):
    return [learning_rate(config, step, steps_per_epoch, images) for step in steps]


def test_linear_rule_scales_with_the_global_batch():
    for nodes, devices, batch, rate in [(1, 1, 32, 0.0025), (1, 8, 128, 0.08), (2, 8, 64, 0.08), (1, 1, 16, 0.00125)]:
        assert scaled_rate(Config(nodes=nodes, devices=devices, batch_size=batch)) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    "devices, batch, rate, scaled",
    [
        (8, 120, 2.92e-3, 0.0875),  # DGX1: 1.168 · 30 = 35.04 → 35
        (16, 56, 3.2e-3, 0.09),  # DGX2: 1.28 · 28 = 35.84 → 36
        (8, 114, 3.2e-3, 0.09),  # DGXA100: 1.28 · 28.5 = 36.48 → 36
        (64, 24, 2.9e-3, 0.14),  # DGX2_multi: 1.16 · 48 = 55.68 → 56
        (1, 8, 2.5e-3, 0.0025),  # 0.25 → at least 1
    ],
)
def test_whole_rule_of_the_submissions(devices, batch, rate, scaled):
    config = Config(devices=devices, batch_size=batch, learning_rate=rate, learning_rate_scaling="whole")
    assert scaled_rate(config) == pytest.approx(scaled, rel=1e-12)


def test_rate_may_stand_as_it_is():
    assert scaled_rate(Config(devices=8, batch_size=128, learning_rate=0.03, learning_rate_scaling="none")) == 0.03


def test_warmup_in_epochs_is_mlperfs_300_steps():
    config = Config(devices=8, batch_size=128, warmup_epochs=2.619685)
    assert warmup_steps(config, IMAGES) == 300
    assert warmup_steps(Config(warmup_steps=650), IMAGES) == 650
    assert warmup_steps(Config(), IMAGES) == 0
    assert warmup_steps(Config(warmup_epochs=0.0), IMAGES) == 0


def test_warmup_rule_written_out():
    """lr(i) = lr - (w - i) · lr / (w · 2^factor) for i < w."""
    plain = Config(learning_rate=0.08, learning_rate_scaling="none", warmup_steps=4)
    assert rates(plain, range(6)) == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08, 0.08], abs=1e-15)
    half = plain.model_copy(update={"warmup_factor": 1})
    assert rates(half, range(6)) == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08], abs=1e-15)
    eighth = plain.model_copy(update={"warmup_factor": 3})
    assert rates(eighth, range(5)) == pytest.approx([0.07, 0.0725, 0.075, 0.0775, 0.08], abs=1e-15)
    mlperf = Config(devices=8, batch_size=128, warmup_epochs=2.619685)
    assert rates(mlperf, [0, 1, 150, 299, 300], 115) == pytest.approx([0, 0.08 / 300, 0.04, 0.08 * 299 / 300, 0.08], abs=1e-15)


def test_without_warmup_the_first_rate_is_whole():
    assert rates(Config(), [0, 1]) == [2.5e-3, 2.5e-3]


def test_the_rate_falls_at_the_end_of_each_decay_epoch():
    config = Config(learning_rate=0.1, learning_rate_scaling="none", decay_epochs=(40, 50))
    got = rates(config, [0, 3999, 4000, 4999, 5000, 6999])
    assert got == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)
    never = Config(learning_rate=0.1, learning_rate_scaling="none", decay_epochs=())
    assert rates(never, [0, 10**6]) == [0.1, 0.1]
    half = Config(learning_rate=0.1, learning_rate_scaling="none", decay_epochs=(1,), decay_factor=0.5)
    assert rates(half, [99, 100]) == pytest.approx([0.1, 0.05])


@given(st.integers(1, 2000), st.integers(0, 32), st.integers(0, 3000), st.floats(1e-6, 10))
def test_rates_rise_through_the_warmup_and_never_leave_their_bounds(warmup, factor, step, rate):
    config = Config(learning_rate=rate, learning_rate_scaling="none", warmup_steps=warmup, warmup_factor=factor, decay_epochs=())
    now, following = rates(config, [step, step + 1])
    assert 0 <= now <= following <= rate * (1 + 1e-12)
    assert step < warmup or now == rate


def evaluations(**keys):
    config = Config(**keys)
    return [epoch for epoch in range(1, config.epochs + 1) if evaluates_after(config, epoch)]


def test_evaluation_schedule():
    assert evaluations(epochs=12, eval_every=5) == [5, 10, 12]
    assert evaluations(epochs=10, eval_every=5) == [5, 10]
    assert evaluations(epochs=3, eval_every=1) == [1, 2, 3]
    assert evaluations(epochs=12, eval_every=0, eval_epochs=(4, 7)) == [4, 7, 12]
    assert evaluations(epochs=12, eval_every=5, eval_epochs=(4,)) == [4, 5, 10, 12]
    assert evaluations(epochs=2, eval_every=0) == [2]
    submissions = evaluations(epochs=80, eval_every=0, eval_epochs=(40, 50, 55, 60, 65, 70, 75, 80))
    assert submissions == [40, 50, 55, 60, 65, 70, 75, 80]
