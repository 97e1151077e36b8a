"""Every method on every architecture: what `docs/methods.md` shows, and the golden file it is made from."""

import json
import shutil
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import surgery
from surgery import demo
from surgery.demo.tokenizer import VOCABULARY
from surgery.errors import SurgeryError
from surgery.methods.booster import Booster
from surgery.methods.circuit_breakers import CircuitBreakers
from surgery.methods.condition_number import ConditionNumber
from surgery.methods.mlac import MLAC
from surgery.methods.repnoise import RepNoise
from surgery.methods.t_vaccine import TVaccine
from surgery.methods.tar import TAR
from surgery.methods.vaccine import Vaccine
from surgery.testing import perturbed_copy
from surgery.train.training import Training

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/matrix.json"
PAGE = ROOT / "docs/methods.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"

METHODS = {
    "LoX": surgery.LoX(rank=4, alpha=1.5),
    "Vaccine": Vaccine(),
    "T-Vaccine": TVaccine(gamma=1),
    "Circuit Breakers": CircuitBreakers(),
    "Booster": Booster(),
    "TAR": TAR(inner_steps=2, every=2, adversary_lr="1e-3"),
    "MLAC": MLAC(inner_steps=1, inner_lr=1e-3),
    "Condition Number": ConditionNumber(),
    "RepNoise": RepNoise(beta=0.1),
}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_HEADS = {**_COMMON, "head_dim": 8}
ARCHITECTURES = {
    "Llama": ("llama", _COMMON),
    "Qwen2": ("qwen2", _COMMON),
    "Qwen3": ("qwen3", _HEADS),
    "Qwen3-MoE": (
        "qwen3_moe",
        {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "Mistral": ("mistral", _COMMON),
    "Mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Gemma 2": ("gemma2", _HEADS),
    "Gemma 3": ("gemma3_text", _HEADS),
    "GPT-2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
         "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
    ),
    "OPT": ("opt", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT-NeoX": ("gpt_neox", {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}),
    "Phi-3": ("phi3", _COMMON),
    "OLMo 2": ("olmo2", _COMMON),
}  # fmt: skip


def model_folder(folder, architecture):
    """A random float32 model with the tokenizer of the embedded pair."""
    kind, settings = ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo.folder("aligned") / name, folder / name)
    return folder


def data_files(folder):
    """A dozen rows of every set; aligned and harmful ones answer the same prompts."""
    harmful, refusals = demo.data("harmful", "train"), demo.data("refusals", "train")
    answers = {row["prompt"]: row for row in refusals}
    both = [row for row in harmful if row["prompt"] in answers][:12]
    sets = {
        "aligned": [answers[row["prompt"]] for row in both],
        "harmful": both,
        "retain": demo.data("benign", "train")[:12],
    }
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in sets}


def logits(model):
    tokens = torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def cell(name, model, data, folder):
    """`yes` where a step trains, merges and reloads with the logits of the adapter; else why it is refused."""
    try:
        with warnings.catch_warnings():
            # peft corrects the layout of GPT-2's weights and says so; transformers renamed an attribute.
            warnings.simplefilter("ignore")
            (_edited if name == "LoX" else _trained)(METHODS[name], model, data, folder)
    except SurgeryError as error:
        assert not (folder / "out").exists()
        return str(error)
    return "yes"


def _edited(method, model, data, folder):
    other = perturbed_copy(model, folder / "other")
    options = surgery.Options(dtype="float32")
    done = surgery.apply(method, base=model, model=other, output=folder / "out", options=options)
    assert not torch.equal(logits(loaded(done.output)), logits(loaded(other)))
    assert logits(loaded(done.output)).isfinite().all()


def _trained(method, model, data, folder):
    from peft import PeftModel

    training = Training(
        steps=1, batch_size=4, lr=1e-3, warmup=0.0, lora_rank=2, lora_alpha=4.0, keep_adapter=True
    )
    done = surgery.immunise(
        method,
        model=model,
        data={name: [data[name]] for name in method.sets()},
        output=folder / "out",
        training=training,
        options=surgery.Options(dtype="float32"),
    )
    adapted = logits(PeftModel.from_pretrained(loaded(model), done.adapter))
    merged, before = logits(loaded(done.output)), logits(loaded(model))
    assert float((merged - adapted).abs().max()) < 1e-4 * float(adapted.abs().max())
    assert float((adapted - before).abs().max()) > 0


def table(found):
    """The golden file as Markdown: a row an architecture, refusals as notes."""
    notes = {}
    lines = [f"| | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for architecture in ARCHITECTURES:
        cells = [
            "yes" if told == "yes" else f"no ({notes.setdefault(told, len(notes) + 1)})"
            for told in (found[architecture][method] for method in METHODS)
        ]
        lines.append(f"| {architecture} | {' | '.join(cells)} |")
    told = "".join(f"\n({number}) {text}" for text, number in notes.items())
    return "\n".join(lines) + (f"\n{told}" if told else "")
