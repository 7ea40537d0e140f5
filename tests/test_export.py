"""One directory that holds a model: for decode.py, for transformers and peft, and for the hub."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import RepoUrl
from peft import PeftModel
from safetensors.torch import load_file
from test_decode import hypotheses
from transformers import AutoModelForCausalLM, AutoTokenizer

import decode
import export
import train
from speechllm.model_flags import build_model, read_model_file
from speechllm.prompt import SPEECH_TOKENS
from speechllm.trained_state import load_trainable_state
from speechllm.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def copy(tiny_exp, tiny_mose_exp, tmp_path):
    """A function to a copy of the experiment with n encoders, `exp<n>`.

    Its `loud.pt` is far from where training began, unlike what two epochs make.
    """

    def copy(n=1):
        if not (exp_dir := tmp_path / f"exp{n}").exists():
            shutil.copytree({1: tiny_exp, 2: tiny_mose_exp}[n], exp_dir)
            model = load_checkpoint(exp_dir / "epoch-2.pt")["model"]
            torch.manual_seed(0)
            loud = {key: value + 0.1 * torch.randn_like(value) for key, value in model.items()}
            torch.save({"model": loud}, exp_dir / "loud.pt")
        return exp_dir

    return copy


@pytest.fixture
def exported(copy, tiny_encoder_dir, tmp_path):
    """A function from flags of export.py to the directory it makes, of `loud.pt` by default."""

    def run(*flags, n=1, out=tmp_path / "out"):
        which = () if "--avg" in flags else ("--checkpoint", "loud.pt")
        bpe = tiny_encoder_dir / "bpe.model"
        export.main(list(map(str, [
            "--exp-dir", copy(n), "--speech-encoder-bpe-path", bpe, "--out", out, *which, *flags,
        ])))  # fmt: skip
        return out

    return run


@pytest.fixture
def decoded(tiny_corpus):
    """A function from --exp-dir to what decode.py writes of the test set, by utterance."""

    def run(exp_dir, *flags, name="projector", method="draft"):
        decode.main(list(map(str, [
            "--exp-dir", exp_dir, "--manifest-dir", tiny_corpus, "--test-cuts", "tiny_cuts_test",
            "--max-new-tokens", 8, "--use-fp16", "false", "--num-workers", 0, *flags,
        ])))  # fmt: skip
        return hypotheses(exp_dir, f"decode-{method}-{name}-max8", "tiny_test")

    return run


@pytest.fixture
def said(exported):
    def said(*flags, **options):
        with pytest.raises(SystemExit) as error:
            exported(*flags, **options)
        assert "\n" not in error.value.code
        return error.value.code

    return said


@pytest.mark.parametrize("n", [1, 2])
def test_the_directory_decodes_alone(exported, decoded, tiny_encoder_dir, tmp_path, n):
    """Moved elsewhere, and with nothing else said."""
    out = exported(n=n)
    bpe = ("--speech-encoder-bpe-path", tiny_encoder_dir / "bpe.model")
    expected = decoded(tmp_path / f"exp{n}", "--checkpoint", "loud.pt", *bpe, name="loud")
    moved = shutil.move(out, tmp_path / "moved")
    shutil.rmtree(tmp_path / f"exp{n}")
    assert decoded(moved) == expected
    assert not [path for path in moved.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    modes = {path.stat().st_mode for path in moved.rglob("*") if path.is_file()}
    assert len(modes) == 1, "some files can be read by their owner alone"


def loaded_logits(llm, ids):
    with torch.no_grad():
        return llm.eval()(input_ids=ids).logits


@pytest.fixture
def logits(copy):
    """Some ids, and what the trained model says of them: (1, L) and (1, L, V)."""
    args = decode.read_flags(["--exp-dir", str(copy())])
    model, _ = build_model(args, torch.float32, torch.float32)
    load_trainable_state(model, load_checkpoint(copy() / "loud.pt")["model"])
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    return ids, loaded_logits(model.llm, ids)


def test_transformers_and_peft_load_it_and_give_the_same_logits(
    exported, logits, tiny_llm_dir, tmp_path
):
    ids, expected = logits
    out = exported("--adapter", tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(loaded_logits(plain, ids), expected, rtol=0, atol=2e-5)
    assert {p.name for p in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tiny_llm_dir)
    before = loaded_logits(base, ids)
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(loaded_logits(adapted, ids), expected, rtol=0, atol=2e-5)
    assert (before - expected).abs().max() > 1e-3, "the adapter does nothing"
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llm_dir)


def test_the_tokenizer_knows_the_speech_tokens(exported, tiny_llm_dir):
    out = exported()
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = load_file(out / "model.safetensors")["model.embed_tokens.weight"].size(0)
    assert all(i < rows for i in tokenizer.convert_tokens_to_ids(SPEECH_TOKENS))
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids("<speech>")) == "<speech>"
    config = json.loads((out / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions(exported, decoded, logits, dtype):
    out = exported("--dtype", dtype)
    weights = load_file(out / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {f"torch.{dtype}"}
    kinds = {w.dtype for w in load_file(out / "encoders" / "1" / "model.safetensors").values()}
    assert kinds == {torch.float32, getattr(torch, dtype)}
    ids, expected = logits
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (loaded_logits(plain, ids) - expected).abs().max() < {"bfloat16": 0.2, "float16": 0.02}[
        dtype
    ]
    assert len(decoded(out)) == 3


def test_a_checkpoint_by_name_and_averages(exported, copy, tmp_path, tiny_exp):
    a = exported("--checkpoint", "epoch-1.pt", out=tmp_path / "a")
    shutil.copy(tiny_exp / "epoch-1.pt", copy() / "checkpoint-7.pt")
    b = exported("--iter", 7, "--avg", 1, out=tmp_path / "b")
    c = exported("--epoch", 2, "--avg", 2, out=tmp_path / "c")
    a, b, c = (load_file(folder / "projector.safetensors") for folder in (a, b, c))
    first = load_checkpoint(tiny_exp / "epoch-1.pt")["model"]
    for key in a:
        assert torch.equal(a[key], first[key]) and torch.equal(b[key], first[key])
        assert not torch.equal(c[key], first[key])


@pytest.mark.parametrize("flags", [("--use-lora", "false"), ("--unfreeze-encoder", "true"),
                                   ("--unfreeze-llm", "false")])  # fmt: skip
def test_whatever_was_trained(tiny_train_argv, decoded, tiny_encoder_dir, tmp_path, flags):
    bpe = ("--speech-encoder-bpe-path", str(tiny_encoder_dir / "bpe.model"))
    exp_dir, out = tmp_path / "exp", tmp_path / "out"
    train.main([*tiny_train_argv(exp_dir), *flags, *bpe, "--num-epochs", "1", "--base-lr", "0.1"])
    export.main(["--exp-dir", str(exp_dir), "--checkpoint", "epoch-1.pt", "--out", str(out)])
    expected = decoded(exp_dir, "--checkpoint", "epoch-1.pt", name="epoch-1")
    assert decoded(out) == expected


def test_prompt_context_and_language_are_kept(exported):
    out = exported("--prompt", "write it", "--use-context", "true")
    stored = read_model_file(out)
    assert (stored["prompt"], stored["use_context"]) == ("write it", True)


def test_an_encoder_without_a_bpe_model(exported, decoded, caplog):
    out = exported("--speech-encoder-bpe-path", "no.model")
    assert "no.model is missing: decoding will make no use of that encoder's CTC head" in (
        caplog.text
    )
    assert read_model_file(out)["speech_encoder_bpe_path"] == ""


def test_the_card(exported, decoded, copy, tiny_llm_dir):
    stored = json.loads((copy() / "model.json").read_text())
    stored |= {"command": "src/train.py --train-cuts mine", "language": "en"}
    (copy() / "model.json").write_text(json.dumps(stored))
    bpe = ("--speech-encoder-bpe-path", "none")
    for epoch in (1, 2):
        flags = ("--epoch", epoch, "--avg", epoch, "--method", "greedy", *bpe)
        decoded(copy(), *flags, name=f"epoch-{epoch}-avg-{epoch}", method="greedy")
    summary = next((copy() / "decode").glob("wer-summary-*epoch-2-avg-2*")).read_text()
    wer, errors = re.search(r"%WER (\S+)% \[(\d+ / \d+),", summary).groups()
    card = (exported("--epoch", 2, "--avg", 2) / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| tiny")]
    assert rows == [f"| tiny_test | WER {wer} % | {errors} | decode-greedy-epoch-2-avg-2-max8 |"]
    assert "int8" not in card
    flags = ("--epoch", 2, "--avg", 2, "--int8", "true")
    of_int8 = (exported(*flags, out=copy() / "int8") / "README.md").read_text()
    assert "Measured before the LLM's weights became int8:\n\n| set |" in of_int8
    assert "    src/train.py --train-cuts mine\n" in card and "\nlanguage: en\n" in card
    assert str(tiny_llm_dir) in card and "licence" in card


# ---- what goes wrong


def test_nothing_is_begun_that_cannot_be_done(said, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "get_token", lambda: None)
    (tmp_path / "there").mkdir()
    for flags, sentence in (
        (("--out", tmp_path / "there"), f"--out {tmp_path}/there is there already"),
        (("--adapter", tmp_path / "there"), f"--adapter {tmp_path}/there is there already"),
        (("--adapter", tmp_path / "x", "--use-lora", "false"),
         f"--adapter {tmp_path}/x: the model was trained without LoRA"),
        (("--push-to-hub", "me/mine"),
         "--push-to-hub me/mine needs a token: set HF_TOKEN, or `hf auth login`"),
        (("--llm-path", tmp_path / "no"),
         f"LLM directory {tmp_path}/no is missing or has no config.json"),
        (("--epoch", 9, "--avg", 2),
         f"epoch-8.pt is missing in {tmp_path}/exp1: --epoch 9 --avg 2 needs 8, 9, "
         "there are: 1, 2"),
    ):  # fmt: skip
        assert said(*flags) == sentence
    assert said("--push-to-hub", "a b").startswith("--push-to-hub a b: ")
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


def test_weights_that_are_no_numbers(said, copy, tmp_path):
    checkpoint = load_checkpoint(copy() / "loud.pt")
    key = "llm.base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    checkpoint["model"][key][0, 0] = 1e9
    torch.save(checkpoint, copy() / "bad.pt")
    assert said("--checkpoint", "bad.pt", "--dtype", "float16") == (
        "model.layers.1.mlp.up_proj.weight has values that are no numbers in torch.float16"
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize("damage", ["cut off", "nothing", "missing", "alien"])
def test_damaged_parts(exported, decoded, damage):
    out = exported()
    path = out / "encoders" / "1" / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "alien":
        shutil.copy(out / "projector.safetensors", path)
    else:
        path.write_bytes(path.read_bytes()[:-40] if damage == "cut off" else b"")
    with pytest.raises(SystemExit, match=re.escape(str(path))):
        decoded(out)


# ---- the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes what it is asked; `hub.fails` makes it fail."""
    hub = SimpleNamespace(asked=[], fails=None)

    def note(name):
        def method(self, *args, **options):
            if hub.fails:
                raise OSError(hub.fails)
            hub.asked.append((name, args, options))
            return RepoUrl(f"https://huggingface.co/me/{args[0].split('/')[-1]}") if args else None

        return method

    api = type("Api", (), {name: note(name) for name in ("create_repo", "upload_folder")})
    monkeypatch.setattr(export, "HfApi", api)
    monkeypatch.setattr(export, "get_token", lambda: "hf_secretsecret")
    return hub


@pytest.mark.parametrize("name", ["me/mine", "mine"])
def test_pushing(exported, hub, capsys, caplog, name):
    out = exported("--push-to-hub", name)
    assert hub.asked == [
        ("create_repo", (name,), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "me/mine", "folder_path": out}),
    ]
    said = capsys.readouterr()
    assert f"on the hub as {name}" in said.out
    everything = said.out + said.err + caplog.text + (out / "README.md").read_text()
    assert "hf_secretsecret" not in everything


def test_a_hub_that_fails(said, hub, tmp_path):
    hub.fails = "401 for https://huggingface.co/api?token=x with hf_secretsecret\nmore"
    sentence = said("--push-to-hub", "me/mine")
    assert sentence.startswith(f"{tmp_path}/out is whole, but not on the hub as me/mine: 401 ")
    assert "secretsecret" not in sentence and (tmp_path / "out" / "model.json").is_file()
