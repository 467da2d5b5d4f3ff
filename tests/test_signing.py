"""A release is as it was listed and signed, or what differs is named."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trap2 import signing
from trap2.errors import UserError


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "README.md").write_text("a card\n")
    (folder / "sub" / "Ünïcode name.json").write_text("{}")
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES = {
    "changed 'model.safetensors'": lambda folder: flip(folder / "model.safetensors"),
    "changed 'sub/Ünïcode name.json'": lambda f: flip(f / "sub" / "Ünïcode name.json"),
    "missing 'README.md'": lambda folder: (folder / "README.md").unlink(),
    "added 'sub/more.bin'": lambda folder: (folder / "sub" / "more.bin").write_bytes(b""),
    "missing 'README.md'; added 'card.md'": lambda folder: (folder / "README.md").rename(
        folder / "card.md"
    ),
}


def test_an_untouched_release_is_as_listed(release):
    assert signing.write_manifest(release) == 3
    assert signing.check_manifest(release) == 3
    first = (release / signing.MANIFEST).read_bytes()
    assert signing.write_manifest(release) == 3
    assert (release / signing.MANIFEST).read_bytes() == first


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_the_list(release):
    signing.write_manifest(release)
    command = ["sha256sum", "--check", "--strict", signing.MANIFEST]
    done = subprocess.run(command, cwd=release, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == 3


@pytest.mark.parametrize("named", CHANGES)
def test_what_differs_from_the_list_is_named(release, named):
    signing.write_manifest(release)
    CHANGES[named](release)
    with pytest.raises(UserError) as caught:
        signing.check_manifest(release)
    assert f"is not what its SHA256SUMS lists: {named}; download it again" in str(caught.value)


def test_many_differences_are_cut_short(release):
    signing.write_manifest(release)
    for n in range(9):
        (release / f"more{n}").write_text("")
    with pytest.raises(UserError, match=r"added 'more0', .*'more4' and 4 more; download"):
        signing.check_manifest(release)


def test_what_git_and_hubs_keep_beside_a_release_is_no_part_of_it(release):
    signing.write_manifest(release)
    (release / ".cache" / "huggingface").mkdir(parents=True)
    (release / ".cache" / "huggingface" / "x.lock").write_text("")
    (release / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert signing.check_manifest(release) == 3
    (release / "sub" / ".cache").write_text("")  # only at the top
    with pytest.raises(UserError, match=r"added 'sub/\.cache'"):
        signing.check_manifest(release)


def test_a_link_counts_as_what_is_read_through_it(release, tmp_path):
    signing.write_manifest(release)
    blob = tmp_path / "blob"
    (release / "model.safetensors").rename(blob)
    (release / "model.safetensors").symlink_to(blob)
    assert signing.check_manifest(release) == 3
    flip(blob)
    with pytest.raises(UserError, match=r"changed 'model\.safetensors'"):
        signing.check_manifest(release)
    (release / "linked").symlink_to(release / "sub")
    with pytest.raises(UserError, match="linked is a link to a folder; copy its files there inst"):
        signing.check_manifest(release)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no SHA256SUMS, so nothing says what it should hold; pass --key if"),
        (b"abc  README.md\n", "line 1 of .*SHA256SUMS is no digest and file name; download it"),
        (b"\xff\xfe", "cannot read .*SHA256SUMS: .*; download it again"),
    ],
)
def test_a_list_that_is_none_is_refused(release, content, message):
    if content is not None:
        (release / signing.MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=message):
        signing.check_manifest(release)


def test_a_list_opens_nothing_outside_the_release(release):
    signing.write_manifest(release)
    with (release / signing.MANIFEST).open("a") as stream:
        stream.write(f"{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(UserError, match=r"missing '\.\./\.\./etc/passwd'; download"):
        signing.check_manifest(release)


def test_names_that_break_a_line_and_folders_that_are_none_are_refused(release, tmp_path):
    (release / "a\nb").write_text("")
    with pytest.raises(UserError, match=r"holds a file named 'a\\nb'; rename it"):
        signing.write_manifest(release)
    assert not (release / signing.MANIFEST).exists()
    with pytest.raises(UserError, match="nowhere is not a folder; give a release folder"):
        signing.check_manifest(tmp_path / "nowhere")


def test_a_file_that_cannot_be_read_is_named(release):
    (release / "broken").symlink_to(release / "nothing")
    with pytest.raises(UserError, match=r"cannot read .*broken: No such file or directory; check"):
        signing.write_manifest(release)


def test_without_the_library_the_remedy_is_named(release, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(UserError, match=r"not installed; pip install 'trap2\[sign\]'"):
        signing.sign(release, release / "key.pem")


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> Path:
    """A folder of key pairs, `NAME.pem` and `NAME.pub`."""
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    folder = tmp_path_factory.mktemp("keys")
    made = {
        "ours": ec.generate_private_key(ec.SECP256R1()),
        "other": ec.generate_private_key(ec.SECP384R1()),
        "rsa": rsa.generate_private_key(65537, 2048),
        "ed": ed25519.Ed25519PrivateKey.generate(),
        "koblitz": ec.generate_private_key(ec.SECP256K1()),
        "locked": ec.generate_private_key(ec.SECP256R1()),
    }
    for name, key in made.items():
        lock = s.BestAvailableEncryption(b"word") if name == "locked" else s.NoEncryption()
        (folder / f"{name}.pem").write_bytes(
            key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, lock)
        )
        (folder / f"{name}.pub").write_bytes(
            key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        )
    (folder / "junk.pem").write_text("junk")
    return folder


@pytest.fixture
def signed(release, keys) -> Path:
    signing.write_manifest(release)
    signing.sign(release, keys / "ours.pem")
    return release


def test_a_signed_release_is_as_signed_wherever_it_lies(signed, keys, tmp_path):
    signing.check_signature(signed, keys / "ours.pub")
    moved = shutil.move(signed, tmp_path / "moved")
    (moved / ".cache").mkdir()
    (moved / ".cache" / "x").write_text("")
    signing.check_signature(moved, keys / "ours.pub")
    assert not list(moved.glob("*.partial"))


def test_openssf_s_own_program_accepts_the_signature(signed, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    command += ["--signature", str(signed / "model.sig"), "--public_key", str(keys / "ours.pub")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    flip(signed / "README.md")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("named", CHANGES)
def test_what_differs_from_what_was_signed_is_named(signed, keys, named):
    CHANGES[named](signed)
    signing.write_manifest(signed)  # whoever changes a file changes the list too
    assert signing.check_manifest(signed)
    with pytest.raises(UserError) as caught:
        signing.check_signature(signed, keys / "ours.pub")
    said = str(caught.value)
    assert f"{signed} is not as the owner of {keys / 'ours.pub'} signed it: Signature misma" in said
    assert said.endswith("; do not use it before its publisher has explained this")
    assert all(part.split("'")[1] in said for part in named.split("; "))
    assert "digest_value" not in said
    assert "\n" not in said


@pytest.mark.parametrize("key", ["other.pub", "rsa.pub", "ed.pub", "koblitz.pub", "junk.pem", "no"])
def test_another_key_does_not_verify(signed, keys, key):
    with pytest.raises(UserError, match=rf"is not as the owner of .*{key} signed it: \S+"):
        signing.check_signature(signed, keys / key)


@pytest.mark.parametrize(
    "key", ["locked.pem", "rsa.pem", "ed.pem", "koblitz.pem", "junk.pem", "no"]
)
def test_a_key_that_cannot_sign_is_refused_and_leaves_the_old_signature(signed, keys, key):
    before = (signed / signing.SIGNATURE).read_bytes()
    with pytest.raises(UserError, match=rf"cannot sign .*{key}: .+; use an unencrypted EC private"):
        signing.sign(signed, keys / key)
    assert (signed / signing.SIGNATURE).read_bytes() == before
    assert not list(signed.glob("*.partial"))


def test_a_damaged_signature_is_refused(signed, keys):
    path = signed / signing.SIGNATURE
    whole = json.loads(path.read_text())
    damaged = [b"", b"junk", b"[]", b"{}", path.read_bytes()[:300]]
    for change in (
        lambda e: e.update(signatures=[]),
        lambda e: e["signatures"][0].update(sig=base64.b64encode(b"no").decode()),
        lambda e: e.update(payload=base64.b64encode(b"{}").decode()),
        lambda e: e.update(payload=5),
    ):
        copy = json.loads(json.dumps(whole))
        change(copy["dsseEnvelope"])
        damaged.append(json.dumps(copy).encode())
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not as the owner of .* signed it: .+; do not use"):
            signing.check_signature(signed, keys / "ours.pub")
    os.unlink(path)
    with pytest.raises(UserError, match="No such file or directory"):
        signing.check_signature(signed, keys / "ours.pub")


def test_a_link_is_not_signed(release, keys):
    (release / "more").symlink_to(release / "README.md")
    with pytest.raises(UserError, match=r"cannot sign .*: Cannot use .*more.* symlink"):
        signing.sign(release, keys / "ours.pem")
