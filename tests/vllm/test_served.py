"""Exported models in vLLM: the tokens of our own decoding, offline and over HTTP."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from free_port import free_port

from speechllm.audio.fbank import fbank_extractor
from speechllm.decoding.config import CheckpointConfig, SearchConfig
from speechllm.decoding.load import TrainedModel
from speechllm.models.config import load_model_config

pytest.importorskip("vllm.config", reason="vLLM is not installed: bash local/test_vllm.sh")
import httpx  # noqa: E402 one of vLLM's requirements

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 0.2  # share of the machine's
DRAFTS = {
    "method": "custom_class", "num_speculative_tokens": 16,
    "model": "speechllm.vllm.CtcDraftProposer",
}  # fmt: skip
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="session")
def clips(tiny_corpus):
    return sorted((tiny_corpus / "audio").glob("t*.wav")) + sorted(
        (tiny_corpus / "audio").glob("dev*.wav")
    )


@pytest.fixture(scope="session")
def greedy(vllm_export):
    """A function (n, clips, context) -> ids and text of each clip, decoded by decode.py's code."""

    def decode(n, clips, context=""):
        folder, fbank = vllm_export(n), fbank_extractor()
        model = TrainedModel(
            load_model_config(folder), CheckpointConfig(exp_dir=folder, use_fp16=False)
        )
        options = dict(guard="off", max_new_tokens=12, word_timestamps=False)
        recognizer, found = model.recognizer(SearchConfig(method="greedy", **options)), []
        for clip in clips:
            features = torch.as_tensor(
                fbank.extract(soundfile.read(clip, dtype="float32")[0], 16000)
            )
            lens = torch.tensor([len(features)])
            batch = {"features": features[None], "feature_lens": lens, "contexts": [context]}
            found += recognizer.decode(recognizer.encode(batch))
        # vLLM leaves out an incomplete last character, which an untrained model may write.
        return [(one.hypothesis.ids, one.text.rstrip("\ufffd").strip()) for one in found]

    return decode


@pytest.mark.slow
def test_decode_with_vllm_writes_the_results_of_decode(vllm_export, tiny_corpus, tmp_path):
    folder = shutil.copytree(vllm_export(1), tmp_path / "model")
    flags = ["--exp-dir", folder, "--manifest-dir", tiny_corpus, "--test-cuts", "tiny_cuts_train"]
    ours = ["--method", "greedy", "--guard", "off", "--max-new-tokens", "12", "--use-fp16", "false",
            "--on-the-fly-feats", "true", "--num-workers", "0"]  # fmt: skip
    run = [sys.executable, ROOT / "src/decode.py", *flags, *ours]
    subprocess.run([*map(str, run)], check=True)
    memory = ["--gpu-memory-utilization", MEMORY]
    run = [sys.executable, ROOT / "local/decode_with_vllm.py", *flags, *memory]
    subprocess.run([*map(str, run)], check=True)
    theirs, ours = sorted(
        (folder / "decode").glob("recogs-*.txt"), key=lambda p: "greedy" in p.name
    )
    assert theirs.read_text() == ours.read_text()
    [summary] = (folder / "decode").glob("wer-summary-*vllm-float32.txt")
    assert "RTFx" in summary.read_text()


@pytest.mark.slow
def test_drafts_do_not_change_the_tokens(vllm_export, greedy, clips):
    """64 requests at once, with repetitions whose prompts vLLM has in part; prompts are read in
    pieces of up to 64 tokens.
    """
    from vllm import LLM, SamplingParams

    from speechllm.vllm.processor import generation_prompt

    folder, expected = str(vllm_export(2)), [ids for ids, _ in greedy(2, clips)]
    llm = LLM(
        folder, dtype="float32", speculative_config=DRAFTS, gpu_memory_utilization=MEMORY,
        enable_prefix_caching=True, block_size=32, max_num_batched_tokens=64, enforce_eager=True,
        disable_log_stats=False,
    )  # fmt: skip
    samples = [soundfile.read(clip, dtype="float32")[0] for clip in clips]
    prompts = [generation_prompt(folder, llm.get_tokenizer(), one) for one in samples]
    prompts = (prompts * 64)[:64]
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    ends = llm.model_config.try_get_generation_config()["eos_token_id"]
    for k, request in enumerate(found):
        ids = [i for i in request.outputs[0].token_ids if i not in ends]
        assert ids == expected[k % len(clips)]
    counts = {metric.name: metric for metric in llm.get_metrics()}
    for name in ("spec_decode_num_draft_tokens", "prefix_cache_hits"):
        assert counts[f"vllm:{name}"].value > 0


# ---- the server


def serve(folder, port):
    """The server's process; its output goes to `<folder>.log`."""
    flags = ["--model", folder, "--port", port, "--dtype", "float32", "--enforce-eager",
             "--gpu-memory-utilization", MEMORY, "--served-model-name", "tiny"]  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, flags)]
    with open(f"{folder}.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def server(vllm_export):
    folder, port = vllm_export(2), free_port()
    process, url = serve(folder, port), f"http://localhost:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, Path(f"{folder}.log").read_text()
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def post(server):
    """A function (audio, fields) -> response to a transcription request."""

    def send(audio, **fields):
        content = audio if isinstance(audio, bytes) else Path(audio).read_bytes()
        files, data = {"file": ("talk.wav", content)}, {"model": "tiny", **fields}
        url = f"{server}/v1/audio/transcriptions"
        return httpx.post(url, files=files, data=data, timeout=300)

    return send


@pytest.mark.slow
def test_64_requests_at_once_get_their_texts(post, greedy, clips):
    expected = [text for _, text in greedy(2, clips)]
    with ThreadPoolExecutor(64) as pool:
        texts = [one.json()["text"] for one in pool.map(post, (clips * 64)[:64])]
    assert texts == (expected * 64)[:64]
    assert len({*expected}) > len(clips) / 2, "the texts hardly differ"


@pytest.mark.slow
def test_a_stream_has_the_same_text(post, greedy, clips):
    lines = [line for line in post(clips[0], stream="true").text.splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    deltas = [event["choices"][0]["delta"]["content"] for event in events]
    assert len(deltas) > 1 and "".join(deltas).strip() == greedy(2, clips[:1])[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"prompt": "seven"}, {"hotwords": "seven"}])
def test_prompt_and_hotwords_are_the_context(post, greedy, clips, fields):
    texts = [post(clip, **fields).json()["text"] for clip in clips[:3]]
    assert texts == [text for _, text in greedy(2, clips[:3], "seven")]
    assert texts != [text for _, text in greedy(2, clips[:3])]


def wav(samples, rate=16000, format="wav"):
    import io

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "audio, fields, message",
    [
        (b"", {}, "nvalid"),
        (b"not audio" * 100, {}, "nvalid"),
        (wav(np.zeros(0)), {}, "too short: 0.00 s"),
        (wav(np.zeros(800)), {}, "too short: 0.05 s"),
        (wav(np.zeros(3600 * 16000, np.int16), format="flac"), {}, "600"),
        (wav(np.zeros(16000)), {"language": "de"}, "language 'de': this model is for 'en'"),
        (wav(np.zeros(16000)), {"response_format": "verbose_json"}, "verbose_json"),
    ],
    ids=["empty", "garbage", "no samples", "short", "hour", "language", "verbose"],
)
def test_bad_requests_get_400_and_the_engine_lives_on(post, greedy, clips, audio, fields, message):
    response = post(audio, **fields)
    assert (response.status_code, message in response.text) == (400, True), response.text
    assert post(clips[0]).json()["text"] == greedy(2, clips[:1])[0][1]


@pytest.mark.slow
def test_long_recordings_are_split_and_stereo_is_resampled(post, clips):
    noise = np.random.default_rng(0).normal(scale=0.1, size=(44100, 2))
    assert post(wav(noise, 44100)).status_code == 200
    pieces = post(wav(np.random.default_rng(0).normal(scale=0.1, size=16000 * 7)))
    assert len(pieces.json()["text"]) > len(post(clips[0]).json()["text"])
