import pytest

from surgery.errors import InputError
from surgery.pairing import pair_names

LLAMA = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]
WRAPPED = ["language_model." + name for name in LLAMA]
GPT2_BARE = ["wte.weight", "h.0.attn.c_attn.weight", "ln_f.weight"]
GPT2 = ["transformer." + name for name in GPT2_BARE]


def test_equal_names_pair_with_themselves():
    pairing = pair_names(LLAMA, LLAMA)
    assert pairing.partner == dict(zip(LLAMA, LLAMA, strict=True))
    assert (pairing.only_aligned, pairing.only_base, pairing.note) == ((), (), "")


@pytest.mark.parametrize(
    ("aligned", "base"), [(WRAPPED, LLAMA), (LLAMA, WRAPPED), (GPT2, GPT2_BARE), (GPT2_BARE, GPT2)], ids=str
)
def test_a_prefix_on_one_side_is_exchanged_and_told(aligned, base):
    pairing = pair_names(aligned, base)
    assert pairing.partner == dict(zip(aligned, base, strict=True))
    assert pairing.note


def test_extra_tensors_do_not_disturb_the_exchange():
    pairing = pair_names([*WRAPPED, "vision_tower.proj.weight"], LLAMA)
    assert pairing.only_aligned == ("vision_tower.proj.weight",)
    assert len(pairing.partner) == len(LLAMA)


def test_two_equally_good_exchanges_are_refused():
    aligned = [f"{tower}.layers.0.mlp.up_proj.weight" for tower in ("text", "vision")]
    with pytest.raises(InputError, match="more than one way"):
        pair_names(aligned, ["layers.0.mlp.up_proj.weight"])


def test_checkpoints_without_a_common_name_are_refused_naming_both_sides():
    with pytest.raises(InputError, match=r"encoder\.a.*model\.embed"):
        pair_names(["encoder.a", "encoder.b"], LLAMA)


def test_names_that_only_one_side_has_are_listed():
    pairing = pair_names([*LLAMA[:-1], "mtp.0.weight"], LLAMA)
    assert pairing.only_aligned == ("mtp.0.weight",)
    assert pairing.only_base == ("lm_head.weight",)
