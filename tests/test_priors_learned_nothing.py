"""A run of questions that learned nothing fails, and the next run asks a corrected server again."""

import json
import re

import pytest

from ovdet2.errors import DataError, SetupError
from ovdet2.priors.answers import yes_probability
from ovdet2.priors.chat_server import answer_of
from tests.chat_cases import client, run, says, serving, write_pictures

COMPLETION = {"id": "x", "object": "chat.completion"}


def choice(finish, **message):
    return COMPLETION | {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish}]}


def tokens(*texts):
    return [(text, [(text, -0.1), ("No" if text == "Yes" else "Yes", -2.3)]) for text in texts]


NEITHER = {
    "talk": says("The image shows a street."),
    "blind": says("No, I cannot see any image.", tokens("No", ",", " I")),
    "blind without the word": says("I'm sorry, but I can't view images."),
    "empty": says(""),
    "empty thinking": says("<think>\n\n</think>"),
    "thinking that is cut": choice("length", content="<think>Let me look"),
    "cut before it begins": choice("length", content=None, reasoning_content="Let me"),
    "content filter": choice("content_filter", content="Yes"),
    "content filter without a message": COMPLETION
    | {"choices": [{"message": None, "finish_reason": "content_filter"}]},
    "refusal": says(None, refusal="No, I cannot help with that."),
    "parts without text": says([{"type": "thinking", "thinking": "Yes"}]),
}


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as start:
        yield start


@pytest.fixture
def records(tmp_path):
    return write_pictures(tmp_path)


WORDS = [f"word {number}" for number in range(40)]


@pytest.mark.parametrize("kind", NEITHER)
def test_what_is_neither_yes_nor_no(kind, serve, records, tmp_path):
    assert answer_of(NEITHER[kind]).yes is None
    server = serve(lambda question, times: NEITHER[kind])
    with pytest.raises(
        DataError, match=r"(?s)(\d+) of \1 answers say neither yes nor no, so no prior is written"
    ) as raised:
        run(client(server, workers=2), tmp_path / "answers", records, words=WORDS)
    assert len(re.findall(r"'word \d+': ", str(raised.value))) == 3 and "--request" in str(raised.value)
    assert len(server.requests) < 40 and not list(tmp_path.glob("answers/*"))  # early, and nothing is stored
    healed = serve(lambda question, times: says("yes"))
    _, found, _ = run(client(healed), tmp_path / "answers", records, words=WORDS[:3])
    assert found == {10 + i: {0: 1.0, 1: 1.0, 2: 1.0} for i in range(3)}


def test_a_cut_answer_is_named(serve, records, tmp_path):
    server = serve(lambda question, times: NEITHER["thinking that is cut"])
    with pytest.raises(DataError, match="cut: finish_reason length.*max_tokens"):
        run(client(server), tmp_path / "answers", records)


@pytest.mark.parametrize("neither", range(10))
def test_only_a_majority_ends_the_run(neither, serve, records, tmp_path):
    words = WORDS[:9]

    def reply(question, times):
        number = int(question.split("word ")[1].split()[0])
        return NEITHER["talk"] if number < neither else says("no")

    server = serve(reply)
    if 2 * neither > 9:
        with pytest.raises(DataError, match=r"\d+ of \d+ answers"):
            run(client(server), tmp_path / "answers", records, words=words)
    else:
        backend, found, _ = run(client(server), tmp_path / "answers", records, words=words)
        assert backend.unparsable == 3 * neither and {len(scores) for scores in found.values()} == {9 - neither}


def test_few_old_refusals_are_no_majority(serve, records, tmp_path):
    """A second run asks only what was refused; it is judged with the answers of the first."""
    server = serve(lambda question, times: NEITHER["refusal"] if "word 3 " in question else says("yes"))
    for _ in range(2):
        backend, found, _ = run(client(server), tmp_path / "answers", records, words=WORDS)
        assert backend.unparsable == 3 and all(len(scores) == 39 for scores in found.values())
    assert backend.asked == 3


@pytest.mark.parametrize(
    "content, yes",
    [
        ([{"type": "text", "text": "Yes"}], 1.0),
        (["Yes"], 1.0),
        ([{"type": "text", "text": "N"}, {"type": "text", "text": "o, none"}], 0.0),
        ([{"type": "thinking", "thinking": "Yes"}, {"type": "text", "text": "No"}], 0.0),
        ([{"type": "output_text", "text": "no"}], 0.0),
        ("<think></think>Yes", 1.0),
        ("No, I cannot see any cat in the image.", 0.0),
    ],
)
def test_lists_of_parts_are_read(content, yes):
    assert answer_of(says(content)).yes == yes


@pytest.mark.parametrize("content", [[{"type": "text"}], [3], {"text": "Yes"}, 3, [{"type": "text", "text": ["Yes"]}]])
def test_contents_without_text_are_not_asked_again(content, serve, records, tmp_path):
    server = serve(lambda question, times: says(content))
    _, found, skipped = run(client(server), tmp_path / "answers", records[:1], words=("cat",))
    assert (
        found == {}
        and len(server.requests) == 1
        and "word 'cat': the reply has a content that is no text" in skipped[0]
    )


def test_probabilities_after_thinking():
    yes = tokens("Yes")
    for before in (
        ("<think>", "\n", "</think>", "\n"),
        ("<", "think", ">", "No", "</", "think", ">"),
        ("a", "</think>"),
    ):
        assert yes_probability([*tokens(*before), *yes]) == yes_probability(yes)
    assert yes_probability(tokens("<think>", "Yes")) is None  # it did not end


# error of a reply with status 200 -> requests made
ERRORS = {
    "of the model": ({"message": "image input is not supported", "type": "invalid_request_error"}, 1, DataError),
    "text": ("model not loaded", 1, DataError),
    "a code of the question": ({"code": 400, "message": "bad"}, 1, DataError),
    "a code of the key": ({"code": "401", "message": "no key"}, 1, SetupError),
    "a code that may pass": ({"code": 503, "message": "later"}, 3, SetupError),
    "overloaded": ({"type": "overloaded_error", "message": "x"}, 3, DataError),
    "rate limit": ({"code": "rate_limit_exceeded"}, 3, DataError),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_only_errors_that_may_pass_are_tried_again(kind, serve, records, tmp_path):
    error, requests, raised = ERRORS[kind]
    server = serve(lambda question, times: (200, {}, json.dumps({"error": error}).encode()))
    if raised is SetupError:
        with pytest.raises(SetupError):
            run(client(server), tmp_path / "answers", records[:1], words=("cat",))
    else:
        _, found, skipped = run(client(server), tmp_path / "answers", records[:1], words=("cat",))
        assert found == {} and "the reply is an error" in skipped[0] and "word 'cat'" in skipped[0]
    assert len(server.requests) == requests
