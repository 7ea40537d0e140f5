"""The published computation of a training step, and its comparison with ours.

Every utterance goes through every encoder in float32; logits of the whole vocabulary at every
position; loss and accuracy from all of them, copied to the CPU at once. Both use our encoders.
"""

import torch
from peft.tuners import lora
from torch import Tensor
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from speechllm.models.lora import QWEN_ROTARY, FusedRMSNorm, LoraLinear, LoraMLP, apply_rotary
from speechllm.models.prompt import IGNORED, training_ids
from speechllm.models.speech_llm import SpeechLLM
from speechllm.precision import autocast


def published_loss(model: SpeechLLM, batch: dict, used: list[list[int]]) -> Tensor:
    """Return the mean loss per label, computed as published."""
    features, lens = batch["features"], batch["feature_lens"]
    ids, labels = training_ids(model.chat, batch["transcripts"], [len(group) for group in used])
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        outputs = [encoder(features, lens) for encoder in model.encoder]
    projected = [projector(out) for projector, (out, _) in zip(model.encoder_projector, outputs)]
    speech = [
        [projected[k][b, : outputs[k][1][b] // model.ds_rate] for k in group]
        for b, group in enumerate(used)
    ]
    embeds, mask, labels = model.merge(ids, labels, speech)
    mask, labels = mask.to(features.device), labels.to(features.device)
    output = model.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    predicted = output.logits.argmax(dim=-1)[:, :-1]
    ((predicted == labels[:, 1:]) & (labels[:, 1:] != IGNORED)).sum().item()
    return output.loss


def our_loss(model: SpeechLLM, batch: dict, used: list[list[int]]) -> Tensor:
    """Return the mean loss per label, as train.py computes it."""
    ids, labels = training_ids(model.chat, batch["transcripts"], [len(group) for group in used])
    sums = model(batch["features"], batch["feature_lens"], ids, labels, used)
    return sums["loss"] / (labels != IGNORED).sum().item()


OUR_CLASSES = {LoraLinear: lora.Linear, LoraMLP: Qwen2MLP, FusedRMSNorm: Qwen2RMSNorm}
LOSSES = {"published": published_loss, "ours": our_loss}


def step_loss(name: str, model: SpeechLLM, batch: dict, used: list, dtype: torch.dtype) -> Tensor:
    """Compute the loss by name, with peft's LoRA layers or ours."""
    for module in model.modules():
        for classes in OUR_CLASSES.items():
            if type(module) in classes:
                module.__class__ = classes[name == "published"]
    rotary = QWEN_ROTARY if name == "published" else apply_rotary
    modeling_qwen2.apply_rotary_pos_emb = rotary
    with autocast(batch["features"].device, dtype):
        return LOSSES[name](model, batch, used)


def check_equal(model: SpeechLLM, batch: dict, dtype: torch.dtype) -> None:
    """Compare loss and gradients of both computations, without dropout.

    Raises:
      SystemExit: in float32 they differ by more than rounding.
    """
    used = model.all_encoders(len(batch["feature_lens"]))
    model.eval()
    losses, gradients = [], []
    for name in LOSSES:
        model.zero_grad(set_to_none=True)
        losses.append(step_loss(name, model, batch, used, dtype))
        losses[-1].backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    error = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    difference = abs(losses[0] - losses[1]).item()
    if dtype == torch.float32 and max(difference, error) > 1e-4:
        raise SystemExit(f"loss differs by {difference:.1e}, gradients differ by {error:.1e}")
    model.zero_grad(set_to_none=True)
