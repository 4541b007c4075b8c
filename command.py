"""How the project's commands read their arguments and how they end: 0, 2 with one sentence, or 130 after Ctrl-C."""

import argparse
import inspect
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
    """An argument's type: a number of `least` or more, of the type of `least`."""
    def number(text):
        try:
            value = type(least)(text)
        except ValueError:
            value = math.nan
        whole = isinstance(least, int)
        if not least <= value < (2**63 if whole else math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' * whole}number of {least} or more")
        return value
    return number


def settings_of(backbone, arguments):
    """What a backbone's class takes beside CLIP and names: its defaults, or the arguments that are not None.

    ValueError: an argument that is another backbone's.
    """
    parameters = inspect.signature(backbone).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty}
    for name in ("n_ctx", "ctx_init", "depth", "n_ctx_vision", "depth_vision"):
        if getattr(arguments, name) is not None:
            if name not in settings:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is no setting of {backbone.__name__.lower()}: leave it out")
            settings[name] = getattr(arguments, name)
    return settings


def warn(text):
    """A line on stderr; the command goes on."""
    print(f"{pathlib.Path(sys.argv[0]).name}: warning: {text}", file=sys.stderr)


def end(name, main):
    """Runs a command to its exit. What a user can mend is a ValueError or OSError: one sentence, no traceback."""
    try:
        main()
        return
    except KeyboardInterrupt:
        code, text = 130, "stopped; what was finished is kept"
    except (ValueError, OSError) as error:
        code, text = 2, error
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the sentence has a line of its own
    print(f"{name}: {text}", file=sys.stderr)
    sys.exit(code)
