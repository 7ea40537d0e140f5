"""Recognizer: encoders, search, choice among hypotheses, flags and word times for batches."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.audio.fbank import FRAME_SHIFT
from speechllm.data.length_limits import LLMPositions, TooManyPositions, frames_needed
from speechllm.decoding.beam import beam_search, score_hypotheses
from speechllm.decoding.config import SearchConfig
from speechllm.decoding.correction import Correction, correct
from speechllm.decoding.ctc_decoder import CtcDecoder, CtcOutput
from speechllm.decoding.draft_proposals import DraftPolicy, forward_cost
from speechllm.decoding.hallucination import (
    find_repetition,
    hallucination_flags,
    spectral_variations,
)
from speechllm.decoding.hotwords import Hotwords, Spotted, read_hotwords, spot_hotwords
from speechllm.decoding.hypothesis import Hypothesis
from speechllm.decoding.prefix_tree import PrefixTree
from speechllm.decoding.recognition import EncodedBatch, Recognition
from speechllm.decoding.speculative import speculative_decode
from speechllm.decoding.word_times import align_words, time_words
from speechllm.errors import InputError
from speechllm.models.prompt import (
    decode_transcripts,
    encode_contexts,
    encode_transcripts,
    word_log_probs,
)
from speechllm.models.speech_encoders import EncoderOutput, to_device
from speechllm.models.speech_llm import SpeechLLM
from speechllm.precision import autocast

FALLBACK_BEAM, FALLBACK_CTC_WEIGHT = 4, 0.3
NEEDS_CTC = "{}: no encoder has both a CTC head and a BPE model (--speech-encoder-bpe-path)"
Item = TypeVar("Item")


class Recognizer:
    """Recognizes batches with one search configuration, and collects decoding statistics.

    Attributes:
      min_frames: minimum feature frames per utterance.
      too_many_positions: check for cuts that exceed the LLM's positions.
    """

    def __init__(
        self,
        model: SpeechLLM,
        tokenizer: PreTrainedTokenizerBase,
        ctc_decoder: CtcDecoder | None,
        search: SearchConfig,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """Initialize with a resolved search.

        Raises:
          InputError: the search needs a CTC head and there is none, or hotwords are invalid.
        """
        if not ctc_decoder and search.ctc_options:
            raise InputError(NEEDS_CTC.format(search.ctc_options[0]))
        self.model, self.tokenizer, self.ctc_decoder = model, tokenizer, ctc_decoder
        self.search, self.device, self.dtype = search, device, dtype
        phrases = [*(read_hotwords(search.hotwords) if search.hotwords else ()), *search.hotword]
        self.hotwords = self.tokenize_hotwords(phrases)
        self.min_frames = frames_needed(model.ds_rate)
        positions = LLMPositions(tokenizer, model.chat, len(model.encoder), model.ds_rate)
        limit = model.llm.config.max_position_embeddings
        self.too_many_positions = TooManyPositions(positions, limit, search.max_new_tokens)
        self.draft_policy = DraftPolicy(search.forward_cost or forward_cost(model.base_llm))
        self.start_counting()

    def tokenize_hotwords(self, phrases: Sequence[str]) -> Hotwords | None:
        """Return phrases in the form of a batch's `hotwords` entry; None without phrases.

        Raises:
          InputError: a phrase cannot be tokenized, or neither a CTC head nor a beam can use it.
        """
        if not phrases:
            return None
        if not self.ctc_decoder and self.search.method != "beam":
            raise InputError(NEEDS_CTC.format("hotwords without --method beam"))
        bpe = self.ctc_decoder and self.ctc_decoder.tokenizer
        return Hotwords(map(self.model.chat.spelled, phrases), self.tokenizer, bpe)

    def start_counting(self) -> None:
        """Reset the counters and the clock."""
        self.counter, self.audio_seconds, self.start = Counter(), 0.0, time.monotonic()
        self.rtfx = 0.0  # audio seconds per second, set by stop_counting

    def stop_counting(
        self, gather: Callable[[tuple], list[tuple]] = lambda mine: [mine]
    ) -> dict[str, float]:
        """Return statistics since `start_counting`, collected from all processes by `gather`."""
        mine = time.monotonic() - self.start, self.counter, self.audio_seconds
        all_seconds, counters, audio_seconds = zip(*gather(mine))
        seconds, n = max(all_seconds), sum(counters, Counter())  # of the slowest process
        self.counter, self.audio_seconds = n, sum(audio_seconds)
        self.rtfx = self.audio_seconds / seconds
        counts = {
            "seconds of decoding": seconds,
            "RTFx (audio seconds per second)": self.rtfx,
            "LLM forward passes per utterance": n["passes"] / max(1, n["utterances"]),
        }
        if n["drafted"]:
            counts["accepted draft tokens (%)"] = 100 * n["accepted"] / n["drafted"]
        if self.search.ctc_bypass_entropy or self.search.guard == "fallback":
            counts["utterances taken from CTC"] = n["from CTC"]
        if self.search.guard != "off":
            counts["utterances flagged by the guard"] = n["flagged"]
        return counts

    def __call__(self, batches: Iterable[dict]) -> Iterator[tuple[dict, list[Recognition]]]:
        """Yield each batch with its recognitions.

        On a GPU, the encoders run one batch ahead of the LLM. On a CPU, each uses all cores anyway.
        """
        encoded_batches = ((batch, self.encode(batch)) for batch in batches)
        if self.device.type == "cuda":
            encoded_batches = one_ahead(encoded_batches)
        for batch, encoded in encoded_batches:
            recognitions = self.decode(encoded)
            for one in recognitions:
                work = one.hypothesis
                self.counter.update(
                    {"utterances": 1, "from CTC": one.source == "CTC", "flagged": bool(one.flags),
                     "passes": work.passes, "drafted": work.drafted, "accepted": work.accepted}
                )  # fmt: skip
            self.audio_seconds += batch["seconds"]
            yield batch, recognitions

    @torch.no_grad()
    def encode(self, batch: dict) -> EncodedBatch:
        """Run the encoders, the projectors and the CTC head on a batch."""
        features, lens = batch["features"], batch["feature_lens"]
        with autocast(self.device, self.dtype):
            all_encoders = self.model.all_encoders(len(lens))
            outputs = self.model.encode(to_device(self.device, features), lens, all_encoders)
        return self.embed(outputs, features, lens, batch.get("contexts"), batch.get("hotwords"))

    @torch.no_grad()
    def embed(
        self,
        outputs: list[EncoderOutput],
        features: Tensor,
        lens: Tensor,
        contexts: list[str] | None = None,
        hotwords: list[Hotwords | None] | None = None,
    ) -> EncodedBatch:
        """Run the projectors and the CTC head on the outputs of all encoders.

        Args:
          features: (B, T, 80), from which the outputs were computed; lens: (B,), on the CPU.
        """
        ctc, ctc_ids = [None] * len(lens), [None] * len(lens)
        with autocast(self.device, self.dtype):
            context_ids = encode_contexts(self.tokenizer, self.model.chat, contexts)
            prompt = self.model.embed_prompts(outputs, context_ids)
            if self.ctc_decoder:
                _, *encoder_output = outputs[self.ctc_decoder.encoder]
                ctc = self.ctc_decoder(*encoder_output)
                ctc_ids = encode_transcripts(self.tokenizer, [output.text for output in ctc])
        seconds = (lens * FRAME_SHIFT).tolist()
        variations = spectral_variations(features, lens)
        selected = self._hotwords(ctc, hotwords or [None] * len(lens))
        return EncodedBatch(
            prompt.embeds, prompt.mask, seconds, variations, ctc, ctc_ids, *selected
        )

    def _hotwords(
        self, ctc: list[CtcOutput | None], lists: list[Hotwords | None]
    ) -> tuple[list[list[Spotted]], list[PrefixTree | None]]:
        """Return the spotted hotwords and the prefix tree for each utterance.

        Args:
          lists: hotwords per utterance; None for the search's hotwords.
        """
        spotted, lists = [[] for _ in ctc], [one or self.hotwords for one in lists]
        if self.ctc_decoder and any(lists):
            spotted = spot_hotwords(ctc, lists)
            lists = [[one.hotword for one in found] for found in spotted]
        else:
            lists = [entries.entries if entries else [] for entries in lists]
        bonus = self.search.hotword_score
        trees = [PrefixTree((ids for one in found for ids in one.tokens), bonus) for found in lists]
        return spotted, [tree if tree.root.children else None for tree in trees]

    @torch.no_grad()
    def decode_ctc(self, features: Tensor, lens: Tensor) -> list[CtcOutput]:
        """Return CTC outputs without LLM prompts; features (B, T, 80), lens (B,) on the CPU."""
        encoder = self.model.encoder[self.ctc_decoder.encoder]
        with autocast(self.device, self.dtype):
            return self.ctc_decoder(*encoder(features.to(self.device), lens))

    @torch.no_grad()
    def decode(self, encoded: EncodedBatch) -> list[Recognition]:
        """Return the recognitions for an encoded batch."""
        limit, rows = self.search.ctc_bypass_entropy, range(len(encoded.seconds))
        bypassed = [b for b in rows if limit and encoded.ctc[b].entropy < limit]
        searched = [b for b in rows if b not in bypassed]
        found = self._search(encoded, searched, self.search)
        found |= {b: self._use_ctc(encoded, b) for b in bypassed}
        if self.search.guard == "fallback":
            self._replace_flagged(encoded, found, [b for b in searched if found[b].flags])
        if self.search.word_timestamps and self.ctc_decoder:
            self._add_word_times(encoded, [found[b] for b in rows])
        return [found[b] for b in rows]

    # ---- sources of texts

    def _search(
        self, encoded: EncodedBatch, rows: list[int], search: SearchConfig
    ) -> dict[int, Recognition]:
        if not rows:
            return {}
        prompts, limit = self._prompts(encoded, rows), search.max_new_tokens

        def is_repetition(i: int, ids: list[int]) -> bool:
            ctc_ids = encoded.ctc_ids[rows[i]]
            return search.guard != "off" and find_repetition(ids, ctc_ids) is not None

        with autocast(self.device, self.dtype):
            if search.method == "beam":
                trees = [encoded.trees[b] for b in rows]
                options = search.beam_size, limit, is_repetition, trees
                found = beam_search(self.model, *prompts, *options)
            else:
                drafts = [encoded.ctc_ids[b] if search.method == "draft" else None for b in rows]
                options = drafts, limit, search.draft_accept_prob, is_repetition, self.draft_policy
                found = [[one] for one in speculative_decode(self.model, *prompts, *options)]
        repetitions = [
            [search.guard != "off" and _cut_repetition(one, encoded.ctc_ids[b]) for one in some]
            for b, some in zip(rows, found)
        ]
        hypotheses = list(chain(*found))
        texts = decode_transcripts(self.tokenizer, [one.ids for one in hypotheses])
        for one, text in zip(hypotheses, texts):
            one.text = text
        recognitions = {
            b: self._choose(encoded, b, some, are_cut, search)
            for b, some, are_cut in zip(rows, found, repetitions)
        }
        self._correct(encoded, recognitions)
        return recognitions

    def _prompts(self, encoded: EncodedBatch, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return embeddings and mask for some utterances in the batch."""
        return encoded.embeds[to_device(self.device, torch.tensor(rows))], encoded.mask[rows]

    def _correct(self, encoded: EncodedBatch, found: dict[int, Recognition]) -> None:
        rows = [b for b in found if encoded.spotted[b] and "repetition" not in found[b].flags]
        corrections = [
            Correction(found[b].hypothesis, encoded.ctc[b], encoded.spotted[b], encoded.trees[b])
            for b in rows
        ]

        def score(indices: list[int], texts: list[str]) -> list[Hypothesis]:
            utterances, ids = [rows[i] for i in indices], encode_transcripts(self.tokenizer, texts)
            prompts = self._prompts(encoded, utterances)
            with autocast(self.device, self.dtype):
                scored = score_hypotheses(self.model, *prompts, ids, self.search.max_new_tokens)
            return [replace(one, text=text) for one, text in zip(scored, texts)]

        correct(corrections, score)
        for b in rows:  # flags are not updated: the LLM gives corrected texts a low probability
            found[b].text = found[b].hypothesis.text

    def _choose(
        self,
        encoded: EncodedBatch,
        b: int,
        hypotheses: list[Hypothesis],
        is_repetition: list[bool],
        search: SearchConfig,
    ) -> Recognition:
        """Return an utterance's best hypothesis, with its flags."""
        ctc = encoded.ctc[b]
        if ctc and (search.ctc_weight or search.nbest > 1):
            for one in hypotheses:
                one.ctc_log_prob = ctc.log_prob(one.text)
        scores = [one.score(search.ctc_weight) for one in hypotheses]
        order = sorted(range(len(scores)), key=lambda i: (is_repetition[i], -scores[i]))
        best = hypotheses[order[0]]
        flags = self._flags(encoded, b, best.text, best.log_probs)
        return Recognition(
            best.text,
            best,
            ctc.text if ctc else None,
            flags=["repetition", *flags] if is_repetition[order[0]] else flags,
            nbest=[hypotheses[i] for i in order[: search.nbest]] if search.nbest > 1 else [],
        )

    def _use_ctc(self, encoded: EncodedBatch, b: int) -> Recognition:
        text, hypothesis = encoded.ctc[b].text, Hypothesis(list(encoded.ctc_ids[b]))
        return Recognition(text, hypothesis, text, "CTC", self._flags(encoded, b, text, []))

    def _replace_flagged(
        self, encoded: EncodedBatch, found: dict[int, Recognition], flagged: list[int]
    ) -> None:
        """Decode flagged utterances again with beam search and CTC, or use the CTC text."""
        search = replace(
            self.search,
            method="beam",
            draft_accept_prob=1.0,  # a beam has no draft
            beam_size=max(FALLBACK_BEAM, self.search.beam_size),
            ctc_weight=self.search.ctc_weight or FALLBACK_CTC_WEIGHT,
        )
        for b, second in self._search(encoded, flagged, search).items():
            first, used = found[b], self._use_ctc(encoded, b) if second.flags else second
            used.flags, used.replaced_text, used.nbest = first.flags, first.text, first.nbest
            work = used.hypothesis
            work.passes = second.hypothesis.passes + first.hypothesis.passes
            work.drafted, work.accepted = first.hypothesis.drafted, first.hypothesis.accepted
            found[b] = used

    def _flags(self, encoded: EncodedBatch, b: int, text: str, log_probs: list[float]) -> list[str]:
        if self.search.guard == "off":
            return []
        ctc_text = encoded.ctc[b].text if encoded.ctc[b] else None
        return hallucination_flags(
            text, encoded.seconds[b], log_probs, ctc_text, encoded.spectral_variations[b]
        )

    def _add_word_times(self, encoded: EncodedBatch, found: list[Recognition]) -> None:
        words = [one.text.split() for one in found]
        all_pieces = iter(self.ctc_decoder.tokenizer.encode_words([*chain(*words)]))
        pieces = [list(islice(all_pieces, len(some))) for some in words]
        spans = align_words([ctc.log_probs for ctc in encoded.ctc], pieces)
        for b, one in enumerate(found):
            log_probs, hypothesis = None, one.hypothesis
            if one.source == "LLM":
                log_probs = word_log_probs(self.tokenizer, hypothesis.ids, hypothesis.log_probs)
            options = log_probs, self.search.ctc_lag
            one.words = time_words(spans[b], encoded.seconds[b], words[b], *options)


def _cut_repetition(hypothesis: Hypothesis, ctc_ids: list[int] | None) -> bool:
    """Remove a repetition at the end of a hypothesis; return true if there is one."""
    keep = find_repetition(hypothesis.ids, ctc_ids)
    if keep is not None:
        del hypothesis.ids[keep:], hypothesis.log_probs[keep:]
    return keep is not None


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, computing the next item while the current one is used."""
    remaining = iter(items)
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(next, remaining, None)
        while (item := future.result()) is not None:
            future = thread.submit(next, remaining, None)
            yield item
