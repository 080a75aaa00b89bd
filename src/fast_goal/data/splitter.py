"""Splits captions, and tokenizes their sentences, in processes beside (`python -m fast_goal.data.splitter CONTEXT_LENGTH`).

The splitter is pure Python, some milliseconds for a caption, and in a thread it would hold up the decoding of images and
the feeding of a GPU. Messages are pickles between this program and its own child, over a pipe; the child ends when
the pipe closes, also after a kill of the parent.

`S` sentences, `L` tokens.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import numpy as np

from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.errors import DataError

AT_ONCE = 16  # captions in one message


class Split(NamedTuple):
    """Of one caption: where its sentences start and end, in characters, int32 [S, 2]; and, where a context length was given,
    for each its token ids uint16 [L] and the length of the whole text in tokens."""

    spans: np.ndarray
    tokens: list[tuple[np.ndarray, int]]


def split(captions: Sequence[str], context_length: int | None = None) -> list[Split]:
    """The sentences of each caption, and their tokens; without a context length no tokens."""
    results = []
    for caption in captions:
        sentences = split_sentences(caption)
        tokens = [] if context_length is None else _tokens([sentence.text for sentence in sentences], context_length)
        results.append(Split(np.array([[s.start, s.end] for s in sentences], np.int32).reshape(-1, 2), tokens))
    return results


def _tokens(sentences: Sequence[str], context_length: int) -> list[tuple[np.ndarray, int]]:
    ids, lengths = tokenize(sentences, context_length)
    return [(row[:count].astype(np.uint16), count) for row, count in zip(ids.numpy(), lengths.tolist(), strict=True)]


class Splitter:
    """`submit` splits captions in the background: in child processes, or with `processes` = 0 in a thread."""

    def __init__(self, context_length: int | None, processes: int):
        self._context_length = context_length
        self._pool = ThreadPoolExecutor(1, "sentences")
        self._children = [_Child(context_length) for _ in range(processes)]
        self._next = 0

    def __enter__(self) -> Splitter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, captions: Sequence[str]) -> list[Future[list[Split]]]:
        """Futures of the results, in order: together one for each caption."""
        parts = [captions[start : start + AT_ONCE] for start in range(0, len(captions), AT_ONCE)]
        if not self._children:
            return [self._pool.submit(split, part, self._context_length) for part in parts]
        futures = []
        for part in parts:
            futures.append(self._children[self._next].submit(part))
            self._next = (self._next + 1) % len(self._children)
        return futures

    def close(self) -> None:
        """Ends what runs beside."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.close()


class _Child:
    """A child process; one thread writes to it and one reads from it, so that neither side waits on a full pipe."""

    def __init__(self, context_length: int | None):
        command = [sys.executable, "-m", __name__, *([] if context_length is None else [str(context_length)])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._futures: deque[Future[list[Split]]] = deque()
        self._writer = ThreadPoolExecutor(1, "splitter")
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def submit(self, captions: Sequence[str]) -> Future[list[Split]]:
        future: Future[list[Split]] = Future()
        self._writer.submit(self._write, list(captions), future)
        return future

    def _write(self, captions: list[str], future: Future[list[Split]]) -> None:
        self._futures.append(future)
        try:
            _send(self._process.stdin, captions)
        except (OSError, ValueError):
            self._ended = True
        if self._ended:  # the pipe took what nobody will read, or the reader had ended before this future was there
            self._fail()

    def _read(self) -> None:
        try:
            while (result := _receive(self._process.stdout)) is not None:
                self._futures.popleft().set_result([Split(*one) for one in result])
        finally:
            self._ended = True
            self._fail()

    def _fail(self) -> None:
        while self._futures:
            try:
                future = self._futures.popleft()
            except IndexError:
                return
            status = self._process.wait()
            message = f"the process that splits captions ended with exit status {status}. Run the step again: it goes on."
            future.set_exception(DataError(message))

    def close(self) -> None:
        self._writer.shutdown(wait=False, cancel_futures=True)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written
                stream.close()


def _send(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """The next message, None at the end of the stream."""
    try:
        head = stream.read(8)
        data = stream.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
        return pickle.loads(data) if data else None
    except (OSError, ValueError, EOFError, pickle.UnpicklingError):
        return None


def main() -> None:
    """The child: reads lists of captions until its input closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    context_length = int(sys.argv[1]) if len(sys.argv) > 1 else None
    output, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing that a library prints may get between the messages
    while (captions := _receive(sys.stdin.buffer)) is not None:
        try:
            _send(output, [tuple(one) for one in split(captions, context_length)])  # here the class is another: __main__'s
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
