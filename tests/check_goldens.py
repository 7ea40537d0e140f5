#!/usr/bin/env python3
"""Compare this implementation with numbers from the published one, for every file found.

    python3 tests/check_goldens.py tests/goldens

Checks zipformer_*.pt and zipformer_*_keys.json, also with the prefix causal_, speech_llm_*.pt,
scaled_adam*.pt, and results-*.json with recogs-*.txt and errs-*.txt. Prints a line with the largest
error for each file and exits with status 1 if one is too large.
"""

import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"
try:
    import torch
except ModuleNotFoundError:  # the system's Python: run again with the project's
    if not VENV_PYTHON.is_file() or Path(sys.prefix) == ROOT / ".venv":
        raise
    os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])
sys.path.insert(0, str(ROOT / "src"))

from golden_scaled_adam import trajectory_error  # noqa: E402
from torch import nn  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from speechllm.decoding.beam import beam_search  # noqa: E402
from speechllm.decoding.speculative import speculative_decode  # noqa: E402
from speechllm.models.llm import prepare_llm  # noqa: E402
from speechllm.models.prompt import IGNORED, ChatTemplate, training_ids  # noqa: E402
from speechllm.models.speech_llm import SpeechLLM  # noqa: E402
from speechllm.models.state_dict import load_trainable_state  # noqa: E402
from speechllm.models.zipformer.checkpoint import encoder_from_state  # noqa: E402
from speechllm.models.zipformer.chunk_encoder import ChunkEncoder  # noqa: E402
from speechllm.models.zipformer.config import SIZES, Chunking, ZipformerConfig  # noqa: E402
from speechllm.models.zipformer.encoder import ZipformerEncoder  # noqa: E402
from speechllm.scoring.files import errs_text, recogs_text  # noqa: E402
from speechllm.scoring.wer import align_utterance  # noqa: E402

BEAMS = {"generated": 1, "generated_beam4": 4}
TOLERANCE = 1e-4  # absolute, on activations and parameters


class Mismatch(Exception):
    """A value differs from the golden one."""


def same(name: str, ours, golden) -> None:
    equal = torch.equal(ours, golden) if torch.is_tensor(ours) else ours == golden
    if not equal:
        raise Mismatch(f"{name}: ours {ours}, golden {golden}")


def distance(ours: torch.Tensor, golden: torch.Tensor) -> float:
    same("shape", ours.shape, golden.shape)
    error = float((ours.double() - golden.double()).abs().max()) if ours.numel() else 0.0
    return error if error == error else float("inf")  # a NaN must not pass


def zipformer_config(values: dict, causal: bool = False) -> ZipformerConfig:
    """Parse icefall's configuration, such as `{"encoder_dim": "192,256"}`."""
    config = {}
    for field in fields(ZipformerConfig):
        if field.name in values and field.name != "causal":
            value = tuple(int(v) for v in str(values[field.name]).split(","))
            config[field.name] = value[0] if field.type is int else value
    return ZipformerConfig(**config, causal=causal)


@torch.no_grad()
def check_zipformer(path: Path) -> float:
    golden = torch.load(path, weights_only=True)
    config = zipformer_config(golden["config"])
    encoder = encoder_from_state(golden["state_dict"], config).freeze()
    features, lens = golden["features"], golden["feature_lens"]
    batched, batched_lens = encoder(features, lens)
    same("encoder_out_lens", batched_lens, golden["encoder_out_lens"])
    errors = []
    for i, alone in enumerate(golden["alone"]):
        one, one_len = features[i : i + 1, : lens[i]], lens[i : i + 1]
        embed, embed_len = encoder.encoder_embed(one, one_len)
        if "embed_lens" in golden:
            same("embed_lens", int(embed_len[0]), int(golden["embed_lens"][i]))
        errors.append(distance(embed[0, : embed_len[0]], alone["embed"]))
        errors.append(distance(encoder(one, one_len)[0][0], alone["encoder_out"]))
        errors.append(distance(batched[i, : batched_lens[i]], alone["encoder_out"]))
        if i == 0 and "stack_outputs_first" in golden:
            outputs = encoder.encoder.stack_outputs(embed, embed_len)
            same("number of stacks", len(outputs), len(golden["stack_outputs_first"]))
            for ours, theirs in zip(outputs, golden["stack_outputs_first"]):
                errors.append(distance(ours[0], theirs))
    return max(errors)


@torch.no_grad()
def check_causal_zipformer(path: Path) -> float:
    golden = torch.load(path, weights_only=True)
    config = zipformer_config(golden["config"], golden["causal"])
    encoder = encoder_from_state(golden["state_dict"], config).freeze()
    features, lens = golden["features"], golden["feature_lens"]
    errors = []
    for masked in golden["masked"]:
        chunking = Chunking(masked["chunk_size"], masked["left_context_frames"])
        batched, batched_lens = encoder(features, lens, chunking=chunking)
        for i, expected in enumerate(masked["encoder_out"]):
            alone, _ = encoder(features[i : i + 1, : lens[i]], lens[i : i + 1], chunking=chunking)
            errors.append(distance(alone[0], expected))
            errors.append(distance(batched[i, : batched_lens[i]], expected))
    for streamed in golden["streaming"]:
        chunking = Chunking(streamed["chunk_size"], streamed["left_context_frames"])
        chunks = ChunkEncoder(encoder, chunking)
        same("window", chunks.window, streamed["feature_frames_a_chunk"])
        same("advance", chunks.advance, streamed["advance"])
        for i, expected in enumerate(streamed["encoder_out"]):
            tail = features.new_full((streamed["tail_padding"], 80), streamed["tail_value"])
            padded = torch.cat([features[i, : lens[i]], tail])
            states, found = [chunks.initial_state()], []
            for window in padded.unfold(0, chunks.window, chunks.advance).transpose(1, 2):
                out, _, states = chunks(window[None], torch.tensor([len(window)]), states)
                found.append(out[0])
            errors.append(distance(torch.cat(found), expected))
    return max(errors)


def check_zipformer_keys(path: Path) -> float:
    golden = json.loads(path.read_text())
    causal = path.name.startswith("causal_")
    config = replace(SIZES[path.name.split("_")[-2]], causal=causal)
    if "config" in golden:
        same("config", config, zipformer_config(golden["config"]))
    with torch.device("meta"):
        encoder = ZipformerEncoder(config)
    ours = {name: list(parameter.shape) for name, parameter in encoder.named_parameters()}
    same("parameters", ours, golden["parameters"])
    same("buffers", dict(encoder.named_buffers()), golden["buffers"])
    return 0.0


@torch.no_grad()
def check_speech_llm(path: Path) -> float:
    golden = torch.load(path, weights_only=True)
    model = speech_llm(golden)
    n = len(model.encoder)
    input_ids, labels = training_ids(model.chat, golden["texts"], [n] * len(golden["texts"]))
    same("input_ids", input_ids, golden["input_ids"])
    same("labels", labels, golden["labels"])
    same("attention_mask", input_ids != model.chat.pad, golden["attention_mask"])
    features, lens = golden["features"], golden["feature_lens"]
    sums = model(features, lens, input_ids, labels, model.all_encoders(len(lens)))
    errors = [abs(float(sums["loss"] / (labels != IGNORED).sum()) - golden["batch_loss"])]
    # Answers that reached the limit of the golden run are the longest.
    limit = max(len(alone[key]) for alone in golden["alone"] for key in BEAMS)
    for i, alone in enumerate(golden["alone"]):
        one, one_len = features[i : i + 1, : lens[i]], lens[i : i + 1]
        speech = model.speech_embeddings(one, one_len, model.all_encoders(1))
        theirs = alone["speech_features"]
        theirs = theirs if isinstance(theirs, list) else [theirs]
        same("number of encoders", len(speech[0]), len(theirs))
        errors += [distance(a, b) for a, b in zip(speech[0], theirs)]
        one_ids, one_labels = training_ids(model.chat, golden["texts"][i : i + 1], [n])
        embeds, _, merged = model.merge(one_ids, one_labels, speech)
        hidden, targets = model.label_hidden_states(embeds, merged)
        logits = model.llm.get_output_embeddings()(hidden)
        same("num_label_tokens", len(targets), alone["num_label_tokens"])
        prompt = embeds.size(1) - len(targets)
        same("num_prompt_embeds", prompt, alone["num_prompt_embeds"])
        loss = nn.functional.cross_entropy(logits, targets)
        accuracy = (logits.argmax(dim=-1) == targets).float().mean()
        errors += [distance(logits, alone["label_logits"]), distance(loss, alone["loss"])]
        errors.append(distance(accuracy, alone["acc"]))
        decoded = model.prompt(one, one_len)[:2]
        for key, beam_size in BEAMS.items():
            tokens = alone[key].tolist()
            found = (
                beam_search(model, *decoded, beam_size, limit)[0]
                if beam_size > 1
                else speculative_decode(model, *decoded, [None], limit)
            )
            ends = [t for t in tokens if t in (model.chat.end, model.chat.pad)]
            expected = tokens[: tokens.index(ends[0])] if ends else tokens
            same(f"{key} of utterance {i}", found[0].ids, expected)
    return max(errors)


def speech_llm(golden: dict) -> SpeechLLM:
    """Build the model of a speech_llm_*.pt file, with its checkpoint loaded."""
    encoders = [
        encoder_from_state(pretrained["model"], zipformer_config(config)).freeze()
        for pretrained, config in zip(golden["pretrained"], golden["encoder_configs"])
    ]
    llm = Qwen2ForCausalLM(Qwen2Config(**golden["llm_config"]))
    llm.load_state_dict(golden["llm_state_dict"])
    token = golden["token_ids"]
    chat = ChatTemplate(
        before=(token["im_start"], token["user"], token["nl"]),
        group=(token["start_speech"], token["speech"], token["end_speech"]),
        after=tuple(token[t] for t in ("im_end", "nl", "im_start", "assistant", "nl")),
        end=token["im_end"],
        pad=token["pad"],
    )
    model = SpeechLLM(encoders, prepare_llm(llm, unfreeze=True, use_lora=True), chat).eval()
    load_trainable_state(model, golden["checkpoint"]["model"])
    return model


def check_scaled_adam(path: Path) -> float:
    return trajectory_error(torch.load(path, weights_only=True))


def check_results(path: Path) -> float:
    results = [align_utterance(*result) for result in json.loads(path.read_text())]
    texts = {"recogs": recogs_text(results), "errs": errs_text(results)[0]}
    found = 0
    for kind, text in texts.items():
        golden = path.with_name(path.name.replace("results-", f"{kind}-")).with_suffix(".txt")
        if golden.is_file():
            found += 1
            if golden.read_bytes() != text.encode():
                raise Mismatch(f"{golden.name} differs")
    if not found:
        raise Mismatch("recogs- and errs- files are missing")
    return 0.0


CHECKS = {
    "zipformer_*_keys.json": check_zipformer_keys,
    "zipformer_*.pt": check_zipformer,
    "causal_zipformer_*_keys.json": check_zipformer_keys,
    "causal_zipformer_*.pt": check_causal_zipformer,
    "speech_llm_*.pt": check_speech_llm,
    "scaled_adam*.pt": check_scaled_adam,
    "results-*.json": check_results,
}


def check_folder(folder: Path) -> bool:
    """Check every file of a known format; return True if there is one and all agree."""
    passed = []
    for pattern, check in CHECKS.items():
        for path in sorted(folder.glob(pattern)):
            try:
                error = check(path)
                passed.append(error <= TOLERANCE)
                verdict = "ok" if passed[-1] else f"FAILED, more than {TOLERANCE:g}"
                print(f"{path.name}: largest error {error:.2g} {verdict}")
            except Exception as problem:  # one bad file must not hide the others
                passed.append(False)
                print(f"{path.name}: FAILED: {type(problem).__name__}: {problem}"[:500])
    print(f"{sum(passed)} of {len(passed)} files agree")
    return bool(passed) and all(passed)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        given = " ".join(argv) or "nothing"
        raise SystemExit(f"usage: check_goldens.py DIR; {given} is not a directory")
    raise SystemExit(0 if check_folder(Path(argv[0])) else 1)


if __name__ == "__main__":
    main()
