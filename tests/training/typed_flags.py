"""Flags as they are typed, and the batches that they give."""

import argparse

import pytest

from speechllm.data import add_data_arguments, add_training_data_arguments
from speechllm.seeds import seed_everything
from speechllm.training.distributed import Ranks
from speechllm.training.loaders import make_train_loader
from speechllm.training.training_cuts import check_data
from speechllm.training.training_flags import add_training_arguments


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    add_data_arguments(parser)
    add_training_data_arguments(parser)
    parser.add_argument("--train-cuts", default="tiny_cuts_many")
    parser.add_argument("--valid-cuts", default="tiny_cuts_dev")
    return parser.parse_args([str(flag) for flag in flags])


def typed(flags):
    """A dict of flags as a namespace."""
    return parse(*(item for pair in flags.items() for item in pair))


def batches(flags, epoch=1, ranks=Ranks(), skip=0):
    """One epoch of training batches, from flags as they are typed."""
    args = typed(flags)
    statistics, _ = check_data(args)
    seed_everything(0)
    return list(make_train_loader(args, statistics, ranks)(epoch, skip))


def listing(batches):
    return [(batch["texts"], batch["features"].double().sum().item()) for batch in batches]


def said(flags, **more):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        batches({**flags, **more})
    return str(error.value)
