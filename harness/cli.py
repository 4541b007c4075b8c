"""The command line: how a command prints other people's text, warns, and ends.

Exit codes: 0; 1 where a part was left out (predict.py); 2 with one sentence for what a user can fix; 130 after Ctrl-C;
141 where the reader of the output went away (`| head`).
"""

import contextlib
import errno
import os
import pathlib
import re
import signal
import sys
import warnings

from tqdm import tqdm

WORKERS_FAILED = re.compile(  # PyTorch's and the system's words where worker processes that load images fail
    r"shared memory|DataLoader worker|Too many open files|ancdata|Bus error|unable to (write to|resize|open) "
    r"(file|shared)"
)
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|bad_alloc")


def printable(text):
    """Text of other people, such as file names and class names, on one line that does nothing to a terminal.

    Control characters, line ends and bytes that are not UTF-8 are escaped, as in `\\x1b`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def warn(text):
    """Prints one line on stderr; the command goes on."""
    tqdm.write(f"{pathlib.Path(sys.argv[0]).name}: warning: {printable(text)}", file=sys.stderr)


def run_main(name, main):
    """Runs `main` and exits with the code that it returns (None: 0).

    A ValueError or OSError is what a user can fix, and so is a machine that has run out of memory: exit code 2, one
    sentence, no traceback.
    """
    warnings.showwarning = lambda message, *_: warn(" ".join(str(message).split()))  # of Python, in a line too
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a closed stream is None
            stream.reconfigure(errors="backslashreplace")  # letters that the terminal does not have
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell sets this for jobs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        print(end="", flush=True)
        if code:
            sys.exit(code)
        return
    except KeyboardInterrupt:
        code, text = 130, "stopped; what was finished is kept"
    except BrokenPipeError:
        discard_output()
        sys.exit(141)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        code, text = 2, sentence(error)
        if text is None:
            raise
        try:
            print(end="", flush=True)
        except OSError:
            discard_output()
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the sentence has a line of its own
    print(f"{name}: {printable(text)}", file=sys.stderr)
    sys.exit(code)


def discard_output():
    """Sends what is still to be printed nowhere: Python flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sentence(error):
    """What a user can do about an error, one sentence; None for a RuntimeError that is a fault of the program."""
    text = " ".join(str(error).split())
    if WORKERS_FAILED.search(text) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return (
            f"the processes that load images failed ({text[:120]}): give --workers 0, or more shared memory and open "
            "files (docker run --shm-size, ulimit -n)"
        )
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        return f"there is no memory left ({text[:120]}): lower --batch-size, --anchors, --cache-views or --workers"
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF) and error.filename is None:
        return f"the output cannot be written ({error.strerror}): make room, or send it elsewhere"
    text = str(error)
    return text if len(text) < 1500 else f"{text[:700]} ... {text[-700:]}"  # a name of thousands of letters
