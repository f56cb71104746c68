"""Concept priors by a tiny vision-language model of `transformers`, and by the tool with it and with a server."""

import os
import sys

import pytest
import torch
from build_concept_priors import main

from ovdet2.errors import CacheError, DataError, SetupError, UsageError
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.priors.local_model import LocalModel
from tests.chat_cases import never, of_probability, run, serving, write_pictures
from tests.micro_training import SPLIT, write_data

TOKENS = "<pad> <unk> <s> </s> <image> Yes yes No no Question : Does exist in the image ? Answer cat dog bar disc ring"


@pytest.fixture
def records(tmp_path):
    return write_pictures(tmp_path)


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as start:
        yield start


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
    with pytest.raises(CacheError, match="10 questions were asked, the limit of --max-queries, and 26 remain"):
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
