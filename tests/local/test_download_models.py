"""local/download_models.sh and fetch.py, against a mirror of Hugging Face on 127.0.0.1."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fetch
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "local" / "download_models.sh"
ENCODER = Path("models/zipformer/librispeech/transducer_crctc_large/pretrained.pt")
BPE = Path("models/zipformer/librispeech/bpe.model")
LARGE = 3 * fetch.CHUNK + 17


class Mirror:
    """Repositories with the paths and answers of huggingface.co, and faults to choose."""

    def __init__(self):
        self.files = {}  # (repo, path): content
        self.requests = []  # (path, first byte asked for)
        self.break_after = None  # bytes of an answer, after which the connection is closed
        self.broken_answers = 0  # so many answers break
        self.understands_range = True
        self.corrupt = False

    def add_all(self):
        for i, download in enumerate(fetch.GROUPS["all"]):
            is_large = download.file.endswith((".pt", ".safetensors"))
            self.files[download.repo, download.file] = bytes([i]) * (LARGE if is_large else 100)
            self.files[download.repo, "README.md"] = b"read me"

    def listing(self, repo: str) -> list[dict]:
        return [self.entry(path, content) for (r, path), content in self.files.items() if r == repo]

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        size = len(content)
        entry = {"type": "file", "path": path, "size": size, "oid": "of the pointer"}
        if size > 1000:
            sha256 = hashlib.sha256(content).hexdigest()
            return entry | {"lfs": {"oid": sha256, "size": size, "pointerSize": 134}}
        return entry | {"oid": hashlib.sha1(b"blob %d\0" % size + content).hexdigest()}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        mirror, path = self.server.mirror, unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").removesuffix("/tree/main")
            listing = mirror.listing(repo)
            return self.answer(200 if listing else 404, json.dumps(listing).encode())
        if "/resolve/main/" in path:  # large files live elsewhere
            self.send_response(302)
            self.send_header("Location", path.replace("/resolve/main/", "/cdn/"))
            return self.end_headers()
        repo, _, file = path[1:].partition("/cdn/")
        return self.send_file(mirror, file, mirror.files[repo, file])

    def send_file(self, mirror: Mirror, file: str, content: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        mirror.requests.append((file, start))
        if mirror.corrupt:
            content = b"x" + content[1:]
        if start and mirror.understands_range:
            return self.answer(206, content[start:], mirror)
        return self.answer(200, content, mirror)

    def answer(self, status: int, content: bytes, mirror: Mirror | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if mirror and mirror.broken_answers and len(content) > mirror.break_after:
            mirror.broken_answers -= 1
            content = content[: mirror.break_after]
        self.wfile.write(content)


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "PAUSE", 0)
    mirror = Mirror()
    mirror.add_all()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.mirror = mirror
    mirror.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield mirror
    server.shutdown()
    server.server_close()


def download(mirror: Mirror, root: Path, *groups: str) -> None:
    fetch.main(["--mirror", mirror.url, "--root", str(root), *groups])


def files_in(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def expected(mirror: Mirror, group: str) -> dict[str, bytes]:
    return {d.dest: mirror.files[d.repo, d.file] for d in fetch.GROUPS[group]}


@pytest.mark.parametrize("group", fetch.GROUPS)
def test_a_group_lands_where_the_recipe_looks(mirror, tmp_path, group):
    download(mirror, tmp_path, group)
    assert {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    } == expected(mirror, group)


def test_where_things_land():
    dests = {group: {d.dest for d in downloads} for group, downloads in fetch.GROUPS.items()}
    assert dests["encoder"] == {str(ENCODER), str(BPE)}
    assert dests["encoders"] == {str(BPE)} | {
        f"models/zipformer/librispeech/{name}/pretrained.pt"
        for name in ("transducer_large", "aed_crctc_large", "crctc_large", "transducer_crctc_large")
    }
    assert "models/qwen2-1.5b-instruct/model.safetensors" in dests["llm"]
    assert dests["baseline"] | dests["mose"] == {
        "exp/asr_librispeech_zipformer_qwen2_1.5B/epoch-10-avg-5.pt",
        "exp/asr_librispeech_zipformer_mose_qwen2_1.5B/epoch-10-avg-5.pt",
    }
    assert dests["all"] == set.union(*(dests[group] for group in dests if group != "all"))


def test_what_is_there_is_checked_and_kept(mirror, tmp_path):
    download(mirror, tmp_path, "encoder")
    mirror.requests.clear()
    download(mirror, tmp_path, "encoder", "encoder")
    assert mirror.requests == []


def test_another_file_in_the_place_is_not_overwritten(mirror, tmp_path):
    (tmp_path / BPE).parent.mkdir(parents=True)
    (tmp_path / BPE).write_bytes(b"my own")
    with pytest.raises(SystemExit, match=f"{BPE} is not http.*move it away"):
        download(mirror, tmp_path, "encoder")
    assert files_in(tmp_path) == {str(BPE)} and mirror.requests == []


@pytest.mark.parametrize("understands_range", [True, False])
def test_a_download_goes_on_where_it_was_cut_off(mirror, tmp_path, understands_range):
    mirror.understands_range = understands_range
    part = tmp_path / f"{ENCODER}.part"
    part.parent.mkdir(parents=True)
    content = expected(mirror, "encoder")[str(ENCODER)]
    part.write_bytes(content[:1000])
    download(mirror, tmp_path, "encoder")
    assert (tmp_path / ENCODER).read_bytes() == content
    assert ("exp/pretrained.pt", 1000) in mirror.requests
    assert files_in(tmp_path) == {str(ENCODER), str(BPE)}


def test_a_breaking_connection_is_taken_up_again(mirror, tmp_path):
    mirror.break_after, mirror.broken_answers = fetch.CHUNK, 2
    download(mirror, tmp_path, "encoder")
    starts = [start for file, start in mirror.requests if file == "exp/pretrained.pt"]
    assert starts == [0, fetch.CHUNK, 2 * fetch.CHUNK]
    assert (tmp_path / ENCODER).read_bytes() == expected(mirror, "encoder")[str(ENCODER)]


def test_giving_up_keeps_what_came_for_the_next_time(mirror, tmp_path):
    mirror.break_after, mirror.broken_answers = 0, fetch.ATTEMPTS
    with pytest.raises(SystemExit, match="run this again to go on where it stopped"):
        download(mirror, tmp_path, "encoder")
    assert len(mirror.requests) == fetch.ATTEMPTS
    assert files_in(tmp_path) == {f"{ENCODER}.part"}


def test_a_wrong_hash_is_refused_and_leaves_nothing(mirror, tmp_path):
    mirror.corrupt = True
    with pytest.raises(SystemExit, match="pretrained.pt has another size or hash than"):
        download(mirror, tmp_path, "encoder")
    assert files_in(tmp_path) == set()


def test_a_wrong_part_is_refused_too_and_a_too_long_one_begun_anew(mirror, tmp_path):
    part = tmp_path / f"{ENCODER}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of something else")
    with pytest.raises(SystemExit, match="another size or hash"):
        download(mirror, tmp_path, "encoder")
    assert files_in(tmp_path) == set()
    part.write_bytes(b"x" * (LARGE + 1))
    download(mirror, tmp_path, "encoder")
    assert files_in(tmp_path) == {str(ENCODER), str(BPE)}


def test_small_files_are_checked_too(mirror, tmp_path, monkeypatch):
    entry = mirror.entry("bpe.model", b"abc")
    record = fetch.find_record("m", fetch.Download("r", "bpe.model", "d"), [entry])
    path = tmp_path / "bpe.model"
    for content, is_right in ((b"abc", True), (b"abd", False), (b"abcd", False)):
        path.write_bytes(content)
        assert record.matches(path) == is_right


def test_a_file_the_repository_lacks_is_named_before_any_download(mirror, tmp_path):
    del mirror.files[fetch.BPE.repo, fetch.BPE.file]
    with pytest.raises(SystemExit, match="has no file data/lang_bpe_500/bpe.model; it has exp/pre"):
        download(mirror, tmp_path, "encoder")
    assert mirror.requests == []


def test_too_little_space_is_said_before_any_download(mirror, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match=r"0\.0 GB to download, 0\.0 GB free in "):
        download(mirror, tmp_path, "encoder")
    assert mirror.requests == []


@pytest.mark.parametrize("fault", ["unreachable", "not found", "no listing"])
def test_without_a_mirror_it_says_what_to_fetch_by_hand(mirror, tmp_path, monkeypatch, fault):
    url = mirror.url
    if fault == "unreachable":
        url = "http://127.0.0.1:1"
    elif fault == "not found":
        mirror.files.clear()
    else:
        monkeypatch.setattr(Mirror, "listing", lambda self, repo: {"error": "log in"})
    with pytest.raises(SystemExit) as stop:
        fetch.main(["--mirror", f"{url}/", "--root", str(tmp_path), "encoder"])
    (text,) = str(stop.value).splitlines()
    for item in fetch.GROUPS["encoder"]:
        assert f"{url}/{item.repo}/resolve/main/{item.file} to {item.dest}" in text
    assert f"put them into {tmp_path}" in text
    assert files_in(tmp_path) == set()


def test_the_shell_script(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    command = [str(SCRIPT), "--mirror", mirror.url, "--root", str(tmp_path)]
    done = subprocess.run([*command, "baseline"], cwd="/", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == set(expected(mirror, "baseline"))
    refused = subprocess.run([*command, "models"], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "llm" in refused.stderr and "mose" in refused.stderr  # the groups there are


def test_names_in_a_listing_are_no_places_for_files(mirror, tmp_path):
    for download_ in fetch.GROUPS["encoder"]:
        for name in ("../../outside", "/tmp/outside", "exp/../../../outside"):
            mirror.files[download_.repo, name] = b"hostile"
    root = tmp_path / "a" / "b" / "c"
    root.mkdir(parents=True)
    download(mirror, root, "encoder")
    assert files_in(tmp_path) == {f"a/b/c/{ENCODER}", f"a/b/c/{BPE}"}
    assert not Path("/tmp/outside").exists()


@pytest.mark.parametrize(
    "entries", [["x"], [{"size": 3}], [{"path": "exp/pretrained.pt", "size": "../x"}], [None]]
)
def test_a_listing_of_something_else(mirror, tmp_path, monkeypatch, entries):
    monkeypatch.setattr(mirror, "listing", lambda repo: entries)
    with pytest.raises(SystemExit, match="is not listed as Hugging Face lists files: "):
        download(mirror, tmp_path, "encoder")
    assert not files_in(tmp_path)


def test_a_password_of_the_mirror_is_not_told(mirror, tmp_path):
    url = mirror.url.replace("://", "://user:t0ken@")
    with pytest.raises(SystemExit) as error:
        fetch.main(["--mirror", url, "--root", str(tmp_path), "encoder"])
    assert "://***@127.0.0.1" in str(error.value) and "t0ken" not in str(error.value)
