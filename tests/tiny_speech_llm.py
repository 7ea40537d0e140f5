"""A SpeechLLM of two tiny encoders and a tiny LLM, and its loss on four utterances."""

import torch

TRANSCRIPTS = [[10, 11], [12], [13, 14, 15, 16, 17], [18, 19, 20]]
USED = [[0], [0], [1, 0], [1]]  # the first two utterances do not use the second encoder
LENS = [90, 60, 75, 81]


def speech_llm(use_lora=True, frozen=(True, True), device="cpu"):
    """Return a model in evaluation mode, whose trained parameters are not zero."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from speechllm.models.llm import prepare_llm
    from speechllm.models.prompt import ChatTemplate
    from speechllm.models.speech_llm import SpeechLLM
    from speechllm.models.zipformer.config import ZipformerConfig
    from speechllm.models.zipformer.encoder import ZipformerEncoder

    torch.manual_seed(0)
    encoder = ZipformerConfig(
        num_encoder_layers=(1,), downsampling_factor=(1,), feedforward_dim=(16,), num_heads=(2,),
        encoder_dim=(16,), encoder_unmasked_dim=(16,), cnn_module_kernel=(5,), query_head_dim=(8,),
        value_head_dim=(4,), frontend_channels=16, pos_dim=12,
    )  # fmt: skip
    chat = ChatTemplate(before=(1, 2), group=(3, 4, 5), after=(6, 7), end=8, pad=0)
    with torch.device(device):
        llm = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=24, tie_word_embeddings=True,
        ))  # fmt: skip
        encoders = [ZipformerEncoder(encoder) for _ in range(2)]
        for one, is_frozen in zip(encoders, frozen):
            if is_frozen:
                one.freeze()
        model = SpeechLLM(encoders, prepare_llm(llm, unfreeze=True, use_lora=use_lora), chat).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def speech_batch(rows=range(4), **more):
    """Return a batch of these of the four utterances."""
    rows = list(rows)
    generator = torch.Generator().manual_seed(1)
    ids = [str(row) for row in rows]
    features = torch.randn(4, 90, 80, generator=generator)[rows]
    return {"features": features, "rows": rows, "cut_ids": ids, "seconds": 1.0, **more}


class SpeechLoss:
    """Loss of `speech_batch`; its `failure` is "out of memory" or a factor of the features."""

    def __init__(self, chat):
        self.chat = chat

    def num_tokens(self, batch):
        return sum(len(TRANSCRIPTS[row]) + 1 for row in batch["rows"])

    def __call__(self, model, batch):
        from speechllm.models.prompt import training_ids

        rows, failure = batch["rows"], batch.get("failure", "1")
        if failure == "out of memory":
            raise torch.OutOfMemoryError
        used = [USED[row] for row in rows]
        transcripts = [TRANSCRIPTS[row] for row in rows]
        ids, labels = training_ids(self.chat, transcripts, [len(one) for one in used])
        lens = torch.tensor([LENS[row] for row in rows])
        return model(float(failure) * batch["features"], lens, ids, labels, used)


def speech_loss(batch):
    """Return a function model -> loss of this batch."""
    return lambda model: SpeechLoss(model.chat)(model, batch)["loss"]
