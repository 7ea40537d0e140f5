"""A small model, and naive searches that recompute everything for each token."""

import torch

from speechllm.models.llm import load_llm, prepare_llm
from speechllm.models.prompt import build_chat_template
from speechllm.models.speech_llm import SpeechLLM
from speechllm.models.zipformer.checkpoint import load_encoder

LENS = torch.tensor([160, 61, 122])
LENGTH = 8  # most tokens of a hypothesis here


def make_model(llm_dir, encoder_dir, encoder_size, n):
    encoders = [load_encoder(encoder_dir / f"{name}.pt", encoder_size) for name in "ab"[:n]]
    llm, tokenizer = load_llm(str(llm_dir))
    torch.manual_seed(0)
    llm = prepare_llm(llm, unfreeze=True, use_lora=True)
    model = SpeechLLM([e.freeze() for e in encoders], llm, build_chat_template(tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "projector" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def log_probs(model, prompt, answers):
    """Return the log-probabilities of the next token after N answers of one length: (N, V)."""
    answers = model.llm.get_input_embeddings()(torch.tensor(answers, dtype=torch.long))
    embeds = torch.cat([prompt.expand(len(answers), -1, -1), answers], dim=1)
    return model.llm(inputs_embeds=embeds, use_cache=False).logits[:, -1].log_softmax(dim=-1)


def naive_beam(model, prompt, size, length):
    """The best hypothesis, where none comes to an end before `length` tokens; 1 is greedy."""
    hypotheses, scores = [[]], torch.zeros(1)
    for _ in range(length):
        scores = scores[:, None] + log_probs(model, prompt, hypotheses)
        vocabulary = scores.size(1)
        scores, best = scores.flatten().topk(size)
        hypotheses = [[*hypotheses[i // vocabulary], i % vocabulary] for i in best.tolist()]
        assert not any(ids[-1] in (model.chat.end, model.chat.pad) for ids in hypotheses)
    return hypotheses[0]
