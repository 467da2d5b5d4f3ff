"""What a release holds, file by file, so that any change shows; and whose release it is.

`SHA256SUMS`, which `sha256sum -c` reads too, shows accidents: whoever changes a file can change
the list. `model.sig` is a signature in the format of OpenSSF Model Signing with the publisher's own
key, made and checked offline; it covers every file, the list included.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trap2.errors import UserError
from trap2.files import file_digest, write_text

MANIFEST, SIGNATURE = "SHA256SUMS", "model.sig"
NOT_RELEASED = (".git", ".gitattributes", ".gitignore", ".github", ".cache")
"""What git and model hubs keep beside the files of a release, at its top; never part of it."""

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_DIGESTS = re.compile(r": Expected .*?(?=, ['\"]Hash mismatch for|\]$)", re.DOTALL)
"""The part of the library's message that names no file."""
_SHOWN = 5


def write_manifest(folder: Path) -> int:
    """List every file of a release with its digest in `SHA256SUMS`.

    Returns:
        How many files there are.

    Raises:
        UserError: `folder` is no folder, cannot be read or written, holds a link to a folder, or a
            name that breaks a line.
    """
    found = _digests(folder)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(found.items())]
    write_text(folder / MANIFEST, "".join(lines))
    return len(found)


def check_manifest(folder: Path) -> int:
    """Compare every file of a release with `SHA256SUMS`.

    Returns:
        How many files there are.

    Raises:
        UserError: A file was changed, added or taken away, or there is no list to compare with.
    """
    found, listed = _digests(folder), _listed(folder)
    differences = {
        "changed": [name for name in sorted(listed.keys() & found) if listed[name] != found[name]],
        "missing": sorted(listed.keys() - found),
        "added": sorted(found.keys() - listed),
    }
    if any(differences.values()):
        named = "; ".join(f"{how} {_named(names)}" for how, names in differences.items() if names)
        raise UserError(
            f"{folder} is not what its {MANIFEST} lists: {named}; download it again, or if the "
            "change is yours, run trap2 sign again"
        )
    return len(found)


def sign(folder: Path, key: Path) -> None:
    """Sign every file of a release with a private key.

    Args:
        folder: The release.
        key: Elliptic-curve private key, PEM, not encrypted (P-256, P-384 or P-521).

    Raises:
        UserError: The key or the release is not usable, or the library is not installed.
    """
    partial = folder / (SIGNATURE + ".partial")
    with _explained(f"cannot sign {folder} with {key}", "use an unencrypted EC private key in PEM"):
        from model_signing import hashing, signing

        ignored = [Path(name) for name in (SIGNATURE, *NOT_RELEASED)]
        hashed = hashing.Config().set_ignored_paths(paths=ignored)
        config = signing.Config().set_hashing_config(hashed)
        config.use_elliptic_key_signer(private_key=key).sign(folder, partial)
        partial.replace(folder / SIGNATURE)


def check_signature(folder: Path, key: Path) -> None:
    """Check that every file of a release is as it was signed.

    Args:
        folder: The release.
        key: The publisher's public key, PEM; from the publisher, never from the release itself.

    Raises:
        UserError: A file is not as it was signed, the signature is of another key or damaged, the
            key is not usable, or the library is not installed.
    """
    with _explained(
        f"{folder} is not as the owner of {key} signed it",
        "do not use it before its publisher has explained this",
    ):
        from model_signing import verifying

        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
        config.verify(folder, folder / SIGNATURE)


@contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the library raises into one line."""
    try:
        from cryptography.exceptions import InvalidSignature
        from google.protobuf.json_format import ParseError
        from model_signing import signing  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"signatures need '{error.name}', which is not installed; pip install 'trap2[sign]'"
        ) from error
    expected: tuple[Any, ...] = (OSError, ValueError, TypeError, AttributeError, LookupError)
    try:
        yield
    except (*expected, InvalidSignature, ParseError) as error:
        reason = " ".join(_DIGESTS.sub("", str(error)).split())
        reason = "".join(c if c.isprintable() else "?" for c in reason[:500])
        reason = reason or type(error).__name__
        raise UserError(f"{what}: {reason.rstrip('. ')}; {remedy}") from error


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of every file, by its path inside the folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a release folder")
    found = {}
    try:
        for path in _files(folder):
            name = path.relative_to(folder).as_posix()
            if not name.isprintable() or "\\" in name:
                raise UserError(f"{folder} holds a file named {name!r}; rename it")
            found[name] = file_digest(path).removeprefix("sha256:")
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; check the release"
        ) from error
    return found


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        top = Path(parent) == folder
        left_out = (*NOT_RELEASED, MANIFEST, SIGNATURE) if top else ()
        folders[:] = [name for name in folders if name not in left_out]
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise UserError(
                    f"{Path(parent) / name} is a link to a folder; copy its files there instead"
                )
        yield from (Path(parent) / name for name in names if name not in left_out)


def _listed(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no {MANIFEST}, so nothing says what it should hold; "
            "pass --key if it is signed, or ask its publisher for the list"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; download it again") from error
    listed = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"line {number} of {path} is no digest and file name; download it again"
            )
        listed[match[2]] = match[1]
    return listed


def _named(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
