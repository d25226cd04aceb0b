"""The benchmark itself: contracts, configuration, data, the training loop, evaluation and records, for any accelerator."""
