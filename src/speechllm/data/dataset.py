"""Datasets that convert cuts to batches, in the main process or in a worker.

A batch is a dict:

    features      (B, T, 80) float32, padded; B utterances, T frames of 10 ms
    feature_lens  (B,) int64, valid frames
    texts         B transcripts as in the cut files
    contexts      B prompt contexts, "" for none; only with `use_context`
    cut_ids       B cut ids; --concatenate-cuts gives new ids
    seconds       audio in the batch, without padding
    invalid       errors found when reading skipped utterances and noise

A tokenizer adds the training targets; for an LLM, see prompt.ChatTokenizer.training_batch. With an
encoder cache, `features` are the outputs of all encoders, (B, T / 4, C).

If all utterances in a batch are invalid, the batch is one second of silence with the text "" and
without `cut_ids`: it keeps the ranks in sync and has no weight. `usable_batches` drops it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lhotse import CutSet
from lhotse.cut import Cut, PaddingCut
from lhotse.dataset import K2SpeechRecognitionDataset, OnTheFlyFeatures, PrecomputedFeatures
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from speechllm.audio.fbank import FRAME_SHIFT, NUM_MEL_BINS, fbank_extractor
from speechllm.data.encoder_cache import EncoderCache
from speechllm.data.validation import CutError, context_of, header_errors, read_errors
from speechllm.errors import InputError, first_line
from speechllm.models.zipformer.encoder import encoder_out_lens

SILENCE = 100  # frames
ErrorsOf = Callable[[Cut], list[CutError]]


@dataclass(frozen=True)
class TextOptions:
    """Creates a batch's text entries: contexts and, with a tokenizer, token ids and labels."""

    use_context: bool = False
    tokenizer: Any = None  # with a method like prompt.ChatTokenizer.training_batch
    sample_encoders: bool = False  # per utterance, as in MoSE

    def __call__(self, texts: list[str], cuts: Iterable[Cut]) -> dict:
        """Return the entries for these cuts or, without cuts, for the batch of silence."""
        contexts = ([context_of(cut) for cut in cuts] or [""]) if self.use_context else None
        entries = {} if contexts is None else {"contexts": contexts}
        if self.tokenizer is not None:
            entries |= self.tokenizer.training_batch(texts, contexts, self.sample_encoders)
        return entries


class SpeechDataset(K2SpeechRecognitionDataset):
    """lhotse's dataset, returning the batches described at the top of this file."""

    def __init__(
        self,
        on_the_fly_feats: bool = False,
        cut_transforms: Iterable[Callable[[CutSet], CutSet]] = (),
        input_transforms: list[Callable[[Tensor], Tensor]] | None = None,
        check: ErrorsOf | None = None,
        text: TextOptions = TextOptions(),
    ):
        """`check` returns the errors of a cut, for manifests that were not scanned."""
        strategy = PrecomputedFeatures()
        if on_the_fly_feats:  # one by one: in a batch, the last frames would depend on other cuts
            strategy = OnTheFlyFeatures(fbank_extractor(), use_batch_extract=False)
        super().__init__(True, input_transforms=input_transforms, input_strategy=strategy)
        self.on_the_fly_feats, self.check, self.text = on_the_fly_feats, check, text
        self.read_errors = partial(read_errors, need_features=not on_the_fly_feats)
        self.augmentations, self.augmented = cut_transforms, CutSet()

    def __getitem__(self, cuts: CutSet) -> dict:
        """Return a batch; if reading fails, read utterances one by one and skip unreadable ones."""
        valid, invalid = _partition(cuts, self._errors)
        for augmentations in (self.augmentations, self.augmentations, ()):  # noise may be damaged
            if not valid:
                silence = torch.zeros(1, SILENCE, NUM_MEL_BINS)
                return make_batch(silence, [SILENCE], [], self.text, invalid)
            self.cut_transforms = [*augmentations, self._remember]
            try:
                batch = self._read(CutSet.from_cuts(valid))
            except Exception as error:  # lhotse's storages raise different exceptions
                reason = first_line(error)
            else:
                return make_batch(*batch, self.text, invalid)
            valid, unreadable = _partition(valid, self.read_errors)
            invalid += unreadable or self._noise_errors({cut.id for cut in cuts})
        raise InputError(f"cuts {valid[0].id} … {valid[-1].id} cannot be batched: {reason}")

    def _errors(self, cut: Cut) -> list[CutError]:
        errors = self.check(cut) if self.check else []
        return errors or (header_errors(cut) if self.on_the_fly_feats else [])

    def _remember(self, cuts: CutSet) -> CutSet:
        self.augmented = cuts
        return cuts

    def _noise_errors(self, ids: set[str]) -> list[CutError]:
        """Return the errors in the noise last mixed with the cuts that have these ids."""
        tracks = [track.cut for cut in self.augmented for track in getattr(cut, "tracks", ())]
        noise = [cut for cut in tracks if cut.id not in ids and not isinstance(cut, PaddingCut)]
        return _partition(noise, self.read_errors)[1]

    def _read(self, cuts: CutSet) -> tuple[Tensor, list[int], list[Cut]]:
        """Return augmented features (B, T, 80), their valid frames, and the cut of each row."""
        batch = super().__getitem__(cuts)
        features, supervisions = batch["inputs"], batch["supervisions"]
        if not features.sum().isfinite():
            raise InputError("features are not finite")
        rows, ends = supervisions["sequence_idx"], supervisions["start_frame"].long()
        ends = (ends + supervisions["num_frames"]).clamp(max=features.size(1))
        lens = torch.zeros(len(features), dtype=torch.long).scatter_reduce(0, rows, ends, "amax")
        cut_of = dict(zip(rows.tolist(), supervisions["cut"]))  # concatenated cuts occur repeatedly
        return features, lens.tolist(), [cut_of[row] for row in range(len(features))]


class CachedEncoderDataset(Dataset):
    """Dataset like SpeechDataset, with cached encoder outputs instead of features."""

    def __init__(self, cache: EncoderCache, text: TextOptions = TextOptions()):
        self.cache, self.text = cache, text

    def __getitem__(self, cuts: CutSet) -> dict:
        found, invalid = [], []
        for cut in cuts.sort_by_duration(ascending=False):
            try:
                found.append((*self.cache.read(cut), cut))
            except InputError as error:
                invalid.append(CutError(cut.id, "not-cached", str(error)))
        if not found:
            silence = torch.zeros(1, int(encoder_out_lens(SILENCE)), sum(self.cache.dims))
            return make_batch(silence, [SILENCE], [], self.text, invalid)
        outputs, lens, valid = zip(*found)
        return make_batch(pad_sequence(outputs, batch_first=True), lens, valid, self.text, invalid)


def make_batch(
    features: Tensor,
    feature_lens: Sequence[int],
    cuts: Sequence[Cut],
    text: TextOptions,
    invalid: Sequence[CutError] = (),
) -> dict:
    """Return the batch of `cuts`; without cuts, the batch of silence."""
    texts = [" ".join(part.text for part in cut.supervisions) for cut in cuts] or [""]
    return {
        "features": features,
        "feature_lens": torch.tensor(feature_lens),
        "texts": texts,
        "cut_ids": [cut.id for cut in cuts],
        "seconds": sum(feature_lens) * FRAME_SHIFT if cuts else 0.0,
        "invalid": [*invalid],
        **text(texts, cuts),
    }


def _partition(cuts: Iterable[Cut], errors_of: ErrorsOf) -> tuple[list[Cut], list[CutError]]:
    """Return the valid cuts, and the first error of each invalid cut."""
    valid, invalid = [], []
    for cut in cuts:
        errors = errors_of(cut)
        invalid += errors[:1]
        valid += [] if errors else [cut]
    return valid, invalid


def usable_batches(batches: Iterable[dict], invalid: list[CutError]) -> Iterator[dict]:
    """Yield batches that contain utterances; append the errors of all batches to `invalid`."""
    for batch in batches:
        invalid += batch["invalid"]
        if batch["cut_ids"]:
            yield batch
