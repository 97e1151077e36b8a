"""A model on the loopback Hub, and what is fetched of it."""

import json

import hub_server
import pytest

from surgery.errors import AccessError, InputError, ResourceError, SurgeryError, UsageError
from surgery.hub import resolve

Fault, Hub = hub_server.Fault, hub_server.Hub
TOKEN = "hf_secretsecretsecretsecretsecret12"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
CONFIG = b'{"model_type": "llama"}'


def index_of(*files):
    return json.dumps({"weight_map": {f"layer.{i}": file for i, file in enumerate(files)}}).encode()


def longest(slept):
    """Seconds that the most patient thread would have waited for the Hub.

    Shorter sleeps are those of a file lock that polls: it spins here, where sleeping takes no time.
    """
    return max((sum(pause for pause in pauses if pause > 0.1) for pauses in slept.values()), default=0)


@pytest.fixture
def model(hub):
    """A repository with a model in two shards, and beside it much that no edit needs."""
    repository = hub.create("org/model")
    repository.commit(
        {
            "config.json": CONFIG,
            INDEX: index_of(*SHARDS),
            SHARDS[0]: b"first" * 100,
            SHARDS[1]: b"second" * 100,
            "README.md": b"# A card",
            "LICENSE": b"do as you like",
            "tokenizer.json": b"{}",
            "tokenizer.model": b"pieces",
            "modeling_x.py": b"raise SystemExit",
            "odd[1].jinja": b"{{ x }}",
            "additional_chat_templates/tool.jinja": b"{{ y }}",
            "surgery.json": b"{}",
            "model.fp16.safetensors": b"half",
            "model.safetensors": b"whole",
            "adapter_model.safetensors": b"adapter",
            "pytorch_model.bin": b"pickle",
            "training_args.bin": b"pickle",
            "model.Q4_K_M.gguf": b"quantised",
            "onnx/model.onnx": b"graph",
            "original/params.json": b"{}",
            "consolidated.00.pth": b"pickle",
            "checkpoint-10/optimizer.pt": b"state",
            "runs/x/events.tfevents.1": b"log",
            "banner.png": b"picture",
            ".gitattributes": b"*.bin filter=lfs",
            ".eval_results/x.yaml": b"[]",
        }
    )
    return repository


WANTED = {
    "config.json", INDEX, *SHARDS, "README.md", "LICENSE", "tokenizer.json", "tokenizer.model", "modeling_x.py",
    "odd[1].jinja", "additional_chat_templates/tool.jinja", "surgery.json",
}  # fmt: skip


def files(source):
    return {path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file()}


def failure(name, kind=AccessError, **options):
    """The message of the error that resolving ends in, which has to be one line without secrets."""
    with pytest.raises(SurgeryError) as caught:
        resolve(name, **options)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert caught.value.exit_code == {AccessError: 5, ResourceError: 4, InputError: 3, UsageError: 2}[kind]
    assert "\n" not in text
    assert TOKEN not in text
    assert kind is not AccessError or caught.value.__cause__ is None
    return text
