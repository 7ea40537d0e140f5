"""A step of a small SpeechLLM, real and as `speechllm.training.size` computes it."""

import torch
from benchmarks.measure import make_llm, random_chat

from speechllm.llm import prepare_llm
from speechllm.model import SpeechLLM
from speechllm.prompt import training_ids
from speechllm.training.size import Batch, Training
from speechllm.zipformer import SIZES, ZipformerEncoder

BATCH = Batch(utterances=4, seconds=8.0, tokens=21)
TRAINED = {"lora": (True, True), "full": (True, False), "projector": (False, False)}


def make_model(trained, dtype=torch.float32, encoders=1, unfreeze_encoder=False, device="cpu"):
    """What of the LLM is trained is a name in TRAINED; the weights are random."""
    unfreeze, use_lora = TRAINED[trained]
    with torch.device(device):
        llm = make_llm("tiny", torch.float32 if trained == "full" else dtype, device)
        llm = prepare_llm(llm, unfreeze, use_lora)
        ears = [ZipformerEncoder(SIZES["tiny"]) for _ in range(encoders)]
        if not unfreeze_encoder:
            ears = [encoder.freeze(dtype) for encoder in ears]
        return SpeechLLM(ears, llm, random_chat("tiny")).train()


def predicted(trained, dtype=torch.float32, checkpointing=False, **model):
    return Training(make_model(trained, dtype, **model, device="meta"), BATCH, dtype, checkpointing)


def loss(model, dtype=torch.float32):
    n = len(model.encoder)
    transcripts = [[11] * (BATCH.tokens - 1)] * BATCH.utterances
    ids, labels = training_ids(model.chat, transcripts, [n] * BATCH.utterances)
    features = torch.randn(BATCH.utterances, BATCH.frames, 80)
    lens = torch.full(features.shape[:1], BATCH.frames)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(features, lens, ids, labels, model.all_encoders(BATCH.utterances))["loss"]
