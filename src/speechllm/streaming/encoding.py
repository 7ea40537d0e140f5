"""Encoding of streams: each frame once with causal encoders, else the open phrase repeatedly."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from speechllm.decoding.recognition import EncodedBatch
from speechllm.decoding.recognizer import Recognizer
from speechllm.models.speech_encoders import EncoderOutput
from speechllm.models.zipformer.chunk_encoder import ChunkEncoder, StreamState
from speechllm.models.zipformer.config import MIN_FEATURE_FRAMES, Chunking
from speechllm.precision import autocast
from speechllm.streaming.phrase import FEATURES_PER_FRAME, OpenPhrase, Phrase


class EncodedStream:
    """The open phrase of a stream and the state of its encoders.

    Attributes:
      encoded: number of encoded features in the open phrase.
      states: state of each causal encoder.
      ended: true if no more features will follow.
    """

    def __init__(self, states: list[StreamState]):
        self.phrase = OpenPhrase()
        self.states = states
        self.encoded = 0
        self.ended = False

    def cut(self, first: int, end: int) -> Phrase:
        """Remove frames and return a phrase; see `OpenPhrase.cut`."""
        self.encoded -= FEATURES_PER_FRAME * end
        return self.phrase.cut(first, end)

    @property
    def pending(self) -> int:
        """Number of features not yet encoded."""
        return len(self.phrase.features) - self.encoded


class CausalEncoding:
    """Encodes streams chunk by chunk; the LLM uses this encoder output."""

    def __init__(self, recognizer: Recognizer, chunking: Chunking):
        """
        Raises:
          InputError: the encoders do not support the chunking.
        """
        self.recognizer = recognizer
        self.encoders = [ChunkEncoder(encoder, chunking) for encoder in recognizer.model.encoder]
        with autocast(recognizer.device, recognizer.dtype):
            self.initial = [encoder.initial_state() for encoder in self.encoders]
        self.window, self.advance = self.encoders[0].window, self.encoders[0].advance

    def open(self) -> EncodedStream:
        """Return a stream without audio."""
        return EncodedStream(self.initial)

    def is_ready(self, stream: EncodedStream) -> bool:
        """Return true if a chunk can be encoded."""
        return stream.pending >= (MIN_FEATURE_FRAMES if stream.ended else self.window)

    def __call__(self, streams: list[EncodedStream]) -> None:
        """Encode one chunk of each stream."""
        parts = [one.phrase.features[one.encoded :][: self.window] for one in streams]
        lens = torch.tensor([len(part) for part in parts])
        features = pad_sequence(parts, batch_first=True)
        features = pad(features, (0, 0, 0, self.window - features.size(1)))
        features, outputs, next_states = features.to(self.recognizer.device), [], []
        for k, encoder in enumerate(self.encoders):
            with autocast(self.recognizer.device, self.recognizer.dtype):
                out, out_lens, states = encoder(features, lens, [one.states[k] for one in streams])
            outputs.append(out)
            next_states.append(states)
        best = _best_tokens(self.recognizer, outputs)
        for b, (stream, n) in enumerate(zip(streams, out_lens.tolist())):
            stream.states = [states[b] for states in next_states]
            stream.phrase.append([out[b, :n] for out in outputs], best[b, :n])
            stream.encoded += FEATURES_PER_FRAME * n

    def embed(self, phrases: list[Phrase], contexts: list[str]) -> EncodedBatch:
        """Embed the LLM prompts for phrases, reusing their encoder outputs."""
        lens = torch.tensor([phrase.end - phrase.start for phrase in phrases])
        outputs = [
            EncoderOutput(list(range(len(phrases))), pad_sequence(parts, batch_first=True), lens)
            for parts in zip(*(phrase.outputs for phrase in phrases))
        ]
        return self.recognizer.embed(outputs, *_collate(phrases), contexts)


class Reencoding:
    """Encodes the whole open phrase after each second; its maximum length limits the cost."""

    window = 100  # feature frames: 1 s

    def __init__(self, recognizer: Recognizer):
        self.recognizer = recognizer

    def open(self) -> EncodedStream:
        """Return a stream without audio."""
        return EncodedStream([])

    def is_ready(self, stream: EncodedStream) -> bool:
        """Return true if there is enough new audio."""
        if stream.ended and len(stream.phrase.features) >= MIN_FEATURE_FRAMES:
            return stream.pending > 0
        return stream.pending >= self.window

    @torch.no_grad()
    def __call__(self, streams: list[EncodedStream]) -> None:
        """Encode the whole open phrase of each stream."""
        recognizer, model = self.recognizer, self.recognizer.model
        for one in streams:
            one.encoded = min(one.encoded + self.window, len(one.phrase.features))
        parts = [one.phrase.features[: one.encoded] for one in streams]
        features = pad_sequence(parts, batch_first=True)
        lens = torch.tensor([one.encoded for one in streams])
        with autocast(recognizer.device, recognizer.dtype):
            all_encoders = model.all_encoders(len(streams))
            encoded = model.encode(features.to(recognizer.device), lens, all_encoders)
        outputs = [one.encoder_out for one in encoded]
        best = _best_tokens(recognizer, outputs)
        for b, (stream, n) in enumerate(zip(streams, encoded[0].lens.tolist())):
            stream.phrase.outputs, stream.phrase.best = [out[b, :n] for out in outputs], best[b, :n]

    def embed(self, phrases: list[Phrase], contexts: list[str]) -> EncodedBatch:
        """Embed the LLM prompts for phrases, encoded like offline recordings."""
        features, lens = _collate(phrases)
        batch = {"features": features, "feature_lens": lens, "contexts": contexts}
        return self.recognizer.encode(batch)


@torch.no_grad()
def _best_tokens(recognizer: Recognizer, outputs: list[Tensor]) -> np.ndarray:
    """Return the most probable CTC token per frame, (B, T)."""
    decoder = recognizer.ctc_decoder
    with autocast(recognizer.device, recognizer.dtype):
        return decoder.ctc_output(outputs[decoder.encoder]).argmax(dim=-1).cpu().numpy()


def _collate(phrases: list[Phrase]) -> tuple[Tensor, Tensor]:
    features = [phrase.features for phrase in phrases]
    lens = torch.tensor([len(one) for one in features])
    return pad_sequence(features, batch_first=True), lens
