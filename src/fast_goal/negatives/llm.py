"""Hard negatives by a language model: generator `llm`, `fast-goal configure negatives=llm`.

The model runs here through transformers, or behind OpenAI's chat interface (a key, if it needs one, comes from the
environment variable FAST_GOAL_NEGATIVES_API_KEY). `llm_prompt.py` says what it is asked, `llm_answer.py` what of its answer
is taken. A caption with fewer candidates than `negatives.per_caption` is asked about again, up to `llm.attempts` times: for the
types that are missing, told what was wrong, with another seed, and where it is long about other sentences of it.

Every answer is kept in `.fast_goal/negatives/` as it comes, by what was asked: a run that was killed asks nothing twice, and a
caption that is added costs only itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fast_goal.config import LanguageModelConfig, NegativesConfig
from fast_goal.data.generation import Failure, Result
from fast_goal.data.generation.asking import ask_all
from fast_goal.data.generation.local import local_settings
from fast_goal.data.generation.server import ChatClient
from fast_goal.data.generation.store import AnswerStore
from fast_goal.data.generation.text import Question, TextModel
from fast_goal.files import digest
from fast_goal.negatives import Candidate, Made, generator
from fast_goal.negatives.llm_answer import read
from fast_goal.negatives.llm_prompt import Part, parts, question, words_shown
from fast_goal.progress import Progress

FOLDER = Path(".fast_goal/negatives")
WHERE = "negatives.llm"
KEY_VARIABLE = "FAST_GOAL_NEGATIVES_API_KEY"
AGAIN = 0.7  # the least temperature of a second attempt: at 0 it would bring the same; a guess
EMPTY_CAPTION = "empty caption"


class Writer(Protocol):
    """What answers questions: `parallel` calls with `batch_size` questions each may run at once."""

    batch_size: int
    parallel: int

    def answer(self, questions: Sequence[Question]) -> list[Result]: ...

    def notes(self) -> list[str]: ...

    def close(self) -> None: ...


class ServerWriter:
    """Raises ConfigError for an address that cannot be used, before anything is sent."""

    batch_size = 1

    def __init__(self, config: LanguageModelConfig):
        server = config.server
        self._max_new_tokens, self.parallel = config.max_new_tokens, server.concurrency
        self._client = ChatClient(
            server.url,
            config.model,
            KEY_VARIABLE,
            WHERE,
            parallel=server.concurrency,
            timeout=server.timeout,
            attempts=config.attempts,
            retry_wait=server.retry_wait,
        )

    def answer(self, questions: Sequence[Question]) -> list[Result]:
        """See Writer."""
        return [self._client.ask(self._request(one)) for one in questions]

    def notes(self) -> list[str]:
        return self._client.notes()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _request(self, one: Question) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": one.text}],
            "max_tokens": self._max_new_tokens,
            "temperature": one.temperature,
            "seed": one.seed,
        }


def load_writer(config: LanguageModelConfig) -> Writer:
    """The model of `config.kind`. Raises ModelError where it cannot be had, ConfigError for an address that is none."""
    if config.kind == "server":
        return ServerWriter(config)
    return TextModel(
        config.model,
        WHERE,
        revision=config.transformers.revision,
        precision=config.transformers.precision,
        batch_size=config.transformers.batch_size,
        max_new_tokens=config.max_new_tokens,
    )


@dataclass(frozen=True)
class _Asked:
    """One question about a caption, without the prompt's words, which are long."""

    part: Part
    types: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...]
    known: tuple[str, ...]

    def text(self) -> str:
        return question(self.part.text, self.types, dict(self.wrong), self.known)


@dataclass
class _Work:
    """What is known about one caption. reasons: how often a part of an answer, or all of it, was refused for what."""

    caption: str
    parts: list[Part]
    found: list[Candidate] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)  # what was made of the part, by its text in lower case
    declined: set[str] = field(default_factory=set)
    wrong: dict[str, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    failed: bool = False

    def next(self, attempt: int, types: Sequence[str], wanted: int, each: int) -> _Asked | None:
        """What to ask, None where there is enough or no more to be had."""
        if self.failed or not self.parts or len(self.found) >= wanted:
            return None
        if len(self.parts) > 1:
            self.declined.clear()  # other sentences may allow it
        counts = Counter(candidate.type for candidate in self.found)
        missing = tuple(kind for kind in types if counts[kind] < each and kind not in self.declined)
        if not missing:
            return None
        wrong = tuple((kind, reason) for kind, reason in self.wrong.items() if not kind or kind in missing)
        return _Asked(self.parts[attempt % len(self.parts)], missing, wrong, tuple(self.said.values()))

    def take(self, asked: _Asked, result: Result, types: Sequence[str]) -> Iterable[str]:
        """Adds what a result brings; the reasons of what is refused."""
        if isinstance(result, Failure):
            self.failed = True
            refused = [("", result.reason)]
        else:
            reading = read(result, asked.part.text, asked.types, types)
            refused = list(reading.refused)
            self.declined |= reading.declined
            for kind, text in reading.accepted:
                whole = self.caption[: asked.part.start] + text + self.caption[asked.part.end :]
                if whole.casefold() in self.said:
                    refused.append((kind, "said twice"))
                    continue
                self.said[whole.casefold()] = text
                self.found.append(Candidate(whole, kind))
        self.wrong = dict(refused)
        reasons = [reason for _, reason in refused]
        self.reasons.update(reasons)
        return reasons

    def ordered(self, types: Sequence[str], seed: int) -> list[Candidate]:
        """One of each type before the second of any; which type comes first differs from caption to caption, or the last of
        the list would always be the one too many."""
        turn = int(digest([seed, self.caption], 8), 16) % len(types)
        rank = {kind: (place - turn) % len(types) for place, kind in enumerate(types)}
        earlier, keyed = Counter(), []
        for candidate in self.found:
            keyed.append(((earlier[candidate.type], rank[candidate.type]), candidate))
            earlier[candidate.type] += 1
        return [candidate for _, candidate in sorted(keyed, key=lambda pair: pair[0])]

    def reason(self) -> str:
        """Why there is nothing, in a few words."""
        if not self.parts:
            return EMPTY_CAPTION
        return self.reasons.most_common(1)[0][0] if self.reasons else "no type fits the caption"


@generator("llm")
class LanguageModel:
    """See the module. The model is loaded only if there is something to ask."""

    def __init__(self, config: NegativesConfig, folder: Path = FOLDER):
        self._config, self._folder = config, folder
        llm = config.llm
        # a folder's place on this machine says nothing to the table's reader
        model = Path(llm.model).name if llm.kind == "transformers" and Path(llm.model).is_dir() else llm.model
        pinned = llm.transformers.revision if llm.kind == "transformers" else None
        self.name = f"llm: {model}@{pinned}" if pinned else f"llm: {model}"

    def make(self, captions: Sequence[str]) -> Made:
        """See Generator. Raises ModelError where the model cannot be had or one question after the other fails, ConfigError for
        an address that cannot be used; the answers so far are kept."""
        config, types = self._config, self._config.types
        shown = words_shown(config.llm.max_new_tokens, len(types))
        works = [_Work(caption, parts(caption, shown, config.seed)) for caption in captions]
        each = math.ceil(config.per_caption / len(types))  # of a type
        counts, refused, writers = Counter[str](), Counter[str](), list[Writer]()
        with AnswerStore(self._key(), self._facts(), self._folder) as store, ExitStack() as closing:
            for attempt in range(config.llm.attempts * each):
                asked: dict[str, tuple[_Asked, list[_Work]]] = {}
                for work in works:
                    if (one := work.next(attempt, types, config.per_caption, each)) is not None:
                        asked.setdefault(self._hash(one, attempt), (one, []))[1].append(work)

                def take(results: Mapping[str, Result], asked: Mapping[str, Any] = asked) -> None:
                    for content, result in results.items():
                        one, concerned = asked[content]
                        for work in concerned:
                            refused.update(work.take(one, result, types))

                def ask(ones: Sequence[_Asked], attempt: int = attempt) -> list[Result]:
                    return writers[0].answer([self._question(one, attempt) for one in ones])

                known = store.get(asked)
                take(known)
                todo = [(content, one) for content, (one, _) in asked.items() if content not in known]
                counts.update(known=len(known), asked=len(todo))
                if not todo:
                    continue
                if not writers:
                    writers.append(load_writer(config.llm))
                    closing.callback(writers[0].close)
                size, parallel = writers[0].batch_size, writers[0].parallel
                label = f"negatives, attempt {attempt + 1}" if attempt else "negatives"
                with Progress(label, len(asked), "captions", done=len(known)) as progress:
                    ask_all(todo, ask, store, progress, take, size, parallel, config.llm.model, "captions")
            notes = [note for writer in writers for note in writer.notes()]
        return Made(
            candidates=[work.ordered(types, config.seed) for work in works],
            reasons={place: work.reason() for place, work in enumerate(works) if not work.found},
            notes=[f"{self.name}: {counts['asked']:,} questions asked now, {counts['known']:,} answers known before"]
            + notes
            + [f"of its answers refused: {reason}, {count:,} times" for reason, count in refused.most_common()],
        )

    def _question(self, asked: _Asked, attempt: int) -> Question:
        text, temperature = asked.text(), self._config.llm.temperature
        seed = int(digest([self._config.seed, attempt, text], 8), 16) >> 1  # 31 bits: some servers take no more
        return Question(text, seed, max(temperature, AGAIN) if attempt else temperature)

    def _hash(self, asked: _Asked, attempt: int) -> str:
        one = self._question(asked, attempt)
        return digest([one.text, one.seed, one.temperature], 32)

    def _key(self) -> str:
        """A digest of what an answer depends on beside the question."""
        llm = self._config.llm
        local = llm.transformers
        # not the server's address: the same model may move
        settings = {} if llm.kind == "server" else local_settings(llm.model, local.revision, local.precision)
        return digest({"kind": llm.kind, "model": llm.model, "max_new_tokens": llm.max_new_tokens, **settings})

    def _facts(self) -> dict[str, str]:
        """What the store's reader wants to know; not the address, which may hold what is not to be kept."""
        llm = self._config.llm
        return {"model": llm.model, "kind": llm.kind, "max_new_tokens": str(llm.max_new_tokens)}
