"""Qwen, Llama, Mistral and Gemma: a training step, decoding as transformers', export, loading."""

import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file

from speechllm.decoding.beam import beam_search
from speechllm.decoding.speculative import speculative_decode
from speechllm.models.build import build_model
from speechllm.models.config import ModelConfig, load_model_config
from speechllm.models.export import PROJECTOR, write_model
from speechllm.models.prompt import training_ids
from speechllm.models.state_dict import load_trainable_state

COMMON = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "Qwen2": ("Qwen2", dict(tie_word_embeddings=False)),
    "Qwen3": ("Qwen3", dict(head_dim=8, tie_word_embeddings=False)),
    "Qwen3-tied": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "Llama": ("Llama", dict(tie_word_embeddings=False)),
    "Mistral": ("Mistral", dict(sliding_window=8)),
    "Gemma2": ("Gemma2", dict(head_dim=8, sliding_window=8)),
    "Gemma3": ("Gemma3", dict(head_dim=8, sliding_window=8)),
}
LENS = torch.tensor([160, 61, 122])
TEXTS = [[10, 11, 12, 13], [20], [30, 31]]


def tiny_llm(family, vocab_size):
    """Return an untrained LLM with weights that are not near zero."""
    name, options = FAMILIES[family]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")
    torch.manual_seed(0)
    config = config(**COMMON | options, vocab_size=vocab_size)
    llm = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return llm.eval()


QUICK = ("Qwen2", "Gemma3")  # in a fast run, too


@pytest.fixture(
    params=[pytest.param(one, marks=[pytest.mark.slow] * (one not in QUICK)) for one in FAMILIES]
)
def built(request, tiny_tokenizer, tiny_encoder_dir, encoder_size, tmp_path):
    """A model whose LLM has no spare embedding rows, its tokenizer and configuration."""
    llm_dir = tmp_path / "llm"
    tiny_llm(request.param, len(tiny_tokenizer)).save_pretrained(llm_dir)
    tiny_tokenizer.save_pretrained(llm_dir)
    config = ModelConfig(
        llm_path=str(llm_dir),
        speech_encoder_type=encoder_size,
        speech_encoder_path=str(tiny_encoder_dir / "a.pt"),
        speech_encoder_bpe_path=str(tiny_encoder_dir / "bpe.model"),
    )
    torch.manual_seed(1)
    model, tokenizer = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), tokenizer, config


def features():
    return torch.randn(3, 160, 80, generator=torch.Generator().manual_seed(2))


def greedy(model, drafts=(None, None, None)):
    embeds, mask, _ = model.prompt(features(), LENS)
    found = speculative_decode(model, embeds, mask, drafts, max_new_tokens=8)
    return [hypothesis.ids for hypothesis in found]


def generated(model, **options):
    embeds, mask, _ = model.prompt(features(), LENS)
    config = transformers.GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=[*model.chat.ends],
        pad_token_id=model.chat.pad, **options,
    )  # fmt: skip
    rows = model.llm.generate(
        inputs_embeds=embeds, attention_mask=mask.long(), generation_config=config
    )
    return [[i for i in row if i not in model.chat.ends] for row in rows.tolist()]


def test_loss_and_gradients_equal_those_of_transformers(built):
    model, _, _ = built
    ids, labels = training_ids(model.chat, TEXTS, [1, 1, 1])
    used = model.all_encoders(3)
    sums = model(features(), LENS, ids, labels, used)
    sums["loss"].backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad.clone() for p in trainable]
    assert all(grad.isfinite().all() for grad in grads)
    embeds, mask, labels = model.merge(
        ids, labels, model.speech_embeddings(features(), LENS, used)
    )
    model.zero_grad()
    out = model.llm(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False)
    log_probs = out.logits[:, :-1].float().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(log_probs, labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(sums["loss"], loss, rtol=1e-4)
    loss.backward()
    for ours, parameter in zip(grads, trainable):
        assert torch.allclose(ours, parameter.grad, rtol=1e-2, atol=2e-4 * ours.abs().max())


def test_greedy_hypotheses_with_and_without_drafts_are_those_of_generate(built):
    model, _, _ = built
    expected = generated(model)
    assert greedy(model) == expected
    drafts = [expected[0], [*expected[1][:3], 40, *expected[1][4:]], [41, 42]]
    assert greedy(model, drafts) == expected


def test_beam_search_scores_its_hypotheses(built):
    model, _, _ = built
    embeds, mask, _ = model.prompt(features(), LENS)
    for best, *_ in beam_search(model, embeds, mask, 2, 8):
        assert len(best.log_probs) in (len(best.ids), len(best.ids) + 1)


@pytest.mark.parametrize("int8", [False, True])
def test_an_export_decodes_the_same(built, int8, tmp_path):
    model, tokenizer, config = built
    expected = greedy(model)
    out = tmp_path / "out"
    out.mkdir()
    write_model(model, tokenizer, config, out, torch.float32, int8)
    exported = load_model_config(out)
    again, _ = build_model(exported)
    load_trainable_state(again, load_file(out / PROJECTOR))
    found = greedy(again.eval())
    if int8:
        assert found[0][:1] == expected[0][:1]
        return
    assert found == expected
    llm = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, value in again.llm.state_dict().items():
        assert torch.equal(llm.state_dict()[name], value), name


def test_dtype_of_added_rows_is_the_mean(built):
    model, _, config = built
    old = dataclasses.replace(config).llm_path
    rows = load_file(f"{old}/model.safetensors")["model.embed_tokens.weight"]
    new = model.base_llm.get_input_embeddings().weight
    assert len(new) == len(rows) + 5
    assert torch.allclose(new[len(rows) :], rows.mean(dim=0).expand(5, -1), atol=1e-6)
