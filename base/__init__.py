"""The benchmark itself: contracts, configuration, the training loop, evaluation and records, for any accelerator."""
