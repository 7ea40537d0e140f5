"""Seeds derived from the position in training, so that resuming needs no saved random states."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: object) -> int:
    """Hash the parts to a seed below 2^32; different parts give unrelated seeds."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


def seed_everything(*parts: object) -> None:
    """Seed the generators of Python, numpy and torch, including torch's GPU generators."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def fork_rng(*parts: object) -> Iterator[None]:
    """Seed the CPU generators within the context, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
