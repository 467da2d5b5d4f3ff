"""What can go wrong, sorted by whose move it is.

Every message is one line with the value, the reason and the remedy. The command line prints the
message of any `Trap2Error` without a traceback and ends with exit code 2.
"""


class Trap2Error(Exception):
    """Base of every error this package raises on purpose."""


class UserError(Trap2Error, ValueError):
    """The input is wrong; the message says which value, why, and what to do about it."""


class Unsupported(Trap2Error, NotImplementedError):
    """The input is sound, but of a kind this version cannot treat exactly, so it refuses."""


class TrainingStopped(Trap2Error, ArithmeticError):
    """Training met a non-finite number and stopped; earlier checkpoints are untouched."""
