"""Decoding of test sets with a trained model, and writing of results, for decode.py."""

import logging
from collections import ChainMap
from dataclasses import asdict, replace

import torch

from speechllm.cli import comma_list
from speechllm.decoding.config import SearchConfig
from speechllm.decoding.hotwords import read_hotwords
from speechllm.decoding.load import TrainedModel, read_parameters
from speechllm.decoding.recognizer import Recognizer
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.evaluation.config import DecodeConfig
from speechllm.evaluation.eval_sets import EvalSet, decode_shard, merge_results, read_eval_sets
from speechllm.evaluation.results import write_results
from speechllm.models.config import check_model_files
from speechllm.precision import autocast_dtype
from speechllm.progress import setup_logging
from speechllm.scoring.files import log_line
from speechllm.scoring.wer import ErrorCounts


def decode_sets(dist_env: DistEnv, config: DecodeConfig) -> None:
    """Decode all test sets with one search, in every process; raises like `prepare`."""
    sets, model = prepare(config, "decode", dist_env)
    recognizer = model.recognizer(config.search)
    suffix = result_suffix(config, recognizer.search, model.parameters_name)
    for one in sets:
        decode_set(one, recognizer, config, suffix, dist_env)
    logging.info(f"Results are in {config.out_dir}")


def prepare(
    config: DecodeConfig, program: str, dist_env: DistEnv
) -> tuple[list[EvalSet], TrainedModel]:
    """Read the sets, start the log, load the model; raise FileNotFoundError or InputError."""
    check_model_files(config.model)
    sets = read_eval_sets(config.evaluation.test_cuts, config.data)
    if not sets:
        test_cuts = config.evaluation.test_cuts
        raise InputError(f"--test-cuts {test_cuts!r} is empty: expected cut files")
    for path in filter(None, (config.evaluation.biasing_list, config.search.hotwords)):
        read_hotwords(path)  # fails before the model is loaded
    parameters, name = read_parameters(config.checkpoint, config.model.checkpoint, dist_env)
    setup_logging(config.out_dir / f"log-{program}-{name}", dist_env)
    logging.info(f"Decoding started: {asdict(config)}")
    return sets, TrainedModel(config.model, config.checkpoint, dist_env, (parameters, name))


def decode_set(
    cuts: EvalSet, recognizer: Recognizer, config: DecodeConfig, suffix: str, dist_env: DistEnv
) -> ErrorCounts:
    """Decode a test set jointly with the other processes; write the results; return the errors."""
    recognizer.start_counting()
    shard = decode_shard(
        cuts,
        recognizer,
        config.data,
        min_frames=recognizer.min_frames,
        more_errors=recognizer.too_many_positions,
        use_context=config.model.use_context,
        dist_env=dist_env,
    )
    measurements = recognizer.stop_counting(dist_env.gather_objects)
    results = ChainMap(*dist_env.gather_objects(shard))
    errors = None
    if dist_env.is_main:
        decoded, names = merge_results(cuts, results), (cuts.name, suffix)
        evaluation = config.evaluation
        biasing_list = evaluation.biasing_list or config.search.hotwords
        evaluation = replace(evaluation, biasing_list=biasing_list)
        if not config.model.lowercase and evaluation.normalize == "none":
            evaluation = replace(evaluation, normalize="cased")
        errors = write_results(decoded, config.out_dir, *names, evaluation, measurements)
    errors, *_ = dist_env.gather_objects(errors)
    logging.info(log_line(cuts.name, errors))
    logging.info(", ".join(f"{name}: {value:.2f}" for name, value in measurements.items()))
    return errors


def result_suffix(config: DecodeConfig, search: SearchConfig, parameters_name: str) -> str:
    """Return the part of result file names that identifies the options; `search` is resolved."""
    used, evaluation = config.checkpoint.use_encoders, config.evaluation
    dtype = autocast_dtype(config.checkpoint.use_fp16, config.checkpoint.use_bf16)
    is_default = search.max_new_tokens == SearchConfig().max_new_tokens
    parts = [
        "decode",
        search.name,
        str(config.model.chunkings[-1]),
        parameters_name,
        "encoders" + "+".join(comma_list(used)) if used else "",
        "" if is_default else f"max{search.max_new_tokens}",
        "" if dtype == torch.float32 else str(dtype).removeprefix("torch."),
        evaluation.normalize.replace("none", ""),
        evaluation.error_unit.replace("auto", ""),
    ]
    return "-".join(filter(None, parts))
