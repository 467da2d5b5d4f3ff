"""The command line, `trap2 COMMAND`: protect, attack and audit, report, publish.

Nothing heavy is imported before a command is known, so that help is instant. Errors of the user's
end in one line on stderr and exit code 2; a requirement that is not met in 1; Ctrl-C in 130;
a reader of stdout that went away in 141, in silence.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from trap2 import __version__
from trap2.cli.judging import add_judging, add_list
from trap2.cli.making import add_demo, add_making
from trap2.cli.publishing import add_publishing
from trap2.errors import Trap2Error


def parser() -> argparse.ArgumentParser:
    """The whole surface of the command line."""
    top = argparse.ArgumentParser(
        prog="trap2",
        description="Make fine-tuned weights unmergeable, attack the protection, report what held.",
    )
    top.add_argument("--version", action="version", version=f"trap2 {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_making(commands)
    add_judging(commands)
    add_publishing(commands)
    add_list(commands)
    add_demo(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0, 1 if a requirement is not met, 2 for an error of the user's, 130 after Ctrl-C,
        141 if the reader of stdout went away.
    """
    chosen = parser().parse_args(arguments)
    # Libraries' own progress bars, hints and deprecations would drown ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        code = int(chosen.run(chosen) or 0)
        sys.stdout.flush()  # here, where a reader that left is no error
        return code
    except Trap2Error as error:
        print(f"trap2: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = f"'{error.name}', which is not installed; pip install 'trap2[run]'"
        print(f"trap2: error: {chosen.command} needs {missing}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 141
    except KeyboardInterrupt:
        print("trap2: interrupted; what was finished is kept", file=sys.stderr)
        return 130


def _reader_left() -> bool:
    """Whether the reader of stdout went away (`trap2 list attacks | head`), and not a worker's.

    Then what is still to be written goes nowhere, or Python would complain about it at its exit.
    """
    try:
        print(flush=True)  # a flush alone has nothing to write where stdout is not buffered
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
