"""The MLPerf training log (ruleset 1.0.0, benchmark ssd), written with the mlperf-logging library.

``python -m mlperf_logging.compliance_checker --usage training --ruleset 1.0.0 <run>/mlperf.log`` checks it.
"""

import logging
from pathlib import Path

from mlperf_logging.mllog import constants as keys
from mlperf_logging.mllog import mllog

from base.config import Config
from base.schedule import scaled_rate, warmup_steps


class MLPerfLog:
    """MLPerf's events of one run, appended to a file; without a file nothing is written (ranks after the first)."""

    def __init__(self, path: Path | None):
        logger = logging.Logger("mlperf", logging.INFO)  # not registered: two runs in one process do not mix
        logger.addHandler(logging.FileHandler(path) if path else logging.NullHandler())
        self.log = mllog.MLLogger(logger, root_dir=str(Path(__file__).resolve().parents[1]))

    def init_start(self, platform: str, cache_cleared: bool) -> None:
        """The run's identity, and whether whoever started it had cleared the caches of all machines before."""
        self.log.event(keys.SUBMISSION_BENCHMARK, "ssd")
        self.log.event(keys.SUBMISSION_DIVISION, "closed")
        self.log.event(keys.SUBMISSION_ORG, "reference_implementation")
        self.log.event(keys.SUBMISSION_PLATFORM, platform)
        self.log.event(keys.SUBMISSION_STATUS, keys.ONPREM)
        self.log.event(keys.CACHE_CLEAR, cache_cleared)
        self.log.start(keys.INIT_START)

    def run_start(self) -> None:
        """The clock starts; data may be touched from here on."""
        self.log.end(keys.INIT_STOP)
        self.log.start(keys.RUN_START)

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
            self.log.event(key, value)

    def epoch_start(self, epoch: int) -> None:
        self.log.start(keys.BLOCK_START, metadata={keys.FIRST_EPOCH_NUM: epoch, keys.EPOCH_COUNT: 1})
        self.log.start(keys.EPOCH_START, metadata={keys.EPOCH_NUM: epoch})

    def epoch_stop(self, epoch: int) -> None:
        self.log.end(keys.EPOCH_STOP, metadata={keys.EPOCH_NUM: epoch})
        self.log.end(keys.BLOCK_STOP, metadata={keys.FIRST_EPOCH_NUM: epoch})

    def eval_start(self, epoch: int) -> None:
        self.log.start(keys.EVAL_START, metadata={keys.EPOCH_NUM: epoch})

    def eval_stop(self, epoch: int, ap: float) -> None:
        self.log.event(keys.EVAL_ACCURACY, ap, metadata={keys.EPOCH_NUM: epoch})
        self.log.end(keys.EVAL_STOP, metadata={keys.EPOCH_NUM: epoch})

    def run_stop(self, reached: bool) -> None:
        self.log.end(keys.RUN_STOP, metadata={keys.STATUS: keys.SUCCESS if reached else keys.ABORTED})
