"""CTC drafts for vLLM's speculative decoding: the same tokens with fewer forward passes.

    --speculative-config '{"method": "custom_class", "num_speculative_tokens": 16,
                           "model": "speechllm.vllm.CtcDraftProposer"}'

vLLM verifies each proposal, so a missing or outdated draft only costs speed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from speechllm.decoding.ctc_decoder import find_ctc_decoder
from speechllm.decoding.draft_proposals import Draft
from speechllm.errors import InputError
from speechllm.models.prompt import encode_transcripts
from speechllm.models.speech_encoders import EncoderOutput
from speechllm.vllm.exported import chat_template, exported_config, split_request

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MAX_DRAFTS = 4096  # the oldest are dropped


class CtcDraftProposer:
    """Proposes the rest of the CTC text for a request's audio, like `speculative_decode`.

    vLLM passes only token ids; the draft is found by the hash that the processor writes in place of
    the first speech embeddings.
    """

    def __init__(self, vllm_config: "VllmConfig"):
        from vllm.tokenizers import cached_tokenizer_from_config

        model_config = vllm_config.model_config
        self.config = exported_config(model_config.model)
        self.tokenizer = cached_tokenizer_from_config(model_config)
        self.chat = chat_template(model_config.model, self.tokenizer)
        self.max_tokens = vllm_config.speculative_config.num_speculative_tokens
        self.max_length = model_config.max_model_len
        self.drafts: dict[tuple[int, ...], tuple[list[int], Draft, int]] = {}

    def load_model(self, model: nn.Module) -> None:
        """Start collecting drafts for the batches encoded by `model`.

        Raises:
          InputError: the model has no CTC head with a BPE model.
        """
        self.ctc_decoder = find_ctc_decoder(model.speech, self.config.bpe_paths)
        if self.ctc_decoder is None:
            raise InputError("CTC drafts need an encoder with a CTC head and a bpe.model")
        model.on_encoded = self.add

    def add(self, keys: Sequence[Tensor], outputs: list[EncoderOutput]) -> None:
        """Store the drafts for an encoded batch by the keys of its utterances."""
        _, encoder_out, lens = outputs[self.ctc_decoder.encoder]
        texts = [output.text for output in self.ctc_decoder(encoder_out, lens)]
        sizes = (lens // self.config.encoder_projector_ds_rate).tolist()
        for key, size, ids in zip(keys, sizes, encode_transcripts(self.tokenizer, texts)):
            ids = [*ids, self.chat.end]
            self.drafts[tuple(key.tolist()[:size])] = ids, Draft(ids), 0
        for oldest in [*self.drafts][:-MAX_DRAFTS]:
            del self.drafts[oldest]

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings=None,
    ) -> list[list[int]]:
        """Return draft tokens for each request in the batch.

        Args:
          sampled_token_ids: new tokens per request; empty for an incomplete prompt.
          num_tokens_no_spec: (R,), number of tokens in prompt and answer.
          token_ids_cpu: (R, L), these tokens.
        """
        return [
            self._proposal(token_ids_cpu[row, : num_tokens_no_spec[row]].tolist()) if new else []
            for row, new in enumerate(sampled_token_ids)
        ]

    def _proposal(self, ids: list[int]) -> list[int]:
        key, answer = split_request(self.chat, self.tokenizer, ids)
        if key not in self.drafts:
            return []
        tokens, draft, length = self.drafts[key]
        if length > len(answer):  # from an earlier request with the same audio
            draft, length = Draft(tokens), 0
        for token in answer[length:]:
            draft.advance(token)
        self.drafts[key] = tokens, draft, len(answer)
        return draft.remaining[: min(self.max_tokens, self.max_length - len(ids) - 1)]
