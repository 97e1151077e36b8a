"""Each bad input is refused in one line that says what to do, and leaves everything as it was."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import check_message, refused, run, snapshot
from safetensors.torch import load_file, save_file

from surgery import testing

CONFIG = {"model_type": "surprise", "architectures": ["SurpriseForCausalLM"], "torch_dtype": "bfloat16"}
Q, NORM, EMBED = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def weights():
    generator = torch.Generator().manual_seed(7)
    shapes = {EMBED: (31, 24), NORM: (24,), "lm_head.weight": (31, 24)}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes[f"{stem}.self_attn.q_proj.weight"] = (24, 24)
        shapes[f"{stem}.mlp.up_proj.weight"] = (37, 24)
        shapes[f"{stem}.mlp.up_proj.bias"] = (37,)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


CASES = {}


def case(code, *words):
    """Register a function that spoils a pair; `words` stand in the error, the way out among them."""

    def register(spoil):
        CASES[spoil.__name__] = (code, words, spoil)
        return spoil

    return register


def rewrite(folder, change, shard=None):
    """Pass the tensors of a folder's shards through `change`, the index kept true."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors = load_file(file)
        tensors = change(tensors) if shard in (None, file.name) else tensors
        save_file(tensors, file, metadata={"format": "pt"})
        index["weight_map"].update(dict.fromkeys(tensors, file.name))
    (folder / INDEX).write_text(json.dumps(index))


def replaced(folder, **tensors):
    """Replace tensors by name; dots are written as double underscores."""
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    rewrite(folder, lambda found: {name: new.get(name, tensor) for name, tensor in found.items()})


def renamed(folder, rename):
    rewrite(folder, lambda found: {rename(name): tensor for name, tensor in found.items()})


def added(folder, tensors):
    new = {name: tensor.clone() for name, tensor in tensors.items()}
    rewrite(folder, lambda found: {**found, **new}, SHARD)


def configured(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))


def reindexed(folder, name, file):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def new_header(folder, change):
    """Rewrite a shard's header by a function on its entries, its data kept."""
    path = folder / SHARD
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8:end]))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def pickled(pair, side="aligned", **extra):
    """Turn a side into a pickled checkpoint."""
    folder = pair.folder(side)
    tensors = testing.read_tensors(folder)
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    torch.save({**tensors, **extra}, folder / "pytorch_model.bin")


# Two checkpoints that do not belong together.


@case(3, Q, "[24, 24]", "[24, 23]", "check that base")
def shapes_differ(pair):
    replaced(pair.base, **{Q: torch.ones(24, 23).bfloat16()})


@case(3, "lm_head.weight", "other.lm_head.w", "LoX needs the checkpoint")
def names_differ_without_a_common_ending(pair):
    renamed(pair.base, lambda name: "other." + name.replace("weight", "w").replace("bias", "b"))


@case(3, "more than one way", "rename one side")
def names_differ_and_can_be_paired_in_two_ways(pair):
    both = torch.ones(24, 24).bfloat16()
    names = ("one.layers.0.q.weight", "two.layers.0.q.weight")
    rewrite(pair.aligned, lambda found: {name: both.clone() for name in names} if Q in found else {})
    rewrite(pair.base, lambda found: {"three.layers.0.q.weight": both} if Q in found else {})


@case(3, "2 tensors", "model.layers.1.", "--exclude")
def aligned_lacks_tensors(pair):
    gone = (Q, "model.layers.1.mlp.up_proj.weight")
    rewrite(pair.aligned, lambda found: {name: found[name] for name in found if name not in gone})


@case(3, Q, "no such tensor", "--exclude")
def base_lacks_a_tensor(pair):
    rewrite(pair.base, lambda found: {name: found[name] for name in found if name != Q})


@case(3, "[31, 24]", "[33, 24]", "--vocab common-rows")
def vocabulary_differs(pair):
    replaced(pair.base, **{EMBED: torch.ones(33, 24).bfloat16()})


@case(3, "base and aligned hold the same weights", "check that base")
def base_equals_aligned_by_content(pair):
    shutil.rmtree(pair.base)
    shutil.copytree(pair.aligned, pair.base)


@case(3, "base and aligned are both aligned", "give")
def base_equals_aligned_by_path(pair):
    pair.base = pair.aligned


@case(3, "base and aligned are both", "give")
def base_is_a_link_to_aligned(pair):
    shutil.rmtree(pair.base)
    pair.base.symlink_to(pair.aligned)


@case(3, "look swapped", "the card of base names aligned", "--i-checked-the-order")
def cards_say_that_the_order_is_swapped(pair):
    (pair.base / "README.md").write_text("---\nbase_model: someone/aligned\n---\n")


@case(3, "look swapped", "only base has a chat template", "--i-checked-the-order")
def chat_template_is_on_the_wrong_side(pair):
    (pair.base / "chat_template.jinja").write_text("{{ messages }}")


# Files that are missing, damaged or hostile.


@case(3, f"aligned/{SHARD}", "missing", "complete the download")
def a_shard_is_missing(pair):
    (pair.aligned / SHARD).unlink()


@case(3, f"base/{SHARD}", "missing", "complete the download")
def a_shard_of_base_is_missing(pair):
    (pair.base / SHARD).unlink()


@case(3, "the index of aligned", "model.layers.9.x", "download")
def index_names_an_absent_tensor(pair):
    reindexed(pair.aligned, "model.layers.9.x", SHARD)


@case(3, "../secret.safetensors", "below its folder", "do not trust")
def index_names_a_path_above_the_folder(pair):
    shutil.copy(pair.aligned / SHARD, pair.aligned.parent / "secret.safetensors")
    reindexed(pair.aligned, Q, "../secret.safetensors")


@case(3, "/etc/x.safetensors", "below its folder", "do not trust")
def index_names_an_absolute_path(pair):
    reindexed(pair.base, Q, "/etc/x.safetensors")


@case(3, f"aligned/{SHARD}", "truncated", "download")
def a_shard_is_truncated(pair):
    os.truncate(pair.aligned / SHARD, (pair.aligned / SHARD).stat().st_size - 5)


@case(3, f"base/{SHARD}", "truncated", "download")
def a_shard_ends_in_its_header(pair):
    os.truncate(pair.base / SHARD, 40)


@case(3, "header of 4611686018427387904 bytes", "at most", "download")
def a_header_claims_an_absurd_size(pair):
    with open(pair.aligned / SHARD, "r+b") as file:
        file.write(struct.pack("<Q", 1 << 62))


@case(3, "overlaps", "download")
def offsets_overlap(pair):
    def overlap(entries):
        rows = sorted((entry["data_offsets"], name) for name, entry in entries.items() if name[0] != "_")
        (begin, end), name = rows[1]
        entries[name]["data_offsets"] = [begin - 2, end - 2]
        return entries

    new_header(pair.aligned, overlap)


@case(3, "unknown dtype FLOAT7", "known are")
def a_dtype_is_unknown(pair):
    new_header(
        pair.base,
        lambda entries: {
            name: entry if name[0] == "_" else {**entry, "dtype": "FLOAT7"} for name, entry in entries.items()
        },
    )


@case(3, "config.json", "not JSON", "download")
def a_config_is_no_json(pair):
    (pair.aligned / "config.json").write_text("{'model_type': 1}")


@case(3, "nowhere", "give a folder")
def a_folder_is_missing(pair):
    pair.base = "nowhere"


@case(3, "no weights", "give the folder of a checkpoint")
def a_folder_is_empty(pair):
    shutil.rmtree(pair.base)
    pair.base.mkdir()


@case(3, "is a file", "folder")
def a_source_is_a_file(pair):
    pair.base /= SHARD


@case(3, "an adapter only", "merge it")
def aligned_is_an_adapter(pair):
    shutil.rmtree(pair.aligned)
    pair.aligned.mkdir()
    (pair.aligned / "adapter_config.json").write_text("{}")


# Values that are no numbers.


def spoiled_value(name, value):
    def change(found):
        return {
            **found,
            name: found[name].view(-1).index_fill(0, torch.tensor([5]), value).view_as(found[name]),
        }

    return lambda found: change(found) if name in found else found


for _side in ("aligned", "base"):
    for _name, _kind in ((Q, "edited"), (NORM, "copied")):
        for _value in ("nan", "inf"):

            def _spoil(pair, side=_side, name=_name, value=_value):
                rewrite(pair.folder(side), spoiled_value(name, float(value)))

            _spoil.__name__ = f"{_value}_in_an_{_kind}_tensor_of_{_side}"
            case(3, _name, f"the {_side} checkpoint", "NaN or infinity")(_spoil)


# Weights that are not floating point.

UP = "model.layers.0.mlp.up_proj"
BYTES = torch.ones(9, 1, dtype=torch.uint8)
INTS = torch.ones(3, 24, dtype=torch.int32)
SCALES = torch.ones(1, 24).half()
QUANTISED = {
    "bitsandbytes 4-bit": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {f"{UP}.weight.absmax": SCALES, f"{UP}.weight.quant_state.bitsandbytes__nf4": BYTES[:, 0]},
    ),
    "bitsandbytes 8-bit": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {f"{UP}.SCB": torch.ones(3)},
    ),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, {f"{UP}.qweight": INTS, f"{UP}.g_idx": INTS[0]}),
    "AWQ": ({"quant_method": "awq", "bits": 4}, {f"{UP}.qweight": INTS, f"{UP}.qzeros": INTS}),
    "BitNet (1-bit)": (
        {"quant_method": "bitnet"},
        {f"{UP}.packed": BYTES, f"{UP}.packed_scale": torch.ones(1)},
    ),
}
for _label, (_settings, _tensors) in QUANTISED.items():
    for _side in ("aligned", "base"):

        def _quantise(pair, side=_side, settings=_settings, tensors=_tensors):
            configured(pair.folder(side), quantization_config=settings)
            added(pair.folder(side), tensors)

        _quantise.__name__ = f"{_label.replace(' ', '_')}_weights_in_{_side}"
        case(3, f"{_side} has {_label} weights", "floats of 16 bits", "use")(_quantise)


@case(3, "aligned has GPTQ weights", "floats of 16 bits", "use")
def quantised_weights_that_no_config_tells_of(pair):
    added(pair.aligned, {f"{UP}.qweight": INTS, f"{UP}.g_idx": INTS[0]})


@case(3, "aligned has integer weights", Q, "I8", "floats of 16 bits")
def weights_are_integers(pair):
    replaced(pair.aligned, **{Q: torch.ones(24, 24, dtype=torch.int8)})


@case(3, "GGUF weights only (q4.gguf)", "give the safetensors checkpoint")
def weights_are_gguf(pair):
    shutil.rmtree(pair.aligned)
    pair.aligned.mkdir()
    (pair.aligned / "q4.gguf").write_bytes(b"GGUF\3\0\0\0")


@case(3, "pickled weights only (pytorch_model.bin)", "--allow-pickle")
def weights_are_pickled_and_nobody_allowed_it(pair):
    pickled(pair)


# Options that make no sense.


def options(name, code, words, *arguments):
    def spoil(pair):
        return arguments

    spoil.__name__ = name
    case(code, *words)(spoil)


options("rank_is_0", 2, ["rank is 0", "at least 1", "--rank full"], "--rank", "0")
options("rank_is_negative", 2, ["rank is -2", "at least 1"], "--rank", "-2")
options("rank_is_above_every_tensor", 2, ["rank is 25", "more than 24", "--rank 24 or less"], "--rank", "25")
options("alpha_is_nan", 2, ["alpha is nan", "finite", "--alpha 1.25"], "--alpha", "nan")
options("alpha_is_infinite", 2, ["alpha is inf", "finite", "--alpha 1.25"], "--alpha", "inf")
options("alpha_is_negative", 2, ["alpha is -0.1", "at least 0", "remove alignment"], "--alpha", "-0.1")
options(
    "alpha_is_below_1_on_the_base_anchor", 2, ["alpha is 0.99", "at least 1", "remove alignment"],
    "--anchor", "base", "--alpha", "0.99",
)  # fmt: skip
options("nothing_is_selected", 2, ["select no tensor", "loosen --include"], "--include", "nothing")
options("a_pattern_is_no_regular_expression", 2, ["include is '('", "regular"], "--include", "(")
options("layers_are_no_range", 2, ["layers is '7'", "--layers 4:20"], "--layers", "7")
options("json_and_quiet_contradict_each_other", 2, ["--json", "--quiet", "choose one"], "--json")
options("an_adapter_takes_no_dtype", 2, ["--dtype", "--as-lora"], "--as-lora", "--dtype", "float32")
options("the_device_is_unknown", 2, ["'abacus'", "--device cpu"], "--device", "abacus")


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line_and_leaves_no_trace(name, pair, capfd):
    code, words, spoil = CASES[name]
    more = spoil(pair) or ()
    refused(capfd, pair, code, words, pair.command("-q", *more))


def test_the_same_command_on_the_good_pair_succeeds(pair, capfd):
    before = snapshot(pair.root)
    # In matrices as small as these the grid can be too coarse for 99 % of an edit, which would be warned of.
    code, out, err = run(capfd, pair.command("-q"))
    assert (code, out) == (0, "")
    assert not err or err.startswith("warning: a tensor keeps 9")
    after = snapshot(pair.root)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == {"out"}


def test_a_refusal_is_seen_by_who_compares_the_folders(pair, capfd):
    with pytest.raises(AssertionError):
        refused(capfd, pair, 0, [], pair.command("-q"))


def test_names_that_differ_by_one_prefix_are_paired(pair, capfd):
    renamed(pair.base, lambda name: "language_model." + name)
    code, out, err = run(capfd, pair.command("--json"))
    assert code == 0, err
    assert json.loads(out)["edited"] == 6


def test_swapped_arguments_go_through_when_someone_vouches(pair, capfd):
    (pair.base / "chat_template.jinja").write_text("{{ messages }}")
    assert run(capfd, pair.command("-q", "--i-checked-the-order"))[0] == 0


def test_an_unknown_architecture_works(pair, capfd):
    for folder in (pair.base, pair.aligned):
        renamed(folder, lambda name: name.replace("model.layers.", "trunk.rungs.").replace("q_proj", "zork"))
        (folder / "config.json").write_text('{"model_type": "surprise"}')
    code, out, err = run(capfd, pair.command("--json"))
    assert code == 0, err
    assert json.loads(out)["edited"] == 6


def test_a_pickle_is_read_when_allowed(pair, capfd):
    pickled(pair)
    assert run(capfd, pair.command("-q", "--allow-pickle"))[0] == 0
    assert not list(pair.out.glob("*.bin"))


class Runs:
    """Unpickled freely, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("side", ["aligned", "base"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(pair, capfd, side):
    made = pair.root / "made"
    pickled(pair, side, x=Runs(made))
    words = [f"{side}/pytorch_model.bin", "run code (posix.mkdir)", "do not trust", "safetensors"]
    refused(capfd, pair, 3, words, pair.command("-q", "--allow-pickle"))
    assert not made.exists()
    torch.load(pair.folder(side) / "pytorch_model.bin", weights_only=False)
    assert made.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nan_in_an_edited_tensor_of_base", "rank_is_0", "a_shard_is_truncated"])
def test_bad_input_is_refused_the_same_way_in_a_real_process(pair, name):
    code, words, spoil = CASES[name]
    more = spoil(pair) or ()
    before = snapshot(pair.root)
    command = [sys.executable, "-m", "surgery", *pair.command("-q", *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    check_message(done.stderr, words)
    assert snapshot(pair.root) == before
