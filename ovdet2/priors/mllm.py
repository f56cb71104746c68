"""Concept priors by a multimodal language model (CCKT-Det++), with one question per image and word.

The model is a :class:`~ovdet2.priors.chat_server.ChatServer` or a
:class:`~ovdet2.priors.local_model.LocalModel`. It has ``identity`` (dict of model and settings), ``workers``
(concurrent calls), ``words_per_call``, ``prepare(path)`` (the image as it is sent; DataError for an unreadable one),
``ask(prepared, words, questions)`` (a list of :class:`~ovdet2.priors.answers.Answer`) and ``stop()``.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from ovdet2.errors import CacheError, DataError, UsageError
from ovdet2.io.files import sha256_file
from ovdet2.io.progress import progress_bar
from ovdet2.priors.answers import Answer, AnswerBook
from ovdet2.priors.chat_server import ChatServer
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.priors.local_model import LocalModel
from ovdet2.vocabulary.templates import clean_name

_FEW = 20  # so many answers that are neither yes nor no may be by chance
_SAMPLES = 3  # answers in a message

PROMPT = "Question: Does [OBJ] exist in the image? Answer:"


class MllmBackend:
    """score = P(yes) from the model's token probabilities if it returns them, otherwise 1 or 0 from its text.

    If an answer is neither yes nor no, the word is not in the image's list and is counted in ``unparsable``; if most
    answers are, the run ends with an error. If a question fails after all tries, its image has no list, like an image that
    cannot be read.

    Attributes (valid once :meth:`lists` has begun):
        asked: number of questions asked in this run.
        known: number of questions answered by earlier runs.
        unparsable: number of answers that are neither yes nor no.
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
            model: see the module.
            folder: of the stored answers, see :mod:`~ovdet2.priors.answers`.
            words: K words.
            prompt: question with "[OBJ]" for the cleaned word.
            candidates: :class:`~ovdet2.priors.concept_prior.ConceptPriors` whose ``top`` words of an image are the only
                ones that the model is asked about; None: all words.
            top: number of candidate words per image.
            max_queries: maximum number of questions of this run; None for no limit.

        Raises:
            UsageError: the prompt has no "[OBJ]".
        """
        if "[OBJ]" not in prompt:
            raise UsageError(f"the prompt {prompt!r} has no [OBJ], which stands for the word.")
        self.model, self.words, self.prompt = model, tuple(words), prompt
        self.candidates, self.top, self.max_queries = candidates, top, max_queries
        self.book = AnswerBook(folder, model.identity | {"prompt": prompt})
        self.asked = self.known = self.unparsable = 0
        self._answered, self._lock = 0, threading.Lock()
        self._neither: list[tuple[str, str]] = []  # (word, text) of the answers of this run that are neither yes nor no

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
        """P(yes) of the words per image, see :mod:`ovdet2.priors`.

        Raises:
            CacheError: ``max_queries`` questions were asked and others remain; the message states how many.
            DataError: more than half of the answers are neither yes nor no; the message has three of them.
            SetupError: the model cannot be reached.
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
            index = self._candidate_words(record)
            answers = [self._answer(digest, self.words[i]).yes for i in index]
            self.unparsable += answers.count(None)
            scored = [(i, yes) for i, yes in zip(index, answers) if yes is not None]
            yield (
                record["image_id"],
                torch.tensor([i for i, _ in scored], dtype=torch.int64),
                torch.tensor([yes for _, yes in scored], dtype=torch.float32),
            )

    def _answer(self, digest, word) -> Answer:
        answer = self.book.get(digest, word)
        assert answer is not None  # images with a failed question were removed from the digests
        return answer

    def _candidate_words(self, record):
        """Indices of the words that the model is asked about for an image."""
        if self.candidates is None:
            return list(range(len(self.words)))
        return sorted(self.candidates.select(record["image_id"], top=self.top, names=self.words).tolist())

    def _unanswered(self, record, digest):
        """The words of an image that are not answered yet."""
        words = [self.words[i] for i in self._candidate_words(record)]
        return [word for word in words if self.book.get(digest, word) is None]

    def _count_unanswered(self, record, digests):
        return len(self._unanswered(record, digests[record["image_id"]]))

    def _ask_all(self, records, digests, skip):
        records = [record for record in records if record["image_id"] in digests]
        total = sum(len(self._candidate_words(record)) for record in records)
        to_ask = sum(self._count_unanswered(record, digests) for record in records)
        self.known = total - to_ask
        failed = set()
        with (
            progress_bar(total=total, initial=self.known, desc="questions", disable=not to_ask) as progress,
            ThreadPoolExecutor(self.model.workers) as pool,
        ):
            running = {}  # future -> (image id, number of questions)
            try:
                for record, prepared, words in self._calls(records, digests, failed, skip):
                    future = pool.submit(self._ask, digests[record["image_id"]], prepared, words)
                    running[future] = record["image_id"], len(words)
                    # Few calls are submitted ahead: memory holds few images, and an abort waits for few answers.
                    if len(running) >= 2 * self.model.workers:
                        _collect(running, failed, skip, progress)
                        self._refuse_if_most_are_neither(_FEW)
                while running:
                    _collect(running, failed, skip, progress)
                self._refuse_if_most_are_neither(1)
            except BaseException:
                self.model.stop()
                pool.shutdown(cancel_futures=True)
                raise
        for image_id in failed:
            del digests[image_id]
        if self.max_queries is not None and self.asked >= self.max_queries:
            left = sum(self._count_unanswered(record, digests) for record in records if record["image_id"] in digests)
            if left:
                raise CacheError(
                    f"{self.asked} questions were asked, the limit of --max-queries, and {left} remain: no prior is "
                    f"written. The answers are stored in {self.book.folder}; run the same command to continue."
                )

    def _calls(self, records, digests, failed, skip):
        """Yield (record, its prepared image, words) of each call to make; images in ``failed`` are skipped."""
        for record in records:
            words = self._unanswered(record, digests[record["image_id"]])
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
            self.book.add(digest, word, answer)  # in the thread of the call: an answer is stored immediately
            with self._lock:
                self._answered += 1
                if answer.yes is None:
                    self._neither.append((word, answer.text))

    def _refuse_if_most_are_neither(self, least):
        """Raise a DataError if at least ``least`` answers and more than half are neither yes nor no."""
        number, total = len(self._neither), self.known + self._answered
        if number < least or 2 * number <= total:
            return
        samples = "; ".join(f"{word!r}: {text[:200]!r}" for word, text in self._neither[:_SAMPLES])
        raise DataError(
            f"{number} of {total} answers say neither yes nor no, so no prior is written ({samples}). Check that the model "
            "reads images, the --prompt, and the length of its answers (--request '{\"max_tokens\": 512}'). These answers are "
            "not stored: the same command asks again."
        )


def _digests(records, skip):
    digests = {}
    for record in progress_bar(records, desc="hashing images", leave=False):
        try:
            digests[record["image_id"]] = sha256_file(Path(record["file_name"]))
        except OSError as error:
            skip(f"{record['file_name']} cannot be read ({error.strerror}): check the image folder of the data set.")
    return digests


def _collect(running, failed, skip, progress):
    """Wait for at least one call; add the images of failed calls to ``failed``."""
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
