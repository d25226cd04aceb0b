"""The MLPerf training log (ruleset 1.0.0, benchmark ssd), written with the mlperf-logging library.

``python -m mlperf_logging.compliance_checker --usage training --ruleset 1.0.0 <run>/mlperf.log`` checks it.
"""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants as keys
from mlperf_logging.mllog import mllog

from base.config import Config
from base.schedule import scaled_rate, warmup_steps


def run_seconds(log: str) -> float | None:
    """MLPerf's result: seconds from run_start to run_stop, breaks of a run that was resumed included; None unless the log has both."""
    found = {key: int(stamp) for stamp, key in re.findall(r'"time_ms": (\d+),.*"key": "(run_start|run_stop)"', log)}
    return (found[keys.RUN_STOP] - found[keys.RUN_START]) / 1e3 if len(found) == 2 else None


class _Lines(logging.Handler):
    """Hands each line to ``write``. logging's own handlers only print that a disk is full, and go on."""

    def __init__(self, write: Callable[[str], None]):
        super().__init__()
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))


class MLPerfLog:
    """MLPerf's events of one run, each given to ``write`` as a line; None (ranks after the first): nothing is written.

    Its clock is the system's as it was at the start, and then only goes forward: a run's result is the difference of two lines.
    """

    def __init__(self, write: Callable[[str], None] | None):
        logger = logging.Logger("mlperf", logging.INFO)  # not registered: two runs in one process do not mix
        logger.addHandler(_Lines(write) if write else logging.NullHandler())
        self.log = mllog.MLLogger(logger, root_dir=str(Path(__file__).resolve().parents[1]), default_stack_offset=2)
        self.zero = time.time() - time.monotonic()

    def follow(self, milliseconds: int) -> None:
        """No line is to be older than this, the last one of a run that goes on."""
        self.zero = max(self.zero, milliseconds / 1e3 - time.monotonic())

    def _event(self, key: str, value: Any = None, **metadata: Any) -> None:
        self.log.event(key, value, metadata, time_ms=self._now())

    def _start(self, key: str, **metadata: Any) -> None:
        self.log.start(key, metadata=metadata, time_ms=self._now())

    def _end(self, key: str, **metadata: Any) -> None:
        self.log.end(key, metadata=metadata, time_ms=self._now())

    def _now(self) -> int:
        return round((self.zero + time.monotonic()) * 1e3)

    def init_start(self, platform: str, cache_cleared: bool) -> None:
        """The run's identity, and whether whoever started it had cleared the caches of all machines before."""
        self._event(keys.SUBMISSION_BENCHMARK, "ssd")
        self._event(keys.SUBMISSION_DIVISION, "closed")
        self._event(keys.SUBMISSION_ORG, "reference_implementation")
        self._event(keys.SUBMISSION_PLATFORM, platform)
        self._event(keys.SUBMISSION_STATUS, keys.ONPREM)
        self._event(keys.CACHE_CLEAR, cache_cleared)
        self._start(keys.INIT_START)

    def run_start(self) -> None:
        """The clock starts; data may be touched from here on."""
        self._end(keys.INIT_STOP)
        self._start(keys.RUN_START)

    def hyperparameters(self, config: Config, train_images: int, eval_images: int) -> None:
        """What the compliance checker wants to know of the recipe."""
        events = {
            keys.SEED: config.seed,
            keys.GLOBAL_BATCH_SIZE: config.global_batch,
            keys.GRADIENT_ACCUMULATION_STEPS: config.gradient_accumulation,
            keys.MODEL_BN_SPAN: config.batch_size // config.gradient_accumulation,
            keys.MAX_SAMPLES: config.max_samples,
            keys.OPT_NAME: "sgd",
            keys.OPT_BASE_LR: scaled_rate(config),
            keys.OPT_WEIGHT_DECAY: config.weight_decay,
            keys.OPT_LR_WARMUP_STEPS: warmup_steps(config, train_images),
            keys.OPT_LR_WARMUP_FACTOR: config.warmup_factor,
            keys.OPT_LR_DECAY_BOUNDARY_EPOCHS: list(config.decay_epochs),
            keys.TRAIN_SAMPLES: train_images,
            keys.EVAL_SAMPLES: eval_images,
        }
        for key, value in events.items():
            self._event(key, value)

    def epoch_start(self, epoch: int) -> None:
        self._start(keys.BLOCK_START, **{keys.FIRST_EPOCH_NUM: epoch, keys.EPOCH_COUNT: 1})
        self._start(keys.EPOCH_START, **{keys.EPOCH_NUM: epoch})

    def epoch_stop(self, epoch: int) -> None:
        self._end(keys.EPOCH_STOP, **{keys.EPOCH_NUM: epoch})
        self._end(keys.BLOCK_STOP, **{keys.FIRST_EPOCH_NUM: epoch})

    def eval_start(self, epoch: int) -> None:
        self._start(keys.EVAL_START, **{keys.EPOCH_NUM: epoch})

    def eval_stop(self, epoch: int, ap: float) -> None:
        self._event(keys.EVAL_ACCURACY, ap, **{keys.EPOCH_NUM: epoch})
        self._end(keys.EVAL_STOP, **{keys.EPOCH_NUM: epoch})

    def run_stop(self, reached: bool) -> None:
        self._end(keys.RUN_STOP, **{keys.STATUS: keys.SUCCESS if reached else keys.ABORTED})
