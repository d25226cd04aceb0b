"""Learning rate and evaluation times: MLPerf's rules as pure functions of the step and the epoch."""

from base.config import Config


def scaled_rate(config: Config) -> float:
    """The rate after warm-up. ``linear``: rate × global batch / 32 (MLPerf reference). ``whole``: 2.5e-3 times a whole
    number, at least 1, nearest to that (MLPerf v0.7 submissions). ``none``: as it stands."""
    factor = config.global_batch / 32
    if config.learning_rate_scaling == "linear":
        return config.learning_rate * factor
    if config.learning_rate_scaling == "whole":
        return 2.5e-3 * max(1, round(config.learning_rate / 2.5e-3 * factor))
    return config.learning_rate


def warmup_steps(config: Config, images: int) -> int:
    """Steps of warm-up; one given in epochs counts ``images`` / global batch steps an epoch, to the nearest step.

    MLPerf's 2.619685 epochs are 300 steps of 1024 out of 117,266 images (its own code cuts 299.99998 to 299)."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round((config.warmup_epochs or 0) * images / config.global_batch)


def learning_rate(config: Config, step: int, steps_per_epoch: int, images: int) -> float:
    """The rate of a step (from 0): MLPerf's warm-up, then × ``decay_factor`` from the end of each decay epoch on."""
    rate, warmup = scaled_rate(config), warmup_steps(config, images)
    epoch = step // steps_per_epoch
    rate *= config.decay_factor ** sum(epoch >= boundary for boundary in config.decay_epochs)
    if step < warmup:
        rate *= 1 - (warmup - step) / (warmup * 2**config.warmup_factor)  # so written it is exactly 0 where it starts at 0
    return rate


def evaluates_after(config: Config, epoch: int) -> bool:
    """Whether there is an evaluation after ``epoch`` (from 1); always after the last."""
    regular = config.eval_every > 0 and epoch % config.eval_every == 0
    return regular or epoch in config.eval_epochs or epoch == config.epochs
