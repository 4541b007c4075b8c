"""The command line: how the project's commands read their arguments, print other people's text, warn, and end.

Exit codes: 0; 1 where a part was left out (predict.py); 2 with one sentence for what a user can mend; 130 after Ctrl-C;
141 where the reader of the output went away (`| head`).
"""

import argparse
import contextlib
import errno
import math
import os
import pathlib
import re
import signal
import sys

from tqdm import tqdm

WORKERS_FAILED = re.compile(  # PyTorch's and the system's words where loading in worker processes ends
    r"shared memory|DataLoader worker|Too many open files|ancdata|Bus error|unable to (write to|resize) file|"
    r"unable to open (file|shared)"
)
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|bad_alloc")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def __init__(self, name, description):
        super().__init__(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def at_least(least, most=None):
    """The type of an argument: a number of `least` to `most`, whole where `least` is an int.

    most: None is the end of what a machine counts to, 2**63 - 1 or 1e38.
    """
    whole = isinstance(least, int)
    limit = most if most is not None else 2**63 - 1 if whole else 1e38

    def number(text):
        try:
            value = type(least)(text)
        except ValueError:
            value = math.nan  # fails the comparison below
        if not least <= value <= limit:
            span = f"{least} or more" if most is None or value < least or value != value else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole number' if whole else 'number'} of {span}")
        return value

    return number


def printable(text):
    """Text of other people, as names of files and classes are, in one line that does nothing to a terminal.

    Control characters, line ends and bytes that are no UTF-8 are escaped, as in `\\x1b`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def warn(text):
    """Prints one line on stderr; the command goes on."""
    tqdm.write(f"{pathlib.Path(sys.argv[0]).name}: warning: {printable(text)}", file=sys.stderr)


def catch_early_interrupt():
    """Ctrl-C ends the command at once and without a traceback, until `end` takes over: imports take seconds."""

    def stop(*_):
        os.write(2, b"stopped before anything began\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def end(name, main):
    """Runs `main` to its exit code, which is what it returns (None: 0).

    What a user can mend is a ValueError or OSError, or a machine that has run out: exit code 2, one sentence, no
    traceback.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, by `>&-`
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115  until the process ends
        with contextlib.suppress(AttributeError):
            getattr(sys, stream).reconfigure(errors="backslashreplace")  # letters that the terminal has not
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which a shell sets for jobs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()
        if code:
            sys.exit(code)
        return
    except KeyboardInterrupt:
        code, text = 130, "stopped; what was finished is kept"
    except BrokenPipeError:
        drop_output()
        sys.exit(141)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        code, text = 2, sentence(error)
        if text is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            drop_output()
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the sentence has a line of its own
    print(f"{name}: {printable(text)}", file=sys.stderr)
    sys.exit(code)


def drop_output():
    """Sends what is still to be printed nowhere: Python flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sentence(error):
    """What a user can do about an error, one sentence; None for a RuntimeError that is a fault of the program."""
    text = " ".join(str(error).split())
    if WORKERS_FAILED.search(text) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return (
            f"the processes that load images came to an end ({text[:120]}): give --workers 0, or more shared memory "
            "and open files (docker run --shm-size, ulimit -n); what was finished is kept"
        )
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        return (
            f"there is no memory left ({text[:120]}): lower --batch-size, --anchors, --cache-views or --workers, "
            "or take a smaller --clip; what was finished is kept"
        )
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF) and error.filename is None:
        return f"the output cannot be written ({error.strerror}): make room, or send it elsewhere"
    text = str(error)
    return text if len(text) < 1500 else f"{text[:700]} ... {text[-700:]}"  # a name of thousands of letters
