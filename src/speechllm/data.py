"""Cut files to padded batches, with lhotse; the flags are those icefall users know.

A batch is a dict:

    features      (B, T, 80) float32, padded; B utterances, T frames of 10 ms
    feature_lens  (B,) int64, valid frames
    texts         B transcripts as they are in the cut files
    contexts      B texts for the prompt, empty where there is none; only with `use_context`
    ids           B cut ids; a cut joined by --concatenate-cuts has a new one
    seconds       audio in the batch, without padding
    bad           faults of the utterances left out, and of noise: what is broken shows when read

With an encoder cache, `features` are the outputs of all encoders, (B, T / 4, C).

A batch that was trained on before training was resumed has `ids` and `seconds` alone.

A batch of which all utterances are bad is a second of silence with the text "", and no `ids`: the
ranks stay in step, and it must not count. `with_speech` leaves such batches out.
"""

import argparse
import os
import random
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import get_all_start_methods
from pathlib import Path
from threading import Thread

import torch
from lhotse import CutSet
from lhotse.cut import Cut, PaddingCut
from lhotse.dataset import (
    CutConcatenate,
    CutMix,
    K2SpeechRecognitionDataset,
    OnTheFlyFeatures,
    PrecomputedFeatures,
    SpecAugment,
)
from lhotse.dataset.dataloading import make_worker_init_fn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from speechllm.cut_faults import Fault, cut_faults, header_faults, reading_faults
from speechllm.cut_files import context_of
from speechllm.encoder_cache import EncoderCache
from speechllm.errors import InputError, first_line
from speechllm.features import FRAME_SHIFT, NUM_MEL_BINS, fbank_extractor
from speechllm.flags import str2bool
from speechllm.sampling import BatchLimit, make_sampler, with_positions
from speechllm.seeds import seeded
from speechllm.zipformer.encoder import encoder_out_lens

MIN_BATCHES_IN_BUCKET = 10  # of which --drop-last may drop one
POSITIONS_A_SECOND = 6.25  # of the LLM, at least: speech of one encoder, at the published rate
SILENCE = 100  # frames
BATCHES_IN_BUFFER = 4  # of each bucket, where cuts hold their data


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--manifest-dir", type=Path, default=Path("data/fbank"), help="where the cut files are")
    add("--max-duration", type=float, default=200.0, help="seconds of audio in a process' batch")
    add("--bucketing-sampler", type=str2bool, default=True, help="batches of similar durations")
    add("--num-buckets", type=int, default=30, help="of durations; fewer for a small corpus")
    add("--num-workers", type=int, default=2, help="loader processes")
    add("--loader-timeout", type=float, default=600.0,
        help="seconds in which they must give a batch, or the program ends; 0: any time")
    add("--on-the-fly-feats", type=str2bool, default=False,
        help="compute fbank from the audio instead of reading it")  # fmt: skip


def loader_options(args) -> dict:
    """What the flags of `add_data_arguments` say, as keywords of both loaders.

    And --use-context, which only models with an LLM have.
    """
    names = (
        "max_duration", "bucketing_sampler", "num_buckets", "num_workers", "loader_timeout",
        "on_the_fly_feats",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    return {**options, "use_context": getattr(args, "use_context", False)}


def add_training_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training data")
    add = group.add_argument
    add("--shuffle", type=str2bool, default=True, help="a new order in each epoch")
    add("--drop-last", type=str2bool, default=True, help="drop a bucket's last, incomplete batch")
    add("--shar-dir", help="in place of --train-cuts: directories of shards, comma-separated")
    add("--min-utterance", type=float, default=1.0, help="shorter ones (s) are not trained on")
    add("--max-utterance", type=float, default=20.0, help="longer ones (s) are not trained on")
    add("--max-bad-fraction", type=float, default=0.01,
        help="of the utterances, that may be broken: these are left out and listed in "
             "<exp-dir>/bad-cuts.jsonl; more stop the training")  # fmt: skip
    add("--concatenate-cuts", type=str2bool, default=False,
        help="join short utterances to fill what would be padding")  # fmt: skip
    add("--duration-factor", type=float, default=1.0,
        help="with --concatenate-cuts: longest joined cut, relative to the longest")  # fmt: skip
    add("--gap", type=float, default=1.0, help="with --concatenate-cuts: seconds between cuts")
    add("--enable-musan", type=str2bool, default=True,
        help="mix noise from musan_cuts.jsonl.gz into half the utterances, 10-20 dB")  # fmt: skip
    add("--enable-spec-aug", type=str2bool, default=True, help="SpecAugment")
    add("--spec-aug-time-warp-factor", type=int, default=80, help="below 1: no time warping")


class SpeechDataset(K2SpeechRecognitionDataset):
    """lhotse's dataset with the batches described at the top of this file."""

    def __init__(
        self,
        on_the_fly_feats: bool = False,
        cut_transforms: list[Callable[[CutSet], CutSet]] | None = None,
        input_transforms: list[Callable[[Tensor], Tensor]] | None = None,
        faults: Callable[[Cut], list[Fault]] | None = None,
        use_context: bool = False,
    ):
        """
        Args:
          faults: what is wrong with a cut, where manifests were not checked before.
        """
        super().__init__(
            return_cuts=True,
            input_transforms=input_transforms,
            input_strategy=_input_strategy(on_the_fly_feats),
        )
        self.on_the_fly_feats, self.faults, self.use_context = on_the_fly_feats, faults, use_context
        self.augmentations, self.augmented = cut_transforms or [], CutSet()

    def __getitem__(self, cuts: CutSet) -> dict:
        """A batch; only when it cannot be made, its utterances are read one by one.

        Raises:
          ValueError: it cannot be made although they can be read.
        """
        good, bad = _parted(cuts, self._faults)
        for augmentations in (self.augmentations, self.augmentations, []):  # noise may be broken
            if not good:
                return _silence(torch.zeros(1, SILENCE, NUM_MEL_BINS), bad)
            self.cut_transforms = [*augmentations, self._remember]
            try:
                return {**self._batch(CutSet.from_cuts(good)), "bad": bad}
            except Exception as error:  # lhotse's storages each have their own
                reason = first_line(error)
            good, more = _parted(good, self._reading_faults)
            bad += more or self._noise_faults({cut.id for cut in cuts})
        raise InputError(f"no batch can be made of cuts {good[0].id} … {good[-1].id}: {reason}")

    def _faults(self, cut: Cut) -> list[Fault]:
        faults = self.faults(cut) if self.faults else []
        return faults or (header_faults(cut) if self.on_the_fly_feats else [])

    def _reading_faults(self, cut: Cut) -> list[Fault]:
        return reading_faults(cut, not self.on_the_fly_feats)

    def _remember(self, cuts: CutSet) -> CutSet:
        self.augmented = cuts
        return cuts

    def _noise_faults(self, ids: set[str]) -> list[Fault]:
        """Of what was last mixed with cuts of these ids."""
        tracks = [track.cut for cut in self.augmented for track in getattr(cut, "tracks", ())]
        noise = [cut for cut in tracks if cut.id not in ids and not isinstance(cut, PaddingCut)]
        return _parted(noise, self._reading_faults)[1]

    def _batch(self, cuts: CutSet) -> dict:
        """
        Raises:
          Exception: an utterance, or noise, cannot be read or is not finite.
        """
        batch = super().__getitem__(cuts)
        if not batch["inputs"].sum().isfinite():
            raise InputError("features are not finite")
        supervisions = batch["supervisions"]
        size = batch["inputs"].size(0)
        texts: list[list[str]] = [[] for _ in range(size)]
        heard, lens = [None] * size, torch.zeros(size, dtype=torch.long)
        # A joined cut has several supervisions: their texts follow one another.
        for row, start, frames, text, cut in zip(
            supervisions["sequence_idx"].tolist(),
            supervisions["start_frame"].tolist(),
            supervisions["num_frames"].tolist(),
            supervisions["text"],
            supervisions["cut"],
        ):
            texts[row].append(text)
            heard[row] = cut
            lens[row] = max(int(lens[row]), start + frames)
        lens.clamp_(max=batch["inputs"].size(1))
        return {
            "features": batch["inputs"],
            "feature_lens": lens,
            "texts": [" ".join(parts) for parts in texts],
            "ids": [cut.id for cut in heard],
            "seconds": lens.sum().item() * FRAME_SHIFT,
            **_contexts(heard, self.use_context),
        }


def _contexts(cuts: Iterable[Cut], use_context: bool) -> dict:
    return {"contexts": list(map(context_of, cuts))} if use_context else {}


class HeardDataset(Dataset):
    """Batches as those of `SpeechDataset`, what encoders made of the features in their place."""

    def __init__(self, cache: EncoderCache, use_context: bool = False):
        self.cache, self.use_context = cache, use_context

    def __getitem__(self, cuts: CutSet) -> dict:
        cuts, bad = _parted(cuts.sort_by_duration(ascending=False), self._faults)  # as lhotse does
        if not cuts:
            frames = int(encoder_out_lens(SILENCE))
            return _silence(torch.zeros(1, frames, sum(self.cache.dims)), bad)
        outputs, frames = zip(*map(self.cache.read, cuts))
        return {
            "features": pad_sequence(outputs, batch_first=True),
            "feature_lens": torch.tensor(frames),
            "texts": [" ".join(part.text for part in cut.supervisions) for cut in cuts],
            "ids": [cut.id for cut in cuts],
            "seconds": sum(frames) * FRAME_SHIFT,
            "bad": bad,
            **_contexts(cuts, self.use_context),
        }

    def _faults(self, cut: Cut) -> list[Fault]:
        sentence = f"the encoder cache has no outputs of cut {cut.id}"
        return [Fault(cut.id, "not-cached", sentence)] if self.cache.lacks(cut) else []


def _parted(
    cuts: Iterable[Cut], faults_of: Callable[[Cut], list[Fault]]
) -> tuple[list[Cut], list[Fault]]:
    """The cuts without a fault, and the first faults of the others."""
    good, bad = [], []
    for cut in cuts:
        faults = faults_of(cut)
        bad += faults[:1]
        good += [] if faults else [cut]
    return good, bad


def _silence(features: Tensor, bad: list[Fault]) -> dict:
    return {
        "features": features,
        "feature_lens": torch.tensor([SILENCE]),
        "texts": [""],
        "ids": [],
        "seconds": 0.0,
        "bad": bad,
    }


def with_speech(batches: Iterable[dict], bad: list[Fault]) -> Iterator[dict]:
    """The batches with utterances; `bad` gets the faults of those that all have left out."""
    for batch in batches:
        bad += batch["bad"]
        if batch["ids"]:
            yield batch


def _input_strategy(on_the_fly_feats: bool):
    if on_the_fly_feats:
        # One by one: as a batch, the last frames would depend on the other utterances.
        return OnTheFlyFeatures(fbank_extractor(), use_batch_extract=False)
    return PrecomputedFeatures()


class Numbered:
    """(number, cuts) of a sampler's batches; before `skip` what is left to know of the cuts."""

    def __init__(self, sampler: Iterable[CutSet], skip: int, start: int = 0, step: int = 1):
        self.sampler, self.skip, self.start, self.step = sampler, skip, start, step

    def __iter__(self) -> Iterator[tuple[int, CutSet | dict]]:
        number = self.start
        for cuts in self.sampler:
            yield number, cuts if number >= self.skip else _trained_on(cuts)
            number += self.step


def _trained_on(cuts: CutSet) -> dict:
    return {"ids": [cut.id for cut in cuts], "seconds": sum(cut.duration for cut in cuts)}


class SeededDataset(Dataset):
    """Of another dataset; what is drawn for a batch follows from its number, whoever makes it."""

    def __init__(self, dataset: Dataset, seed: str):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, numbered: tuple[int, CutSet | dict]) -> dict:
        number, cuts = numbered
        if isinstance(cuts, dict):
            return cuts
        with seeded(self.seed, number):
            return self.dataset[cuts]


class StreamedDataset(IterableDataset):
    """Each loader process makes batches of its own part of the cuts.

    They take turns. When one is through, the others' numbers are larger than their place in the
    epoch: so no batch of `skip` or later is taken for one that was trained on.
    """

    def __init__(self, dataset: Dataset, sampler: Iterable[CutSet], skip: int):
        self.dataset, self.sampler, self.skip = dataset, sampler, skip

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        turn = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.dataset.__getitem__, Numbered(self.sampler, self.skip, *turn))


def joined(cuts: CutSet, duration_factor: float, gap: float) -> CutSet:
    """Short cuts, one after the other, in place of padding."""
    return CutConcatenate(duration_factor=duration_factor, gap=gap)(cuts)


def _mix_noise(cuts: CutSet, noise: CutSet) -> CutSet:
    """Noise of 10 to 20 dB in half of the cuts, drawn with Python's generator."""
    rng = random.Random(random.getrandbits(64))
    return CutMix(noise, p=0.5, snr=(10, 20), preserve_id=True, seed=rng)(cuts)


def training_loader(
    cuts: CutSet,
    *,
    sample: CutSet | None = None,
    max_duration: float,
    max_tokens: int = 0,
    count_positions: Callable[[Cut], int] | None = None,
    num_cuts: int,
    seconds: float = float("inf"),
    bucketing_sampler: bool = True,
    num_buckets: int = 30,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 2,
    loader_timeout: float = 600.0,
    on_the_fly_feats: bool = False,
    concatenate_cuts: bool = False,
    duration_factor: float = 1.0,
    gap: float = 1.0,
    musan_cuts: CutSet | None = None,
    enable_spec_aug: bool = True,
    spec_aug_time_warp_factor: int = 80,
    use_context: bool = False,
    seed: int = 42,
    epoch: int = 1,
    skip: int = 0,
    rank: int = 0,
    world_size: int = 1,
    encoder_cache: EncoderCache | None = None,
    more_faults: Callable[[Cut], list[Fault]] | None = None,
) -> DataLoader:
    """The augmented batches of one epoch, this rank's share; order and noise follow seed and epoch.

    `num_cuts` of `seconds` in all are in `cuts`. With `max_tokens` above 0 a batch has at most so
    many LLM positions, padding included; `count_positions` tells those of a cut. Of the first
    `skip` batches, which were trained on, nothing is loaded.

    With a `sample` of them, `cuts` are of shards: each process of each rank has a part of its own
    (see `Shards.cuts`), and makes batches of that alone. Their manifests were not read before, so
    here cuts with faults, or `more_faults`, are left out.

    With an `encoder_cache`, which has them all, nothing is augmented.

    Raises (when it is read):
      ValueError: the process that gives no batch in `loader_timeout` seconds, unless that is 0, or
        was killed.
    """
    streamed = sample is not None
    if max_tokens:
        cuts = with_positions(cuts, count_positions)
        sample = with_positions(sample, count_positions) if streamed else None
    full = min(max_duration, max_tokens / POSITIONS_A_SECOND if max_tokens else max_duration)
    parts = world_size * max(1, num_workers) if streamed else world_size
    if drop_last:  # each bucket may lose a batch
        batches = seconds / (full * parts)
        num_buckets = int(min(num_buckets, batches / MIN_BATCHES_IN_BUCKET))
    options = {"shuffle": shuffle, "drop_last": drop_last, "seed": seed}
    if streamed:  # the shards are divided already
        in_batch = full * num_cuts / seconds
        in_buffer = round(BATCHES_IN_BUFFER * max(1, num_buckets) * in_batch)
        options.update(rank=0, world_size=1, sample=sample, cuts_in_buffer=in_buffer)
    else:
        options.update(rank=rank, world_size=world_size)
    sampler = make_sampler(
        cuts,
        BatchLimit(max_duration, max_tokens=max_tokens),
        num_cuts=num_cuts // parts if streamed else num_cuts,
        num_buckets=num_buckets if bucketing_sampler else 0,
        **options,
    )
    sampler.set_epoch(epoch - 1)
    if encoder_cache is not None:
        dataset = HeardDataset(encoder_cache, use_context)
    else:
        dataset = SpeechDataset(
            on_the_fly_feats,
            _cut_transforms(concatenate_cuts, duration_factor, gap, musan_cuts),
            [_spec_augment(spec_aug_time_warp_factor)] if enable_spec_aug else [],
            _Faults(not on_the_fly_feats, more_faults) if streamed else None,
            use_context,
        )
    dataset = SeededDataset(dataset, f"{seed} {epoch} {rank}")
    watched = {"where": f"epoch {epoch}", "timeout": loader_timeout}
    if not streamed:
        return _data_loader(dataset, num_workers, **watched, sampler=Numbered(sampler, skip))
    return _data_loader(
        StreamedDataset(dataset, sampler, skip),
        num_workers,
        **watched,
        init=make_worker_init_fn(rank, world_size, False),  # tells them their rank
    )


@dataclass(frozen=True)
class _Faults:
    """What a check of the manifest would have found; loader processes can unpickle it."""

    need_features: bool
    more_faults: Callable[[Cut], list[Fault]] | None

    def __call__(self, cut: Cut) -> list[Fault]:
        faults = cut_faults(cut, need_features=self.need_features)
        return faults or (self.more_faults(cut) if self.more_faults else [])


def _cut_transforms(
    concatenate_cuts: bool, duration_factor: float, gap: float, musan_cuts: CutSet | None
) -> list[Callable[[CutSet], CutSet]]:
    transforms = []
    if concatenate_cuts:
        transforms.append(partial(joined, duration_factor=duration_factor, gap=gap))
    if musan_cuts is not None:
        transforms.append(partial(_mix_noise, noise=musan_cuts))
    return transforms


def _spec_augment(time_warp_factor: int) -> SpecAugment:
    return SpecAugment(
        time_warp_factor=time_warp_factor,
        num_frame_masks=10,
        frames_mask_size=100,
        num_feature_masks=2,
        features_mask_size=27,
    )


def evaluation_loader(
    cuts: CutSet,
    *,
    max_duration: float,
    num_cuts: int,
    bucketing_sampler: bool = True,
    num_buckets: int = 30,
    num_workers: int = 2,
    loader_timeout: float = 600.0,
    on_the_fly_feats: bool = False,
    use_context: bool = False,
    rank: int = 0,
    world_size: int = 1,
    encoder_cache: EncoderCache | None = None,
) -> DataLoader:
    """Every cut exactly once, similar durations together, nothing augmented.

    Of several ranks each has a share of the batches, which are the same for any number of ranks:
    kernels round differently in other batches. The cuts' manifests have been checked.
    """
    if encoder_cache is not None:
        dataset = HeardDataset(encoder_cache, use_context)
    else:
        dataset = SpeechDataset(on_the_fly_feats, use_context=use_context)
    sampler = make_sampler(
        cuts,
        BatchLimit(max_duration),
        num_cuts=num_cuts,
        num_buckets=num_buckets if bucketing_sampler else 0,
        shuffle=False,
        drop_last=False,
        seed=0,
        rank=0,
        world_size=1,
    )
    batches = sampler if world_size == 1 else _share_of_batches(sampler, rank, world_size)
    return _data_loader(
        dataset, num_workers, where="evaluation", timeout=loader_timeout, sampler=batches
    )


def _share_of_batches(batches: Iterable[CutSet], rank: int, world_size: int) -> list[CutSet]:
    """The longest first, so that the ranks' shares take about as long."""

    def padded_seconds(cuts: CutSet) -> float:
        return len(cuts) * max(cut.duration for cut in cuts)

    return sorted(batches, key=padded_seconds, reverse=True)[rank::world_size]


class NamingLoader(DataLoader):
    """Tells which process gave no batch in time or died, and what it was to read.

    Of shards that is not known here: the processes themselves draw from them.
    """

    def __init__(self, dataset, *, where: str, **options):
        """`where` these batches are, for the sentence."""
        self.where, self.given = where, {}
        super().__init__(dataset, **options)

    @property
    def _index_sampler(self) -> Iterable:
        """What a process is to read next; it is remembered until that is here."""
        self.given.clear()
        return map(self._remember, count(), super()._index_sampler)

    def _remember(self, number: int, batch):
        self.given[number] = batch
        return batch

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        for number in count():
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):
                    raise
                raise InputError(self._sentence(batches, number, first_line(error))) from None
            self.given.pop(number, None)
            yield batch

    def _sentence(self, batches: Iterator, number: int, error: str) -> str:
        """What torch leaves out. Its tasks are (process,), and (process, batch) when done."""
        tasks, pids = batches._task_info, [process.pid for process in batches._workers]
        numbers = re.findall(r"\d+", error)
        dead = [process for process, pid in enumerate(pids) if str(pid) in numbers]
        what = f"gave nothing for {self.timeout:g} s (--loader-timeout)"
        if dead:
            what = f"died, perhaps because the machine ran out of memory ({error})"
        process = dead[0] if dead else tasks[batches._rcvd_idx][0]
        ids = [_ids(self.given.get(n)) for n, task in sorted(tasks.items()) if task == (process,)]
        cuts = f"; it was to read the cuts {ids[0]}" if ids and ids[0] else ""
        return (
            f"{self.where}, batch {number}: loader process {process} (pid {pids[process]}) "
            f"{what}{cuts}"
        )


def _ids(batch: tuple[int, CutSet | dict] | CutSet | None) -> str:
    """Of what samplers give."""
    cuts = batch[1] if isinstance(batch, tuple) else batch or ()
    return " ".join(cuts["ids"] if isinstance(cuts, dict) else [cut.id for cut in cuts])


def _data_loader(
    dataset,
    num_workers: int,
    where: str,
    timeout: float,
    init: Callable[[int], None] | None = None,
    **options,
) -> DataLoader:
    """Torch's own generator is neither used nor moved; `init` gets the number of a new process.

    Each process has two batches ready (torch's default), in memory from which a GPU copies fastest.
    They start in the system's usual way also in a rank that was spawned: by itself it would spawn
    them too, and each would import everything anew, at every epoch.
    """
    if timeout < 0:
        raise InputError(f"--loader-timeout {timeout:g} must be at least 0")
    usual, *_ = get_all_start_methods()
    return NamingLoader(
        dataset,
        where=where,
        batch_size=None,
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        multiprocessing_context=usual if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=partial(_begin_process, init=init),
        **options,
    )


def _begin_process(number: int, init: Callable[[int], None] | None) -> None:
    """The end of a job is told to all of its processes: batches are made until the rank is through.

    So only the process that began this one can end it by SIGTERM.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    Thread(target=_end_with_parent, daemon=True).start()
    if init:
        init(number)


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
