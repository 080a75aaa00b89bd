"""Brings the bytes of one address to one `.part` file: resumed, retried, in parallel parts, never a mix of two files.

`data.fetch` is what callers use; it decides where a file comes from, checks it and gives it its name. Beside
`<file>.part` lies `<file>.part.json`: the size, the validator (ETag or date) of the file that the bytes belong to, and how
far each part has come. A server whose file no longer has this validator makes the download start over.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fast_goal.data.origins import Policy, Reply, Restart, Retryable, Source, Unreachable, shown
from fast_goal.errors import DataError
from fast_goal.files import read_json, write_json
from fast_goal.progress import Progress

MB = 1_000_000
_SAVE_EVERY = 1.0  # seconds; what a kill can lose of the knowledge how far a part has come


class Stopped(DataError):
    """Another download of the session failed."""


class _Stopped(Exception):
    """Another part or another file failed."""


class Session:
    """What the downloads of one call share: the progress line, the room on the disk, and the end when one fails."""

    def __init__(self, name: str, policy: Policy):
        self.name, self.policy = name, policy
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._left = 0
        self._events: list[threading.Event] = []
        self._halted = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def event(self) -> threading.Event:
        """An event that is set when the session is halted."""
        with self._lock:
            event = threading.Event()
            self._events.append(event)
            if self._halted:
                event.set()
            return event

    def halt(self) -> None:
        """Ends all downloads of this session at their next chunk."""
        with self._lock:
            self._halted = True
            for event in self._events:
                event.set()

    def begin(self, path: Path, total: int | None, done: int) -> None:
        """Counts in a file of which `done` bytes are there. Raises DataError if the disk has no room for what is missing."""
        missing = (total or 0) - done if total is not None else 0
        with self._lock:
            check_room(path.parent, self._left + missing, path.name.removesuffix(".part"))
            self._left += missing
            if self._progress is None:
                self._progress = self._stack.enter_context(Progress(self.name, 0, "MB", scale=MB))
            self._progress.add(total or 0, done)

    def count(self, new: int) -> None:
        """Counts bytes that were written."""
        with self._lock:
            self._left = max(0, self._left - new)
            if self._progress is not None:
                self._progress.update(new)

    def forget(self, total: int | None, done: int) -> None:
        """Takes a file out again that starts over."""
        with self._lock:
            self._left = max(0, self._left - ((total or 0) - done if total is not None else 0))
            if self._progress is not None:
                self._progress.add(-(total or 0), -done)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises DataError if fewer than `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{what} needs {needed / MB:,.1f} MB in {folder}, where {free / MB:,.1f} MB are free. "
            "Free some space, or set FAST_GOAL_DOWNLOADS to a folder on a larger disk."
        )


@dataclass
class _Part:
    """Bytes [start, end) of the file, of which those before `position` are written; end None: unknown."""

    start: int
    end: int | None
    position: int

    @property
    def complete(self) -> bool:
        return self.end is not None and self.position >= self.end


@dataclass
class _State:
    """What is known of the bytes in a `.part` file; `url` without secrets."""

    url: str
    size: int | None = None
    validator: str | None = None
    parts: list[_Part] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(part.position - part.start for part in self.parts)

    @classmethod
    def read(cls, path: Path, part: Path) -> _State | None:
        """The saved state; None if there is none or it does not fit the bytes."""
        try:
            values = read_json(path)
            state = cls(values["url"], values["size"], values["validator"], [_Part(**item) for item in values["parts"]])
            fits = part.stat().st_size >= max((item.position for item in state.parts if item.position > item.start), default=0)
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            return None
        return state if fits and state.parts else None


class Transfer:
    """One file from one source into `part`.

    `safe` says that a checksum will be looked at afterwards; `resumed`, that not all bytes came in one answer.
    """

    def __init__(self, source: Source, part: Path, size: int | None, safe: bool, session: Session):
        self.source, self.part, self.size, self.safe, self.session = source, part, size, safe, session
        self.resumed = False
        self.validator: str | None = None
        self._saved = part.with_name(f"{part.name}.json")
        self._shown = shown(source.url)
        self._stop = session.event()
        self._lock = threading.Lock()
        self._last_save = 0.0
        self._state = _State(self._shown)

    def run(self) -> int:
        """Returns the size of the complete `part`. Raises DataError, Missing or Unreachable; what is there is kept."""
        policy = self.session.policy
        last = ""
        for _ in range(policy.attempts):
            try:
                self._once()
            except Restart as reason:
                last = str(reason)
                print(f"fetch: {self._name}: starting over: {reason}")
                self.discard()
                self._stop = self.session.event()
            except _Stopped:
                raise Stopped(f"{self._name}: stopped because another download failed. {self._kept()}") from None
            except OSError as error:
                raise self._disk_error(error) from error
            else:
                self.validator = self._state.validator
                return self._state.done
        raise Unreachable(f"{self._shown}: its download had to start over {policy.attempts} times, at last because {last}.")

    def discard(self) -> None:
        """Removes what was fetched so far."""
        self.session.forget(self._state.size, self._state.done)
        self.part.unlink(missing_ok=True)
        self._saved.unlink(missing_ok=True)
        self._state, self.resumed = _State(self._shown), False

    def finished(self) -> None:
        """Removes the state of a file that has got its name."""
        self._saved.unlink(missing_ok=True)

    @property
    def _name(self) -> str:
        return self.part.name.removesuffix(".part")

    def _once(self) -> None:
        state = _State.read(self._saved, self.part)
        if state is not None and state.url == self._shown and self.size in (None, state.size) and self._may_resume(state):
            self._state, self.resumed = state, True
            self.session.begin(self.part, state.size, state.done)
            if state.done:
                print(f"fetch: {self._name}: {state.done / MB:,.1f} MB are there already; continuing")
            self._run_parts()
        else:
            self._state = _State(self._shown)
            self._persist(self._start, lambda: self._state.done)
            if not all(part.complete for part in self._state.parts):
                self._run_parts()

    def _may_resume(self, state: _State) -> bool:
        return state.validator is not None or self.safe

    def _start(self) -> None:
        """The first request asks for the first `parts_from` bytes: enough for most files, and the answer tells how large
        the others are, whether they can be split, and how they are recognised."""
        if self._state.parts:
            self._run_part(self._state.parts[0])
            return
        first = self.session.policy.parts_from
        for asked in (first, None):
            with self.source.open(0, asked, None) as reply:
                total = reply.total
                if self.size is not None and total is not None and total != self.size:
                    raise DataError(
                        f"{self._shown} has {total:,} bytes; {self.size:,} are published. It is another file or another "
                        "release: correct `size` (and `sha256`) in params.yaml, or `url`."
                    )
                larger = reply.ranges and (total is None or total > first)
                if asked is not None and larger and (total is None or reply.validator is None):
                    continue  # parts of it could not be told from parts of another file
                self.session.begin(self.part, total, 0)
                self._state.size, self._state.validator = total, reply.validator
                self._state.parts = self._split(total, first) if larger and total is not None else [_Part(0, total, 0)]
                self.part.write_bytes(b"")
                self._save()
                self._read(self._state.parts[0], reply)
                return

    def _split(self, total: int, first: int) -> list[_Part]:
        """The part that comes with the first answer, and the rest in equal parts that are worth a connection."""
        count = max(1, min(self.session.policy.parts, 4 * (total - first) // first))
        bounds = [first + (total - first) * index // count for index in range(count + 1)]
        return [_Part(0, first, 0), *(_Part(start, end, start) for start, end in itertools.pairwise(bounds))]

    def _run_parts(self) -> None:
        parts = [part for part in self._state.parts if not part.complete]
        if not parts:
            return
        with ThreadPoolExecutor(len(parts)) as pool:
            futures = [
                pool.submit(self._persist, lambda part=part: self._run_part(part), lambda part=part: part.position)
                for part in parts
            ]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also when the user interrupts
                if not all(future.done() and not future.exception() for future in futures):
                    self._stop.set()
        errors = [error for error in (future.exception() for future in futures) if error]
        if errors:
            raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])

    def _run_part(self, part: _Part) -> None:
        state = self._state
        if part.position > part.start and not self._may_resume(state):
            raise Restart("the server gives neither an ETag nor a date, so that a changed file could not be noticed")
        whole = len(state.parts) == 1 and part.position == 0
        self.resumed |= not whole
        with self.source.open(part.position, None if len(state.parts) == 1 else part.end, state.validator) as reply:
            changed = reply.validator != state.validator and reply.validator is not None
            if reply.total is not None and state.size is not None and reply.total != state.size:
                raise Restart(f"the file on the server has {reply.total:,} bytes now, {state.size:,} before")
            if changed and (state.validator is not None or not whole):
                raise Restart("the file on the server changed")
            self._read(part, reply)

    def _read(self, part: _Part, reply: Reply) -> None:
        """Writes the reply's bytes. Raises Retryable if they end too early."""
        try:
            with self.part.open("r+b", buffering=0) as stream:
                stream.seek(part.position)
                for chunk in reply.chunks:
                    if self._stop.is_set():
                        raise _Stopped
                    if part.end is not None:
                        chunk = chunk[: part.end - part.position]
                    _write(stream, chunk)
                    part.position += len(chunk)
                    self.session.count(len(chunk))
                    if part.complete:
                        break
                    if time.monotonic() - self._last_save >= _SAVE_EVERY:
                        self._save(stream)
            if part.end is None:
                part.end = self._state.size = part.position
            if not part.complete:
                raise Retryable(f"the server stopped {part.end - part.position:,} bytes too early")
        finally:
            self._save()

    def _save(self, stream: BinaryIO | None = None) -> None:
        with self._lock:
            self._last_save = time.monotonic()
            state = asdict(self._state)
            if stream is not None:  # the state may not be ahead of the bytes, even when the power fails
                os.fsync(stream.fileno())
            try:
                write_json(self._saved, state)
            except OSError as error:
                if not _is_full(error):  # on a full disk the older state is good enough to resume from
                    raise

    def _persist(self, work: Callable[[], None], position: Callable[[], int]) -> None:
        """Runs `work` until it ends, with growing pauses. Raises Unreachable after too many failures in a row."""
        import tenacity

        policy, seen = self.session.policy, position()
        backoff = tenacity.wait_exponential_jitter(initial=policy.first_wait, max=policy.longest_wait, jitter=policy.first_wait)

        def after(call: tenacity.RetryCallState) -> None:
            nonlocal seen
            if position() > seen:  # a connection that brought bytes begins the count anew
                call.attempt_number = 1
            seen = position()

        def pause(call: tenacity.RetryCallState) -> float:
            asked = _failure(call).wait
            return backoff(call) if asked is None else asked

        def tell(call: tenacity.RetryCallState) -> None:
            number, seconds = call.attempt_number, call.upcoming_sleep
            print(f"fetch: {self._name}: {_failure(call)}; attempt {number + 1} of {policy.attempts} in {seconds:.1f} s")

        def sleep(seconds: float) -> None:
            if self._stop.wait(seconds):
                raise _Stopped

        try:
            tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(Retryable),
                stop=tenacity.stop_after_attempt(policy.attempts),
                wait=pause,
                after=after,
                before_sleep=tell,
                sleep=sleep,
                reraise=True,
            )(work)
        except Retryable as error:
            raise Unreachable(
                f"{self._shown} could not be downloaded: {error}, {policy.attempts} times in a row without a new byte. "
                f"{self._kept()}"
            ) from None

    def _kept(self) -> str:
        if not self._state.done:
            return "Nothing was fetched so far."
        of = "" if self._state.size is None else f" of {self._state.size / MB:,.1f}"
        return f"{self._state.done / MB:,.1f}{of} MB are kept in {self.part}: the same command continues there."

    def _disk_error(self, error: OSError) -> DataError:
        if not _is_full(error):
            return DataError(f"{self.part} cannot be written: {error}")
        free = shutil.disk_usage(self.part.parent).free
        size = self._state.size
        missing = "" if size is None else f" {(size - self._state.done) / MB:,.1f} MB are missing,"
        return DataError(
            f"the disk of {self.part.parent} is full:{missing} {free / MB:,.1f} MB are free. Free some space, or set "
            f"FAST_GOAL_DOWNLOADS to a folder on a larger disk. {self._kept()}"
        )


def _failure(call: Any) -> Retryable:
    error = call.outcome.exception()
    assert isinstance(error, Retryable)
    return error


def _write(stream: BinaryIO, chunk: bytes) -> None:
    """All of `chunk`: a raw file may write less."""
    view = memoryview(chunk)
    while view:
        view = view[stream.write(view) :]


def _is_full(error: OSError) -> bool:
    return error.errno in {errno.ENOSPC, errno.EDQUOT}
