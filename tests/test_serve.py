"""serve.py as a user starts it; every flag changes something."""

import itertools
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

import serve
import transcribe
from speechllm.cli import flag_name
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


CONFIG = {  # flags that become fields of the configs of the service and of its transcriber
    "--host": "0.0.0.0", "--port": "8001", "--model-name": "whisper-1", "--allow-origin": "*",
    "--token-file": "{tmp}/token", "--max-upload-mb": "1.5", "--max-audio-seconds": "60",
    "--max-concurrent-requests": "3", "--max-queued-seconds": "90", "--max-streams": "3",
    "--max-stream-speed": "2", "--max-stream-idle": "20", "--max-stream-duration": "60",
    "--max-segment-duration": "4", "--min-silence": "0.3", "--endpoint-silence": "0.3",
    "--max-duration": "50",
}  # fmt: skip
OTHERS = {
    "--dtype": ("bfloat16", lambda s: s.transcriber.recognizer.dtype),
    "--language": ("de", lambda s: s.transcriber.language),
    "--max-new-tokens": ("7", lambda s: s.transcriber.recognizer.search),
}


def test_every_flag_has_an_entry():
    """Flags of the model are those of transcribe.py and tested there."""
    flags = set(serve.get_parser()._option_string_actions)
    of_transcribe = set(transcribe.get_parser()._option_string_actions)
    of_transcribe -= {"--context", "--format", "--out", "--stream"}
    assert flags == {*of_transcribe, *CONFIG, *OTHERS}


@pytest.mark.slow
def test_every_flag_changes_something(started):
    before = started()
    for flag, (value, seen) in OTHERS.items():
        assert seen(started(flag, value)) != seen(before), flag
    after = started(*itertools.chain(*CONFIG.items()))
    changed = set()
    for configs in zip(*([s.service.config, s.transcriber.config] for s in (before, after))):
        one, other = map(vars, configs)
        changed |= {flag_name(field) for field in one if one[field] != other[field]}
    assert changed == set(CONFIG)
    assert (after.host, after.port, after.service.token) == ("0.0.0.0", 8001, "sesame")


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
