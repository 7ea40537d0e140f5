"""A directory that holds a model: for decode.py, for transformers and peft, and for the hub."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from decode_results import hypotheses
from huggingface_hub import RepoUrl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import decode
import export
import speechllm
import train
from speechllm.checkpoints import load_checkpoint
from speechllm.models.build import build_model
from speechllm.models.config import INDEX_FILE, load_model_config
from speechllm.models.export import write_index
from speechllm.models.identity import content_hashes
from speechllm.models.packed import PackedLinear
from speechllm.models.state_dict import load_trainable_state

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def experiment(copies, tmp_path):
    """A function n -> a copy of the experiment with n encoders, `exp<n>`.

    Its `loud.pt` is far from the initial weights, unlike the checkpoints after two epochs.
    """

    def copy(n=1):
        if not (exp_dir := tmp_path / f"exp{n}").exists():
            model = load_checkpoint(copies(n) / "epoch-2.pt")["model"]
            torch.manual_seed(0)
            loud = {key: value + 0.1 * torch.randn_like(value) for key, value in model.items()}
            torch.save({"model": loud}, exp_dir / "loud.pt")
        return exp_dir

    return copy


@pytest.fixture
def bpe(tiny_encoder_dir):
    return "--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model"


@pytest.fixture
def exported(experiment, bpe, tmp_path):
    """A function from flags of export.py to the directory written, of `loud.pt` by default."""

    def run(*flags, n=1, out=tmp_path / "out"):
        checkpoint = () if "--avg" in flags else ("--checkpoint", "loud.pt")
        argv = ["--exp-dir", experiment(n), *bpe, "--out", out, *checkpoint, *flags]
        export.main(list(map(str, argv)))
        return out

    return run


@pytest.fixture
def decoded(tiny_corpus):
    """A function from --exp-dir to the hypotheses of the test set."""

    def run(exp_dir, *flags, name="projector", method="draft"):
        decode.main(list(map(str, [
            "--exp-dir", exp_dir, "--manifest-dir", tiny_corpus, "--test-cuts", "tiny_cuts_test",
            "--max-new-tokens", 8, "--use-fp16", "false", "--num-workers", 0, *flags,
        ])))  # fmt: skip
        return hypotheses(exp_dir, f"decode-{method}-{name}-max8", "tiny_test")

    return run


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_the_directory_decodes_alone_and_can_be_moved(exported, decoded, bpe, tmp_path, n):
    out = exported(n=n)
    expected = decoded(tmp_path / f"exp{n}", "--checkpoint", "loud.pt", *bpe, name="loud")
    moved = Path(shutil.move(out, tmp_path / "moved"))
    shutil.rmtree(tmp_path / f"exp{n}")
    assert decoded(moved) == expected
    files = [path for path in moved.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pt", ".bin", ".pkl")]
    modes = {path.stat().st_mode for path in files if "decode" not in path.parts}
    assert len(modes) == 1, "some files can be read by their owner alone"


def logits_of(llm):
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return llm.eval()(input_ids=ids).logits


@pytest.fixture
def logits(experiment):
    """The trained model's logits (1, L, V)."""
    model, _ = build_model(load_model_config(experiment()))
    load_trainable_state(model, load_checkpoint(experiment() / "loud.pt")["model"])
    return logits_of(model.llm)


def test_transformers_and_peft_give_the_same_logits(exported, logits, tiny_llm_dir, tmp_path):
    out = exported("--lora-dir", tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits_of(plain), logits, rtol=0, atol=2e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llm_dir)
    assert (logits_of(base) - logits).abs().max() > 1e-3, "LoRA changes nothing"
    with_lora = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits_of(with_lora), logits, rtol=0, atol=2e-5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llm_dir)


@pytest.mark.slow
def test_weights_are_stored_in_the_dtype(exported, decoded, logits):
    out = exported("--dtype", "float16")
    weights = load_file(out / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"torch.float16"}
    kinds = {w.dtype for w in load_file(out / "encoders" / "1" / "model.safetensors").values()}
    assert kinds == {torch.float32, torch.float16}
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (logits_of(plain) - logits).abs().max() < 0.02
    assert len(decoded(out)) == 3


@pytest.mark.slow
def test_linear_layers_are_packed_in_bfloat16_only(exported, tiny_corpus):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    out, clip = exported(), tiny_corpus / "audio" / "train-2.wav"
    for use_bf16 in (True, False):
        asr = speechllm.load(out, use_bf16=use_bf16, max_new_tokens=6)
        llm = asr.transcriber.recognizer.model.llm
        assert use_bf16 == any(isinstance(layer, PackedLinear) for layer in llm.modules())
        assert asr.transcribe(clip).duration > 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--use-lora", "false"), ("--unfreeze-encoder", "true"),
                                   ("--unfreeze-llm", "false")])  # fmt: skip
def test_all_trained_parameters_are_exported(tiny_train_argv, decoded, bpe, tmp_path, flags):
    exp_dir, out = tmp_path / "exp", tmp_path / "out"
    argv = [*tiny_train_argv(exp_dir), *flags, *map(str, bpe)]
    train.main([*argv, "--num-epochs", "1", "--base-lr", "0.1"])
    export.main(["--exp-dir", str(exp_dir), "--checkpoint", "epoch-1.pt", "--out", str(out)])
    expected = decoded(exp_dir, "--checkpoint", "epoch-1.pt", name="epoch-1")
    assert decoded(out) == expected


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_directory_has_what_vllm_needs(exported, experiment, n):
    out = exported(n=n)
    config = json.loads((out / "config.json").read_text())
    names = ["SpeechLLMForConditionalGeneration"]
    assert (config["architectures"], config["model_type"]) == (names, "qwen2")
    limits = json.loads((out / "generation_config.json").read_text())
    ends = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert (limits["eos_token_id"], limits["max_new_tokens"]) == (ends, 200)
    model = load_model_config(out)
    assert model.encoder_hashes == content_hashes(model.speech_encoder_path) != ""
    trained = json.loads((experiment(n) / "model.json").read_text())
    assert model.longest_utterance == trained["longest_utterance"] > 0.5
    files = dict.fromkeys(load_file(out / "model.safetensors"), "model.safetensors")
    assert json.loads((out / INDEX_FILE).read_text())["weight_map"] == files


def test_an_older_export_is_completed_by_exporting_it_again(exported, tmp_path):
    old, again = exported(), tmp_path / "again"
    expected = (old / INDEX_FILE).read_text()
    (old / INDEX_FILE).unlink()
    export.main(["--exp-dir", str(old), "--out", str(again)])
    assert (again / INDEX_FILE).read_text() == expected
    for name in ("model.safetensors", "projector.safetensors", "encoders/1/model.safetensors"):
        assert (again / name).read_bytes() == (old / name).read_bytes()


def test_the_index_of_an_llm_in_several_files_is_kept(tmp_path):
    (tmp_path / INDEX_FILE).write_text("{}")
    write_index(tmp_path)
    assert (tmp_path / INDEX_FILE).read_text() == "{}"


@pytest.mark.slow
def test_the_card_has_command_data_and_error_rates(exported, decoded, experiment, tiny_llm_dir):
    stored = json.loads((experiment() / "model.json").read_text())
    stored |= {"command": "src/train.py --train-cuts mine", "language": "en"}
    (experiment() / "model.json").write_text(json.dumps(stored))
    for epoch in (1, 2):
        flags = ("--epoch", epoch, "--avg", epoch, "--method", "greedy")
        name = f"epoch-{epoch}-avg-{epoch}"
        no_bpe = ("--speech-encoder-bpe-path", "none")
        decoded(experiment(), *flags, *no_bpe, name=name, method="greedy")
    summary = next((experiment() / "decode").glob("wer-summary-*epoch-2-avg-2*")).read_text()
    wer, errors = re.search(r"%WER (\S+)% \[(\d+ / \d+),", summary).groups()
    card = (exported("--epoch", 2, "--avg", 2) / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| tiny")]
    assert rows == [f"| tiny_test | WER {wer} % | {errors} | decode-greedy-epoch-2-avg-2-max8 |"]
    assert "    src/train.py --train-cuts mine\n" in card and "\nlanguage: en\n" in card
    assert str(tiny_llm_dir) in card and "license" in card


# ---- errors


@pytest.fixture
def message(exported):
    """A function from flags to the one sentence of an error."""

    def message(*flags):
        with pytest.raises(SystemExit) as error:
            exported(*flags)
        return error.value.code

    return message


def test_wrong_flags_are_found_before_anything_is_written(message, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    (tmp_path / "used").mkdir()
    for flags, expected in (
        (("--out", tmp_path / "used"), f"--out {tmp_path}/used already exists"),
        (("--lora-dir", tmp_path / "x", "--use-lora", "false"),
         f"--lora-dir {tmp_path}/x: the model was trained without LoRA"),
        (("--push-to-hub", "me/mine"),
         "--push-to-hub me/mine needs a token: set HF_TOKEN or run `hf auth login`"),
        (("--push-to-hub", "a b"), "--push-to-hub a b: "),
        (("--epoch", 9, "--avg", 2), f"epoch-8.pt is missing in {tmp_path}/exp1"),
    ):  # fmt: skip
        assert message(*flags).startswith(expected)
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


# ---- the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that records its calls; with `hub.error` they fail."""
    hub = SimpleNamespace(calls=[], error=None)

    def create_repo(name, **options):
        if hub.error:
            raise OSError(hub.error)
        hub.calls.append((name, options))
        return RepoUrl(f"https://huggingface.co/me/{name.split('/')[-1]}")

    hub.create_repo, hub.upload_folder = create_repo, lambda **options: hub.calls.append(options)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secretsecret")
    return hub


def test_the_directory_is_uploaded_without_secrets(exported, hub, capsys, caplog):
    out = exported("--push-to-hub", "mine")
    assert hub.calls == [
        ("mine", {"private": True, "exist_ok": True}),
        {"repo_id": "me/mine", "folder_path": out},
    ]
    printed = capsys.readouterr()
    assert "uploaded to mine" in printed.out
    everything = printed.out + printed.err + caplog.text + (out / "README.md").read_text()
    assert "hf_secretsecret" not in everything


def test_a_failed_upload_keeps_the_directory(message, hub, tmp_path):
    hub.error = "401 for https://huggingface.co/api?token=x with hf_secretsecret\nmore"
    text = message("--push-to-hub", "me/mine")
    assert text.startswith(f"exported to {tmp_path}/out, but the upload to me/mine failed: 401 ")
    assert "secretsecret" not in text and (tmp_path / "out" / "model.json").is_file()
