"""Encoding of streams: each frame once with causal encoders, else the open phrase repeatedly."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from speechllm.decoding.recognition import EncodedBatch
from speechllm.decoding.recognizer import Recognizer
from speechllm.models.speech_encoders import EncoderOutput, pad_features
from speechllm.models.zipformer.chunk_encoder import ChunkEncoder
from speechllm.models.zipformer.config import MIN_FEATURE_FRAMES, Chunking
from speechllm.precision import autocast
from speechllm.streaming.phrase import FEATURES_PER_FRAME, OpenPhrase, Phrase


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
        self.window = self.encoders[0].window

    def is_ready(self, phrase: OpenPhrase) -> bool:
        """Return true if a chunk can be encoded."""
        return phrase.pending >= (MIN_FEATURE_FRAMES if phrase.ended else self.window)

    def __call__(self, phrases: list[OpenPhrase]) -> None:
        """Encode one chunk of each phrase."""
        parts = [one.features[one.encoded :][: self.window] for one in phrases]
        features, lens = pad_features(parts)
        features = pad(features, (0, 0, 0, self.window - features.size(1)))
        features, outputs, next_states = features.to(self.recognizer.device), [], []
        for k, encoder in enumerate(self.encoders):
            with autocast(self.recognizer.device, self.recognizer.dtype):
                out, out_lens, states = encoder(features, lens, [one.states[k] for one in phrases])
            outputs.append(out)
            next_states.append(states)
        best = _best_tokens(self.recognizer, outputs)
        for b, (phrase, n) in enumerate(zip(phrases, out_lens.tolist())):
            phrase.states = [states[b] for states in next_states]
            phrase.append([out[b, :n] for out in outputs], best[b, :n])
            phrase.encoded += FEATURES_PER_FRAME * n

    def embed(self, phrases: list[Phrase], contexts: list[str]) -> EncodedBatch:
        """Embed the LLM prompts for phrases, reusing their encoder outputs."""
        lens = torch.tensor([phrase.end - phrase.start for phrase in phrases])
        outputs = [
            EncoderOutput(list(range(len(phrases))), pad_sequence(parts, batch_first=True), lens)
            for parts in zip(*(phrase.outputs for phrase in phrases))
        ]
        batch = pad_features([phrase.features for phrase in phrases])
        return self.recognizer.embed(outputs, *batch, contexts)


class Reencoding:
    """Encodes the whole open phrase after each second; its maximum length limits the cost."""

    window = 100  # feature frames: 1 s
    initial = ()  # no encoder states

    def __init__(self, recognizer: Recognizer):
        self.recognizer = recognizer

    def is_ready(self, phrase: OpenPhrase) -> bool:
        """Return true if there is enough new audio."""
        if phrase.ended and len(phrase.features) >= MIN_FEATURE_FRAMES:
            return phrase.pending > 0
        return phrase.pending >= self.window

    @torch.no_grad()
    def __call__(self, phrases: list[OpenPhrase]) -> None:
        """Encode each phrase from its beginning."""
        recognizer, model = self.recognizer, self.recognizer.model
        for one in phrases:
            one.encoded = min(one.encoded + self.window, len(one.features))
        features, lens = pad_features([one.features[: one.encoded] for one in phrases])
        with autocast(recognizer.device, recognizer.dtype):
            all_encoders = model.all_encoders(len(phrases))
            encoded = model.encode(features.to(recognizer.device), lens, all_encoders)
        outputs = [one.encoder_out for one in encoded]
        best = _best_tokens(recognizer, outputs)
        for b, (phrase, n) in enumerate(zip(phrases, encoded[0].lens.tolist())):
            phrase.outputs, phrase.best = [out[b, :n] for out in outputs], best[b, :n]

    def embed(self, phrases: list[Phrase], contexts: list[str]) -> EncodedBatch:
        """Embed the LLM prompts for phrases, encoded like offline recordings."""
        features, lens = pad_features([phrase.features for phrase in phrases])
        batch = {"features": features, "feature_lens": lens, "contexts": contexts}
        return self.recognizer.encode(batch)


@torch.no_grad()
def _best_tokens(recognizer: Recognizer, outputs: list[Tensor]) -> np.ndarray:
    """Return the most probable CTC token per frame, (B, T)."""
    decoder = recognizer.ctc_decoder
    with autocast(recognizer.device, recognizer.dtype):
        return decoder.ctc_output(outputs[decoder.encoder]).argmax(dim=-1).cpu().numpy()
