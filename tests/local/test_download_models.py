"""local/download_models.sh and fetch.py, against a mirror of Hugging Face on 127.0.0.1."""

import hashlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fetch
import huggingface_hub.file_download as hub
import pytest

from speechllm.models.config import MOSE, ONE_ENCODER, load_model_config

SCRIPT = Path(__file__).resolve().parents[2] / "local" / "download_models.sh"
BLOCK = 1 << 20
LARGE = 3 * BLOCK + 17
ENCODER, BPE = fetch.GROUPS["encoder"]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def content(self) -> bytes | None:
        repo, _, file = unquote(urlsplit(self.path).path)[1:].partition("/resolve/main/")
        return self.server.files.get((repo, file))

    def do_HEAD(self):
        content = self.content()
        self.send_response(404 if content is None else 200)
        if content is not None:
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sha256 = hashlib.sha256(content).hexdigest()
            self.send_header("ETag", f'"{sha256 if len(content) == LARGE else git}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self):
        mirror, content = self.server, self.content()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        mirror.requests.append((self.path.partition("/resolve/main/")[2], start))
        if mirror.corrupt:
            content = b"x" + content[1:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])


@pytest.fixture
def mirror(monkeypatch):
    """A server with the paths and answers of huggingface.co."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub.constants, "DOWNLOAD_CHUNK_SIZE", BLOCK)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []  # (path, first byte requested)
    server.corrupt = False
    server.files = {  # (repo, path): content
        (repo, path): bytes([i]) * (LARGE if path.endswith((".pt", ".safetensors")) else 100)
        for i, (repo, path) in enumerate(fetch.GROUPS["all"].values())
    }
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield server
    server.shutdown()
    server.server_close()


def download(mirror, root: Path, *groups: str) -> None:
    fetch.main(["--mirror", mirror.url, "--root", str(root), *groups])


def files_in(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file() and path.name != "model.json"]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def expected(mirror, group: str) -> dict[str, bytes]:
    return {name: mirror.files[one] for name, one in fetch.GROUPS[group].items()}


def test_groups_are_downloaded_and_existing_files_are_kept(mirror, tmp_path):
    download(mirror, tmp_path, "all")
    assert files_in(tmp_path) == expected(mirror, "all")
    mirror.requests.clear()
    download(mirror, tmp_path, *fetch.GROUPS)
    assert mirror.requests == []
    for name, config in (("mose_", MOSE), ("", ONE_ENCODER)):
        exp_dir = tmp_path / "exp" / f"asr_librispeech_zipformer_{name}qwen2_1.5B"
        assert load_model_config(exp_dir) == config


@pytest.mark.parametrize("content", [b"my own", b"y" * 100])
def test_a_different_file_is_not_overwritten(mirror, tmp_path, content):
    (tmp_path / BPE).parent.mkdir(parents=True)
    (tmp_path / BPE).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{BPE} differs from http.*move it away"):
        download(mirror, tmp_path, "encoder")
    assert files_in(tmp_path) == {BPE: content} and mirror.requests == []


def test_an_interrupted_download_resumes(mirror, tmp_path):
    part = tmp_path / f"{ENCODER}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(expected(mirror, "encoder")[ENCODER][:1000])
    download(mirror, tmp_path, "encoder")
    assert ("exp/pretrained.pt", 1000) in mirror.requests
    assert files_in(tmp_path) == expected(mirror, "encoder")


def test_a_wrong_hash_is_an_error_and_leaves_nothing(mirror, tmp_path):
    mirror.corrupt = True
    with pytest.raises(SystemExit, match="pretrained.pt: size or hash differs"):
        download(mirror, tmp_path, "encoder")
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("problem", ["unreachable", "not found"])
def test_failures_have_instructions_for_a_manual_download_without_passwords(
    mirror, tmp_path, problem
):
    url = "http://127.0.0.1:1" if problem == "unreachable" else mirror.url
    mirror.files.clear()
    with pytest.raises(SystemExit) as stop:
        fetch.main(["--mirror", f"{url}/", "--root", str(tmp_path), "encoder"])
    (text,) = str(stop.value).splitlines()
    assert text.startswith(f"download from {url} failed: ")
    for name, (repo, file) in fetch.GROUPS["encoder"].items():
        assert f"{url}/{repo}/resolve/main/{file} to {name}" in text
    assert f"put them into {tmp_path}" in text and files_in(tmp_path) == {}

    secret = url.replace("://", "://user:t0ken@")
    with pytest.raises(SystemExit) as stop:
        fetch.main(["--mirror", secret, "--root", str(tmp_path), "encoder"])
    assert "://***@127.0.0.1" in str(stop.value) and "t0ken" not in str(stop.value)


@pytest.mark.slow
def test_shell_script_downloads_from_hf_endpoint_and_lists_groups(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("HF_ENDPOINT", mirror.url)
    command = [str(SCRIPT), "--root", str(tmp_path)]
    done = subprocess.run([*command, "baseline"], cwd="/", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == expected(mirror, "baseline")
    refused = subprocess.run([*command, "models"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "llm" in refused.stderr and "mose" in refused.stderr
