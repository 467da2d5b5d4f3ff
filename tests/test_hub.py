"""A release folder goes to a model hub unchanged: huggingface_hub sends it to a server of our own.

The server speaks the Hub's protocol for commits as far as an upload needs it, on the loopback
interface: weights as LFS objects, everything else within the commit.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from auditing.shelf import stock
from trap2.cli import main
from trap2.update import Update

UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi(token="hf_none")
api.create_repo("me/section", exist_ok=True)
api.upload_folder(repo_id="me/section", folder_path=sys.argv[1])
"""


class Hub(ThreadingHTTPServer):
    """One model repository; `files` is its head."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.cards: list[str] = []

    def answer(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            return {"url": f"{self.address}/me/section"}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return {"errors": [], "warnings": []}
        if path == "/api/models/me/section/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            kinds = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            entries = [
                {"path": name, "uploadMode": kind, "shouldIgnore": False}
                for name, kind in kinds.items()
            ]
            return {"files": entries}
        if path == "/me/section.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [self._place(entry) for entry in wanted]}
        if path == "/api/models/me/section/commit/main":
            for line in map(json.loads, body.splitlines()):
                self._commit(line["key"], line["value"])
            return {"commitUrl": f"{self.address}/me/section/commit/0", "commitOid": "0" * 40}
        raise AssertionError(path)

    def _place(self, entry: dict) -> dict:
        upload = {"href": f"{self.address}/objects/{entry['oid']}"}
        return {**entry, "actions": {"upload": upload}}

    def _commit(self, kind: str, value: dict) -> None:
        if kind == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            self.files[value["path"]] = self.objects[value["oid"]]


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        self._reply(self.server.answer(self.path.partition("?")[0], self._body()))

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._reply({})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _reply(self, record: dict) -> None:
        body = json.dumps(record).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_release_is_uploaded_as_it_is(
    pico_base: Path, tmp_path: Path, hub: Hub, kind: str
) -> None:
    shelf = stock(pico_base)
    release = shutil.copytree(shelf.release(kind, "release"), tmp_path / "release")
    assert main(["sign", str(release)]) == 0
    online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "ignore", "-c", UPLOAD, str(release)]
    done = subprocess.run(
        command, env={**os.environ, **online, **home}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sent = {str(p.relative_to(release)): p.read_bytes() for p in release.rglob("*") if p.is_file()}
    assert hub.files == sent
    assert {"README.md", "trap2.json", "SHA256SUMS"} <= {*hub.files}
    assert {*hub.cards} == {(release / "README.md").read_text()}
    assert {hashlib.sha256(held).hexdigest() for held in hub.objects.values()} == {*hub.objects}
    assert [name for name in sent if name.endswith(".safetensors")]

    back = tmp_path / "back"
    back.mkdir()
    for name, content in hub.files.items():
        (back / name).write_bytes(content)
    assert main(["verify", str(back)]) == 0
    assert Update.open(back, shelf.base).digest == Update.open(release, shelf.base).digest
