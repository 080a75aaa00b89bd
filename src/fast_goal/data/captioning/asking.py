"""Asks a captioner about many images: each content once, and nothing that is in the store already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from fast_goal.config import to_dict
from fast_goal.data.captioning import (
    Answer,
    Captioner,
    CaptionerConfig,
    Failure,
    captioner_key,
    load_captioner,
)
from fast_goal.data.captioning.store import FOLDER, AnswerStore
from fast_goal.data.images import open_image
from fast_goal.errors import DataError, ModelError
from fast_goal.files import digest
from fast_goal.progress import Progress

FAILURES_IN_A_ROW = 50  # after which the fault is taken to be the model's and not the images': a guess

Result = Answer | Failure
_Batch = list[tuple[str, Path]]  # content hash, file


@dataclass
class Asked:
    """results: by content hash. new: how many were asked now. notes: sentences for the log."""

    results: dict[str, Result] = field(default_factory=dict)
    new: int = 0
    notes: list[str] = field(default_factory=list)


def ask_about(
    images: Mapping[str, Path], config: CaptionerConfig, prompt: str, where: str, label: str, folder: Path = FOLDER
) -> Asked:
    """The results for images by the hash of their content. Answers are kept as they come; failures are asked again by the
    next run. The model is loaded only if there is something to ask.

    Raises ModelError where the model cannot be had, and where one image after the other fails.
    """
    key = captioner_key(config, prompt)
    facts = {"model": config.model, "prompt": prompt, "prompt_digest": digest(prompt), "captioner": str(to_dict(config))}
    with AnswerStore(key, facts, folder) as store:
        asked = Asked(dict(store.get(images)))
        todo = [(content, path) for content, path in images.items() if content not in asked.results]
        if not todo:
            return asked
        captioner = load_captioner(config, prompt, where)
        try:
            with Progress(label, len(images), "images", done=len(asked.results)) as progress:
                _work_through(todo, captioner, store, asked, progress)
            asked.notes += captioner.notes()
        finally:
            captioner.close()
    return asked


def _work_through(todo: _Batch, captioner: Captioner, store: AnswerStore, asked: Asked, progress: Progress) -> None:
    size = captioner.batch_size
    batches = (todo[begin : begin + size] for begin in range(0, len(todo), size))
    in_a_row, last, failed = 0, "", Counter[str]()
    pool = ThreadPoolExecutor(captioner.parallel)
    try:
        waiting: dict[Future[list[Result]], _Batch] = {}
        while True:
            # one batch more than can run, so that no worker waits; and no queue of a hundred thousand
            while len(waiting) <= captioner.parallel and (batch := next(batches, None)):
                waiting[pool.submit(_ask, captioner, [path for _, path in batch])] = batch
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            error: BaseException | None = None
            for future in done:
                batch = waiting.pop(future)
                if future.exception() is not None:
                    error = future.exception()
                    continue
                results = {content: result for (content, _), result in zip(batch, future.result(), strict=True)}
                store.put({content: result for content, result in results.items() if isinstance(result, Answer)})
                asked.results.update(results)
                asked.new += len(results)
                for result in results.values():
                    if isinstance(result, Failure):
                        in_a_row, last = in_a_row + 1, result.detail
                        failed[result.reason] += 1
                    else:
                        in_a_row = 0
                progress.update(len(results), **({"failed": failed.total()} if failed else {}))
            if error is not None:
                raise error
            if in_a_row >= FAILURES_IN_A_ROW:
                reasons = ", ".join(f"{reason}: {count}" for reason, count in failed.most_common())
                raise ModelError(
                    f"the captioner failed for {in_a_row} images in a row ({reasons}), the last with: {last} "
                    f"The {asked.new - failed.total():,} answers of this run are kept; run again when the cause is mended."
                )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ask(captioner: Captioner, paths: list[Path]) -> list[Result]:
    """The results for some files; one that has become unreadable is a failure."""
    results: dict[int, Result] = {}
    images = []
    for index, path in enumerate(paths):
        try:
            images.append((index, open_image(path)))
        except DataError as error:
            results[index] = Failure("unreadable image", str(error))
    if images:
        answers = captioner.caption([image for _, image in images])
        results |= {index: answer for (index, _), answer in zip(images, answers, strict=True)}
    return [results[index] for index in range(len(paths))]
