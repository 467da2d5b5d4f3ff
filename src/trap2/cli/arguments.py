"""Kinds of arguments that several commands take."""

import argparse
import re
from typing import Any

CHANGES: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "a.b=c",
    "dest": "changes",
    "help": "change a setting of the file; may be given several times",
}


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no count; write a whole number from 1 on")
    return int(text)


def numbers(text: str) -> list[float]:
    """Finite numbers between commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        wanted = f"'{text}' is no list of numbers; write for example 0,0.5,1"
        raise argparse.ArgumentTypeError(wanted) from error


def parameter(text: str) -> tuple[str, float | int | str]:
    """One `k=v`; v is a number where it can be read as one."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        wanted = f"'{text}' is not of the form k=v; write for example density=0.2"
        raise argparse.ArgumentTypeError(wanted)
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def required(text: str) -> dict[str, float]:
    """Tiers with a share each, between commas."""
    found = [re.fullmatch(r"(T[1-5])=(0?\.\d+|[01](?:\.0*)?)", part) for part in text.split(",")]
    if None in found:
        wanted = f"'{text}' names no tiers with a share each; write for example T1=0.9,T2=0.6"
        raise argparse.ArgumentTypeError(wanted)
    return {match[1]: float(match[2]) for match in found if match}
