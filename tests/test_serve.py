"""serve.py as a user starts it; every flag changes something."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from flag_changes import Change

import serve
import transcribe
from speechllm.models.zipformer.config import SIZES
from speechllm.serving import app

SRC = Path(__file__).resolve().parents[1] / "src"
pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def started(monkeypatch, tiny_transcribe_argv, tiny_exp, tmp_path):
    """A function from flags to the service and its address, or to the message of an error."""
    (tmp_path / "token").write_text("sesame\nmore\n")
    (tmp_path / "empty").write_text("\n")

    def started(*flags):
        seen = SimpleNamespace(message="")

        def run(app, host, port, timeout_keep_alive, **_):
            seen.host, seen.port, seen.keep_alive = host, port, timeout_keep_alive

        def create_app(service):
            seen.service, seen.transcriber = service, service.transcriber
            service.stop()

        monkeypatch.setattr(uvicorn, "run", run)
        monkeypatch.setattr(app, "create_app", create_app)
        try:
            argv = [flag.format(tmp=tmp_path) for flag in flags]
            serve.main([*tiny_transcribe_argv(tiny_exp), *argv])
        except SystemExit as error:
            seen.message = error.code
        return seen

    return started


def server(seen):
    return seen.service.config


def longform(seen):
    return seen.transcriber.config


FLAGS = {
    "--host": Change("0.0.0.0", lambda s: s.host),
    "--port": Change("8001", lambda s: s.port),
    "--model-name": Change("whisper-1", server),
    "--token-file": Change("{tmp}/token", lambda s: s.service.token),
    "--allow-origin": Change("*", server),
    "--max-upload-mb": Change("1.5", server),
    "--max-audio-seconds": Change("60", server),
    "--max-concurrent-requests": Change("3", server),
    "--max-queued-seconds": Change("90", server),
    "--max-streams": Change("3", server),
    "--max-stream-speed": Change("2", server),
    "--max-stream-idle": Change("20", server),
    "--max-stream-duration": Change("60", server),
    "--max-segment-duration": Change("4", longform),
    "--min-silence": Change("0.3", longform),
    "--endpoint-silence": Change("0.3", longform),
    "--max-duration": Change("50", longform),
    "--dtype": Change("bfloat16", lambda s: s.transcriber.recognizer.dtype),
    "--language": Change("de", lambda s: s.transcriber.language),
    "--max-new-tokens": Change("7", lambda s: s.transcriber.recognizer.search),
}


def test_every_flag_has_an_entry():
    """Flags of the model are those of transcribe.py and tested there."""
    flags = set(serve.get_parser()._option_string_actions)
    of_transcribe = set(transcribe.get_parser()._option_string_actions)
    assert flags == of_transcribe - {"--context", "--format", "--out", "--stream"} | set(FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_changes_something(started, flag):
    change = FLAGS[flag]
    assert change.seen(started()) != change.seen(started(flag, change.value))


def test_a_public_server_without_a_token_is_warned_about(started, caplog):
    started("--host", "0.0.0.0", "--token-file", "{tmp}/token")
    assert "anyone can use" not in caplog.text
    started("--host", "0.0.0.0")
    assert "--host 0.0.0.0 without --token-file: anyone can use the server" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--token-file", "{tmp}/none"), "none is missing"),
        (("--token-file", "{tmp}/empty"), "empty: the first line is empty, expected a token"),
        (("--max-audio-seconds", "nan"), "--max-audio-seconds nan must be above 0"),
        (("--port", "99999"), "--port 99999 must be from 0 to 65535"),
    ],
)
def test_wrong_input_is_one_sentence(started, flags, message):
    assert message in started(*flags).message


@pytest.fixture
def serving_process(tiny_exp, tiny_transcribe_argv):
    """A server in its own process, and its URL."""
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from speechllm.models.zipformer.config import SIZES, ZipformerConfig\n"
        f"SIZES['test'] = {SIZES['test']!r}\n"
        "import serve\n"
        "serve.main(sys.argv[2:])\n"
    )
    argv = [*tiny_transcribe_argv(tiny_exp), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(SRC), *argv], stderr=subprocess.PIPE, text=True
    )
    log = []
    for line in process.stderr:
        log.append(line)
        if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
            break
    assert found, "".join(log)
    yield process, found[1]
    process.kill()
    process.wait()


@pytest.mark.slow
def test_sigterm_stops_the_server(serving_process):
    process, url = serving_process
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert "Application shutdown complete" in log
    assert process.returncode == -signal.SIGTERM  # uvicorn raises the signal again
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
