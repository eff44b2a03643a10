"""Remote checkpoints: only ranges are transferred; the hub's cache and a hub of our own on localhost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.errors import CheckpointError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory(write_model):
    system = fsspec.filesystem("memory")
    for i, name in enumerate(("a", "b")):
        system.put(str(write_model(name, llama_tensors(i))), f"/models/{name}", recursive=True)
    yield system
    system.rm("/models", recursive=True)


def test_a_merge_of_remote_folders(memory, tmp_path):
    ws.average(["memory://models/a", "memory://models/b"]).save(tmp_path / "out")
    found = read_safetensors(tmp_path / "out")
    for name, one in llama_tensors(0).items():
        np.testing.assert_allclose(found[name], (one + llama_tensors(1)[name]) / 2, rtol=1e-6)
    assert (tmp_path / "out" / "config.json").exists()


def test_nothing_at_a_url_is_said_plainly(memory):
    with pytest.raises(CheckpointError, match="nothing at memory://models/c"):
        ws.open("memory://models/c")
    with pytest.raises(CheckpointError, match="odd://x"):
        ws.open("odd://x")


@pytest.mark.slow
def test_s3_is_read_by_ranges(tmp_path, monkeypatch):
    """Against moto's server: opening a large file transfers its header, a slice transfers a slice."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import logging

    boto3 = pytest.importorskip("boto3")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    for key, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        write_safetensors(tmp_path / "m.safetensors", {"big": np.arange(1_000_000, dtype=np.float32), "x": np.ones(3)})
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="bucket")
        client.upload_file(str(tmp_path / "m.safetensors"), "bucket", "models/m/model.safetensors")
        transferred = []
        system = fsspec.filesystem("s3")
        fetch = type(system).cat_file
        monkeypatch.setattr(
            type(system), "cat_file", lambda *a, **k: transferred.append(len(found := fetch(*a, **k))) or found
        )
        opened = ws.open("s3://bucket/models/m")
        assert list(opened) == ["big", "x"]
        assert sum(transferred) < 1000
        assert np.array_equal(opened["big"].read(500_000, 500_100), np.arange(500_000, 500_100, dtype=np.float32))
        assert sum(transferred) < 2000
        ws.save(opened, tmp_path / "out")
        assert np.array_equal(read_safetensors(tmp_path / "out")["big"], np.arange(1_000_000, dtype=np.float32))
    finally:
        running.stop()


@pytest.fixture
def serve(write_model):
    """Return a function that starts a web server of one file, and keeps count of the bytes that it sends."""
    folder = write_model("m", llama_tensors(0) | {"big": np.arange(200_000, dtype=np.float32)})
    content = (folder / "model.safetensors").read_bytes()
    servers = []

    def start(*, ranges=True):
        sent = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                if "none" in self.path:
                    self.send_error(404)
                    return
                asked = self.headers.get("Range") if ranges else None
                start, stop = 0, len(content)
                if asked:
                    first, last = asked.removeprefix("bytes=").split("-")
                    start, stop = int(first), int(last) + 1
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
                else:
                    self.send_response(200)
                if ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(stop - start))
                self.end_headers()
                if self.command == "GET":
                    sent.append(stop - start)
                    self.wfile.write(content[start:stop])

        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", sent

    pytest.importorskip("aiohttp")
    yield start
    for server in servers:
        server.shutdown()


def test_a_file_on_the_web_is_read_by_ranges(serve):
    address, sent = serve()
    opened = ws.open(f"{address}/m.safetensors")
    assert sum(sent) < 3000
    assert np.array_equal(opened["lm_head.weight"].numpy(), llama_tensors(0)["lm_head.weight"])
    assert sum(sent) < 5000
    assert np.array_equal(opened["big"].read(100, 200), np.arange(100, 200, dtype=np.float32))
    with pytest.raises(CheckpointError, match="nothing at"):
        ws.open(f"{address}/none.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors?download=true", "download?id=3"])
def test_an_address_with_a_query_is_not_transferred_whole_to_see_whether_it_is_a_folder(serve, name):
    address, sent = serve()
    assert np.array_equal(ws.open(f"{address}/{name}")["big"].read(5, 9), [5, 6, 7, 8])
    assert sum(sent) < 3000


def test_a_server_without_ranges_is_said_plainly(serve):
    address, _ = serve(ranges=False)
    with pytest.raises(CheckpointError, match="does not serve ranges; download the file first"):
        ws.open(f"{address}/m.safetensors")


def test_a_remote_file_that_was_replaced_has_another_identity(memory, tmp_path):
    """Same names, shapes and length: only the storage's own time or version tells."""
    found = []
    for value in (1, 2):
        write_safetensors(tmp_path / "m.safetensors", {"a": np.full(4, value, np.float32)})
        memory.put(str(tmp_path / "m.safetensors"), "/models/m.safetensors")
        found.append(ws.open("memory://models/m.safetensors").identities[0])
    assert found[0].header == found[1].header
    assert found[0] != found[1]
    assert found[1] == ws.open("memory://models/m.safetensors").identities[0]


pytest.importorskip("huggingface_hub")
OPEN = "import sys, weightsmith as ws\nfound = ws.open(sys.argv[1])\nprint(len(found), found.config['model_type'])"


def in_process(reference, **environment):
    """Open in a process of its own: huggingface_hub reads its settings when it is imported."""
    given = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    script = "import sys\nfrom weightsmith.errors import WeightsmithError\ntry:\n    exec(sys.argv[2])\n"
    script += "except WeightsmithError as e:\n    print(type(e).__name__, e)"
    return subprocess.run(
        [sys.executable, "-c", script, reference, OPEN],
        env={**given, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_model_in_the_hubs_cache_is_opened_offline(write_model, tmp_path):
    cache = tmp_path / "hub" / "models--org--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots" / COMMIT).mkdir(parents=True)
    (cache / "blobs").mkdir()
    for ref in ("main", "v1"):
        (cache / "refs" / ref).write_text(COMMIT)
    for file in write_model("a", llama_tensors(0)).iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (cache / "blobs" / digest).write_bytes(file.read_bytes())
        (cache / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/{digest}")
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for reference in ("org/tiny", "org/tiny@v1", f"org/tiny@{COMMIT}"):
        assert in_process(reference, **environment) == f"{len(llama_tensors(0))} llama"
    missing = in_process("org/other", **environment)
    assert missing.startswith("CheckpointError there is no file or folder org/other here, and the hub does not give it")


@pytest.fixture
def hub(write_model):
    """A server that speaks as much of the hub's API as a download needs, for one model."""
    folder = write_model("served", llama_tensors(0))
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "modeling_evil.py").write_text("never fetched")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            name = path.rsplit("/", 1)[-1]
            if path.startswith("/api/models/org/tiny/tree/"):
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith("/api/models/org/tiny"):
                info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files], "tags": []}
                info |= {"private": False, "downloads": 0}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            elif "/resolve/" in path and name in files:
                if self.command == "GET":
                    asked.append(name)
                etag = hashlib.sha256(files[name]).hexdigest()
                self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_model_is_fetched_from_a_hub_without_pickles_and_code(hub, tmp_path):
    endpoint, asked = hub
    environment = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    assert in_process("org/tiny", **environment) == f"{len(llama_tensors(0))} llama"
    assert sorted(asked) == ["config.json", "model.safetensors"]
    assert in_process("org/tiny", **environment, HF_HUB_OFFLINE="1") == f"{len(llama_tensors(0))} llama"
    assert "the hub does not give it" in in_process("org/none", **environment)
