"""Training: data, loop, optimizers, checkpoints and DeepSpeed, for any model with a batch loss."""
