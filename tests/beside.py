"""Tests that are a long process of their own: begun before the others, beside them, one after another.

    @beside.python(__file__, "triton", TRITON_INTERPRET="1")
    def test_it(done):  # a subprocess.CompletedProcess
        assert done.returncode == 0, done.stderr

Where there is a second core it would idle otherwise. conftest.py puts these tests last, so that none is waited for
while another could run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

Done = subprocess.CompletedProcess[str]
Command = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]


def python(*arguments: str, **environment: str) -> pytest.MarkDecorator:
    """The mark of a test that wants Python run with these arguments and additional variables."""
    return pytest.mark.beside((arguments, tuple(environment.items())))


def command_of(item: pytest.Item) -> Command | None:
    mark = item.get_closest_marker("beside")
    return None if mark is None else mark.args[0]


class Processes:
    """The processes of a session; those that were not begun run when their result is asked for."""

    def __init__(self) -> None:
        self._begun: dict[Command, Future[Done]] = {}
        self._worker = ThreadPoolExecutor(1)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._over = False

    def begin(self, commands: list[Command]) -> None:
        for command in commands:
            self._begun[command] = self._worker.submit(self._run, command)

    def result(self, command: Command) -> Done:
        return self._begun[command].result() if command in self._begun else self._run(command)

    def stop(self) -> None:
        """Nothing outlives the session, however it ends."""
        with self._lock:
            self._over = True
            for process in self._running:
                process.kill()
        self._worker.shutdown(cancel_futures=True)

    def _run(self, command: Command) -> Done:
        arguments, environment = command
        line = [sys.executable, *arguments]
        with self._lock:
            if self._over:
                raise RuntimeError("the session is over")
            process = subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **dict(environment)}
            )
            self._running.add(process)
        try:
            stdout, stderr = process.communicate()
        finally:
            process.kill()  # nothing, unless the wait was interrupted
            with self._lock:
                self._running.discard(process)
        return subprocess.CompletedProcess(line, process.returncode, stdout, stderr)
