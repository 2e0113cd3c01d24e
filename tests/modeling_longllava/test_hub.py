"""The Hub folder: it works in a process that has only torch, transformers and Pillow; uploading sends its bytes."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from longllava.modeling_longllava import LongLlavaForConditionalGeneration
from longllava.modeling_longllava.hub import export_model

CODE = {
    "attention.py",
    "cache.py",
    "causal_conv.py",
    "configuration_longllava.py",
    "modeling_longllava.py",
    "scan_compiled.py",
    "scan_triton.py",
    "selective_scan.py",
    "processing_longllava.py",
    "picture_reading_longllava.py",
    "picture_stream_longllava.py",
    "video_reading_longllava.py",
}
FILES = CODE | {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}
# What our package or its extras bring; a user of the folder may have none of it.
NOT_THERE = (
    "longllava", "__editable__", "av", "triton", "trl", "peft", "accelerate", "datasets", "sklearn", "matplotlib",
)  # fmt: skip
MESSAGES = [
    {
        "role": "user",
        "content": [*({"type": "image", "path": path} for path in "012"), {"type": "text", "text": "What is it?"}],
    }
]

CARD_QUESTION = "What is different between the two pictures?"

# Runs in the other process: arguments are the packages, the model folder, a folder to save to and three pictures.
USE_THE_FOLDER = """
import sys

packages, folder, again, *pictures = sys.argv[1:]
sys.path.append(packages)

import importlib.util
import json

for absent in ("longllava", "av", "triton", "accelerate"):
    assert importlib.util.find_spec(absent) is None, f"{absent} can be imported"

import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
    pipeline,
)

messages = json.loads(sys.stdin.read())
for part, path in zip(messages[0]["content"], pictures):
    part["path"] = path
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
result = {"config": type(config).__name__, "processor": type(processor).__name__, "models": [], "missing": []}
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    result["models"].append(type(model).__name__)
    result["missing"] += [str(keys) for keys in info.values() if keys]
with torch.no_grad():
    result["logits"] = model(**inputs).logits[0, -1].tolist()
result["tokens"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
answer = pipe(text=messages, max_new_tokens=4, generate_kwargs={"do_sample": False}, return_full_text=False)
result["answer"] = answer[0]["generated_text"]
model.save_pretrained(again)
processor.save_pretrained(again)
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="session")
def packages(tmp_path_factory) -> Path:
    """The installed packages without ours and without its extras, as links; `.pth` files would be read by none."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if entry.name.split("-")[0].split(".")[0] not in NOT_THERE and not entry.name.startswith(NOT_THERE[:2]):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def tiny_parts(tiny_model, tiny_processor):
    """Model and processor: 8 layers, attention at 4, four experts in every second layer."""
    text = {"num_hidden_layers": 8, "attn_layer_period": 8, "attn_layer_offset": 4}
    return tiny_model(text=text), tiny_processor()


@pytest.fixture
def saved(tiny_parts, tmp_path) -> Path:
    """What `save_pretrained` of both writes into one folder."""
    for part in tiny_parts:
        part.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def bare(saved, tmp_path) -> Path:
    """The same without code, as a repository keeps a model whose code it has elsewhere."""
    shutil.copytree(saved, tmp_path / "bare", ignore=shutil.ignore_patterns("*.py"))
    return tmp_path / "bare"


def run_in_clean_process(code: str, arguments: list[object], work: Path, text: str = "") -> str:
    """Runs `code` offline in the folder `work`; what it printed."""
    (work / "use.py").write_text(code)
    run = subprocess.run(
        # -I: no PYTHON* variables, no current folder. -S: no site-packages, so no editable installation of ours.
        [sys.executable, "-I", "-S", "use.py", *map(str, arguments)],
        cwd=work,
        env={"PATH": os.environ["PATH"], "HOME": str(work), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return run.stdout


def use_in_clean_process(folder: Path, packages: Path, pictures: list[Path], tmp_path: Path) -> tuple[dict, Path]:
    """Runs `USE_THE_FOLDER` in an empty folder; its result, and the folder it saved the model to."""
    work = tmp_path / f"work-{folder.name}"
    work.mkdir()
    again = tmp_path / f"{folder.name}-again"
    printed = run_in_clean_process(USE_THE_FOLDER, [packages, folder, again, *pictures], work, json.dumps(MESSAGES))
    return json.loads(printed.rpartition("RESULT")[2]), again


def check_use(result: dict, model, processor, pictures: list[Path]) -> None:
    """The other process saw our classes and computed what this one computes."""
    assert result["config"] == "LongLlavaConfig"
    assert result["processor"] == "LongLlavaProcessor"
    assert result["models"] == ["LongLlavaForConditionalGeneration"] * 4
    assert result["missing"] == []
    messages = json.loads(json.dumps(MESSAGES))
    for part, path in zip(messages[0]["content"], pictures, strict=False):
        part["path"] = str(path)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=1e-6, rtol=1e-5)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert result["tokens"] == generated[0].tolist()
    answer = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert result["answer"] == answer


# Export


def test_exported_folder_works_in_a_clean_process(bare, tiny_parts, packages, picture_files, tmp_path):
    """Offline and without this package; then saved from there, and used once more."""
    dst = export_model(bare, tmp_path / "exported")
    assert {path.name for path in dst.iterdir()} == FILES | {"README.md"}
    result, again = use_in_clean_process(dst, packages, picture_files[:3], tmp_path)
    check_use(result, *tiny_parts, picture_files[:3])

    assert {path.name for path in again.iterdir()} == FILES
    result, _ = use_in_clean_process(again, packages, picture_files[:3], tmp_path)
    check_use(result, *tiny_parts, picture_files[:3])


def test_save_pretrained_writes_the_same_folder(saved, tiny_parts, packages, picture_files, tmp_path):
    dst = export_model(saved, tmp_path / "exported")
    assert {path.name for path in saved.iterdir()} == FILES
    for name in FILES - {"tokenizer_config.json"}:
        assert (saved / name).read_bytes() == (dst / name).read_bytes(), name
    # Once it has been loaded, a tokenizer also lists its special tokens under a second name.
    settings, exported = (json.loads((path / "tokenizer_config.json").read_text()) for path in (saved, dst))
    assert exported.pop("model_specific_special_tokens") == {"image_token": "<image>"}
    assert exported == {name: value for name, value in settings.items() if name != "is_local"}
    result, _ = use_in_clean_process(saved, packages, picture_files[:3], tmp_path)
    check_use(result, *tiny_parts, picture_files[:3])


def test_every_auto_class_is_named(saved):
    """The names are those of files beside config.json, not of a repository or a package."""
    model = "modeling_longllava.LongLlavaForConditionalGeneration"
    assert json.loads((saved / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_longllava.LongLlavaConfig",
        "AutoModel": model,
        "AutoModelForImageTextToText": model,
        "AutoModelForMultimodalLM": model,
        "AutoModelForCausalLM": model,
    }
    auto_map = json.loads((saved / "processor_config.json").read_text())["auto_map"]
    assert auto_map == {"AutoProcessor": "processing_longllava.LongLlavaProcessor"}


def test_experts_are_stored_one_by_one(bare, tmp_path):
    names = load_file(export_model(bare, tmp_path / "exported") / "model.safetensors").keys()
    assert "model.language_model.layers.1.feed_forward.experts.3.up_proj.weight" in names
    assert not [name for name in names if name.endswith(("gate_up_proj", "experts.down_proj"))]


def test_card_has_metadata_and_an_own_card_stays(bare, tmp_path):
    card = ModelCard.load(export_model(bare, tmp_path / "exported") / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "apache-2.0"
    assert "longllava" in card.data.tags
    assert "1 of 8 layers" in card.text
    (bare / "README.md").write_text("my own card")
    assert (export_model(bare, tmp_path / "own") / "README.md").read_text() == "my own card"


def test_code_of_the_card_runs_in_a_clean_process(bare, tiny_parts, packages, picture_files, tmp_path):
    """The card's own code, as a reader pastes it, beside the exported folder and two pictures; the same answer."""
    model, processor = tiny_parts
    work = tmp_path / "reader"
    work.mkdir()
    pictures = [picture_files[index].rename(work / f"{name}.png") for index, name in enumerate(("first", "second"))]
    card = (export_model(bare, work / "exported") / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert '"exported"' in code
    code = "import sys\nsys.path.append(sys.argv[1])\n" + code
    printed = run_in_clean_process(code, [packages], work)

    content = [*({"type": "image", "path": str(path)} for path in pictures), {"type": "text", "text": CARD_QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(answer, skip_special_tokens=True)[0]
    assert expected
    # By lines, for a random model also writes carriage returns, and a pipe makes newlines of them.
    assert printed.splitlines() == f"{expected}\n".splitlines()


def test_sharded_folder_keeps_its_shards(tiny_parts, tmp_path):
    model, processor = tiny_parts
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "saved")
    dst = export_model(tmp_path / "saved", tmp_path / "exported")
    shards = sorted(path.name for path in dst.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards == sorted(path.name for path in (tmp_path / "saved").glob("model-*.safetensors"))
    loaded = LongLlavaForConditionalGeneration.from_pretrained(dst).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_training_files_do_not_travel(bare, tmp_path):
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json"):
        (bare / name).write_bytes(b"secret")
    assert {path.name for path in export_model(bare, tmp_path / "exported").iterdir()} == FILES | {"README.md"}


def test_model_is_named_by_its_hub_id(bare, tmp_path):
    """A repository that was downloaded before is exported by its id, offline."""
    cache = tmp_path / "hf_home" / "hub" / "models--somebody--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("1" * 40)
    shutil.copytree(bare, cache / "snapshots" / ("1" * 40))
    code = (
        "import sys; from longllava.modeling_longllava.hub import export_model;"
        "export_model('somebody/tiny', sys.argv[1])"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "exported")]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-6000:]
    assert {path.name for path in (tmp_path / "exported").iterdir()} == FILES | {"README.md"}


def test_incomplete_folder_is_refused(bare, tmp_path):
    tensors = load_file(bare / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["model.language_model.final_layernorm.weight"] = torch.ones(31)
    tensors["adapter"] = torch.ones(2)
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        export_model(bare, tmp_path / "exported")
    assert str(error.value).splitlines()[1:] == [
        "  missing: lm_head.weight (260, 32)",
        "  not part of the model: adapter (2,)",
        "  model.language_model.final_layernorm.weight has shape (31,), the configuration says (32,)",
    ]
    assert not [path for path in tmp_path.iterdir() if "exported" in path.name]


def test_what_is_no_model_folder(bare, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder and no Hub id"):
        export_model(tmp_path / "nowhere", tmp_path / "exported")
    (bare / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only safetensors go to the Hub"):
        export_model(bare, tmp_path / "exported")
    (bare / "config.json").write_text('{"model_type": "llava_jamba"}')
    with pytest.raises(ValueError, match="`longllava convert` reads the original layout"):
        export_model(bare, tmp_path / "exported")
    (bare / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no config.json"):
        export_model(bare, tmp_path / "exported")


# Push


class HubStandIn(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as an upload needs; what arrives is kept in `server.store`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        store, endpoint = self.server.store, f"http://127.0.0.1:{self.server.server_port}"
        store["requests"].append(f"POST {self.path}")
        if self.headers["Authorization"] != "Bearer hf_test":
            return self.answer({"error": "Invalid token"}, 401)
        if self.path == "/api/repos/create":
            request = json.loads(body)
            repo_id = f"{request['organization']}/{request['name']}"
            known = repo_id in store["repos"]
            store["repos"].setdefault(repo_id, request)
            return self.answer({"url": f"{endpoint}/{repo_id}", "id": "1"}, 409 if known else 200)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/models/somebody/tiny/preupload/main":
            # As the Hub decides with the .gitattributes that it gives a new repository.
            files = [
                {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular"}
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
            return self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        if self.path == "/somebody/tiny.git/info/lfs/objects/batch":
            objects = [
                {
                    **wanted,
                    "actions": {
                        "upload": {"href": f"{endpoint}/storage/{wanted['oid']}"},
                        "verify": {"href": f"{endpoint}/verify"},
                    },
                }
                for wanted in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if self.path == "/verify":
            content = store["objects"].get(json.loads(body)["oid"])
            return self.answer({}, 200 if content is not None and len(content) == json.loads(body)["size"] else 404)
        if self.path == "/api/models/somebody/tiny/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            store["commits"].append(lines[0]["value"]["summary"])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    assert value["encoding"] == "base64"
                    store["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    store["files"][value["path"]] = store["objects"][value["oid"]]
            return self.answer(
                {"success": True, "commitOid": "1" * 40, "commitUrl": f"{endpoint}/somebody/tiny/commit/{'1' * 40}"}
            )
        return self.answer({"error": f"no such address: {self.path}"}, 404)

    def do_PUT(self):
        self.server.store["requests"].append(f"PUT {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.store["objects"][hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self):
        self.server.store["requests"].append(f"GET {self.path}")
        self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def answer(self, content: dict, status: int = 200) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(encoded)

    def log_message(self, *args) -> None:
        """Quiet."""


@pytest.fixture
def hub():
    """A stand-in of the Hub on this machine; `hub.store` holds what it was sent."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubStandIn)
    server.store = {"requests": [], "repos": {}, "objects": {}, "files": {}, "commits": []}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push_in_subprocess(hub, folder: Path, tmp_path: Path, token: str = "hf_test") -> subprocess.CompletedProcess:
    """huggingface_hub reads HF_ENDPOINT when it is imported, so the push has a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf_home"),
        # The transfer by chunks needs a second service; the Hub offers plain LFS beside it.
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    code = (
        "import sys; from longllava.modeling_longllava.hub import push_model;"
        "print(push_model(sys.argv[1], 'somebody/tiny', private=True, token=sys.argv[2]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), token],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_push_sends_the_exported_folder(hub, bare, tmp_path):
    """Create, preupload, LFS batch, upload, verify, commit; the bytes that arrive are those of the export."""
    run = push_in_subprocess(hub, bare, tmp_path)
    assert run.returncode == 0, run.stderr[-6000:]
    assert run.stdout.strip().endswith("/somebody/tiny")
    repository = hub.store["repos"]["somebody/tiny"]
    assert repository.get("visibility") == "private" or repository.get("private") is True

    dst = export_model(bare, tmp_path / "exported")
    received = hub.store["files"]
    assert set(received) == {path.name for path in dst.iterdir()}
    for name in received.keys() - {"README.md"}:
        assert received[name] == (dst / name).read_bytes(), name
    assert b'from_pretrained("somebody/tiny", trust_remote_code=True' in received["README.md"]
    assert list(hub.store["objects"].values()) == [(bare / "model.safetensors").read_bytes()]
    assert hub.store["commits"] == ["Upload LongLLaVA"]
    requests = hub.store["requests"]
    assert "POST /somebody/tiny.git/info/lfs/objects/batch" in requests
    assert sum(request.startswith("PUT /storage/") for request in requests) == 1

    # Into the repository that now exists.
    assert push_in_subprocess(hub, bare, tmp_path).returncode == 0
    assert len(hub.store["commits"]) == 2


def test_push_with_a_wrong_token_fails_before_anything_is_sent(hub, bare, tmp_path):
    run = push_in_subprocess(hub, bare, tmp_path, token="hf_wrong")
    assert run.returncode != 0
    assert "401" in run.stderr
    assert hub.store["files"] == {}
    assert hub.store["objects"] == {}
