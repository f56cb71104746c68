"""The word bank: what of its words is used, saved and replaced, and which words had training boxes."""

import copy

import pytest
import torch

from ovdet2.engine import AtomicCheckpointer
from ovdet2.engine.trainer import _facts_of
from ovdet2.errors import DataError, UsageError
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary, from_buffers, further_trained_names
from ovdet2.vocabulary.bank import WordBank
from tests import micro


def test_a_bank_answers_for_its_words():
    words, background = micro.vocabulary(), torch.ones(8) / 8**0.5
    bank = WordBank(words, background)
    assert (bank.names, bank.teacher, bank.num_base, len(bank)) == (words.names, words.teacher, 3, 5)
    assert torch.equal(bank.rows(training=False), words.embeddings)
    assert torch.equal(bank.rows(training=True), words.embeddings[:3])
    bank.set(micro.vocabulary(("cat",), 0))
    assert bank.names == ("cat",) and torch.equal(bank.background, background)  # of the same prompts
    bank.set(micro.vocabulary(("cat",), 0), -background)
    assert torch.equal(bank.background, -background)
    with pytest.raises(UsageError, match="expected a Vocabulary, got str"):
        bank.set("cat, dog")


def test_bank_moves_with_the_model_and_refuses_another_space():
    bank = WordBank(micro.vocabulary())
    assert set(bank.state_dict()) == {"embeddings", "base_mask", "manifest"}
    with pytest.raises(DataError, match="micro / other"):
        bank.set(micro.vocabulary(teacher=Fingerprint("micro", "other", "1" * 64)))
    with pytest.raises(DataError, match="6 dimensions, the model 8"):
        bank.set(micro.vocabulary(dim=6))


def test_saved_vocabulary_of_another_k_is_fine_of_another_teacher_is_not():
    saved = WordBank(micro.vocabulary()).state_dict()
    bank = WordBank(micro.vocabulary(("cat", "dog"), 0))
    bank.adopt_saved_vocabulary(saved)
    assert bank.names == ("cat", "dog")
    assert bank.trained_base_names == set(micro.NAMES[:3])
    other = WordBank(micro.vocabulary(teacher=Fingerprint("micro", "other", "1" * 64))).state_dict()
    with pytest.raises(DataError, match="the checkpoint is of teacher micro / other"):
        bank.adopt_saved_vocabulary(other)
    with pytest.raises(DataError, match="trained with embeddings of 6 dimensions, but those of this run have 8"):
        bank.adopt_saved_vocabulary(WordBank(micro.vocabulary(dim=6)).state_dict())
    with pytest.raises(DataError, match="cannot be read"):
        bank.adopt_saved_vocabulary({"embeddings": saved["embeddings"]})


def test_training_refuses_words_out_of_order():
    words = micro.vocabulary()
    shuffled = words.select(torch.ones(5, dtype=torch.bool))
    shuffled.base_mask[:] = torch.tensor([False, True, True, True, False])
    with pytest.raises(UsageError, match="base words first"):
        WordBank(shuffled).training_embeddings


class Detector(torch.nn.Module):
    """The least that is trained, saved and evaluated."""

    def __init__(self, words):
        super().__init__()
        self.head = torch.nn.Linear(2, 2)
        self.vocabulary = WordBank(words)


def trained(folder, names, num_base, weights=""):
    """Train, as far as a checkpoint knows, with boxes of the first ``num_base`` words; returns the checkpoint."""
    model = Detector(micro.vocabulary(names, num_base))
    checkpointer = AtomicCheckpointer(model, str(folder))
    checkpointer.load(str(weights), checkpointables=[])
    checkpointer.save("model_final", iteration=0)
    return folder / "model_final.pth"


def loaded(path, words):
    model = Detector(words)
    AtomicCheckpointer(model).load_all(str(path))
    return model


class TestWordsThatHadBoxes:
    @pytest.fixture
    def chain(self, tmp_path):
        """Checkpoints of a training on cat and dog, one from it on dog and Red_Mug, one from that on owl."""
        first = trained(tmp_path / "1", ("cat", "dog", "owl"), 2)
        second = trained(tmp_path / "2", ("dog", "Red_Mug", "owl"), 2, first)
        return first, second, trained(tmp_path / "3", ("owl", "ant"), 1, second)

    @pytest.mark.parametrize("stage, known", [(0, "cat dog"), (1, "cat dog mug"), (2, "cat dog mug owl")])
    def test_trainings_unite(self, chain, stage, known):
        model = loaded(chain[stage], micro.vocabulary(("ant",), 0))
        expected = {"mug": "red mug"}
        assert model.vocabulary.trained_base_names == {expected.get(name, name) for name in known.split()}
        assert model.vocabulary.from_checkpoint

    def test_fewer_base_words_are_announced(self, tmp_path, caplog):
        """A fine-tuning on two classes of many: the others stay base words of the detector, and the log names them."""
        names = [f"word {number:02d}" for number in range(48)]
        first = trained(tmp_path / "1", names, 48)
        caplog.set_level("INFO", logger="ovdet2.vocabulary.bank")
        tuned = loaded(trained(tmp_path / "2", ("word 03", "word 05", "ant"), 2, first), micro.vocabulary(("ant",), 0))
        [line] = [
            each.getMessage() for each in caplog.records if "that had training boxes are not" in each.getMessage()
        ]
        assert line.startswith("46 words that had training boxes are not among the 2 base words of this run.")
        assert line.endswith("as base words (word 00, word 01, word 02, word 04, word 06, ...).")
        assert tuned.vocabulary.trained_base_names == set(names)
        caplog.clear()
        trained(tmp_path / "3", names, 48, first)
        assert not [each for each in caplog.records if each.name == "ovdet2.vocabulary.bank"]

    @pytest.mark.parametrize("mask", [(False,) * 4, (True,) * 4, (False, False, False, True)])
    def test_words_without_a_data_set_take_their_mask_from_it(self, chain, tmp_path, mask):
        """Whatever mask a vocabulary file has: it may be empty, or of another data set."""
        words = micro.vocabulary(("CAT.", "red mug", "owl", "ant"), 0)
        words = Vocabulary(words.names, mask, words.embeddings, words.teacher, words.templates, words.category_ids)
        words.save(tmp_path / "v.safetensors")
        model = loaded(chain[1], micro.vocabulary(("ant",), 0))
        for given in (words, Vocabulary.load(tmp_path / "v.safetensors")):
            model.vocabulary.set(given)
            assert model.vocabulary.base_mask.tolist() == [True, True, False, False]
            assert model.vocabulary.words.base_mask.tolist() == [True, True, False, False]
            assert model.vocabulary.words.category_ids == words.category_ids

    def test_words_of_a_data_set_keep_the_mask_of_its_split(self, chain):
        model = loaded(chain[2], micro.vocabulary(("ant", "cat", "owl"), 1))
        assert model.vocabulary.base_mask.tolist() == [True, False, False]
        assert _facts_of(model, "w")["novel_words_trained_on"] == ["cat", "owl"]
        transfer = loaded(chain[2], micro.vocabulary(("ant", "cat", "owl"), 0))  # a split without base words
        assert transfer.vocabulary.base_mask.tolist() == [False, True, True]
        assert "novel_words_trained_on" not in _facts_of(transfer, "w")

    def test_entries_of_a_checkpoint(self, chain):
        first, second, _ = (torch.load(path, weights_only=True)["model"] for path in chain)
        prefix = "vocabulary."
        names = {f"{prefix}{name}" for name in ("embeddings", "base_mask", "manifest")}
        assert {name for name in first if name.startswith(prefix)} == names
        plain = WordBank(micro.vocabulary(("cat", "dog", "owl"), 2)).state_dict()
        assert torch.equal(first["vocabulary.manifest"], plain["manifest"])  # as before there was anything to unite
        assert further_trained_names(first["vocabulary.manifest"]) == set()
        assert further_trained_names(second["vocabulary.manifest"]) == {"cat"}
        read = from_buffers(*(second[f"{prefix}{name}"] for name in ("embeddings", "base_mask", "manifest")))
        assert read.names == ("dog", "Red_Mug", "owl") and read.base_mask.tolist() == [True, True, False]
        assert "further_trained_names" not in read.manifest()  # nor in files

    def test_a_resumed_run_saves_what_it_would_have_saved(self, chain, tmp_path):
        for number, path in enumerate(chain):
            before = torch.load(path, weights_only=True)["model"]
            words = from_buffers(*(before[f"vocabulary.{name}"] for name in ("embeddings", "base_mask", "manifest")))
            model = Detector(words)
            checkpointer = AtomicCheckpointer(model, str(path.parent))
            checkpointer.resume_or_load("", resume=True)
            checkpointer.save(f"again_{number}")
            after = torch.load(path.parent / f"again_{number}.pth", weights_only=True)["model"]
            assert all(torch.equal(after[name], before[name]) for name in before)

    def test_copies_of_a_model_exchange_their_buffers(self, chain):
        """As the moving average of a fine-tuning does: the trained model has not read the checkpoint."""
        plain = Detector(micro.vocabulary(("ant", "owl"), 1))
        average = copy.deepcopy(plain)
        AtomicCheckpointer(average).load(str(chain[1]), checkpointables=[])
        for mine, theirs in zip(plain.buffers(), average.buffers(), strict=True):
            mine.copy_(theirs)
        saved = average.state_dict()["vocabulary.manifest"]
        assert further_trained_names(saved) == {"cat", "dog", "red mug"}

    def test_a_damaged_statement_is_refused(self):
        bank = WordBank(micro.vocabulary())
        saved = bank.state_dict()
        text = bytes(saved["manifest"].tolist())[:-1] + b', "further_trained_names": "cat"}'
        saved["manifest"] = torch.tensor(list(text), dtype=torch.uint8)
        with pytest.raises(DataError, match="cannot be read .further_trained_names is no list"):
            bank.adopt_saved_vocabulary(saved)
