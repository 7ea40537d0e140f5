"""The page in a browser, as somebody sees it who drops a file or speaks."""

import asyncio
import base64
import re
import shutil
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from running import running

from speechllm.features import SAMPLING_RATE
from speechllm.serving import app, formats
from speechllm.serving.app import Service
from speechllm.serving.places import Refused

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
expect = sync_api.expect
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
def speech(tiny_corpus, tmp_path_factory):
    """Clips of 12 s or more together: a file, and what the microphone hears again and again."""
    clips = [soundfile.read(tiny_corpus / "audio" / f"train-{i}.wav")[0] for i in range(12)]
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    soundfile.write(path, np.concatenate(clips), SAMPLING_RATE, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def browser(speech):
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={speech}"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=flags, chromium_sandbox=False
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """A function from a server's address to its page; no page may fail or ask elsewhere."""
    contexts, asked, failures = [], [], []

    def on_console(message) -> None:
        if "Content Security Policy" in message.text:  # what it forbids is no request
            failures.append(message.text)

    def go(url: str):
        context = browser.new_context(accept_downloads=True, permissions=["microphone"])
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url.removeprefix("blob:")))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", on_console)
        page.goto(url)
        go.origins.add(url)
        return page

    go.origins = set()
    yield go
    for context in contexts:
        context.close()
    elsewhere = [url for url in asked if not url.startswith(tuple(go.origins))]
    assert (elsewhere, failures) == ([], [])


@pytest.fixture
def page(visit, url):
    return visit(url)


@pytest.fixture(scope="module", autouse=True)
def patience():
    expect.set_options(timeout=60_000)


def drop(page, path: Path, content: bytes | None = None) -> None:
    content = base64.b64encode(path.read_bytes() if content is None else content).decode()
    dropped = page.evaluate_handle(DROPPED, [path.name, "audio/wav", content])
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})


def says(page, pattern: str) -> None:
    expect(page.locator("#state")).to_have_text(re.compile(pattern))


def words_of(page) -> list[str]:
    return page.locator(".word").all_inner_texts()


def asked(url: str, path: Path, **form):
    """What the API says of a file."""
    with path.open("rb") as file:
        form = {"model": "tiny", **form}
        return httpx.post(url + app.TRANSCRIPTIONS, data=form, files={"file": file}, timeout=60)


@pytest.fixture
def answer(url, speech):
    """Of the API, with times."""
    granularities = ["segment", "word"]
    form = {"response_format": "verbose_json", "timestamp_granularities[]": granularities}
    return asked(url, speech, **form).json()


# ---- a file


def test_a_dropped_file_is_transcribed(page, answer, speech):
    drop(page, speech)
    says(page, r"^speech\.wav: done$")
    assert words_of(page) == [word["word"] for word in answer["words"]] != []
    assert page.locator(".segment").count() == len(answer["segments"]) > 2
    expect(page.locator("#model")).to_have_text("tiny")


def test_a_chosen_file_is_transcribed(page, answer, speech):
    with page.expect_file_chooser() as chooser:
        page.click("#choose")
    chooser.value.set_files(speech)
    says(page, r"^speech\.wav: done$")
    assert words_of(page) == [word["word"] for word in answer["words"]]


@pytest.fixture
def confidences(monkeypatch):
    """Words of many confidences: those of an untrained model are all near 0."""
    told = formats.words_json

    def varied(segment):
        return [{**word, "confidence": int(25 * word["start"]) % 5 / 4} for word in told(segment)]

    monkeypatch.setattr(formats, "words_json", varied)


def test_doubtful_words_are_shaded(confidences, page, answer, speech):
    drop(page, speech)
    says(page, "done$")
    shades = page.locator(".word").evaluate_all(
        "words => words.map(word => [getComputedStyle(word).backgroundColor, word.title])"
    )
    assert [title.split()[0] for _, title in shades] == [
        f"{100 * word['confidence']:.0f}" for word in answer["words"]
    ]
    opacities = [float(re.search(r"/ ([\d.e-]+)\)", shade)[1]) for shade, _ in shades]
    expected = [0.8 * (1 - word["confidence"]) for word in answer["words"]]
    assert opacities == pytest.approx(expected, abs=0.01)
    assert len({round(opacity, 2) for opacity in opacities}) > 2


@pytest.mark.parametrize("way", ["click", "keys"])
def test_a_word_is_heard_from_its_start_to_its_end(page, answer, speech, way):
    drop(page, speech)
    says(page, "done$")
    n = next(i for i, word in enumerate(answer["words"]) if word["start"] > 1)
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
        page.locator(".word").first.focus()
        for _ in range(n):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
    (began, _), (ended, at_the_end) = page.evaluate("window.times")
    word = answer["words"][n]
    assert began == pytest.approx(word["start"], abs=0.05) and began > 0
    assert word["end"] <= ended and not at_the_end


def test_downloaded_subtitles_are_those_of_the_api(page, url, speech):
    expect(page.locator("#save")).to_be_disabled()
    drop(page, speech)
    says(page, "done$")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "speech.srt"
    srt = asked(url, speech, response_format="srt").text
    assert Path(download.value.path()).read_text() == srt != ""


def test_a_second_file_takes_the_place_of_the_first(visit, held, speech, clip):
    service = held()
    with running(service) as url:
        page = visit(url)
        drop(page, speech)
        says(page, r"^speech\.wav: listening")
        drop(page, clip)
        service.worker.go.set()
        says(page, rf"^{clip.name}: done$")
        assert words_of(page) == asked(url, clip).json()["text"].split()
        expect(page.locator("#again")).to_be_hidden()  # the first has not failed


def test_of_several_files_none_is_silently_left_out(page, clip):
    page.locator("#file").evaluate("input => input.multiple = true")
    page.set_input_files("#file", [clip, clip])
    says(page, "these are 2 files")


def test_sound_that_the_browser_cannot_play_is_transcribed(page, speech, tmp_path):
    samples, rate = soundfile.read(speech)
    soundfile.write(path := tmp_path / "talk.au", samples, rate)
    drop(page, path)
    says(page, r"^talk\.au: done$")
    expect(page.locator("#how")).to_have_text("this browser cannot play the sound")
    expect(page.locator("#player")).to_be_hidden()
    page.locator(".word").first.click()  # does nothing, and does not fail


# ---- refusals


def test_no_sound(page):
    drop(page, Path("notes.wav"), b"these are notes")
    says(page, r"notes\.wav")
    expect(page.locator("#state")).to_have_class("wrong")
    assert not words_of(page)


def test_too_large(visit, transcriber, speech):
    with running(Service(transcriber, "tiny", max_upload=100_000)) as url:
        page = visit(url)
        drop(page, speech)
        says(page, r"^speech\.wav: the upload is above 0\.1 MB$")
        expect(page.locator("#again")).to_be_hidden()


def test_a_busy_server_can_be_asked_again(visit, transcriber, speech, answer):
    service = Service(transcriber, "tiny", max_waiting=0.1)
    with running(service) as url:
        page = visit(url)
        drop(page, speech)
        says(page, r"^speech\.wav: .* try again later$")
        service.places.max_waiting = 100
        page.click("#again")
        says(page, "done$")
        expect(page.locator("#again")).to_be_hidden()
    assert words_of(page) == [word["word"] for word in answer["words"]]


def test_a_server_that_is_gone(visit, transcriber, clip):
    with running(Service(transcriber, "tiny")) as url:
        page = visit(url)
        expect(page.locator("#model")).to_have_text("tiny")
    drop(page, clip)
    says(page, rf"^{clip.name}: the server does not answer$")


def test_the_token_is_asked_for(visit, transcriber, clip):
    with running(Service(transcriber, "tiny", token="s3same")) as url:
        page = visit(url)
        says(page, "^this server asks for its token$")
        drop(page, clip)
        says(page, f"^{clip.name}: this server asks for its token$")
        page.fill("#secret", "wrong")
        page.keyboard.press("Enter")
        says(page, "^this server has another token$")
        page.fill("#secret", "s3same")
        page.keyboard.press("Enter")
        says(page, f"^{clip.name}: done$")  # what had waited for the token
        expect(page.locator("#token")).to_be_hidden()
        assert words_of(page)


# ---- the microphone


@pytest.fixture
def heard(transcriber):
    """A service that counts requests, keeps transcripts, refuses or is slow as it is told to."""
    service = Service(transcriber, "tiny")
    transcript, accept = service.transcript, service.accept
    service.told, service.at_once, service.refuses, service.rests = [], [], False, 0

    def told(*args):
        service.told.append(transcript(*args))
        return service.told[-1]

    async def accepted(*args):
        service.at_once.append(service.places.requests)
        await asyncio.sleep(service.rests)
        if service.refuses:
            raise Refused(503, "busy")
        return await accept(*args)

    service.transcript, service.accept = told, accepted
    return service


def wait_for(page, condition) -> None:
    while not condition():
        page.wait_for_timeout(20)


def test_who_speaks_sees_the_text_before_the_end(visit, heard):
    with running(heard) as url:
        page = visit(url)
        page.set_viewport_size({"width": 360, "height": 320})
        page.click("#speak")
        provisional = page.locator(".provisional")
        expect(provisional).to_be_visible()
        assert provisional.evaluate("row => getComputedStyle(row).fontStyle") == "italic"
        settled = page.locator(".segment:not(.provisional)")
        expect(settled.first).to_be_visible()
        text, answers = settled.first.inner_text(), len(heard.told)
        wait_for(page, lambda: len(heard.told) >= answers + 2)
        assert settled.first.inner_text() == text
        expect(provisional).to_be_in_viewport()
        expect(page.locator("#speak")).to_be_in_viewport(ratio=1)
        expect(page.locator("#clock")).to_have_text(re.compile(r"^0:\d\d\.\d$"))
        page.click("#speak")
        says(page, r"^recording\.wav: done$")
        expect(provisional).to_have_count(0)
        *live, whole = heard.told
        assert words_of(page) == whole.text.split() != []
        assert set(heard.at_once[:-1]) == {1}  # the last may meet one that is given up
        assert whole.seconds > max(one.seconds for one in live)
        # What is settled is not asked again.
        assert any(later.seconds < former.seconds for former, later in pairwise(live))


def test_who_speaks_to_a_busy_server_waits(visit, heard, clip):
    heard.refuses, heard.rests = True, 2.0  # longer than the page rests between its questions
    with running(heard) as url:
        page = visit(url)
        page.click("#speak")
        says(page, "^recording: what is heard appears below$")
        wait_for(page, lambda: len(heard.at_once) == 2)
        assert heard.at_once == [1, 1]
        heard.rests = 0
        says(page, "^recording: what is heard appears below$")
        drop(page, clip)
        says(page, "^stop the recording first$")
        heard.refuses = False
        expect(page.locator(".provisional .word").first).to_be_visible()
        heard.refuses = True
        page.click("#speak")
        says(page, r"^recording\.wav: busy$")
        assert words_of(page)  # what was heard live stays
        heard.refuses = False
        page.click("#again")
        says(page, r"^recording\.wav: done$")
        assert words_of(page) == heard.told[-1].text.split()


def test_a_microphone_that_is_denied(page):
    page.evaluate("""() => { navigator.mediaDevices.getUserMedia =
      () => Promise.reject(new DOMException("Permission denied", "NotAllowedError")); }""")
    page.click("#speak")
    says(page, "^the microphone: .*denied")
    expect(page.locator("#speak")).to_have_text("Speak")
