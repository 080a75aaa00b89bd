"""Works through many questions to a model and keeps each answer as it comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from fast_goal.data.generation import Answer, Failure, Result
from fast_goal.data.generation.store import AnswerStore
from fast_goal.errors import ModelError
from fast_goal.progress import Progress

FAILURES_IN_A_ROW = 50  # after which the fault is taken to be the model's and not the questions': a guess
T = TypeVar("T")


def ask_all(
    todo: Sequence[tuple[str, T]],
    ask: Callable[[Sequence[T]], Sequence[Result]],
    store: AnswerStore,
    progress: Progress,
    take: Callable[[Mapping[str, Result]], None],
    batch_size: int = 1,
    parallel: int = 1,
    what: str = "the model",
    things: str = "questions",
) -> None:
    """Asks about pairs of a hash and what is asked about, in batches, `parallel` of them at once, and hands the results to
    `take` by their hash. Answers are in the store before they are handed over; failures are not kept.

    Raises what `ask` raises, after the answers under way are kept, and ModelError where one question after the other fails.
    """
    batches = (todo[begin : begin + batch_size] for begin in range(0, len(todo), batch_size))
    in_a_row, last, failed, done_now = 0, "", Counter[str](), 0
    waiting: dict[Future[Sequence[Result]], Sequence[tuple[str, T]]] = {}
    pool = ThreadPoolExecutor(parallel)
    try:
        while True:
            # one batch more than can run, so that no worker waits; and no queue of a hundred thousand
            while len(waiting) <= parallel and (batch := next(batches, None)):
                waiting[pool.submit(ask, [one for _, one in batch])] = batch
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            error: BaseException | None = None
            for future in done:
                batch = waiting.pop(future)
                if future.exception() is not None:
                    error = future.exception()
                    continue
                results = _kept(batch, future, store)
                take(results)
                done_now += len(results)
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
                    f"{what} failed for {in_a_row} {things} in a row ({reasons}), the last with: {last} "
                    f"The {done_now - failed.total():,} answers of this run are kept; run again when the cause is mended."
                )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for future, batch in waiting.items():  # what was under way when an error or Ctrl-C came
            if not future.cancelled() and future.exception() is None:
                _kept(batch, future, store)


def _kept(batch: Sequence[tuple[str, T]], future: Future[Sequence[Result]], store: AnswerStore) -> dict[str, Result]:
    """The results of a batch by their hash, of which the answers are in the store now."""
    results = {content: result for (content, _), result in zip(batch, future.result(), strict=True)}
    store.put({content: result for content, result in results.items() if isinstance(result, Answer)})
    return results
