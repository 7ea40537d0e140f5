"""The report of a prepared corpus."""

from speechllm.data.corpora.corpus_report import report_text


def test_report_counts_words_and_files(prepare, tmp_path, write_audio):
    texts = {"a": "Yes, 7 times", "b": "no no", "c": "今天"}
    for name, text in texts.items():
        write_audio(tmp_path / f"in/{name}.wav", rate=8000).with_suffix(".txt").write_text(text)
    _, report = prepare("--folder", tmp_path / "in", "--language", "zh")
    text = report["text"]
    assert (text["words"], text["different_words"]) == (6, 5)
    assert report["languages"] == {"zh": 3} and report["shared_speakers"] == {}
    assert report["audio"] == {"files": 3, "rates": {"8000": 3}, "channels": {"1": 3}}
    train = report["splits"]["train"]
    assert train["seconds"] == {"shortest": 1.0, "median": 1.0, "longest": 1.0}

    text = (tmp_path / "out/x_report.txt").read_text("utf-8")
    assert text == report_text(report)
    assert "audio files: 3 of 8000 Hz\n" in text and "skipped: none\n" in text
    assert "text: 6 words, 5 different" in text
