"""Batches to transcripts: what the encoders hear, what the LLM writes of it, what to doubt."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.decoding.beam import Candidate, beam_search
from speechllm.decoding.ctc_reader import CtcReader, CtcReading
from speechllm.decoding.draft import Hypothesis, verify_drafts
from speechllm.decoding.guard import doubts, find_loop, variation
from speechllm.decoding.search_options import SearchOptions
from speechllm.decoding.word_times import WordTime, words_with_times
from speechllm.errors import InputError
from speechllm.features import FRAME_SHIFT
from speechllm.model import SpeechLLM
from speechllm.prompt import (
    decode_transcripts,
    encode_contexts,
    encode_transcripts,
    word_log_probs,
)

FALLBACK_BEAM, FALLBACK_CTC_WEIGHT = 4, 0.3
Item, Made = TypeVar("Item"), TypeVar("Made")


@dataclass
class HeardBatch:
    """A batch through the encoders."""

    embeds: Tensor  # prompts, left-padded, (B, L, D)
    mask: Tensor  # (B, L)
    seconds: list[float]
    variations: list[float]  # of the sound, see guard.variation
    readings: list[CtcReading | None]
    ctc_ids: list[list[int] | None]  # their texts, for the LLM


@dataclass
class Recognition:
    """Of one utterance."""

    text: str
    hypothesis: Hypothesis
    ctc_text: str | None = None  # where there is a CTC head
    source: str = "LLM"  # or CTC
    reasons: list[str] = field(default_factory=list)  # to distrust it, or what it replaced
    replaced: str | None = None  # the text that the guard did not believe
    nbest: list[Candidate] = field(default_factory=list)  # of beam search
    words: list[WordTime] | None = None  # where there is a CTC head


class Recognizer:
    """From batches to recognitions; counts the work."""

    def __init__(
        self,
        model: SpeechLLM,
        tokenizer: PreTrainedTokenizerBase,
        reader: CtcReader | None,
        options: SearchOptions,
        device: torch.device,
        dtype: torch.dtype,
    ):
        if not reader:
            for flag, asked in (
                ("--method draft", options.method == "draft"),
                ("--ctc-weight", options.ctc_weight),
                ("--ctc-confident", options.ctc_confident),
                ("--guard fallback", options.guard == "fallback"),
            ):
                if asked:
                    raise InputError(
                        f"{flag}: no encoder has both a CTC head and a BPE model "
                        "(--speech-encoder-bpe-path)"
                    )
        self.model, self.tokenizer, self.reader, self.options = model, tokenizer, reader, options
        self.device, self.dtype = device, dtype
        self.start_counting()

    def start_counting(self) -> None:
        self.counter, self.audio_seconds, self.start = Counter(), 0.0, time.monotonic()
        self.rtfx = 0.0  # audio seconds per second, once counting has stopped

    def stop_counting(
        self, gather: Callable[[tuple], list[tuple]] = lambda mine: [mine]
    ) -> dict[str, float]:
        """For the summary: since `start_counting`, by all processes, the slowest one's time.

        Args:
          gather: from what this process counted to what each of them did.
        """
        mine = time.monotonic() - self.start, self.counter, self.audio_seconds
        all_seconds, counters, audio_seconds = zip(*gather(mine))
        seconds, n = max(all_seconds), sum(counters, Counter())
        self.counter, self.audio_seconds = n, sum(audio_seconds)
        self.rtfx = self.audio_seconds / seconds
        counts = {
            "seconds of decoding": seconds,
            "RTFx (audio seconds per second)": self.rtfx,
            "LLM passes per utterance": n["passes"] / max(1, n["utterances"]),
        }
        if n["drafted"]:
            counts["accepted draft tokens (%)"] = 100 * n["accepted"] / n["drafted"]
        if self.options.ctc_confident or self.options.guard == "fallback":
            counts["utterances taken from CTC"] = n["from CTC"]
        if self.options.guard != "off":
            counts["utterances flagged by the guard"] = n["flagged"]
        return counts

    def __call__(self, batches: Iterable[dict]) -> Iterator[tuple[dict, list[Recognition]]]:
        """Each batch with its recognitions.

        On a GPU the encoders hear one batch ahead of the LLM; CPU cores are busy with either.
        """
        ahead = one_ahead if self.device.type == "cuda" else _one_by_one
        for batch, heard in ahead(self.hear, batches):
            recognitions = self.write(heard)
            for recognition in recognitions:
                self.counter.update({
                    "utterances": 1,
                    "passes": recognition.hypothesis.passes,
                    "drafted": recognition.hypothesis.drafted,
                    "accepted": recognition.hypothesis.accepted,
                    "from CTC": recognition.source == "CTC",
                    "flagged": bool(recognition.reasons),
                })  # fmt: skip
            self.audio_seconds += batch["seconds"]
            yield batch, recognitions

    @torch.no_grad()
    def hear(self, batch: dict) -> HeardBatch:
        """Through encoders and projectors to the LLM's prompt and the CTC head's opinion."""
        with self._autocast():
            features, lens = batch["features"], batch["feature_lens"]
            contexts = encode_contexts(self.tokenizer, self.model.chat, batch.get("contexts"))
            prompt = self.model.prompt(features.to(self.device), lens, contexts)
            readings = self.reader(prompt.heard) if self.reader else [None] * len(lens)
        ids = [None] * len(lens)
        if self.reader:
            ids = encode_transcripts(self.tokenizer, [reading.text for reading in readings])
        return HeardBatch(
            embeds=prompt.embeds,
            mask=prompt.mask,
            seconds=(lens * FRAME_SHIFT).tolist(),
            variations=[variation(features[b, :n]) for b, n in enumerate(lens.tolist())],
            readings=readings,
            ctc_ids=ids,
        )

    @torch.no_grad()
    def read(self, features: Tensor, lens: Tensor) -> list[CtcReading]:
        """What the CTC head alone says, of features (B, T, 80), lens (B,) on the CPU."""
        k = self.reader.encoder
        with self._autocast():
            encoder_out, out_lens = self.model.encoder[k](features.to(self.device), lens)
            return self.reader.read(encoder_out, out_lens)

    @torch.no_grad()
    def write(self, heard: HeardBatch) -> list[Recognition]:
        """The transcripts of a batch."""
        below = self.options.ctc_confident
        from_ctc = [
            b for b, reading in enumerate(heard.readings) if below and reading.entropy < below
        ]
        asked = [b for b in range(len(heard.seconds)) if b not in from_ctc]
        found = self._ask_llm(heard, asked, self.options)
        found |= {b: self._take_ctc(heard, b) for b in from_ctc}
        if self.options.guard == "fallback":
            doubtful = [b for b in asked if found[b].reasons]
            again = replace(
                self.options,
                method="beam",
                beam_size=max(FALLBACK_BEAM, self.options.beam_size),
                ctc_weight=self.options.ctc_weight or FALLBACK_CTC_WEIGHT,
            )
            for b, second in self._ask_llm(heard, doubtful, again).items():
                first, passes = found[b], second.hypothesis.passes
                found[b] = self._take_ctc(heard, b) if second.reasons else second
                found[b].hypothesis = replace(
                    found[b].hypothesis,
                    passes=passes + first.hypothesis.passes,
                    drafted=first.hypothesis.drafted,
                    accepted=first.hypothesis.accepted,
                )
                found[b].reasons, found[b].replaced = first.reasons, first.text
                found[b].nbest = first.nbest
        for b, reading in enumerate(heard.readings):
            if reading and self.options.word_times:
                found[b].words = self._word_times(found[b], reading, heard.seconds[b])
        return [found[b] for b in range(len(heard.seconds))]

    # ---- sources of a text

    def _ask_llm(
        self, heard: HeardBatch, rows: list[int], options: SearchOptions
    ) -> dict[int, Recognition]:
        """Recognitions of some utterances of the batch."""
        if not rows:
            return {}
        prompts = heard.embeds[rows], heard.mask[rows]
        guarded, limit = options.guard != "off", options.max_new_tokens

        def looping(i: int, ids: list[int]) -> bool:
            return guarded and find_loop(ids, heard.ctc_ids[rows[i]]) is not None

        with self._autocast():
            if options.method == "beam":
                found = beam_search(self.model, *prompts, options.beam_size, limit, looping)
            else:
                draft = options.method == "draft"
                drafts = [heard.ctc_ids[b] if draft else None for b in rows]
                found = [
                    [hypothesis]
                    for hypothesis in verify_drafts(
                        self.model, *prompts, drafts, limit, options.accept, looping
                    )
                ]
        return {
            b: self._choose(heard, b, hypotheses, options) for b, hypotheses in zip(rows, found)
        }

    def _choose(
        self, heard: HeardBatch, b: int, hypotheses: list[Hypothesis], options: SearchOptions
    ) -> Recognition:
        """The best of an utterance's hypotheses, without what it repeats, and what to say of it."""
        reading = heard.readings[b]
        loops = [None] * len(hypotheses)
        if options.guard != "off":
            loops = [find_loop(hypothesis.ids, heard.ctc_ids[b]) for hypothesis in hypotheses]
            for hypothesis, keep in zip(hypotheses, loops):
                if keep is not None:
                    del hypothesis.ids[keep:], hypothesis.log_probs[keep:]
        texts = decode_transcripts(self.tokenizer, [h.ids for h in hypotheses])
        ctc = [None] * len(texts)
        if reading and (options.ctc_weight or options.nbest > 1):
            ctc = [reading.log_prob(text) for text in texts]
        candidates = [
            Candidate(text, sum(h.log_probs), len(h.log_probs), by_ctc)
            for text, h, by_ctc in zip(texts, hypotheses, ctc)
        ]
        scores = [one.score(options.ctc_weight) for one in candidates]
        order = sorted(range(len(texts)), key=lambda i: (loops[i] is not None, -scores[i]))
        best, text = hypotheses[order[0]], texts[order[0]]
        ctc_text = reading.text if reading else None
        reasons = []
        if options.guard != "off":
            reasons = self._doubts(heard, b, text, best.log_probs)
            if loops[order[0]] is not None:
                reasons.insert(0, "loop")
        nbest = [candidates[i] for i in order[: options.nbest]] if options.nbest > 1 else []
        return Recognition(text, best, ctc_text, reasons=reasons, nbest=nbest)

    def _take_ctc(self, heard: HeardBatch, b: int) -> Recognition:
        text = heard.readings[b].text
        reasons = self._doubts(heard, b, text, []) if self.options.guard != "off" else []
        hypothesis = Hypothesis(list(heard.ctc_ids[b]))
        return Recognition(text, hypothesis, text, source="CTC", reasons=reasons)

    def _doubts(self, heard: HeardBatch, b: int, text: str, log_probs: list[float]) -> list[str]:
        ctc_text = heard.readings[b].text if heard.readings[b] else None
        return doubts(text, heard.seconds[b], log_probs, ctc_text, heard.variations[b])

    def _word_times(
        self, recognition: Recognition, reading: CtcReading, seconds: float
    ) -> list[WordTime]:
        words = recognition.text.split()
        pieces = [reading.pieces.encode(word) for word in words]
        of_words = None
        if recognition.source == "LLM":
            hypothesis = recognition.hypothesis
            of_words = word_log_probs(self.tokenizer, hypothesis.ids, hypothesis.log_probs)
        lag = self.options.ctc_lag
        return words_with_times(reading.log_probs, seconds, words, pieces, of_words, lag)

    def _autocast(self):
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )


def _one_by_one(function: Callable[[Item], Made], items: Iterable[Item]):
    return ((item, function(item)) for item in items)


def one_ahead(
    function: Callable[[Item], Made], items: Iterable[Item]
) -> Iterator[tuple[Item, Made]]:
    """Each item with what the function makes of it; the next is made while this one is used."""
    remaining = iter(items)

    def make() -> tuple[Item, Made] | None:
        for item in remaining:
            return item, function(item)
        return None

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = thread.submit(make)
        while (made := waiting.result()) is not None:
            waiting = thread.submit(make)
            yield made
