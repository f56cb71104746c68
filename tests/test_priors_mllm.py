"""Concept priors by a vision-language model: a real server on loopback, the answers on disk, and a tiny local model."""

import base64
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet2.data.concept_prior import ConceptPriors, PriorWriter
from ovdet2.errors import CacheError, DataError, SetupError, UsageError
from ovdet2.files import sha256_file
from ovdet2.priors.answers import Answer, AnswerBook, parse_answer, yes_probability
from ovdet2.priors.chat_server import ChatServer, image_bytes
from ovdet2.priors.local_model import LocalModel
from ovdet2.priors.mllm import MllmBackend
from tests.micro_training import SPLIT, write_data
from tools.build_concept_priors import main

WORDS = ("cat", "dog", "Red_Mug")
COMPLETION = "/v1/chat/completions"


# ---- a server --------------------------------------------------------------------------------------------------------


def says(text, logprobs=None, **message):
    """A chat completion; ``logprobs`` is [(token, [(alternative, log probability), ...]), ...]."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    if logprobs is not None:
        places = [
            {
                "token": token,
                "logprob": others[0][1],
                "top_logprobs": [{"token": other, "logprob": value} for other, value in others],
            }
            for token, others in logprobs
        ]
        choice["logprobs"] = {"content": places}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def of_probability(yes):
    """A reply whose next-token probabilities give ``yes`` after the rest is renormalised away."""
    others = [("Yes", math.log(0.8 * yes)), ("No", math.log(0.8 * (1 - yes))), ("Maybe", math.log(0.2))]
    return says("Yes" if yes > 0.5 else "No", [("Yes" if yes > 0.5 else "No", others)])


class Server:
    """Speaks chat completions. ``reply(question, times)`` gives a dict (status 200), (status, headers, bytes), or a
    number of seconds to be silent for; ``times`` counts how often the same image and question came before."""

    def __init__(self, reply):
        self.reply, self.requests, self.headers = reply, [], []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        image, question = (part for part in body["messages"][0]["content"])
        with self.lock:
            times = sum(seen == body for seen in self.requests)
            self.requests.append(body)
            self.headers.append((handler.path, dict(handler.headers)))
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            answer = self.reply(question["text"], times)
            if isinstance(answer, float):
                time.sleep(answer)
                return
            status, headers, data = (200, {}, json.dumps(answer).encode()) if isinstance(answer, dict) else answer
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side was killed, or did not wait
        finally:
            with self.lock:
                self.busy -= 1

    def questions(self):
        return [body["messages"][0]["content"][1]["text"] for body in self.requests]


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def client(server, **options):
    defaults = {"model": "test-model", "workers": 1, "timeout": 5.0, "tries": 3, "first_wait": 0.01}
    return ChatServer(**({"url": server.url} | defaults | options))


@pytest.fixture
def records(tmp_path):
    """Records of three images."""
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return [{"image_id": 10 + i, "file_name": str(tmp_path / f"{i}.png")} for i in range(3)]


def run(model, folder, records, words=WORDS, **options):
    """(backend, {image id: {word index: score}}, messages of skipped images)."""
    backend, skipped = MllmBackend(model, folder, words, **options), []
    found = {i: dict(zip(w.tolist(), s.tolist())) for i, w, s in backend.lists(records, skipped.append)}
    return backend, found, skipped


def never(question, times):
    raise AssertionError("asked again")


def only(record, server, tmp_path, **options):
    """The score of one question."""
    _, found, skipped = run(client(server, **options), tmp_path / "answers", [record], words=("cat",))
    return found.get(record["image_id"]), skipped


def test_probabilities_of_tokens(serve, records, tmp_path):
    chances = {"cat": 0.9, "dog": 0.125, "red mug": 0.5}
    server = serve(lambda question, times: of_probability(chances[question.split("Does ")[1].split(" exist")[0]]))
    backend, found, skipped = run(client(server), tmp_path / "answers", records)
    assert not skipped and (backend.asked, backend.known, backend.unparsable) == (9, 0, 0)
    for record in records:
        assert found[record["image_id"]] == pytest.approx({0: 0.9, 1: 0.125, 2: 0.5}, abs=1e-6)
    assert server.questions()[2] == "Question: Does red mug exist in the image? Answer:"


def test_what_is_sent(serve, records, tmp_path):
    server = serve(lambda question, times: says("Yes"))
    only(records[0], server, tmp_path, key="secret", extra={"max_tokens": None, "max_completion_tokens": 4})
    (body,), ((path, headers),) = server.requests, server.headers
    kind, data = body["messages"][0]["content"][0]["image_url"]["url"].split(";base64,")
    assert path == COMPLETION and headers["Authorization"] == "Bearer secret"
    assert kind == "data:image/png" and base64.b64decode(data) == open(records[0]["file_name"], "rb").read()
    assert body["model"] == "test-model" and body["logprobs"] is True and body["temperature"] == 0
    assert body["max_completion_tokens"] == 4 and "max_tokens" not in body
    again = serve(lambda question, times: says("No"))
    only(records[1], again, tmp_path, url=again.url + "/chat/completions/")
    assert again.headers[0][0] == COMPLETION and "Authorization" not in again.headers[0][1]


def test_answers_in_words_and_refusals(serve, records, tmp_path):
    texts = {"cat": says("Yes, there is one."), "dog": says(" no."), "red mug": says(None, refusal="I cannot help.")}
    server = serve(lambda question, times: texts[question.split("Does ")[1].split(" exist")[0]])
    backend, found, _ = run(client(server), tmp_path / "answers", records[:1])
    assert found == {10: {0: 1.0, 1: 0.0}} and backend.unparsable == 1
    backend, found, _ = run(client(serve(never)), tmp_path / "answers", records[:1])  # a refusal is not asked again
    assert found == {10: {0: 1.0, 1: 0.0}} and (backend.asked, backend.known, backend.unparsable) == (0, 3, 1)


PASSING = {
    "silence": 1.0,
    "429": (429, {"Retry-After": "0.3"}, b"slow down"),
    "500": (500, {}, b"<html>oops"),
    "503": (503, {}, b""),
    "no json": (200, {}, b'{"choices": [{"mess'),
    "cut short": (200, {"Content-Length": "900"}, b'{"choices": '),
    "no choices": {"choices": []},
    "error inside": {"error": {"message": "overloaded"}},
    "parts": says(["Yes"]),
    "broken logprobs": says("Yes", [("Yes", [("Yes", "high")])]),
    "nested": (200, {}, b"[" * 100_000),
}


@pytest.mark.parametrize("first", PASSING)
def test_passing_failures_are_tried_again(serve, records, tmp_path, first):
    server = serve(lambda question, times: PASSING[first] if times == 0 else of_probability(0.75))
    start = time.monotonic()
    assert only(records[0], server, tmp_path, timeout=0.4) == ({0: pytest.approx(0.75)}, [])
    assert len(server.requests) == 2 and (first != "429" or time.monotonic() - start >= 0.3)


@pytest.mark.parametrize("kind", ["no json", "no choices", "error inside", "parts", "broken logprobs", "nested"])
def test_replies_that_stay_malformed_name_image_and_word(serve, records, tmp_path, kind):
    server = serve(lambda question, times: PASSING[kind] if "dog" in question else says("yes"))
    backend, found, skipped = run(client(server, workers=2), tmp_path / "answers", records[:2])
    assert found == {} and len(skipped) == 2  # without an answer for one word there is no list
    assert any(f"{records[0]['file_name']}, word 'dog': the reply" in message for message in skipped)
    assert all("(3 tries at" in message for message in skipped)
    healed = serve(lambda question, times: says("no"))
    backend, found, skipped = run(client(healed), tmp_path / "answers", records[:2])
    assert healed.questions() == ["Question: Does dog exist in the image? Answer:"] * 2  # the others were kept
    assert found == {10: {0: 1.0, 1: 0.0, 2: 1.0}, 11: {0: 1.0, 1: 0.0, 2: 1.0}} and not skipped


@pytest.mark.parametrize(
    "reply, tries, message",
    [
        (1.0, 3, r"0.png, word 'cat': no reply \(.*imed? ?out"),
        ((503, {}, b"busy"), 3, "status 503, 'busy'"),
        ((401, {}, b"who are you"), 1, "status 401, 'who are you'. Check --url, --model and the key"),
        ((404, {}, b""), 1, "status 404"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), 1, "status 302"),
        ((429, {"Retry-After": "4000"}, b""), 1, "asks to wait 4000 s"),
    ],
)
def test_a_server_that_cannot_be_used_stops_the_run(serve, records, tmp_path, reply, tries, message):
    server = serve(lambda question, times: reply)
    with pytest.raises(SetupError, match=message) as raised:
        only(records[0], server, tmp_path, timeout=0.3, key="secret")
    assert len(server.requests) == tries and "secret" not in str(raised.value)


def test_no_server(serve, records, tmp_path):
    server = serve(never)
    server.http.server_close()
    with pytest.raises(SetupError, match="no reply .*efused"):
        only(records[0], server, tmp_path)
    for url in ("file:///etc/passwd", "localhost:8000", "http://"):
        with pytest.raises(UsageError, match="no http or https address"):
            ChatServer(url, "m")


def test_a_refused_request_is_of_its_image(serve, records, tmp_path):
    server = serve(lambda question, times: (400, {}, b"too long"))
    found, skipped = only(records[0], server, tmp_path)
    assert found is None and len(skipped) == 1 and "status 400, 'too long'. See --request" in skipped[0]
    assert len(server.requests) == 1


def test_retry_after_by_date(serve, records, tmp_path):
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 4000))
    server = serve(lambda question, times: (429, {"Retry-After": later}, b""))
    with pytest.raises(SetupError, match=r"asks to wait (3999|4000|399\d) s"):
        only(records[0], server, tmp_path)
    server = serve(lambda question, times: (429, {"Retry-After": "soon"}, b"") if times == 0 else says("yes"))
    assert only(records[0], server, tmp_path) == ({0: 1.0}, [])


def test_two_workers_ask_at_once(serve, records, tmp_path):
    """Each question waits until another one is there, or half a second."""
    meet = threading.Barrier(2)

    def reply(question, times):
        try:
            meet.wait(timeout=5)
        except threading.BrokenBarrierError:
            pass
        return says("yes")

    server = serve(reply)
    _, found, _ = run(client(server, workers=2), tmp_path / "answers", records[:2], words=("cat", "dog"))
    assert server.most_busy == 2 and found == {10: {0: 1.0, 1: 1.0}, 11: {0: 1.0, 1: 1.0}}


def test_unreadable_images_are_left_out_and_not_asked_about(serve, records, tmp_path):
    open(records[0]["file_name"], "wb").write(b"\x89PNG torn")
    os.remove(records[1]["file_name"])
    server = serve(lambda question, times: says("yes"))
    _, found, skipped = run(client(server), tmp_path / "answers", records)
    assert list(found) == [12] and len(server.requests) == 3
    assert sorted("0.png" in message for message in skipped) == [False, True]


@pytest.mark.parametrize("name", ["cmyk.jpg", "turned.jpg", "deep.png", "alpha.png", "palette.gif"])
def test_images_that_readers_differ_about_are_sent_as_decoded(tmp_path, name):
    from ovdet2.data.images import read_image

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "cmyk.jpg": image.convert("CMYK"),
        "turned.jpg": image,
        "deep.png": Image.fromarray(rng.integers(0, 65535, (40, 48)).astype(np.uint16)),
        "alpha.png": image.convert("RGBA"),
        "palette.gif": image.convert("P"),
    }
    images[name].save(tmp_path / name, **({"exif": exif} if name == "turned.jpg" else {}))
    kind, data = image_bytes(tmp_path / name)
    (tmp_path / "sent.png").write_bytes(data)
    assert kind == "png" and np.array_equal(np.asarray(Image.open(tmp_path / "sent.png")), read_image(tmp_path / name))
    image.save(tmp_path / "plain.jpg")
    assert image_bytes(tmp_path / "plain.jpg") == ("jpeg", (tmp_path / "plain.jpg").read_bytes())


# ---- answers on disk -------------------------------------------------------------------------------------------------


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
        with pytest.raises(CacheError, match=f"{put} questions were put, as --max-queries says, and {left} remain"):
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
    again.add("a" * 64, "dog", Answer(None, "?"))
    again.close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 2  # a file has one writer
    assert AnswerBook(tmp_path, {"model": "m"}).get("a" * 64, "dog") == (None, "?")
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


# ---- a local model ---------------------------------------------------------------------------------------------------

TOKENS = "<pad> <unk> <s> </s> <image> Yes yes No no Question : Does exist in the image ? Answer cat dog bar disc ring"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a LLaVA of random weights with a word-level tokenizer."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = TOKENS.split()
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**size, image_size=32, patch_size=16)
    text = transformers.LlamaConfig(**size, vocab_size=len(tokens))
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # untrained logits are all alike
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=fast,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


QUESTIONS = ["Question: Does cat exist in the image? Answer:", "Does dog dog dog exist in the image?", "cat?"]


def test_local_probabilities(tiny, records):
    """Questions of different lengths in one padded batch, against the plain forward of each alone in float64."""
    local = LocalModel(tiny)
    network = local.network.double()
    for record in records:
        image = local.prepare(record["file_name"])
        wanted = []
        for question in QUESTIONS:
            inputs = local.processor(images=[image], text=[f"<image>\n{question}"], return_tensors="pt")
            inputs["pixel_values"] = inputs["pixel_values"].double()
            with torch.no_grad():
                odds = network(**inputs).logits[0, -1].exp()
            wanted.append((odds[5:7].sum() / odds[5:9].sum()).item())
        assert max(wanted) - min(wanted) > 1e-3
        assert local.probabilities(image, QUESTIONS).tolist() == pytest.approx(wanted, abs=1e-5)


def test_local_model_in_chat_format(tiny, records):
    local = LocalModel(tiny)
    local.processor.chat_template = (
        "{% for m in messages %}Question : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} Answer :{% endif %}"
    )
    assert local._prompt("Does cat exist?") == "Question : <image>Does cat exist? Answer :"
    image = local.prepare(records[0]["file_name"])
    together = local.probabilities(image, QUESTIONS)
    assert torch.allclose(together, torch.cat([local.probabilities(image, [q]) for q in QUESTIONS]), atol=1e-5)


def test_local_answers_are_kept(tiny, records, tmp_path):
    local = LocalModel(tiny, batch_size=2)
    backend, found, _ = run(local, tmp_path / "answers", records, words=("cat", "dog", "ring"))
    assert backend.asked == 9 and backend.source["model_sha256"] == local.identity["model_sha256"]
    for record in records:
        image = local.prepare(record["file_name"])
        wanted = local.probabilities(image, [f"Question: Does {w} exist in the image? Answer:" for w in ("cat", "dog")])
        assert [found[record["image_id"]][i] for i in (0, 1)] == pytest.approx(wanted.tolist(), abs=1e-5)
    local.ask = never
    assert run(local, tmp_path / "answers", records, words=("cat", "dog", "ring"))[1] == found


def test_models_that_cannot_be_used(tiny, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is no folder"):
        LocalModel(tmp_path / "none")
    with pytest.raises(DataError, match="could not be loaded"):
        LocalModel(tmp_path)
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")  # pickled weights are not opened
    with pytest.raises(DataError, match="could not be loaded .*safetensors"):
        LocalModel(tmp_path)
    renamed = (tmp_path / "tokenizer.json").read_text().replace('"Yes"', '"Aye"').replace('"yes"', '"aye"')
    (tmp_path / "tokenizer.json").write_text(renamed)
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="no single token for yes or for no"):
        LocalModel(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SetupError, match="pip install transformers"):
        LocalModel(tiny)


# ---- the tool --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


def build(data, *options):
    output = data / "p.safetensors"
    main(["--backend", "mllm", "--dataset", "ov_micro_val", "--output", str(output), *options])
    return ConceptPriors(output)


def test_server_by_the_tool(data, serve, monkeypatch, capsys):
    server = serve(lambda question, times: of_probability(0.9 if "disc" in question else 0.2))
    options = ["--url", server.url, "--model", "m", "--workers", "2", "--api-key-env", "MY_KEY"]
    with pytest.raises(UsageError, match="MY_KEY of --api-key-env is not set"):
        build(data, *options)
    monkeypatch.setenv("MY_KEY", "secret")
    with pytest.raises(CacheError, match="10 questions were put, as --max-queries says, and 26 remain"):
        build(data, *options, "--max-queries", "10")
    assert not (data / "p.safetensors").exists()
    priors = build(data, *options)
    assert len(server.requests) == 36 and len(priors) == 12 and priors.words == SPLIT.names
    assert priors.select(1, 0.5).tolist() == [SPLIT.names.index("disc")]
    assert "Questions: 26 put, 10 known; answers that say neither: 0" in capsys.readouterr().out
    everything = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    assert b"secret" not in everything and server.url.encode() not in everything


def test_local_by_the_tool(data, tiny):
    priors = build(data, "--local", str(tiny), "--device", "cpu", "--batch-size", "2")
    assert priors.manifest["source"]["model"] == tiny.name and priors.manifest["entries"] == 36
    # Narrowed to the best word of that prior: asked from the answers on disk, so nothing is put to the model.
    (data / "first").mkdir()
    os.rename(data / "p.safetensors", data / "first" / "p.safetensors")
    narrow = build(
        data,
        "--local",
        str(tiny),
        "--device",
        "cpu",
        "--candidates",
        str(data / "first" / "p.safetensors"),
        "--top",
        "1",
    )
    assert narrow.manifest["entries"] == 12
    assert all(torch.equal(narrow.select(i), priors.select(i, top=1)) for i in range(1, 13))
