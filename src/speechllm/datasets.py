"""Cuts to a batch, whichever process makes it.

A batch is a dict:

    features      (B, T, 80) float32, padded; B utterances, T frames of 10 ms
    feature_lens  (B,) int64, valid frames
    texts         B transcripts as they are in the cut files
    contexts      B texts for the prompt, empty where there is none; only with `use_context`
    ids           B cut ids; a cut joined by --concatenate-cuts has a new one
    seconds       audio in the batch, without padding
    bad           faults of the utterances left out, and of noise: what is broken shows when read

With an encoder cache, `features` are the outputs of all encoders, (B, T / 4, C).

A batch of which all utterances are bad is a second of silence with the text "", and no `ids`: the
ranks stay in step, and it must not count. `with_speech` leaves such batches out.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from lhotse import CutSet
from lhotse.cut import Cut, PaddingCut
from lhotse.dataset import K2SpeechRecognitionDataset, OnTheFlyFeatures, PrecomputedFeatures
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from speechllm.cut_faults import Fault, header_faults, reading_faults
from speechllm.cut_files import context_of
from speechllm.encoder_cache import EncoderCache
from speechllm.errors import InputError, first_line
from speechllm.features import FRAME_SHIFT, NUM_MEL_BINS, fbank_extractor
from speechllm.zipformer.encoder import encoder_out_lens

SILENCE = 100  # frames


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
