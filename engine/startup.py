"""What each command does before anything else: it checks the versions, and makes output harmless.

The commands import this file first. It, and they, parse with Python 3.8, so that an old Python
prints the sentence below and no SyntaxError.
"""
import os
import sys

LEAST_PYTHON = 3, 11            # the oldest that the tests were run with
LEAST_TORCH = 2, 6              # before, torch.load(weights_only=True) could be made to run code
NEEDS = ("needs Python {}.{} and torch {}.{} or newer, but {}; install both as under Start in "
         "README.md")

# This must precede `import torch`: idle OpenMP threads soon sleep instead of busy-waiting.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def stop(found):
    """Ends the process with one sentence."""
    name = os.path.basename(sys.argv[0]) or "this"
    sys.exit(f"{name}: {NEEDS.format(*LEAST_PYTHON, *LEAST_TORCH, found)}")


if sys.version_info < LEAST_PYTHON:
    stop(f"this is Python {sys.version.split()[0]}, {sys.executable}")
try:
    import torch
except ImportError as e:
    stop(f"torch cannot be imported ({e}) by {sys.executable}")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < LEAST_TORCH:
    stop(f"this is torch {torch.__version__} of {sys.executable}")


class Output:
    """A stream whose failures lose text, never the work: once a pipe is closed or a disk is full,
    what follows goes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._attempt(self.stream.write, text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, method, *args):
        try:
            return method(*args)
        except OSError:         # Windows has no BrokenPipeError for it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())      # also for what is still in the buffer
            os.close(nowhere)


def run(main):
    """Ends the process with the status of main(). What the terminal cannot encode is printed as
    \\u escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")    # closed, or a Windows without one
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Output(stream))
    sys.exit(main())
