"""Train a Qwen2 with a few million parameters on a corpus's transcripts: an LLM for CPUs.

  python local/make_tiny_llm.py --text data/fbank/an4_cuts_train.jsonl.gz --out exp/an4/llm

The result loads like a downloaded Qwen2 (`AutoTokenizer`, `AutoModelForCausalLM`): it has Qwen2's
pre-tokenizer and ChatML tokens, and also the recipe's speech tokens.

The model is trained to answer with a lower-case transcript, in the recipe's chat format. In 90% of
the chats, the user's turn contains the tokens of the answer between speech tokens, lengthened and
noisy like speech: speech recognition with a frozen LLM relies on its ability to repeat the prompt,
which instruct models of the usual size have. Most answers are random words, which reward copying,
not guessing. The model finds its place among recurring words by comparing several of the preceding
ones, which takes more layers rather than wider ones. Training begins without noise and without
recurring words: copying is first learned on easy prompts.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import _path  # noqa: F401

from speechllm.cli import Parser, check_range
from speechllm.errors import InputError, exit_on_user_error
from speechllm.io import atomic_directory

if TYPE_CHECKING:
    from speechllm.models.prompt import ChatTokenizer

SIZES = {  # field of Qwen2Config: flag, default
    "hidden_size": ("--hidden-size", 128),
    "num_hidden_layers": ("--num-layers", 6),
    "num_attention_heads": ("--num-heads", 4),
    "num_key_value_heads": ("--num-kv-heads", 4),
    "intermediate_size": ("--intermediate-size", 344),
}
VOCAB_SIZE = 1000
BATCH_SIZE = 32
PART_SIZE = 8  # examples of similar length that are computed together: less padding
LEARNING_RATE = 3e-3  # of AdamW
MUON_LEARNING_RATE = 5e-3
WARMUP_STEPS = 50
REPEAT_PROB = 0.9  # fraction of user turns that contain the words of the answer
RANDOM_PROB = 0.8  # fraction of these turns that consist of random words
MAX_RANDOM_WORDS = 14
NOISE = 1.2  # on prompts, see total_loss; it grows from 0 in the first half of the training

Example = tuple[list[int], list[int]]  # ids and labels of one chat, of equal length


def read_transcripts(path: Path) -> list[str]:
    """Read the distinct training transcripts in a table or cut file, in lower case.

    Raises:
      InputError: the file cannot be read, or has fewer than two distinct transcripts.
    """
    from speechllm.data.corpora.table import read_table
    from speechllm.data.manifests import read_cuts

    if ".jsonl" in path.suffixes:
        texts = [one.text or "" for cut in read_cuts(path) for one in cut.supervisions]
    else:
        texts = [row.text for row in read_table(path) if row.split in ("", "train")]
    normal = (" ".join(text.lower().split()) for text in texts)
    transcripts = list(dict.fromkeys(filter(None, normal)))
    if len(transcripts) < 2:
        raise InputError(f"{path} has {len(transcripts)} distinct training transcripts, needs 2")
    return transcripts


# ---- tokenizer and examples


def train_tokenizer(transcripts: list[str], vocab_size: int = VOCAB_SIZE):
    """Train a byte-level BPE tokenizer with up to `vocab_size` entries, the ChatML tokens last."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    from speechllm.models.prompt import IM_END, IM_START, PAD

    chat_tokens = (PAD, IM_START, IM_END)  # in Qwen2's order
    backend = Qwen2Tokenizer().backend_tokenizer  # with Qwen2's pre-tokenizer and NFC
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(chat_tokens),
        min_frequency=2,  # otherwise a word that occurs once becomes a token that occurs once
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ["user", "assistant"] * len(transcripts)  # once per example: one token each
    backend.train_from_iterator(transcripts + roles, trainer)
    learned = json.loads(backend.to_str())["model"]
    vocab = learned["vocab"]
    vocab |= {token: i for i, token in enumerate(chat_tokens, start=len(vocab))}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token=IM_END,
        pad_token=PAD,
        extra_special_tokens=list(chat_tokens[1:]),
    )


def encode_example(chat: "ChatTokenizer", answer: str, rng: random.Random | None = None) -> Example:
    """Encode a chat whose user's turn has the answer's tokens, lengthened; without `rng`, none.

    A third of the turns have them once per encoder, the others once; each time, half of the first
    words have the tokens of later words, which begin with a space. A projector confuses these.
    The labels cover the answer and its closing id.
    """
    from speechllm.models.prompt import IGNORED

    ids, spaced_ids = chat.tokenizer([answer, " " + answer]).input_ids
    template, user = chat.template, []
    start, _, end = template.group
    for _ in range(rng.choice((1, 1, chat.num_encoders)) if rng else 0):
        spoken = rng.choice((ids, spaced_ids))
        user += [start, *lengthened(spoken, template.space, rng), end]
    prompt, reply = [*template.before, *user, *template.after], [*ids, template.end]
    return prompt + reply, [IGNORED] * len(prompt) + reply


def lengthened(ids: list[int], space: int, rng: random.Random) -> list[int]:
    """Put spaces between ids and repeat some, like the output of a CTC head with spaces as blanks.

    Speech embeddings outnumber text tokens, and are trained to look like it (models/token_ctc.py).
    """
    mean_gap, out = rng.choice([0.5, 1.5, 4.0]), []
    for token in ids:
        is_repeated = out[-1:] == [token]
        out += [space] * max(int(rng.expovariate(1 / mean_gap)), is_repeated)
        out += [token] * rng.choice([1, 1, 1, 2])
    return out + [space] * int(rng.expovariate(1 / mean_gap))


def random_text(words: list[str], rng: random.Random, may_recur: bool) -> str:
    """Return a text of random words; with `may_recur`, half of the texts repeat a few words."""
    length = rng.randint(1, MAX_RANDOM_WORDS)
    if may_recur and rng.random() < 0.5:
        words = rng.choices(words, k=rng.randint(1, length // 2 + 1))
    return " ".join(rng.choices(words, k=length))


def training_examples(
    chat: "ChatTokenizer", transcripts: list[str], number: int
) -> Iterator[Example]:
    """Yield examples; transcripts are reshuffled in each epoch, words recur after a third."""
    rng = random.Random(0)
    all_words = [word for transcript in transcripts for word in transcript.split()]
    epochs = (rng.sample(transcripts, len(transcripts)) for _ in count())
    for i, transcript in enumerate(islice(chain.from_iterable(epochs), number)):
        if rng.random() >= REPEAT_PROB:
            yield encode_example(chat, transcript)
            continue
        if rng.random() < RANDOM_PROB:
            transcript = random_text(all_words, rng, may_recur=i >= number / 3)
        yield encode_example(chat, transcript, rng)


# ---- model


def build_model(tokenizer, sizes: dict[str, int]):
    """Build an untrained Qwen2 with tied embeddings for the tokenizer's entries."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,  # as in Qwen2
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    return Qwen2ForCausalLM(config)


def count_labels(examples: list[Example]) -> int:
    """Return the number of tokens to predict."""
    from speechllm.models.prompt import IGNORED

    return sum(label != IGNORED for _, labels in examples for label in labels)


def total_loss(model, examples: list[Example], noise: float = 0.0):
    """Return the sum of the labels' negative log-likelihoods in nats.

    Noise on the prompts has a random standard deviation, up to `noise` times the embeddings'.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from speechllm.models.prompt import IGNORED

    ids, labels = ([torch.tensor(one) for one in column] for column in zip(*examples))
    padded = pad_sequence(ids, True, model.config.pad_token_id)
    labels = pad_sequence(labels, True, IGNORED)
    embeds = model.get_input_embeddings()(padded)
    if noise:
        spread = embeds[padded != model.config.pad_token_id].detach().std()
        level = noise * spread * torch.rand(len(ids), 1, 1)
        embeds = embeds + (labels == IGNORED)[..., None] * level * torch.randn_like(embeds)
    return model(inputs_embeds=embeds, labels=labels, num_items_in_batch=1).loss


def train(model, examples: Iterator[Example], max_steps: int) -> None:
    """Train with Muon, and AdamW for embeddings and vectors, with warm-up and linear decay to 0."""
    import torch

    layers = model.get_decoder().layers
    matrices = [p for p in layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(
        matrices, lr=MUON_LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / max_steps)
        )
        for optimizer in (muon, adamw)
    ]
    for step in range(max_steps):
        batch = sorted(islice(examples, BATCH_SIZE), key=lambda example: len(example[0]))
        num_labels, mean_loss = count_labels(batch), 0.0
        noise = NOISE * min(1, 2 * step / max_steps)
        model.zero_grad()
        for k in range(0, BATCH_SIZE, PART_SIZE):
            loss = total_loss(model, batch[k : k + PART_SIZE], noise) / num_labels
            loss.backward()
            mean_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {mean_loss:.3f}")


def make_llm(
    transcripts: list[str], max_steps: int, sizes: dict[str, int], max_copies: int
) -> tuple:
    """Train tokenizer and model, and print the perplexity on held-out transcripts.

    A tenth of the transcripts is held out, but at most 200.
    """
    import torch

    from speechllm.models.prompt import ChatTokenizer, add_speech_tokens, build_chat_template

    torch.manual_seed(0)
    shuffled = random.Random(0).sample(transcripts, len(transcripts))
    num_held_out = min(200, -(-len(transcripts) // 10))
    held_out, training = shuffled[:num_held_out], shuffled[num_held_out:]
    tokenizer = train_tokenizer(training)
    add_speech_tokens(tokenizer)
    chat = ChatTokenizer(tokenizer, build_chat_template(tokenizer), max_copies)
    model = build_model(tokenizer, sizes)
    train(model, training_examples(chat, training, max_steps * BATCH_SIZE), max_steps)
    rng, one_copy = random.Random(0), replace(chat, num_encoders=1)
    examples = [encode_example(one_copy, text, rng) for text in held_out]
    with torch.no_grad():
        perplexity = math.exp(total_loss(model.eval(), examples) / count_labels(examples))
    print(f"{model.num_parameters()} parameters, held-out perplexity {perplexity:.2f} per token")
    return tokenizer, model


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="cut file, or table (its train split is used)")
    add("--out", type=Path, required=True, help="output directory")
    for field, (flag, default) in SIZES.items():
        add(flag, type=int, dest=field, default=default, help=f"{field} of Qwen2Config")
    add("--max-steps", type=int, default=600, help="number of training steps")
    add("--max-copies", type=int, default=2, help="copies of the answer in a third of the prompts: "
        "several encoders give the LLM several")
    args = parser.parse_args(argv)
    check_range("max_copies", args.max_copies, 1)
    if args.out.exists():
        raise InputError(f"{args.out} exists: remove it or choose another --out")
    sizes = {field: getattr(args, field) for field in SIZES}
    tokenizer, model = make_llm(read_transcripts(args.text), args.max_steps, sizes, args.max_copies)
    with atomic_directory(args.out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    main()
