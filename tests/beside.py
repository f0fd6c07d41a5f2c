"""Tests that are a long process of their own: begun before the others, and run beside them.

    @beside.python(__file__, "triton", TRITON_INTERPRET="1")
    def test_it(done):  # a subprocess.CompletedProcess
        assert done.returncode == 0, done.stderr

Where there is a second core it would idle otherwise. conftest.py puts these tests last, so that none is waited for
while another could run.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

Done = subprocess.CompletedProcess[str]
Command = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]


def python(*arguments: str, **environment: str) -> pytest.MarkDecorator:
    """The mark of a test that wants Python run with these arguments and additional variables."""
    return pytest.mark.beside((arguments, tuple(environment.items())))


def command_of(item: pytest.Item) -> Command | None:
    mark = item.get_closest_marker("beside")
    return None if mark is None else mark.args[0]


def commands_of(items: list[pytest.Item]) -> list[Command]:
    """Of those that are not skipped, each once."""
    run = [item for item in items if not any(mark.args[0] for mark in item.iter_markers("skipif"))]
    return list(dict.fromkeys(command for item in run if (command := command_of(item)) is not None))


def has_second_core() -> bool:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) > 1


class Processes:
    """The processes of a session, one at a time, and two from when the first is waited for.

    Those that were not begun run when their result is asked for.
    """

    def __init__(self) -> None:
        self._ahead: collections.deque[Command] = collections.deque()
        self._ends: dict[Command, Future[Done]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._over = False
        # As they are now, and not as whatever test runs when a process begins has set them.
        self._environment, self._folder = dict(os.environ), os.getcwd()

    def begin(self, commands: list[Command]) -> None:
        self._ahead.extend(commands)
        self._ends = {command: Future() for command in commands}
        self._work()

    def result(self, command: Command) -> Done:
        if command not in self._ends:
            return self._run(command)
        if len(self._threads) < 2:
            self._work()
        return self._ends[command].result()

    def stop(self) -> None:
        """At the end of the session, after an interruption too."""
        with self._lock:
            self._over = True
            for process in self._running:
                process.kill()
        for thread in self._threads:
            thread.join(timeout=5)  # longer only where a process has left others that hold its output

    def _work(self) -> None:
        def work() -> None:
            while not self._over:
                try:
                    command = self._ahead.popleft()
                except IndexError:
                    return
                try:
                    self._ends[command].set_result(self._run(command))
                except Exception as error:  # the test's to raise
                    self._ends[command].set_exception(error)

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def _run(self, command: Command) -> Done:
        arguments, environment = command
        line = [sys.executable, *arguments]
        with self._lock:
            if self._over:
                raise RuntimeError("the session is over")
            process = subprocess.Popen(
                line,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**self._environment, **dict(environment)},
                cwd=self._folder,
            )
            self._running.add(process)
        try:
            stdout, stderr = process.communicate()
        finally:
            process.kill()  # nothing, unless the wait was interrupted
            with self._lock:
                self._running.discard(process)
        return subprocess.CompletedProcess(line, process.returncode, stdout, stderr)
