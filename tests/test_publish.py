"""Publishing on a server on this machine that takes what the hub takes, and reading it back."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from d2m_jax import publish
from d2m_jax.config import (
    AutoencoderConfig,
    ConfigError,
    FluxConfig,
    ModelConfig,
    MoEConfig,
    PixelsConfig,
    PromptsConfig,
    StackConfig,
    WordsConfig,
)
from d2m_jax.models.flux import initialise
from d2m_jax.sampling.pipeline import load_pipeline
from d2m_jax.weights import convert
from d2m_jax.weights.directory import model_directory

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPARSE = FluxConfig(
    in_channels=48,
    vec_in_dim=16,
    context_in_dim=16,
    hidden_size=32,
    num_heads=2,
    axes_dim=(4, 6, 6),
    guidance_embed=False,
    double=(StackConfig(1, ffn="moe"),),
    single=(StackConfig(1, blocks=2, active=1),),
    moe=MoEConfig(experts=4, top_k=1),
)
WORDS = ModelConfig(SPARSE, WordsConfig(dim=16, length=2, vocabulary=("cat",)), PixelsConfig(8, 8))
FLUX = ModelConfig(
    replace(SPARSE, hidden_size=3072, num_heads=24, axes_dim=(16, 56, 56)),
    PromptsConfig(),
    AutoencoderConfig(),
    encoders="/home/me/encoders",
)


class Hub(http.server.BaseHTTPRequestHandler):
    """Small files come in the commit, others beforehand by their checksum, as Git LFS has it."""

    content: ClassVar[dict[str, bytes]] = {}
    objects: ClassVar[dict[str, bytes]] = {}
    commits: ClassVar[list[bytes]] = []
    asked: ClassVar[dict] = {}
    closed = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if Hub.closed:
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path.startswith("/api/repos/create"):
            Hub.asked = json.loads(body)
            return self.answer(200, {"url": f"{self.home()}/me/mine", "name": "me/mine"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.startswith("params/") else "regular" for path in paths}
            files = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]
            return self.answer(200, {"files": files})
        if self.path.endswith("/objects/batch"):
            found = [
                {**o, "actions": {"upload": {"href": f"{self.home()}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": found})
        assert self.path == "/api/models/me/mine/commit/main", self.path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                Hub.content[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                Hub.content[value["path"]] = Hub.objects[value["oid"]]
        Hub.commits.append(body)
        url = f"{self.home()}/me/mine/commit/{COMMIT}"
        return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "commitMessage": "m"})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        Hub.objects[oid] = body
        self.answer(200, {})

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/me/mine"):
            files = [
                {"type": "file", "path": p, "rfilename": p, "size": len(c), "oid": p}
                for p, c in Hub.content.items()
            ]
            value = (
                files if "/tree/" in path else {"id": "me/mine", "sha": COMMIT, "siblings": files}
            )
            return self.answer(200, value)
        content = Hub.content[path.split(f"/resolve/{COMMIT}/")[1]]
        more = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, content, more)

    do_HEAD = do_GET

    def home(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, status, value, headers=None):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Settings for processes that shall ask this server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_TOKEN": "hf_of_mine",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "no_proxy": "*",
    }
    server.shutdown()
    server.server_close()


def published(folder, home, *options):
    command = [sys.executable, "-m", "d2m_jax.publish", str(folder), "me/mine", *options]
    return subprocess.run(command, cwd=ROOT, env=home, capture_output=True, text=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "model"
    model_directory.save(folder, WORDS, initialise(SPARSE, 0))
    return folder


def test_what_was_published_is_read_by_its_name(words, home, tmp_path):
    Hub.closed = True
    refused = published(words, home, "--license", "apache-2.0")
    assert refused.returncode == 2 and Hub.content == {}
    assert "me/mine: nothing was published: log in with `hf auth login`" in refused.stderr
    Hub.closed = False
    done = published(words, home, "--license", "apache-2.0", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"/me/mine/commit/{COMMIT}")
    assert len(Hub.commits) == 1 and Hub.asked["visibility"] == "private"
    files = {f.relative_to(words).as_posix(): f for f in words.rglob("*") if f.is_file()}
    assert set(Hub.content) == {*files, "README.md"} and Hub.objects
    for name, file in files.items():
        if name != "config.json":
            assert Hub.content[name] == file.read_bytes()
    code = "import sys, d2m_jax as d; from d2m_jax.weights.convert import convert\n"
    code += "print(d.load_pipeline('me/mine')('cat', steps=1).sum().item())\n"
    code += "print(len(d.load_model('me/mine').single)); convert('me/mine', sys.argv[1])"
    asked = [sys.executable, "-c", code, str(tmp_path / "ours")]
    done = subprocess.run(asked, cwd=ROOT, env=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image = load_pipeline(words)("cat", steps=1).sum().item()
    assert done.stdout.split() == [str(image), "1"]
    assert model_directory.load_config(tmp_path / "ours") == WORDS


def test_a_pipeline_is_published(words, monkeypatch):
    """As it would be from its folder: the path of a folder for a while is told to nobody."""
    seen = []

    def published(folder, *arguments, **options):
        seen.append((model_directory.load_config(folder), arguments))
        return "address"

    push, pipe = publish.push_to_hub, load_pipeline(words)
    monkeypatch.setattr(publish, "push_to_hub", published)
    assert push(pipe, "me/mine", "a/b", license="mit", private=True) == "address"
    assert seen == [(WORDS, ("me/mine", "a/b", "mit", True))]


def facts(card) -> dict:
    return yaml.safe_load(str(card).split("---")[1])


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_a_child_of_flux_inherits_its_license(guided):
    config = replace(FLUX, transformer=replace(FLUX.transformer, guidance_embed=guided))
    card = publish.card(publish.Published(Path(), config, False, False), "me/mine")
    found, text = facts(card), str(card)
    if guided:
        assert found["license"] == "other" and found["base_model"].endswith("FLUX.1-dev")
        assert found["license_name"] == "flux-1-dev-non-commercial-license"
        assert "Copyright Black Forest Labs, Inc." in text
    else:
        assert found["license"] == "apache-2.0" and found["base_model"].endswith("FLUX.1-schnell")
        assert "Black Forest Labs, Inc." not in text
    assert "shared expert and 1 of 4 normal experts" in text
    assert f'load_pipeline("me/mine", encoders="{found["base_model"]}")' in text
    other = publish.card(publish.Published(Path(), config, False, True), "me/mine", "a/b", "mit")
    assert facts(other)["license"] == "mit" and facts(other)["base_model"] == "a/b"
    assert 'load_pipeline("me/mine")' in str(other)


def test_what_is_not_as_wide_as_flux_inherits_nothing():
    """A model that reads FLUX.1's text encoders need not be made of it."""
    found = publish.Published(Path(), replace(FLUX, transformer=SPARSE), False, True)
    with pytest.raises(ConfigError, match=r"--license: expected one.*32 wide, and FLUX.1 3072"):
        publish.card(found, "me/mine")
    text = str(publish.card(found, "me/mine", license="mit"))
    assert "black-forest-labs" not in text and "base_model" not in text
    found = replace(found, own_encoders=False)
    text = str(publish.card(found, "me/mine", license="mit"))
    assert 'load_pipeline("me/mine", encoders=ENCODERS)' in text and "# ENCODERS: the Flux" in text
    assert 'encoders="a/b"' in str(publish.card(found, "me/mine", "a/b", "mit"))


def test_a_card_alone(words, tmp_path, capsys):
    file = tmp_path / "new" / "card.md"
    publish.main([str(words), "me/mine", "--license", "mit", "--card", str(file)])
    assert capsys.readouterr().out == f"the card is in {file}; nothing was published\n"
    assert file.read_text().count("license: mit\n") == 1


def test_a_run_tells_what_it_measured(words, tmp_path):
    row = {"name": "teacher", "steps": 0, "error": {"seen": 0.0}}
    row["milliseconds_per_image"] = {"batch_1": 2.5}
    last = row | {"name": "fitted, after moe", "steps": 600, "error": {"seen": 0.0196}}
    report = {"rows": [row, last], "device": "1 × cpu", "date": "2026-11-26"}
    (tmp_path / "models" / "start").mkdir(parents=True)
    (tmp_path / "model").symlink_to(words)
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = publish._read(tmp_path)
    text = str(publish.card(found, "me/mine", license="mit"))
    assert found.folder == tmp_path / "model" and "## Measured (1 × cpu, 2026-11-26)" in text
    assert "After 600 steps" in text and "| distillation error, seen | 0 | 0.0196 |" in text
    assert "| milliseconds per image and forward, batch of 1 | 2.5 | 2.5 |" in text


def test_an_export_for_torch_says_so(words, tmp_path):
    convert.convert(words, tmp_path / "exported", export="torch")
    found = publish._read(tmp_path / "exported")
    card = publish.card(found, "me/mine", license="mit")
    assert found.torch and "pytorch" in facts(card)["tags"] and "sparse_flux.py" in str(card)


def test_what_cannot_be_published(words, tmp_path):
    with pytest.raises(ConfigError, match="mine: expected OWNER/NAME"):
        publish.push_to_hub(words, "mine", license="mit")
    with pytest.raises(ConfigError, match="--license: expected one, such as apache-2.0"):
        publish.push_to_hub(words, "me/mine")
    with pytest.raises(ConfigError, match="expected a model directory"):
        publish.push_to_hub(tmp_path, "me/mine")
