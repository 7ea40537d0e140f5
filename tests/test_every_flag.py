"""Every flag of train.py and decode.py changes something; a new one needs an entry here.

The effects are on a training's parts, result files, searches, batches or the message of an error.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import decode
import train
from speechllm import distributed
from speechllm.cli import flag_name
from speechllm.data import dataloader
from speechllm.data.config import TrainDataConfig
from speechllm.decoding.recognizer import Recognizer
from speechllm.distributed import DistEnv
from speechllm.evaluation import eval_sets
from speechllm.models.config import ModelConfig, load_model_config
from speechllm.training import fit
from speechllm.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("restore_logging")
OPTIONS = [
    field.name
    for config in (ModelConfig, TrainDataConfig, TrainConfig)
    for field in dataclasses.fields(config)
    if "help" in field.metadata
]
ADAMW = ("--optimizer", "adamw")


@dataclass
class Change:
    """Another value of a flag, the effect to look at, and flags that the effect needs."""

    value: str
    seen: callable
    context: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def other_models(tiny_encoder_dir, tiny_llm_dir, tmp_path_factory):
    """A folder with another encoder, its `bpe.model`, another LLM, and `hotwords.txt`."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "hotwords.txt").write_text("c a b\n")
    (folder / "other.pt").symlink_to(tiny_encoder_dir / "b.pt")
    (folder / "bpe.model").symlink_to(tiny_encoder_dir / "bpe.model")
    llm = shutil.copytree(tiny_llm_dir, folder / "llm")
    weights = load_file(llm / "model.safetensors")
    weights["model.norm.weight"] *= -1
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- what a training is made of


@pytest.fixture
def reached(monkeypatch, tiny_train_argv, tiny_exp, tmp_path):
    """A function from flags to the parts of a Trainer and the message of an error."""

    def run(*flags):
        seen = SimpleNamespace(message="", trainer={}, launched=None)

        def launch(run, training, world_size, master_port):
            seen.launched = world_size, master_port
            run(DistEnv(), training)

        def trainer(**parts):
            seen.trainer = parts
            return SimpleNamespace(run=lambda: None)

        monkeypatch.setattr(fit, "launch", launch)
        monkeypatch.setattr(fit, "Trainer", trainer)
        exp_dir = tmp_path / "exp"
        exp_dir.mkdir(exist_ok=True)
        if not (exp_dir / "epoch-1.pt").exists():  # it was archived
            (exp_dir / "epoch-1.pt").symlink_to(tiny_exp / "epoch-1.pt")
        argv = [*tiny_train_argv(exp_dir), "--resume", "never"]
        try:
            train.main([*argv, *(flag.format(tmp=tmp_path) for flag in flags)])
        except SystemExit as error:
            seen.message = error.code
        engine = seen.trainer.get("engine")
        return SimpleNamespace(
            **vars(seen), **seen.trainer, model=getattr(engine, "module", None), exp_dir=exp_dir
        )

    return run


def train_loader(r):
    return r.loaders.train(1)


def trained_names(r):
    return sorted(r.model_state(lambda parameter: parameter))


def parameter(name):
    return lambda r: r.model.get_parameter(name).tolist()


def message(r):
    return r.message


def rates(r):
    return r.schedule.get_last_lr()


def option_of_optimizer(name):
    return lambda r: r.engine.optimizer.param_groups[0][name]


def lora(r):
    """Rank, scale and dropout of the LoRA matrices of a layer."""
    layer = r.model.base_llm.get_decoder().layers[0].self_attn.q_proj
    return layer.r, layer.scaling, layer.lora_dropout["default"].p


def compiled(r):
    return r.model.base_llm.get_decoder().layers[0]._compiled_call_impl is not None


QUIET = ("--enable-musan", "false", "--enable-spec-aug", "false")
CHANGES = {
    "--world-size": Change("2", lambda r: r.launched),
    "--master-port": Change("12399", lambda r: r.launched),
    "--start-epoch": Change("2", lambda r: r.state.batch_idx_train),
    "--resume": Change("auto", lambda r: r.state.batch_idx_train),
    "--dry-run": Change("true", lambda r: r.launched),
    "--activation-checkpointing": Change("true", lambda r: r.model.llm.is_gradient_checkpointing),
    "--compile": Change("true", compiled),
    "--base-lr": Change("0.005", rates),
    "--projector-lr": Change("2", rates),
    "--lora-lr": Change("2", rates),
    "--encoder-lr": Change("2", rates, ("--unfreeze-encoder", "true")),
    "--betas": Change("0.5,0.9", option_of_optimizer("betas")),
    "--weight-decay": Change("0.5", option_of_optimizer("weight_decay"), ADAMW),
    "--max-grad-norm": Change("1", lambda r: r.engine.max_grad_norm, ADAMW),
    "--projector-dropout": Change("0.5", lambda r: r.model.encoder_projector[0].proj[0].p),
    "--label-smoothing": Change("0.1", lambda r: r.model.label_smoothing),
    "--token-ctc-weight": Change("1", lambda r: r.model.token_ctc_weight),
    "--freeze-projector": Change(
        "true", lambda r: len(r.engine.optimizer.param_groups[0]["params"]),
        ("--pretrained-model-path", "{tmp}/exp/epoch-1.pt"),
    ),
    "--optimizer": Change("adamw", lambda r: type(r.engine.optimizer)),
    "--lr-schedule": Change("eden", rates),
    "--use-fp16": Change("true", lambda r: (r.engine.dtype, r.engine.scaler.is_enabled())),
    "--use-bf16": Change("true", lambda r: r.engine.dtype),
    "--inf-check": Change("true", lambda r: len(r.model.encoder[0]._forward_hooks)),
    "--use-lora": Change("false", trained_names),
    "--lora-r": Change("8", lora),
    "--lora-alpha": Change("8", lora),
    "--lora-dropout": Change("0.5", lora),
    "--lora-targets": Change("q_proj", trained_names),
    "--unfreeze-llm": Change("false", trained_names),
    "--unfreeze-encoder": Change("true", trained_names),
    "--deepspeed": Change("none.json", message, ADAMW),
    "--encoder-feature-mask": Change("false", lambda r: r.model.encoder_feature_mask),
    "--pretrained-model-path": Change(
        "{tmp}/exp/epoch-1.pt", parameter("encoder_projector.0.proj.1.bias")
    ),
    "--language": Change("de", lambda r: load_model_config(r.exp_dir)),
    "--llm-path": Change("{tmp}/llm", parameter("llm.base_model.model.model.norm.weight")),
    "--speech-encoder-type": Change("medium", message),
    "--num-heads": Change("7", message, ("--speech-encoder-type", "auto")),
    "--encoder-unmasked-dim": Change("x", message),
    "--speech-encoder-path": Change(
        "{tmp}/other.pt", parameter("encoder.0.encoder_embed.conv.0.bias")
    ),
    "--chunk-size": Change("16", message),  # these encoders are not causal
    "--left-context-frames": Change("0", message),
    "--encoder-projector-ds-rate": Change("2", lambda r: r.model.encoder_projector[0].ds_rate),
    "--instruction": Change("write it", lambda r: r.model.chat.prompt(1)),
    "--use-context": Change("true", lambda r: [batch.get("contexts") for batch in train_loader(r)]),
    "--lowercase": Change("false", lambda r: r.model.chat.spelled("One")),
    "--use-flash-attn": Change(
        "true", lambda r: r.message or r.model.llm.config._attn_implementation
    ),
    "--num-workers": Change("1", lambda r: train_loader(r).num_workers),
    "--loader-timeout": Change("5", lambda r: train_loader(r).timeout, ("--num-workers", "1")),
    "--max-batch-tokens": Change("100", lambda r: len(list(train_loader(r)))),
    "--encoder-cache-dir": Change(
        "{tmp}/cache", lambda r: [batch["features"].size(2) for batch in train_loader(r)],
        (*QUIET, "--encoder-feature-mask", "false"),
    ),
}  # fmt: skip
ELSEWHERE = {  # files under tests/training that use the option's name
    "test_trainer.py": "num_epochs grad_accum seed log_interval valid_interval tensorboard",
    "test_trainer_checkpoints.py": "save_every_n save_every_minutes keep_last_k patience",
    "test_valid_decode.py": "valid-decode",
    "test_optim.py": "lr_batches lr_epochs warmup_batches",
    "test_skipped_steps.py": "max_skipped_steps",
    "test_memory.py": "scan-oom",
    "test_training_data.py":
        "manifest_dir train_cuts valid_cuts shar_dir max_duration bucketing_sampler num_buckets "
        "on_the_fly_feats shuffle drop_last min_duration max_utterance_duration enable_musan "
        "enable_spec_aug spec_aug_time_warp_factor concatenate_cuts duration_factor gap "
        "max_invalid_fraction corpus_weights replay enable_speed_perturb enable_volume_perturb "
        "enable_reverb enable_codec",
    "../conftest.py": "exp-dir",
    "../test_decode.py": "speech-encoder-bpe-path",  # training only saves it
}  # fmt: skip


# ---- what decoding uses and writes


@pytest.fixture
def decoded(monkeypatch, tiny_argv, tiny_exp, tmp_path):
    """A function from flags to what decoding used and wrote, or its error message."""

    def run(*flags):
        seen = SimpleNamespace(message="", searches=[], loaders=[])
        encode, evaluation_loader = Recognizer.encode, dataloader.evaluation_loader

        def watched_encode(recognizer, batch):
            seen.model = recognizer.model
            features = batch["features"]
            seen.searches.append((features.shape, float(features.sum()), recognizer.search))
            return encode(recognizer, batch)

        def watched_loader(*args, **options):
            seen.loaders.append(evaluation_loader(*args, **options))
            return seen.loaders[-1]

        def launch(run, config, world_size, master_port):
            seen.world_size, seen.master_port = world_size, master_port
            run(distributed.DistEnv(), config)

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
            patch.setattr(distributed, "launch", launch)
            patch.setattr(Recognizer, "encode", watched_encode)
            patch.setattr(eval_sets, "evaluation_loader", watched_loader)
            try:
                decode.main([text.format(tmp=tmp_path) for text in argv])
            except SystemExit as error:
                seen.message = error.code
        out = [path for path in (exp_dir / "decode").glob("*-*") if "log-" not in path.name]
        seen.files = {path.name: path.read_text() for path in out if "summary" not in path.name}
        for path in out:
            path.unlink()
        return seen

    return run


def files(seen):
    return seen.message, seen.files


def names(seen):
    return seen.message, set(seen.files)


def searches(seen):
    return seen.searches


def batches(seen):
    """Cut ids of the batches, in order."""
    return [[batch["cut_ids"] for batch in loader] for loader in seen.loaders]


MANY = ("--max-duration", "20", "--test-cuts", "tiny_cuts_many")
WITH_CTC = ("--speech-encoder-bpe-path", "{tmp}/bpe.model")
DECODE = {
    # Results of several processes are compared in test_same_output.py.
    "--world-size": Change("2", lambda s: s.world_size),
    "--master-port": Change("12399", lambda s: s.master_port),
    "--exp-dir": Change("{tmp}/other", files),
    "--epoch": Change("1", files, ("--avg", "1")),
    "--avg": Change("1", files),
    "--iter": Change("9", files, ("--avg", "1")),
    "--checkpoint": Change("epoch-1.pt", files),
    "--method": Change("beam", names),
    "--beam-size": Change("2", names),
    "--max-new-tokens": Change("1", searches),
    "--normalize": Change("basic", names),
    "--error-unit": Change("characters", lambda s: s.files),
    "--nbest": Change("2", names, ("--beam-size", "2")),
    "--ctc-weight": Change("0.9", files, ("--beam-size", "4", *WITH_CTC)),
    "--draft-accept-prob": Change("0", files, WITH_CTC),
    "--forward-cost": Change("1", searches),
    "--ctc-bypass-entropy": Change("9", files, WITH_CTC),
    "--guard": Change("off", names),
    "--word-timestamps": Change("false", names, WITH_CTC),
    "--ctc-lag": Change("0.3", searches, WITH_CTC),
    "--hotwords": Change("{tmp}/hotwords.txt", names, WITH_CTC),
    "--hotword": Change("c a b", names, WITH_CTC),
    "--hotword-score": Change("99", files, ("--hotword", "c a b", *WITH_CTC)),
    "--biasing-list": Change("missing.txt", lambda s: s.message),
    "--use-encoders": Change("1", names),
    "--use-fp16": Change("true", lambda s: s.model.llm.dtype),
    "--use-bf16": Change("true", lambda s: s.model.llm.dtype),
    "--test-cuts": Change("tiny_cuts_dev", files),
    "--use-lora": Change("false", files),
    "--lora-r": Change("8", files),
    "--lora-alpha": Change("160", lora),
    "--lora-dropout": Change("0.5", lora),
    "--lora-targets": Change("q_proj", files),
    "--unfreeze-llm": Change("false", files),
    "--unfreeze-encoder": Change("true", files),
    "--llm-path": Change("{tmp}/llm", files),
    "--speech-encoder-type": Change("medium", files),
    "--num-heads": Change("x", lambda s: s.message),
    "--encoder-unmasked-dim": Change("x", lambda s: s.message),
    "--speech-encoder-path": Change("{tmp}/other.pt", files),
    "--speech-encoder-bpe-path": Change("{tmp}/bpe.model", names),
    "--chunk-size": Change("16", files),
    "--left-context-frames": Change("0", files),
    "--encoder-projector-ds-rate": Change("2", files),
    "--instruction": Change("write it", files),
    "--use-context": Change("true", files),
    "--lowercase": Change("false", lambda s: s.model.chat.spelled("One")),
    "--use-flash-attn": Change(
        "true", lambda s: s.message or s.model.llm.config._attn_implementation
    ),
    "--manifest-dir": Change("{tmp}", files),
    "--max-duration": Change("1", searches),
    "--bucketing-sampler": Change("false", batches, MANY),
    "--num-buckets": Change("2", batches, MANY),
    "--loader-timeout": Change(
        "5", lambda s: [loader.timeout for loader in s.loaders], ("--num-workers", "1")
    ),
    "--num-workers": Change("1", lambda s: [loader.num_workers for loader in s.loaders]),
    "--on-the-fly-feats": Change("true", searches),
}  # fmt: skip


# ---- all flags

BASELINES = {}  # results without the flag, by program and context
ALL = [("train", flag) for flag in CHANGES] + [("decode", flag) for flag in DECODE]


def test_every_flag_of_training_has_an_entry():
    elsewhere = {flag_name(name) for names in ELSEWHERE.values() for name in names.split()}
    assert elsewhere | set(CHANGES) == set(map(flag_name, OPTIONS))
    for file, names in ELSEWHERE.items():
        text = (Path(__file__).parent / "training" / file).read_text()
        assert not [name for name in names.split() if name not in text], file


def test_every_flag_of_decoding_has_an_entry():
    actions = decode.get_parser()._actions
    flags = {flag for action in actions for flag in action.option_strings}
    assert set(DECODE) == flags - {"-h", "--help"}


@pytest.mark.slow
@pytest.mark.parametrize(("program", "flag"), ALL)
def test_a_flag_changes_something(reached, decoded, program, flag, other_models, tmp_path):
    for path in other_models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    run, change = (reached, CHANGES[flag]) if program == "train" else (decoded, DECODE[flag])
    key = program, change.context
    if key not in BASELINES:
        BASELINES[key] = run(*change.context)
    before = change.seen(BASELINES[key])
    assert before != change.seen(run(*change.context, flag, change.value))


@pytest.mark.slow
def test_weights_are_held_in_the_dtype_of_training_unless_they_are_trained(reached):
    def dtype(*flags):
        return reached(*flags).model.llm.get_input_embeddings().weight.dtype

    bf16 = ("--use-bf16", "true", "--use-fp16", "true")
    half = reached(*bf16)
    assert dtype(*bf16) == half.engine.dtype != dtype()
    assert not half.engine.scaler.is_enabled()
    assert dtype(*bf16, "--use-lora", "false") == dtype()
    assert dtype(*bf16, "--use-lora", "false", "--unfreeze-llm", "false") == dtype(*bf16)
