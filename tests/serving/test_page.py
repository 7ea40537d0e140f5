"""The page in a browser: files, errors and live recordings."""

import base64
import re
import shutil
from pathlib import Path

import httpx
import pytest
from running import eventually, running, service_of

from speechllm.serving.middleware import TRANSCRIPTIONS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
expect = sync_api.expect
expect.set_options(timeout=60_000)
FLAGS = ("--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--use-fake-ui-for-media-stream",
         "--use-fake-device-for-media-stream")  # fmt: skip
DROPPED = """([name, type, content]) => {
  const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], name, { type }));
  return dropped;
}"""


@pytest.fixture(scope="module")
def browser(long_clip):
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={long_clip}"]
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=CHROMIUM, args=flags, chromium_sandbox=False
        )


@pytest.fixture
def visit(browser):
    """A function from a server's URL to its page; checks that its scripts do not fail."""
    pages, failures = [], []

    def on_console(message) -> None:
        if "Content Security Policy" in message.text:
            failures.append(message.text)

    def go(url: str):
        page = browser.new_page(permissions=["microphone"])
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", on_console)
        page.goto(url)
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert failures == []


@pytest.fixture
def page(visit, url):
    return visit(url)


def drop(page, path: Path, content: bytes | None = None) -> None:
    content = base64.b64encode(path.read_bytes() if content is None else content).decode()
    dropped = page.evaluate_handle(DROPPED, [path.name, "audio/wav", content])
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})


def expect_status(page, pattern: str) -> None:
    expect(page.locator("#state")).to_have_text(re.compile(pattern))


def words_of(page) -> list[str]:
    return page.locator(".word").all_inner_texts()


def posted(url: str, path: Path, **form):
    """Return the API's response to a file."""
    with path.open("rb") as file:
        form = {"model": "tiny", **form}
        return httpx.post(url + TRANSCRIPTIONS, data=form, files={"file": file}, timeout=60)


@pytest.fixture
def expected(url, long_clip):
    """Verbose JSON of the API."""
    granularities = ["segment", "word"]
    form = {"response_format": "verbose_json", "timestamp_granularities[]": granularities}
    return posted(url, long_clip, **form).json()


# ---- files


@pytest.mark.parametrize("way", ["drop", "choose"])
def test_a_file_is_transcribed_and_downloaded_as_srt(page, url, expected, long_clip, way):
    expect(page.locator("#save")).to_be_disabled()
    if way == "drop":
        drop(page, long_clip)
    else:
        with page.expect_file_chooser() as chooser:
            page.click("#choose")
        chooser.value.set_files(long_clip)
    expect_status(page, r"^long\.wav: done$")
    assert words_of(page) == [word["word"] for word in expected["words"]] != []
    assert page.locator(".segment").count() == len(expected["segments"]) > 2
    expect(page.locator("#model")).to_have_text("tiny")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "long.srt"
    srt = posted(url, long_clip, response_format="srt").text
    assert Path(download.value.path()).read_text() == srt != ""


@pytest.mark.parametrize("way", ["click", "keys"])
def test_a_word_is_played_from_start_to_end(page, expected, long_clip, way):
    drop(page, long_clip)
    expect_status(page, "done$")
    n = next(i for i, word in enumerate(expected["words"]) if word["start"] > 1)
    page.evaluate("""() => {
      const player = document.getElementById("player");
      const when = what => new Promise(done =>
        player.addEventListener(what, () => done([player.currentTime, player.ended]),
          { once: true }));
      window.times = Promise.all([when("seeked"), when("pause")]);
    }""")
    if way == "click":
        page.locator(".word").nth(n).click()
    else:
        page.locator(".word").nth(n).focus()
        page.keyboard.press("Enter")
    (began, _), (ended, at_the_end) = page.evaluate("window.times")
    word = expected["words"][n]
    assert began == pytest.approx(word["start"], abs=0.05) and began > 0
    assert word["end"] <= ended and not at_the_end


def test_a_second_file_replaces_the_first(visit, held, long_clip, clip):
    service = held()
    with running(service) as url:
        page = visit(url)
        drop(page, long_clip)
        expect_status(page, r"^long\.wav: transcribing")
        drop(page, clip)
        service.worker.go.set()
        expect_status(page, rf"^{clip.name}: done$")
        assert words_of(page) == posted(url, clip).json()["text"].split()
        expect(page.locator("#retry")).to_be_hidden()  # the first was only cancelled


# ---- errors


def test_unusable_files_and_a_denied_microphone_are_reported(page, clip):
    page.locator("#file").evaluate("input => input.multiple = true")
    page.set_input_files("#file", [clip, clip])
    expect_status(page, "choose one file at a time, not 2")
    drop(page, Path("notes.wav"), b"these are notes")
    expect_status(page, r"notes\.wav")
    expect(page.locator("#state")).to_have_class("error")
    assert not words_of(page)
    page.evaluate("""() => { navigator.mediaDevices.getUserMedia =
      () => Promise.reject(new DOMException("Permission denied", "NotAllowedError")); }""")
    page.click("#record")
    expect_status(page, "^microphone: .*denied")
    expect(page.locator("#record")).to_have_text("Record")


def test_a_token_is_requested_and_a_stopped_server_is_reported(visit, transcriber, clip):
    with running(service_of(transcriber, token="s3same")) as url:
        page = visit(url)
        expect_status(page, "^this server requires a token$")
        drop(page, clip)
        expect_status(page, f"^{clip.name}: this server requires a token$")
        page.fill("#token-input", "wrong")
        page.keyboard.press("Enter")
        expect_status(page, "^wrong token$")
        page.fill("#token-input", "s3same")
        page.keyboard.press("Enter")
        expect_status(page, f"^{clip.name}: done$")  # the file that waited for the token
        expect(page.locator("#token")).to_be_hidden()
        assert words_of(page)
    drop(page, clip)
    expect_status(page, f"^{clip.name}: the server does not respond$")


@pytest.mark.parametrize("is_allowed", [True, False])
def test_only_pages_of_allowed_origins_can_use_the_api(browser, url, transcriber, clip, is_allowed):
    origins = {"allow_origin": url} if is_allowed else {}
    with running(service_of(transcriber, "s3same", **origins)) as api:
        page = browser.new_page()
        page.goto(f"{url}/health")  # a page of another origin, without a content policy
        found = page.evaluate(
            """async ([url, content]) => {
              const form = new FormData();
              form.append("model", "whisper-1");
              form.append("seed", "1");
              const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
              form.append("file", new Blob([bytes]));
              const headers = { Authorization: "Bearer s3same" };
              try {
                const response = await fetch(url, { method: "POST", body: form, headers });
                return [(await response.json()).text, response.headers.get("X-Ignored")];
              } catch (error) { return [String(error), null]; }
            }""",
            [api + TRANSCRIPTIONS, base64.b64encode(clip.read_bytes()).decode()],
        )
        page.close()
    expected = [posted(url, clip).json()["text"], "seed"]
    assert found == (expected if is_allowed else ["TypeError: Failed to fetch", None])


# ---- the microphone


def test_text_appears_while_somebody_speaks(visit, transcriber):
    service = service_of(transcriber, token="s3same(")
    with running(service) as url:
        page = visit(url)
        page.fill("#token-input", "s3same(")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        page.set_viewport_size({"width": 360, "height": 320})
        page.click("#record")
        provisional = page.locator(".provisional")
        expect(provisional.locator("p")).to_have_text(re.compile(r"\w"))
        grey = page.locator("#state").evaluate("state => getComputedStyle(state).color")
        assert provisional.evaluate("row => getComputedStyle(row).color") == grey
        final = page.locator(".segment:not(.provisional)")
        expect(final.nth(1)).to_be_visible()
        starts = [float(start) for start in page.locator(".word").evaluate_all(
            "words => words.map(word => word.dataset.start)")]  # fmt: skip
        assert starts == sorted(starts) and starts[-1] >= 3
        expect(provisional).to_be_in_viewport()
        expect(page.locator("#record")).to_be_in_viewport(ratio=1)
        expect(page.locator("#clock")).to_have_text(re.compile(r"^0:\d\d\.\d$"))
        expect_status(page, "^recording: the live transcript appears below$")
        page.click("#record")
        expect_status(page, r"^recording\.wav: done$")
        expect(provisional).to_have_count(0)
        assert words_of(page) != []
        assert eventually(lambda: not service.admission.streams)


def test_a_recording_without_a_live_transcript_is_transcribed_at_its_end(visit, transcriber, clip):
    service = service_of(transcriber, max_streams=1)
    with running(service) as url, service.admission.open_stream():
        page = visit(url)
        waiting = []
        page.route("**/v1/models", lambda route: waiting.append(route))
        page.reload()
        page.click("#record")
        refused = "^recording: 1 streams are open, the maximum: try again later$"
        expect_status(page, refused)
        waiting[0].continue_()
        expect(page.locator("#model")).to_have_text("tiny")
        expect_status(page, refused)  # the answer about the model does not clear it
        drop(page, clip)
        expect_status(page, "^stop the recording first$")
        page.wait_for_timeout(1500)
        page.click("#record")
        expect_status(page, r"^recording\.wav: done$")
        assert words_of(page)
