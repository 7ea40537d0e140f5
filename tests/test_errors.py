"""What programs end with."""

import pytest

from speechllm.errors import InputError, in_sentences


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("--avg 0 averages nothing"), "--avg 0 averages nothing"),
        (FileNotFoundError("s3://key:secret@there/x is missing"), "s3://***@there/x is missing"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_sentence_or_the_code_of_ctrl_c(error, code):
    @in_sentences
    def main(words=()):
        raise error

    with pytest.raises(SystemExit) as end:
        main(["--avg", "0"])
    assert end.value.code == code


def test_other_errors_keep_their_traceback_and_results_come_back():
    assert in_sentences(lambda x: x + 1)(2) == 3
    with pytest.raises(ZeroDivisionError):
        in_sentences(lambda: 1 / 0)()
