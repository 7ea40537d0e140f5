"""The loader of evaluation batches; training/loader.py has that of training."""

from collections.abc import Iterable

from lhotse import CutSet
from torch.utils.data import DataLoader

from speechllm.data.config import DataConfig
from speechllm.data.dataset import CachedEncoderDataset, SpeechDataset, TextOptions
from speechllm.data.encoder_cache import EncoderCache
from speechllm.data.sampler import BatchLimit, make_sampler
from speechllm.data.workers import DiagnosticDataLoader


def evaluation_loader(
    cuts: CutSet,
    config: DataConfig,
    *,
    num_cuts: int,
    text: TextOptions = TextOptions(),
    rank: int = 0,
    world_size: int = 1,
    encoder_cache: EncoderCache | None = None,
) -> DataLoader:
    """Return a loader for evaluation: every cut once, in batches of similar duration.

    The ranks share the batches, which do not depend on the number of ranks: rounding depends on
    the batch. The manifests must have been scanned.
    """
    dataset = SpeechDataset(config.on_the_fly_feats, text=text)
    if encoder_cache is not None:
        dataset = CachedEncoderDataset(encoder_cache, text)
    batches: Iterable[CutSet] = make_sampler(
        cuts,
        BatchLimit(config.max_duration),
        num_cuts=num_cuts,
        num_buckets=config.num_buckets if config.bucketing_sampler else 0,
        rank=0,
        world_size=1,
    )
    if world_size > 1:  # longest first, so that all ranks take about the same time
        in_order = sorted(batches, key=lambda cuts: -len(cuts) * max(cut.duration for cut in cuts))
        batches = in_order[rank::world_size]
    return DiagnosticDataLoader(dataset, batches, config, "evaluation")
