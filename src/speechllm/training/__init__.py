"""Training for any model with a batch loss: data, loop, optimizers, checkpoints, DeepSpeed."""
