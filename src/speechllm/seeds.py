"""Random numbers that follow from where training stands: to go on needs no generator's state."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: object) -> int:
    """A number below 2^32; parts that differ anywhere give one that has nothing to do with it."""
    return random.Random(" ".join(map(str, parts))).getrandbits(32)


def seed_everything(*parts: object) -> None:
    """The generators of Python, numpy and torch, those of the GPUs among them."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seeds the generators of the CPU, and gives them back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
