"""Every flag of train.py and decode.py changes something; a new one without an entry here fails.

What the flags reach is compared: the objects given to the training loop, and what decoding wrote.
What the values themselves do is tested where it is done.
"""

from types import SimpleNamespace

import pytest
from flag_changes import Change, other_models
from lhotse import load_manifest
from lhotse.dataset import OnTheFlyFeatures

import decode
import train
from speechllm import data
from speechllm.decoding import test_set
from speechllm.decoding.recognizer import Recognizer
from speechllm.model_flags import read_model_file
from speechllm.seeds import seed_everything
from speechllm.training import setup
from speechllm.training.distributed import Ranks
from speechllm.training.schedule import Eden

pytestmark = pytest.mark.usefixtures("restore_logging")


def flags_of(parser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}


@pytest.fixture
def other_files(tiny_corpus, tiny_encoder_dir, tiny_llm_dir, tiny_shards, tmp_path):
    """`other.pt`, another encoder, `llm`, another LLM, and `shards` of another corpus.

    Of the 12 cuts of `broken.jsonl.gz` one has no text.
    """
    cuts = load_manifest(tiny_corpus / "tiny_cuts_train.jsonl.gz")
    cuts[3].supervisions[0].text = ""
    cuts.to_file(tmp_path / "broken.jsonl.gz")
    (tmp_path / "shards").symlink_to(tiny_shards)
    other_models(tmp_path, tiny_encoder_dir, tiny_llm_dir)


# ---- train.py


@pytest.fixture
def reached(monkeypatch, tiny_train_argv, tiny_exp, tmp_path):
    """A function from flags to what reached the training loop, or the sentence instead."""

    def run(*flags):
        seen = SimpleNamespace(sentence="")
        loop = {}

        def launch(run, args, world_size, master_port):
            seen.args, seen.world_size, seen.master_port = args, world_size, master_port
            run(Ranks(), args)

        monkeypatch.setattr(train, "launch", launch)
        def trainer(**given):
            engine = given["engine"]
            loop.update(given, **vars(engine))
            return SimpleNamespace(run=lambda: None)

        monkeypatch.setattr(setup, "Trainer", trainer)
        exp_dir = tmp_path / "exp"
        exp_dir.mkdir(exist_ok=True)
        if not (exp_dir / "epoch-1.pt").exists():  # it was moved aside
            (exp_dir / "epoch-1.pt").symlink_to(tiny_exp / "epoch-1.pt")
        argv = [*tiny_train_argv(exp_dir), "--resume", "never"]
        try:
            train.main([*argv, *(f.format(tmp=tmp_path) for f in flags)])
        except SystemExit as error:
            seen.sentence = error.code
        return SimpleNamespace(**vars(seen), **loop)

    return run


def batches(reached, epoch=1):
    """One epoch, listed: ids, texts, shapes and sums of the features."""
    seed_everything(0)
    return [
        (batch["ids"], batch["texts"], batch["features"].shape, float(batch["features"].sum()))
        for batch in reached.train_loader(epoch)
    ]


def ids(reached):
    return [batch[0] for batch in batches(reached)]


def trained_names(reached):
    return sorted(reached.model_state())


def parameter(name):
    return lambda reached: reached.model.get_parameter(name).tolist()


def rates(reached):
    """Learning rates over some batches and epochs."""
    listed = []
    for epoch in (0, 3):
        reached.schedule.step_epoch(epoch)
        for batch in (0, 100, 9000):
            reached.schedule.step_batch(batch)
            listed += reached.schedule.get_last_lr()
    return listed


def attribute(name):
    return lambda reached: getattr(reached, name)


def plain(reached):
    """Without the order of the batches, and the ids: joined cuts have random ones."""
    return sorted(batch[1:] for batch in batches(reached))


def logged(words):
    """Whether the last training said so."""

    def found(reached):
        logs = sorted((reached.exp_dir / "log").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return words in logs[-1].read_text()

    return found


def compiled(module):
    return module._compiled_call_impl is not None


MANY = ("--train-cuts", "tiny_cuts_many", "--max-duration", "20")
QUIET = ("--enable-musan", "false", "--enable-spec-aug", "false")
JOINABLE = (*QUIET, "--max-duration", "20", "--min-utterance", "0.3")
JOINED = (*JOINABLE, "--concatenate-cuts", "true")
BROKEN = ("--train-cuts", "{tmp}/broken.jsonl.gz")
EDEN = ("--lr-schedule", "eden")

TRAIN = {
    "--world-size": Change("2", attribute("world_size")),
    "--master-port": Change("12399", attribute("master_port")),
    "--num-epochs": Change("3", attribute("num_epochs")),
    "--start-epoch": Change("2", lambda r: r.state.batch_idx_train),
    "--resume": Change("auto", lambda r: r.state.batch_idx_train),
    "--save-every-n": Change("10", attribute("save_every_n")),
    "--save-every-minutes": Change("7.5", attribute("save_every_minutes")),
    "--keep-last-k": Change("2", attribute("keep_last_k")),
    "--exp-dir": Change("{tmp}/other", attribute("exp_dir")),
    "--grad-accum": Change("3", attribute("grad_accum")),
    "--dry-run": Change("true", lambda r: hasattr(r, "model")),
    "--activation-checkpointing": Change("true", lambda r: r.module.llm.is_gradient_checkpointing),
    "--compile": Change("true", lambda r: compiled(r.module.plain_llm.get_decoder().layers[0])),
    "--base-lr": Change("0.005", rates),
    "--optimizer": Change("adamw", lambda r: type(r.optimizer)),
    "--lr-schedule": Change("eden", rates),
    "--lr-batches": Change("5000", rates, EDEN),
    "--lr-epochs": Change("2", rates, EDEN),
    "--warmup-batches": Change("200", rates, EDEN),
    "--seed": Change("7", lambda r: (r.seed, ids(r))),
    "--use-fp16": Change("true", lambda r: (r.dtype, r.scaler.is_enabled())),
    "--use-bf16": Change("true", attribute("dtype")),
    "--inf-check": Change("true", lambda r: len(r.model.encoder[0]._forward_hooks)),
    "--max-skipped-steps": Change("3", attribute("max_skipped_steps")),
    # It leaves no trace, as test_memory_scan.py shows; the log alone tells of it.
    "--scan-oom": Change("true", logged("memory for the worst batches")),
    "--tensorboard": Change("false", attribute("tensorboard")),
    "--log-interval": Change("10", attribute("log_interval")),
    "--valid-interval": Change("10", attribute("valid_interval")),
    "--use-lora": Change("false", trained_names),
    "--unfreeze-llm": Change("false", trained_names),
    "--unfreeze-encoder": Change("true", trained_names),
    # A sentence, for this needs another optimizer; its trainings are in test_zero.py.
    "--deepspeed": Change("local/deepspeed_zero2.json", attribute("sentence")),
    "--encoder-feature-mask": Change("false", lambda r: r.model.encoder_feature_mask),
    "--pretrained-model-path": Change(
        "{tmp}/exp/epoch-1.pt", parameter("encoder_projector.0.proj.1.bias")
    ),
    "--language": Change("de", lambda r: read_model_file(r.exp_dir)),
    "--llm-path": Change("{tmp}/llm", parameter("llm.base_model.model.model.norm.weight")),
    "--speech-encoder-type": Change("medium", attribute("sentence")),
    "--speech-encoder-path": Change(
        "{tmp}/other.pt", parameter("encoder.0.encoder_embed.conv.0.bias")
    ),
    # Training has the flag because decoding has it, and does not read it.
    "--speech-encoder-bpe-path": Change("other.model", lambda r: r.args.speech_encoder_bpe_path),
    "--encoder-projector-ds-rate": Change("2", lambda r: r.model.encoder_projector[0].ds_rate),
    "--prompt": Change("write it", lambda r: r.model.chat.prompt(1)),
    "--use-context": Change("true", lambda r: (
        r.model.chat.use_context, [b.get("contexts") for b in r.train_loader(1)])),
    "--use-flash-attn": Change(
        "true", lambda r: r.sentence or r.model.llm.config._attn_implementation
    ),
    "--manifest-dir": Change("{tmp}", attribute("sentence")),
    "--max-duration": Change("3", lambda r: len(batches(r))),
    "--bucketing-sampler": Change("false", ids, (*MANY, "--drop-last", "false")),
    "--num-buckets": Change("2", ids, (*MANY, "--drop-last", "false")),
    "--num-workers": Change("1", lambda r: r.train_loader(1).num_workers),
    "--loader-timeout": Change(
        "5", lambda r: r.train_loader(1).timeout, ("--num-workers", "1")
    ),
    "--on-the-fly-feats": Change("true", plain, QUIET),
    "--shuffle": Change("false", ids),
    "--drop-last": Change("false", lambda r: len(batches(r)), MANY),
    "--min-utterance": Change("0.3", lambda r: r.epoch_seconds),
    "--max-utterance": Change("2.5", lambda r: r.epoch_seconds),
    "--concatenate-cuts": Change("true", plain, JOINABLE),
    "--duration-factor": Change("2", plain, JOINED),
    "--gap": Change("0.1", plain, JOINED),
    "--enable-musan": Change("false", plain, ("--enable-spec-aug", "false", "--shuffle", "false")),
    "--enable-spec-aug": Change("false", plain, ("--enable-musan", "false")),
    "--spec-aug-time-warp-factor": Change("0", plain, ("--enable-musan", "false")),
    "--shar-dir": Change("{tmp}/shards", lambda r: (r.epoch_seconds, len(batches(r)))),
    "--max-tokens": Change("100", lambda r: len(batches(r))),
    "--cache-encoder": Change(
        "{tmp}/cache", lambda r: [b["features"].size(2) for b in r.train_loader(1)],
        (*QUIET, "--encoder-feature-mask", "false"),
    ),
    "--max-bad-fraction": Change("0.1", attribute("sentence"), BROKEN),
    "--train-cuts": Change("tiny_cuts_dev", lambda r: r.epoch_seconds),
    "--valid-cuts": Change("tiny_cuts_test", lambda r: [b["ids"] for b in r.valid_loader()]),
}  # fmt: skip


def test_every_flag_of_train_has_an_entry():
    assert set(TRAIN) == flags_of(train.get_parser(train.DEFAULTS))


@pytest.mark.parametrize("flag", TRAIN)
def test_flag_of_train(reached, other_files, flag):
    change = TRAIN[flag]
    before = change.seen(reached(*change.context))
    assert before == change.seen(reached(*change.context)), "it changes by itself"
    assert before != change.seen(reached(*change.context, flag, change.value))


def test_eden_is_given_its_flags(reached):
    schedule = reached(
        *EDEN, "--lr-batches", "11", "--lr-epochs", "12", "--warmup-batches", "13"
    ).schedule
    assert isinstance(schedule, Eden)
    assert (schedule.lr_batches, schedule.lr_epochs, schedule.warmup_batches) == (11, 12, 13)


def test_bf16_wins_over_fp16(reached):
    both = reached("--use-fp16", "true", "--use-bf16", "true")
    assert both.dtype == reached("--use-bf16", "true").dtype
    assert not both.scaler.is_enabled()


def test_the_llm_is_held_in_the_training_dtype_unless_it_is_trained_itself(reached):
    def dtype(*flags):
        return reached(*flags).model.llm.get_input_embeddings().weight.dtype

    bf16 = ("--use-bf16", "true")
    assert dtype(*bf16) == reached(*bf16).dtype != dtype()
    assert dtype(*bf16, "--use-lora", "false") == dtype()
    assert dtype(*bf16, "--use-lora", "false", "--unfreeze-llm", "false") == dtype(*bf16)


# ---- decode.py


@pytest.fixture
def decoded(monkeypatch, tiny_argv, tiny_exp, tmp_path):
    """A function from flags to what decoding used and wrote, or the sentence instead."""

    def run(*flags):
        seen = SimpleNamespace(sentence="", searches=[], loaders=[])
        hear, evaluation_loader = Recognizer.hear, data.evaluation_loader

        def watched_hear(recognizer, batch):
            seen.model = recognizer.model
            features = batch["features"]
            seen.searches.append((features.shape, float(features.sum()), recognizer.options))
            return hear(recognizer, batch)

        def watched_loader(*args, **options):
            seen.loaders.append(evaluation_loader(*args, **options))
            return seen.loaders[-1]

        def launch(run, args, world_size, master_port):
            seen.world_size, seen.master_port = world_size, master_port
            run(Ranks(), args)

        exp_dir = tmp_path / "exp"
        exp_dir.mkdir(exist_ok=True)
        for name in ("epoch-1.pt", "epoch-2.pt", "checkpoint-9.pt"):
            if not (exp_dir / name).exists():
                (exp_dir / name).symlink_to(tiny_exp / name.replace("checkpoint-9", "epoch-1"))
        argv = [
            *tiny_argv(), "--exp-dir", str(exp_dir), "--test-cuts", "tiny_cuts_test",
            "--epoch", "2", "--avg", "2", "--max-new-tokens", "3", *flags,
        ]  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(decode, "launch", launch)
            patch.setattr(Recognizer, "hear", watched_hear)
            patch.setattr(test_set, "evaluation_loader", watched_loader)
            try:
                decode.main([text.format(tmp=tmp_path) for text in argv])
            except SystemExit as error:
                seen.sentence = error.code
        out = [path for path in (exp_dir / "decode").glob("*-*") if "log-" not in path.name]
        seen.files = {path.name: path.read_text() for path in out if "summary" not in path.name}
        for path in out:
            path.unlink()
        return seen

    return run


def files(seen):
    return seen.sentence, seen.files


def names(seen):
    return seen.sentence, set(seen.files)


def searches(seen):
    return seen.searches


def samplers(seen):
    """The batches, in order."""
    return [[batch["ids"] for batch in loader] for loader in seen.loaders]


WITH_CTC = ("--speech-encoder-bpe-path", "{tmp}/bpe.model")
DECODE = {
    # What several processes write is in test_same_output.py.
    "--world-size": Change("2", attribute("world_size")),
    "--master-port": Change("12399", attribute("master_port")),
    "--exp-dir": Change("{tmp}/other", files),
    "--epoch": Change("1", files, ("--avg", "1")),
    "--avg": Change("1", files),
    "--iter": Change("9", files, ("--avg", "1")),
    "--checkpoint": Change("epoch-1.pt", files),
    "--method": Change("beam", names),
    "--beam-size": Change("2", names),
    "--max-new-tokens": Change("1", searches),
    "--normalize": Change("basic", names),
    "--score-by": Change("characters", lambda s: s.files),
    "--nbest": Change("2", names, ("--beam-size", "2")),
    "--ctc-weight": Change("0.9", files, ("--beam-size", "4", *WITH_CTC)),
    "--accept": Change("relaxed:0", files, WITH_CTC),
    "--ctc-confident": Change("9", files, WITH_CTC),
    "--guard": Change("off", names),
    "--word-times": Change("false", names, WITH_CTC),
    "--ctc-lag": Change("0.3", searches, WITH_CTC),
    "--use-encoders": Change("1", names),
    "--use-fp16": Change("true", lambda s: s.model.llm.dtype),
    "--use-bf16": Change("true", lambda s: s.model.llm.dtype),
    "--test-cuts": Change("tiny_cuts_dev", files),
    "--use-lora": Change("false", files),
    "--unfreeze-llm": Change("false", files),
    "--unfreeze-encoder": Change("true", files),
    "--llm-path": Change("{tmp}/llm", files),
    "--speech-encoder-type": Change("medium", files),
    "--speech-encoder-path": Change("{tmp}/other.pt", files),
    "--speech-encoder-bpe-path": Change("{tmp}/bpe.model", names),
    "--encoder-projector-ds-rate": Change("2", files),
    "--prompt": Change("write it", files),
    "--use-context": Change("true", files),
    "--use-flash-attn": Change(
        "true", lambda s: s.sentence or s.model.llm.config._attn_implementation
    ),
    "--manifest-dir": Change("{tmp}", files),
    "--max-duration": Change("1", searches),
    "--bucketing-sampler": Change("false", samplers, MANY[2:] + ("--test-cuts", "tiny_cuts_many")),
    "--num-buckets": Change("2", samplers, MANY[2:] + ("--test-cuts", "tiny_cuts_many")),
    "--loader-timeout": Change(
        "5", lambda s: [loader.timeout for loader in s.loaders], ("--num-workers", "1")
    ),
    "--num-workers": Change("1", lambda s: [loader.num_workers for loader in s.loaders]),
    "--on-the-fly-feats": Change("true", lambda s: isinstance(
        s.loaders[0].dataset.input_strategy, OnTheFlyFeatures)),
}  # fmt: skip


def test_every_flag_of_decode_has_an_entry():
    assert set(DECODE) == flags_of(decode.get_parser(train.DEFAULTS))


@pytest.mark.parametrize("flag", [flag for flag in DECODE if DECODE[flag]])
def test_flag_of_decode(decoded, other_files, flag):
    change = DECODE[flag]
    before = change.seen(decoded(*change.context))
    assert before != change.seen(decoded(*change.context, flag, change.value))


def test_decoding_again_gives_the_same(decoded):
    assert files(decoded()) == files(decoded())
