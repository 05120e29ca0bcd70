"""A lock on the run folder, and signals that end a run between two steps."""
from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


@contextmanager
def locked(folder: Path, used: str = "is being trained into", advice: str = "wait for it or stop "
           "it, or give another --out") -> Iterator[None]:
    """`folder`, created if needed, for this process alone; ValueError names the process that has
    it, and says how it is `used` and the `advice`.

    The kernel's lock counts, not the file: it ends with its process, so a kill -9 leaves nothing to
    clean up. The file stays: if it were removed, one process could lock it and the next a new file
    of its name. Without fcntl (Windows) or locks of the file system, a second run is not noticed.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as e:
        raise ValueError(f"{folder} cannot be written ({e.strerror}); choose another folder"
                         ) from None
    with file:
        try:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # forked workers would share a flock
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read() or "another process"
            raise ValueError(f"{folder} {used} by {owner}; {advice}") from None
        except (ImportError, OSError):
            pass
        with suppress(OSError):                         # a full disk; the folder is locked anyway
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
            file.flush()
        yield


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """The event is set by Ctrl-C, SIGTERM (a machine that is taken away) or SIGHUP (a closed
    terminal), so that no step is cut in two; a second Ctrl-C interrupts at once. Ignored signals
    stay ignored, as SIGHUP under nohup.
    """
    stop, pid = threading.Event(), os.getpid()

    def handler(number: int, frame: object) -> None:
        if os.getpid() != pid:                          # a forked worker: the main process decides
            return
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        with suppress(OSError):                                 # print is not safe in a handler
            os.write(2, b"\nstopping after this step, then saving; Ctrl-C again stops at once\n")

    old = {number: signal.signal(number, handler) for number in SIGNALS
           if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
