"""Repositories of Hugging Face, from a server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from d2m_jax.config import ConfigError
from d2m_jax.weights.files import hub
from d2m_jax.weights.torch_files.diffusers_folder import FOLDERS

ROOT = Path(__file__).parents[3]
REVISION = "0123456789abcdef0123456789abcdef01234567"
PIPELINE = [
    "flux1-dev.safetensors",  # BFL's own, 23.8 GB beside the transformer's
    "ae.safetensors",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "text_encoder_2/model.fp16-00001-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.fp16.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.msgpack",
]
FULL = [f for f in PIPELINE if "/" in f and not re.search("fp16|bin|msgpack", f)]
ENCODERS = [f for f in FULL if not f.startswith("transformer/")]
VARIANT = "transformer/diffusion_pytorch_model.fp16.safetensors"  # alone, so it is taken
MODEL = ["config.json", "params/_METADATA", "params/d/0.zarr", "encoders/vae/config.json"]
FILES = {
    "someone/pipeline": PIPELINE,
    "someone/transformer": [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
        "samples/a.png",
    ],
    "someone/directory": [*MODEL, "other.txt"],
    "someone/one": ["flux1-dev-fp8.safetensors", "README.md", "picture.png"],
    "someone/several": ["a-fp8.safetensors", "b-fp8.safetensors", "sub/c.safetensors"],
    "someone/lora": ["style.safetensors", "adapter_config.json", "style.png"],
    "someone/adapters": [
        "adapter_model.safetensors",
        "adapter_config.json",
        "other.safetensors",
        "q/adapter_model.safetensors",
        "q/adapter_config.json",
    ],
    "someone/shards": [
        "README.md",
        "flux-00001-of-00002.safetensors",
        "flux-00002-of-00002.safetensors",
        "flux.safetensors.index.json",
    ],
    "someone/Capitals": ["FLUX.SAFETENSORS", "Other.SafeTensors"],
    "someone/named": ["q/adapter_model.safetensors", "q/adapter_config.json", "q/README.md"],
    "someone/gguf": ["flux1-dev-Q4_0.gguf", "flux1-dev-Q8_0.gguf"],
    "someone/empty": ["README.md"],
    "someone/gated": (401, "GatedRepo"),
    "someone/waiting": (403, "GatedRepo"),
}
# Source, its parts, what is downloaded of it, and what is meant by it.
TAKEN = [
    ("someone/pipeline", None, ["transformer/config.json", VARIANT, "model_index.json"], ""),
    (
        "someone/pipeline",
        ["transformer", *FOLDERS],
        [*FULL, VARIANT, "model_index.json"],
        "",
    ),
    ("someone/pipeline", FOLDERS, [*ENCODERS, "model_index.json"], ""),
    ("someone/pipeline/ae.safetensors", None, ["ae.safetensors"], "ae.safetensors"),
    ("someone/transformer", None, FILES["someone/transformer"][:2], ""),
    ("someone/directory", None, MODEL, ""),
    ("someone/one", None, ["flux1-dev-fp8.safetensors"], "flux1-dev-fp8.safetensors"),
    ("someone/one@main", None, ["flux1-dev-fp8.safetensors"], "flux1-dev-fp8.safetensors"),
    ("someone/several/sub/c.safetensors", None, ["sub/c.safetensors"], "sub/c.safetensors"),
    ("someone/lora", None, FILES["someone/lora"][:2], "style.safetensors"),
    # PEFT's settings come along where they are of the file.
    ("someone/lora/style.safetensors", None, FILES["someone/lora"][:2], "style.safetensors"),
    (
        "someone/adapters/adapter_model.safetensors",
        None,
        FILES["someone/adapters"][:2],
        "adapter_model.safetensors",
    ),
    ("someone/adapters/other.safetensors", None, ["other.safetensors"], "other.safetensors"),
    (
        "someone/shards",
        None,
        FILES["someone/shards"][1:],
        "flux.safetensors.index.json",
    ),
    ("someone/Capitals/FLUX.SAFETENSORS", None, ["FLUX.SAFETENSORS"], "FLUX.SAFETENSORS"),
    ("someone/named", None, FILES["someone/named"][:2], "q/adapter_model.safetensors"),
]
REFUSED = [
    ("someone/several", r"holds 2 files of weights \(a-fp8.safetensors; b-fp8.safetensors\); name"),
    ("someone/several/d.safetensors", "holds no d.safetensors, but a-fp8.safetensors; b-fp8"),
    ("someone/gguf", "holds .gguf files alone, expected .safetensors"),
    ("someone/gguf/flux1-dev-Q4_0.gguf", "someone/gguf/flux1-dev-Q4_0.gguf: GGUF, which holds qu"),
    (
        "someone/shards/flux-00002-of-00002.safetensors",
        "flux-00002-of-00002.safetensors: one of 2 shards of a model; give their folder, or its",
    ),
    ("someone/pipeline/transformer", "no such file or folder in .*; of Hugging Face, name OW"),
    ("someone/empty", "holds no weights, expected .safetensors"),
    ("someone/gated", "gated: accept its licence on http.*/someone/gated, then log in with `hf au"),
    ("someone/waiting", "gated, and your login has no access to it: accept its licence on http"),
    ("someone/absent", "taken for a repository of Hugging Face, which is not there: http.*/some"),
    ("someone/one@absent", "the repository http.*/someone/one has no such revision"),
    ("/nothing/there", "^/nothing/there: no such file or folder$"),
    ("./someone/one", f"^./someone/one: no such file or folder in {ROOT}$"),
]
CHILD = """
import json, pathlib, shutil, sys
from huggingface_hub import constants
from d2m_jax.config import ConfigError
from d2m_jax.weights.files import hub
for source, parts in json.loads(sys.argv[1]):
    if not constants.HF_HUB_OFFLINE:
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    try:
        path = hub.local(source, *([] if parts is None else [parts]))
        top = next(p for p in (path, *path.parents) if p.parent.name == "snapshots")
        files = sorted(f.relative_to(top).as_posix() for f in top.rglob("*") if f.is_file())
        print("RESULT", json.dumps([path.relative_to(top).as_posix(), files]))
    except ConfigError as error:
        print("RESULT", json.dumps(str(error)))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0]
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = FILES.get(name, (404, "RepoNotFound"))
        if isinstance(files, tuple):
            return self.answer(files[0], {"X-Error-Code": files[1]})
        if "/absent" in path:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/"):
            value = {"id": name, "sha": REVISION, "siblings": [{"rfilename": f} for f in files]}
            if "/tree/" in path:
                value = [{"type": "file", "path": f, "size": len(f), "oid": sha(f)} for f in files]
            return self.answer(200, {}, json.dumps(value).encode())
        file = re.split(r"/resolve/[^/]+/", path)[1]
        if file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        return self.answer(
            200, {"ETag": f'"{sha(file)}"', "X-Repo-Commit": REVISION}, file.encode()
        )

    do_HEAD = do_GET

    def answer(self, status, headers, content=b""):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def sha(text):
    return hashlib.sha1(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """What hub.local makes of sources, in a process of its own: huggingface_hub reads its settings
    once. Online each begins with an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "no_proxy": "*",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }

    def results(asked, offline=False, **more):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(asked)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | settings | {"HF_HUB_OFFLINE": str(int(offline))} | more,
            timeout=300,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert len(lines) == len(asked), done.stderr[-3000:]
        assert "thrown while requesting" not in done.stderr  # huggingface_hub's own lines
        return [json.loads(line.removeprefix("RESULT ")) for line in lines]

    yield results
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def results(ask):
    asked = [(source, parts) for source, parts, *_ in TAKEN]
    return ask(asked + [(source, None) for source, _ in REFUSED])


@pytest.mark.parametrize("i", [0, 2, 4, 6], ids=[TAKEN[i][0] for i in (0, 2, 4, 6)])
def test_what_was_downloaded_is_found_offline(ask, i):
    source, parts, *_ = TAKEN[i]
    online = ask([(source, parts)])
    assert ask([(source, parts)], offline=True) == online
    (said,) = ask([("someone/lora", None)], offline=True)
    assert "taken for a repository of Hugging Face, which is not in its cache" in said


def test_without_a_connection_a_mistyped_path_is_told_at_once(ask):
    start = time.monotonic()
    (said,) = ask([("teachers/iconz", None)], HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith(f"teachers/iconz: no such file or folder in {ROOT}; taken for a repo")
    assert time.monotonic() - start < 20  # trying again and again takes 23 s


@pytest.mark.parametrize("i", range(len(TAKEN)), ids=[f"{t[0]}-{i}" for i, t in enumerate(TAKEN)])
def test_what_is_needed_is_downloaded_and_no_more(results, i):
    meant, files = results[i]
    assert (meant, files) == (TAKEN[i][3] or ".", sorted(set(TAKEN[i][2])))


@pytest.mark.parametrize("i", range(len(REFUSED)), ids=[source for source, _ in REFUSED])
def test_what_is_refused_says_what_to_do(results, i):
    said = results[len(TAKEN) + i]
    assert re.search(REFUSED[i][1], said) and "\n" not in said, said
    assert said.startswith(REFUSED[i][0].split("@")[0].removesuffix("/d.safetensors")), said


def test_a_cache_and_a_cut_off_download(tmp_path):
    snapshot = tmp_path / "models--someone--flux" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    assert hub.local(snapshot) == snapshot
    with pytest.raises(ConfigError, match=f"one of the 1 folders .*, such as {snapshot}$"):
        hub.local(snapshot.parents[1])
    with pytest.raises(ConfigError, match=f"one of the 1 folders .*, such as {snapshot}$"):
        hub.local(snapshot.parent)
    link = snapshot / "flux.safetensors"
    link.symlink_to("../../blobs/abc")
    with pytest.raises(ConfigError, match=r"flux.safetensors: a link to .*abc, which is not there"):
        hub.local(link)
