"""Concept priors by a multimodal language model, asked about one word at a time: CCKT's second way (CCKT-Det++).

Who answers is passed in: :class:`~ovdet2.priors.chat_server.ChatServer` or
:class:`~ovdet2.priors.local_model.LocalModel`, with ``identity`` (dict: which model, which settings), ``workers``
(calls at once), ``words_per_call``, ``prepare(path)`` (what is sent of an image, DataError for an unreadable one),
``ask(prepared, words, questions)`` (a list of :class:`~ovdet2.priors.answers.Answer`) and ``stop()``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ovdet2.errors import CacheError, DataError, UsageError
from ovdet2.io.files import sha256_file
from ovdet2.priors.answers import Answer, AnswerBook
from ovdet2.priors.chat_server import ChatServer
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.priors.local_model import LocalModel
from ovdet2.vocabulary.templates import clean_name

PROMPT = "Question: Does [OBJ] exist in the image? Answer:"


class MllmBackend:
    """score = P(yes), from the model's token probabilities where it gives them, otherwise 1 or 0 by its text.

    An answer that is neither yes nor no is no statement: the word is left out of the image's list, and counted in
    ``unparsable``. A question that fails for good leaves its image without a list, as an unreadable file does.

    Attributes (after :meth:`lists` began):
        asked: questions put in this run.
        known: questions answered by earlier runs.
        unparsable: answers that say neither.
    """

    kind = "prediction"

    def __init__(
        self,
        model: ChatServer | LocalModel,
        folder: str | Path,
        words: Sequence[str],
        prompt: str = PROMPT,
        candidates: ConceptPriors | None = None,
        top: int | None = None,
        max_queries: int | None = None,
    ) -> None:
        """
        Args:
            model: who answers, see the module.
            folder: of the answers, see :mod:`~ovdet2.priors.answers`.
            words: K words.
            prompt: question with "[OBJ]" for the cleaned word.
            candidates: :class:`~ovdet2.priors.concept_prior.ConceptPriors`: only its ``top`` words are asked of an image.
            top: see there.
            max_queries: questions to put in this run at most; None for no limit.

        Raises:
            UsageError: the prompt has no "[OBJ]".
        """
        if "[OBJ]" not in prompt:
            raise UsageError(f"the prompt {prompt!r} has no [OBJ], which stands for the word.")
        self.model, self.words, self.prompt = model, tuple(words), prompt
        self.candidates, self.top, self.max_queries = candidates, top, max_queries
        self.book = AnswerBook(folder, model.identity | {"prompt": prompt})
        self.asked = self.known = self.unparsable = 0

    @property
    def source(self) -> dict[str, Any]:
        narrowed = {}
        if self.candidates is not None:
            content = self.candidates.manifest["content_sha256"]
            narrowed = {"candidates": self.candidates.manifest["source"], "candidates_sha256": content, "top": self.top}
        return {"backend": "mllm", **self.model.identity, "prompt": self.prompt, **narrowed}

    def lists(
        self, records: Sequence[Mapping[str, Any]], skip: Callable[[str], object]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """As every backend.

        Raises:
            CacheError: ``max_queries`` were put and questions remain; it says how many.
            SetupError: the model cannot be asked.
        """
        if self.candidates is not None:
            records = [record for record in records if record["image_id"] not in self.candidates.missing]
        digests = _digests(records, skip)  # image id -> SHA-256 of the file
        try:
            self._ask_all(records, digests, skip)
        finally:
            self.book.close()
        for record in records:
            digest = digests.get(record["image_id"])
            if digest is None:
                continue
            index = self._wanted(record)
            answers = [self._answer(digest, self.words[i]).yes for i in index]
            self.unparsable += answers.count(None)
            said = [(i, yes) for i, yes in zip(index, answers) if yes is not None]
            yield (
                record["image_id"],
                torch.tensor([i for i, _ in said], dtype=torch.int64),
                torch.tensor([yes for _, yes in said], dtype=torch.float32),
            )

    def _answer(self, digest, word) -> Answer:
        answer = self.book.get(digest, word)
        assert answer is not None  # an image with a question that failed has no digest any more
        return answer

    def _wanted(self, record):
        """Indices of the words to ask of an image."""
        if self.candidates is None:
            return list(range(len(self.words)))
        return sorted(self.candidates.select(record["image_id"], top=self.top, names=self.words).tolist())

    def _open(self, record, digest):
        """The words of an image that are not answered yet."""
        words = [self.words[i] for i in self._wanted(record)]
        return [word for word in words if self.book.get(digest, word) is None]

    def _count_open(self, record, digests):
        return len(self._open(record, digests[record["image_id"]]))

    def _ask_all(self, records, digests, skip):
        records = [record for record in records if record["image_id"] in digests]
        wanted = sum(len(self._wanted(record)) for record in records)
        to_ask = sum(self._count_open(record, digests) for record in records)
        self.known = wanted - to_ask
        failed = set()
        with (
            tqdm(total=wanted, initial=self.known, desc="questions", disable=not to_ask) as progress,
            ThreadPoolExecutor(self.model.workers) as pool,
        ):
            running = {}  # future -> (image id, number of questions)
            try:
                for record, prepared, words in self._calls(records, digests, failed, skip):
                    future = pool.submit(self._ask, digests[record["image_id"]], prepared, words)
                    running[future] = record["image_id"], len(words)
                    # Few are handed in ahead, so that memory holds few images and an abort waits for few answers.
                    if len(running) >= 2 * self.model.workers:
                        _collect(running, failed, skip, progress)
                while running:
                    _collect(running, failed, skip, progress)
            except BaseException:
                self.model.stop()
                pool.shutdown(cancel_futures=True)
                raise
        for image_id in failed:
            del digests[image_id]
        if self.max_queries is not None and self.asked >= self.max_queries:
            left = sum(self._count_open(record, digests) for record in records if record["image_id"] in digests)
            if left:
                raise CacheError(
                    f"{self.asked} questions were put, as --max-queries says, and {left} remain: no prior is written. "
                    f"The answers are kept in {self.book.folder}; the same command goes on."
                )

    def _calls(self, records, digests, failed, skip):
        """(record, what is sent of its image, words) of each call to make; none for an image in ``failed``."""
        for record in records:
            words = self._open(record, digests[record["image_id"]])
            if not words:
                continue
            try:
                prepared = self.model.prepare(record["file_name"])
            except DataError as error:
                failed.add(record["image_id"])
                skip(str(error))
                continue
            for start in range(0, len(words), self.model.words_per_call):
                if record["image_id"] in failed:  # the caller adds to it between calls
                    break
                chunk = words[start : start + self.model.words_per_call]
                if self.max_queries is not None:
                    chunk = chunk[: self.max_queries - self.asked]
                    if not chunk:
                        return
                self.asked += len(chunk)
                yield record, prepared, chunk

    def _ask(self, digest, prepared, words):
        questions = [self.prompt.replace("[OBJ]", clean_name(word)) for word in words]
        for word, answer in zip(words, self.model.ask(prepared, words, questions), strict=True):
            self.book.add(digest, word, answer)  # in the thread that asked: an answer is kept as soon as it is there


def _digests(records, skip):
    digests = {}
    for record in tqdm(records, desc="hashing images", leave=False):
        try:
            digests[record["image_id"]] = sha256_file(Path(record["file_name"]))
        except OSError as error:
            skip(f"{record['file_name']} cannot be read ({error.strerror}): check the image folder of the data set.")
    return digests


def _collect(running, failed, skip, progress):
    """Take what has been answered; a question that failed marks its image, once."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        image_id, count = running.pop(future)
        try:
            future.result()
        except DataError as error:
            if image_id not in failed:
                failed.add(image_id)
                skip(str(error))
        progress.update(count)
