"""Answers of a vision-language model: reading them, and keeping them on disk over runs, kills and processes."""

import math
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from ovdet2.errors import CacheError, UsageError
from ovdet2.io.files import sha256_file
from ovdet2.priors.answers import Answer, AnswerBook, parse_answer, yes_probability
from ovdet2.priors.chat_server import ChatServer
from ovdet2.priors.concept_prior import ConceptPriors, PriorWriter
from ovdet2.priors.mllm import MllmBackend
from tests.chat_cases import WORDS, client, never, of_probability, run, says, serving, write_pictures


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as start:
        yield start


@pytest.fixture
def records(tmp_path):
    return write_pictures(tmp_path)


def test_a_second_run_asks_nothing(serve, records, tmp_path):
    _, first, _ = run(client(serve(lambda q, t: of_probability(0.3))), tmp_path / "answers", records)
    backend, again, _ = run(client(serve(never)), tmp_path / "answers", records)
    assert again == first and (backend.asked, backend.known) == (0, 9)
    copy = [{"image_id": 77, "file_name": records[0]["file_name"]}]  # the content counts, not the id
    assert run(client(serve(never)), tmp_path / "answers", copy)[1] == {77: first[10]}


def test_another_model_prompt_or_request_is_asked_anew(serve, records, tmp_path):
    server = serve(lambda question, times: says("yes"))
    for options, prompt in (
        ({}, "Is [OBJ] there?"),
        ({"model": "other"}, "Is [OBJ] there?"),
        ({"extra": {"seed": 1}}, "Is [OBJ] there?"),
        ({}, "[OBJ]?"),
        ({}, "[OBJ]?"),
    ):
        run(client(server, **options), tmp_path / "answers", records[:1], words=("cat",), prompt=prompt)
    assert server.questions() == ["Is cat there?"] * 3 + ["cat?"]
    with pytest.raises(UsageError, match=r"has no \[OBJ\]"):
        MllmBackend(client(server), tmp_path, WORDS, prompt="Is a cat there?")


def test_budget_of_questions(serve, records, tmp_path):
    server = serve(lambda question, times: says("yes"))
    for put, left in ((4, 5), (4, 1)):
        with pytest.raises(
            CacheError, match=f"{put} questions were asked, the limit of --max-queries, and {left} remain"
        ):
            run(client(server, workers=2), tmp_path / "answers", records, max_queries=4)
    backend, found, _ = run(client(server), tmp_path / "answers", records, max_queries=4)
    assert backend.asked == 1 and len(server.requests) == 9 and len(found) == 3


def test_candidates_narrow_the_questions(serve, records, tmp_path):
    writer = PriorWriter(("dog", "sofa", "cat", "red mug"), [10, 11, 12])
    writer.add(10, None, torch.tensor([0.5, 0.9, 0.4, 0.6]))
    writer.add(11, torch.tensor([2]), torch.tensor([0.9]))
    writer.save(tmp_path / "clip", "made_up", "0" * 64, {"backend": "test"}, "prediction")
    server = serve(lambda question, times: says("yes"))
    backend, found, skipped = run(
        client(server), tmp_path / "answers", records, candidates=ConceptPriors(tmp_path / "clip"), top=2
    )
    assert found == {10: {1: 1.0, 2: 1.0}, 11: {0: 1.0}} and len(server.requests) == 3 and not skipped
    assert backend.source["top"] == 2 and backend.source["candidates"] == {"backend": "test"}


def _answer_all(url, folder, records, words):
    run(ChatServer(url, "test-model", workers=2, timeout=5.0), folder, records, words=words)


def test_a_killed_run_goes_on_where_it_was(serve, records, tmp_path):
    words = [f"word {i}" for i in range(20)]
    reached = threading.Event()

    def reply(question, times):
        if len(server.requests) >= 25:
            reached.set()
        time.sleep(0.01)
        return says("yes")

    server = serve(reply)
    child = multiprocessing.get_context("fork").Process(
        target=_answer_all, args=(server.url, tmp_path / "answers", records, words)
    )
    child.start()
    assert reached.wait(60)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    asked = len(server.requests)
    assert asked < 60
    kept = AnswerBook(tmp_path / "answers", {"model": "test-model", "prompt": MllmBackend.__init__.__defaults__[0]})
    digests = [sha256_file(record["file_name"]) for record in records]
    answered = sum(kept.get(digest, word) is not None for digest in digests for word in words)
    assert asked - 2 * 2 <= answered <= asked  # what two workers had under way
    backend, found, _ = run(client(server), tmp_path / "answers", records, words=words)
    assert backend.asked == 60 - answered and all(len(scores) == 20 for scores in found.values())
    run(client(serve(never)), tmp_path / "answers", records, words=words)


def test_two_processes_at_once(serve, records, tmp_path):
    words = [f"word {i}" for i in range(15)]
    server = serve(lambda question, times: says("yes"))
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_answer_all, args=(server.url, tmp_path / "answers", records, words)) for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    backend, found, _ = run(client(serve(never)), tmp_path / "answers", records, words=words)
    assert backend.book.damaged == 0 and all(len(scores) == 15 for scores in found.values())


def test_damaged_lines_are_asked_again(tmp_path):
    book = AnswerBook(tmp_path, {"model": "m"})
    for word in WORDS:
        book.add("a" * 64, word, Answer(0.25, "é\n"))
    book.close()
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"image": 3}\n\xff\n[]\n' + lines[2].replace(b"0.25", b"2.5")
    path.write_bytes(b"".join(lines)[:-7])  # and the last one torn
    again = AnswerBook(tmp_path, {"model": "m"})
    assert again.get("a" * 64, "cat") == (0.25, "é\n") and again.damaged == 5
    assert again.get("a" * 64, "dog") is None and again.get("a" * 64, "Red_Mug") is None
    again.add("a" * 64, "dog", Answer(0.5, "?"))
    again.add("b" * 64, "dog", Answer(None, "?"))
    assert again.get("b" * 64, "dog") == (None, "?")
    again.close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 2  # a file has one writer
    assert AnswerBook(tmp_path, {"model": "m"}).get("a" * 64, "dog") == (0.5, "?")
    assert AnswerBook(tmp_path, {"model": "m"}).get("b" * 64, "dog") is None  # neither yes nor no: asked again
    assert AnswerBook(tmp_path, {"model": "other"}).get("a" * 64, "dog") is None
    path.write_bytes(b"")
    assert AnswerBook(tmp_path, {"model": "m"}).damaged == 0


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Yes", 1.0),
        (" no, there is no cat.", 0.0),
        ("**Yes**", 1.0),
        ("Answer: No", 0.0),
        ("The answer is yes.", 1.0),
        ("NO", 0.0),
        ("Nothing of the kind", None),
        ("Yesterday", None),
        ("I see a cat", None),
        ("", None),
        ("It is unclear; no cat can be seen", None),
        ("<think></think>Yes", 1.0),
        ("<think>\n\n</think>\n\nNo.", 0.0),
        ("<think>Yes? A dog.</think> no", 0.0),
        ("The dog is a cat.</think>\nYes", 1.0),  # the opening tag is in the template of the chat
        ("<THINK>a</THINK><think>b</think>yes", 1.0),
        ("<reasoning>it is</reasoning>Answer: no", 0.0),
        ("<think>Yes, I", None),
        ("<think></think>", None),
        ("No, I cannot see any image.", None),
        ("No, I can\u2019t see the image you mention", None),
        ("No, I am unable to view images directly.", None),
        ("No. I don't have access to the image", None),
        ("No, there was no image attached: no image was provided.", None),
        ("No, as a text-based AI I do not know.", None),
        ("No, I cannot see any cat in the image.", 0.0),
        ("No, I do not see a picture in the image.", 0.0),
        ("No, there is no image of a cat.", 0.0),
        ("Yes, I can see it in the image.", 1.0),
    ],
)
def test_parsing(text, wanted):
    assert parse_answer(text) == wanted


def test_probability_sums_spellings_and_skips_what_is_no_word():
    half = math.log(0.5)
    spelled = [("Yes", math.log(0.3)), (" yes", math.log(0.1)), ("▁No", math.log(0.2)), ("Maybe", math.log(0.4))]
    assert yes_probability([("Yes", spelled)]) == pytest.approx(0.4 / 0.6)
    assert yes_probability([("\n", [("Yes", half)]), ("**", []), ("Yes", spelled)]) == pytest.approx(0.4 / 0.6)
    assert yes_probability([("The", spelled), ("Yes", spelled)]) is None
    assert yes_probability([("Yes", [("Yes", float("nan"))])]) is None
    assert yes_probability([]) is None
