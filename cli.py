"""The command line: how the project's commands read their arguments, warn, and end.

Exit codes: 0; 1 where a part was left out (predict.py); 2 with one sentence for what a user can mend; 130 after Ctrl-C.
"""

import argparse
import math
import pathlib
import sys

from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def __init__(self, name, description):
        super().__init__(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(least):
    """The type of an argument: a number of `least` or more, whole where `least` is an int."""
    kind, most = ("whole number", 2**63) if isinstance(least, int) else ("number", math.inf)

    def number(text):
        try:
            value = type(least)(text)
        except ValueError:
            value = math.nan  # fails the comparison below
        if not least <= value < most:
            raise argparse.ArgumentTypeError(f"{text} is not a {kind} of {least} or more")
        return value

    return number


def warn(text):
    """Prints one line on stderr; the command goes on."""
    print(f"{pathlib.Path(sys.argv[0]).name}: warning: {text}", file=sys.stderr)


def end(name, main):
    """Runs `main` to its exit code, which is what it returns (None: 0).

    What a user can mend is a ValueError or OSError: exit code 2, one sentence, no traceback.
    """
    try:
        code = main()
        if code:
            sys.exit(code)
        return
    except KeyboardInterrupt:
        code, text = 130, "stopped; what was finished is kept"
    except (ValueError, OSError) as error:
        code, text = 2, error
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the sentence has a line of its own
    print(f"{name}: {text}", file=sys.stderr)
    sys.exit(code)
