"""A tiny Qwen2: transcripts, tokenizer, examples, training, the written directory."""

import dataclasses
import itertools
import math
import random
import re

import make_tiny_llm as tiny
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechllm.models.prompt import (
    IGNORED,
    SPEECH_TOKENS,
    ChatTokenizer,
    add_speech_tokens,
    build_chat_template,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FLAGS = "--hidden-size 32 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-size 48"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.train_tokenizer([" ".join(LETTERS), " ".join(reversed(LETTERS))], 400)
    add_speech_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatTokenizer(tokenizer, build_chat_template(tokenizer), num_encoders=2)


def write_table(path, texts):
    path.write_text("path\ttext\n" + "".join(f"x\t{text}\n" for text in texts))
    return path


def make(text, out, flags="--max-steps 2"):
    tiny.main(["--text", str(text), "--out", str(out), *f"{FLAGS} {flags}".split()])
    return AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)


def test_transcripts_are_distinct_lower_case_and_of_the_training_split(tmp_path, tiny_corpus):
    path = tmp_path / "a.tsv"
    rows = ("train\tGO  ON", "train\tgo on", "train\t ", "test\tNO", "train\tYes")
    path.write_text("path\tsplit\ttext\n" + "".join(f"x\t{row}\n" for row in rows))
    assert tiny.read_transcripts(path) == ["go on", "yes"]
    assert len(tiny.read_transcripts(tiny_corpus / "tiny_cuts_train.jsonl.gz")) > 2


def test_unusable_input_is_an_error(tmp_path):
    table = write_table(tmp_path / "a.tsv", ["ONE LINE ONLY"])
    with pytest.raises(SystemExit, match="a.tsv has 1 distinct training transcripts"):
        make(table, tmp_path / "llm")
    with pytest.raises(SystemExit, match="exists: remove it"):
        make(table, tmp_path)


@pytest.mark.slow
@pytest.mark.shared
def test_pre_tokenizer_and_normalizer_are_qwen2s(tokenizer, shared):
    qwen2 = AutoTokenizer.from_pretrained(shared / "tokenizer").backend_tokenizer
    ours, text = tokenizer.backend_tokenizer, "it's 1984, h i n\n\n  naïve"
    split, expected = (one.pre_tokenizer.pre_tokenize_str(text) for one in (ours, qwen2))
    assert split == expected
    assert ours.normalizer.normalize_str("e\u0301") == qwen2.normalizer.normalize_str("e\u0301")


def test_labels_cover_the_answer_and_its_closing_token(chat, tokenizer):
    ids, labels = tiny.encode_example(chat, "h i")
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nh i<|im_end|>"
    )
    assert labels == [IGNORED] * 8 + ids[8:] and tokenizer.decode(ids[8:]) == "h i<|im_end|>"


@pytest.mark.parametrize("num_encoders", [1, 2])
def test_the_user_says_the_answer_between_speech_tokens_once_or_per_encoder(chat, num_encoders):
    chat = dataclasses.replace(chat, num_encoders=num_encoders)
    rng, numbers = random.Random(0), set()
    for _ in range(30):
        ids, labels = tiny.encode_example(chat, "h i", rng)
        prompt = chat.tokenizer.decode(ids[: labels.count(IGNORED)])
        user = re.fullmatch(r"<.im_start.>user\n(.*)<.im_end.>\n<.im_start.>assistant\n", prompt)[1]
        groups = re.findall("<start_speech>(?: *h)+(?: *i)+ *<end_speech>", user)
        assert "".join(groups) == user
        numbers.add(len(groups))
    assert numbers == {1, num_encoders}


def test_half_of_the_first_words_in_prompts_have_the_tokens_of_later_words(chat):
    chat, rng = dataclasses.replace(chat, num_encoders=1), random.Random(0)
    (first,), (later,) = chat.tokenizer(["h", " h"]).input_ids
    examples = [tiny.encode_example(chat, "h i", rng) for _ in range(40)]
    prompts = [ids[: labels.count(IGNORED)] for ids, labels in examples]
    assert all((first in prompt) != (later in prompt) for prompt in prompts)
    assert 10 < sum(later in prompt for prompt in prompts) < 30


def test_lengthened_ids_are_those_of_the_text_after_ctc():
    ids, space, rng = [5, 5, 6, 7, 7], 3, random.Random(0)
    for _ in range(50):
        path = tiny.lengthened(ids, space, rng)
        assert [token for token, _ in itertools.groupby(path) if token != space] == ids
        assert len(path) > len(ids)


@pytest.mark.parametrize("may_recur", [True, False])
def test_a_random_text_has_few_different_words_only_if_they_may_recur(may_recur):
    rng, words = random.Random(0), [f"word{i}" for i in range(1000)]
    texts = [tiny.random_text(words, rng, may_recur).split() for _ in range(100)]
    assert {*map(len, texts)} == {*range(1, tiny.MAX_RANDOM_WORDS + 1)}
    recurring = sum(len({*text}) <= len(text) / 2 + 1 < len(text) for text in texts)
    assert recurring in range(20, 60) if may_recur else recurring == 0


def test_training_examples_have_the_number_asked_for(chat):
    assert len([*tiny.training_examples(chat, ["a b", "c d", "e f"], 8)]) == 8


def test_noise_changes_the_loss(chat, tokenizer):
    sizes = dict(zip(tiny.SIZES, (32, 1, 2, 1, 48), strict=True))
    model = tiny.build_model(tokenizer, sizes).eval()
    examples = [tiny.encode_example(chat, "h i", random.Random(0))]
    clean, again, noisy = (tiny.total_loss(model, examples, noise) for noise in (0.0, 0.0, 1.0))
    assert clean == again != noisy


def test_the_directory_loads_as_qwen2_with_speech_tokens(tmp_path, capsys):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(LETTERS, k=4)) for _ in range(60)]
    table = write_table(tmp_path / "a.tsv", texts)
    tokenizer, model = make(table, tmp_path / "new" / "llm")
    assert model.config.model_type == "qwen2"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "held-out perplexity" in capsys.readouterr().out
    ids = tokenizer.convert_tokens_to_ids(SPEECH_TOKENS)
    assert ids == [*range(len(tokenizer) - 5, len(tokenizer))]
    assert add_speech_tokens(tokenizer) == len(tokenizer) == ids[-1] + 1  # already there
    rows = model.get_input_embeddings().num_embeddings
    assert rows >= len(tokenizer) and rows % 64 == 0


@pytest.mark.slow
def test_it_learns_to_repeat_the_words_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "MUON_LEARNING_RATE", 1e-2)
    monkeypatch.setattr(tiny, "BATCH_SIZE", 16)
    names = [f"call {a} {b}" for a in "abcdefg" for b in "abcdefg"]
    table = write_table(tmp_path / "names.tsv", names)
    flags = "--max-steps 300 --num-layers 2 --hidden-size 64 --num-kv-heads 2"
    tokenizer, model = make(table, tmp_path / "llm", flags)
    chat = ChatTokenizer(tokenizer, build_chat_template(tokenizer), num_encoders=1)
    examples = [tiny.encode_example(chat, name, random.Random(0)) for name in names]
    mean = tiny.total_loss(model, examples) / tiny.count_labels(examples)
    assert mean < 0.5 < math.log(7)
