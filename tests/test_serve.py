"""serve.py as a user starts it; every flag changes something."""

import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from flag_changes import Change

import serve
import transcribe

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def started(monkeypatch, tiny_transcribe_argv, tiny_exp, tmp_path):
    """A function from flags to the service and where it would listen, or the sentence instead."""
    (tmp_path / "token").write_text("sesame\nmore\n")
    (tmp_path / "empty").write_text("\n")

    def started(*flags):
        seen = SimpleNamespace(sentence="")

        def run(app, host, port, timeout_keep_alive, **_):
            seen.host, seen.port, seen.keep_alive = host, port, timeout_keep_alive

        def create_app(service):
            seen.service = service
            service.stop()

        with monkeypatch.context() as patch:
            patch.setattr(uvicorn, "run", run)
            patch.setattr(serve, "create_app", create_app)
            try:
                argv = [flag.format(tmp=tmp_path) for flag in flags]
                serve.main([*tiny_transcribe_argv(tiny_exp), *argv])
            except SystemExit as error:
                seen.sentence = error.code
        return seen

    return started


def of_service(name):
    return lambda seen: getattr(seen.service, name)


def of_transcriber(name):
    return lambda seen: getattr(seen.service.worker.transcriber, name)


FLAGS = {
    "--host": Change("0.0.0.0", lambda s: s.host),
    "--port": Change("8001", lambda s: s.port),
    "--model-name": Change("whisper-1", of_service("model_name")),
    "--token-file": Change("{tmp}/token", of_service("token")),
    "--max-upload": Change("1.5", of_service("max_upload")),
    "--max-seconds": Change("60", of_service("max_seconds")),
    "--max-requests": Change("3", lambda s: s.service.places.max_requests),
    "--max-waiting": Change("90", lambda s: s.service.places.max_waiting),
    "--max-segment": Change("4", of_transcriber("max_segment")),
    "--pause": Change("0.3", of_transcriber("pause")),
    "--max-duration": Change("50", of_transcriber("max_duration")),
    "--language": Change("de", of_service("language")),
}


def flags_of(parser):
    return {flag for action in parser._actions for flag in action.option_strings}


def test_every_flag_has_an_entry():
    """What the model is loaded by is transcribe.py's, and tested there."""
    shared = flags_of(transcribe.get_parser()) - set(FLAGS)
    assert set(FLAGS) == flags_of(serve.get_parser()) - shared
    assert shared - flags_of(serve.get_parser()) == {"--context", "--format", "--out"}


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(started, flag):
    change = FLAGS[flag]
    before = change.seen(started(*change.context))
    assert before != change.seen(started(*change.context, flag, change.value))


def test_a_flag_of_the_model_reaches_it(started):
    assert started("--max-new-tokens", "7").service.worker.transcriber.recognizer.options != (
        started().service.worker.transcriber.recognizer.options
    )


def test_nothing_outside_this_machine_is_listened_to_by_default(started):
    assert started().host == "127.0.0.1"


def test_connections_are_kept_longer_than_clients_use_them_again(started):
    """Else the server may close one that a client just wrote to, and the request is lost."""
    assert started().keep_alive > 2 * httpx.Limits().keepalive_expiry


def test_an_open_server_without_a_token_is_warned_of(started, caplog):
    started("--host", "0.0.0.0", "--token-file", "{tmp}/token")
    assert "whoever reaches it" not in caplog.text
    started("--host", "0.0.0.0")
    assert "--host 0.0.0.0 without --token-file: whoever reaches it" in caplog.text


def test_the_token_is_the_first_line(started):
    assert started("--token-file", "{tmp}/token").service.token == "sesame"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--token-file", "{tmp}/none"), "none is missing"),
        (("--token-file", "{tmp}/empty"), "begins with an empty line"),
        (("--max-requests", "0"), "--max-requests 0 must be a number above 0"),
        (("--max-seconds", "nan"), "--max-seconds nan must be a number above 0"),
        (("--max-upload", "inf"), "--max-upload inf must be a number above 0"),
        (("--port", "99999"), "--port 99999 must be from 0 to 65535"),
        (("--checkpoint", "none.pt"), "none.pt"),
    ],
)
def test_what_is_wrong_is_a_sentence(started, flags, sentence):
    assert sentence in started(*flags).sentence


def test_sigterm_stops_the_server(serving_process):
    process, url = serving_process
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "Application shutdown complete" in said
    assert process.returncode == -signal.SIGTERM  # as whoever sent it expects, after all is done
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.fixture
def serving_process(tiny_exp, tiny_transcribe_argv, tmp_path):
    """A server in a process of its own; its encoder size is one that only tests know."""
    code = (
        "import sys\n"
        "sys.path[:0] = sys.argv[1].split(':')\n"
        "from speechllm.zipformer import SIZES, ZipformerConfig\n"
        "SIZES['test'] = ZipformerConfig(num_encoder_layers=(1, 1, 1),"
        " downsampling_factor=(1, 2, 1), feedforward_dim=(16, 24, 16), num_heads=(2,),"
        " encoder_dim=(16, 24, 16), encoder_unmasked_dim=(12, 16, 12),"
        " cnn_module_kernel=(7, 5, 7), query_head_dim=(8,), value_head_dim=(4,),"
        " frontend_channels=16, pos_dim=12)\n"
        "import serve\n"
        "serve.main(sys.argv[2:])\n"
    )
    argv = [*tiny_transcribe_argv(tiny_exp), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, os.path.dirname(serve.__file__), *argv],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = []
    for line in process.stderr:
        seen.append(line)
        if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
            break
    assert found, "".join(seen)
    yield process, found[1]
    process.kill()
    process.wait()
