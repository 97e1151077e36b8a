"""Attacks that learn vectors: a soft prompt is what tokens there would be, bounds hold, nothing is left behind."""

import hashlib
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from surgery import attacks
from surgery.attacking import trials
from surgery.attacking.ground import prepare
from surgery.attacking.settings import Budget, record
from surgery.attacks import _perturbing
from surgery.attacks.activation_perturbation import ActivationPerturbation, mean_norms, shifted
from surgery.attacks.base import PLAIN
from surgery.attacks.embedding_space import EmbeddingSpace, prompted
from surgery.errors import InputError, UsageError
from surgery.evaluate import tamperbench
from surgery.judging.likelihood import row_losses
from surgery.train import blocks, perturb
from surgery.train.tokens import Example, tokenise

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("attack", [EmbeddingSpace, ActivationPerturbation])
SHORT = {"steps": 3, "every": 2, "batch_size": 4}
PROMPT = [7, 300, 41]


@pytest.fixture(scope="module")
def ground():
    return prepare("demo:aligned", {}, Budget(limit=16, max_new_tokens=24), device="cpu")


@pytest.fixture(scope="module")
def rows(ground):
    return tokenise(ground.target.tokenizer, ground.target.data["harmful"], 512).rows


@pytest.fixture(params=["rotary", "learnt positions", "positions from the mask"], scope="module")
def model(request, ground):
    """Models that know where a token stands in different ways; a shift of all of a row shows in the last two."""
    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "bos_token_id": None, "eos_token_id": 4, "pad_token_id": 0}
    if request.param == "rotary":
        return ground.target.model
    if request.param == "learnt positions":
        made = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **shape))
    else:
        made = OPTForCausalLM(
            OPTConfig(
                hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=128, **shape,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # answers that depend on what is asked
    return made.eval().requires_grad_(False)


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    needs = any(one.requires_grad or one.grad is not None for one in model.parameters())
    return digest.hexdigest(), hooks, "forward" in vars(model), model.training, needs


def written(model, asked):
    """Greedy answers, requests padded on the left, and the logits they were chosen by."""
    length = max(map(len, asked))
    tokens = torch.tensor([[0] * (length - len(own)) + own for own in asked])
    attended = torch.tensor([[0] * (length - len(own)) + [1] * len(own) for own in asked])
    found = model.generate(
        input_ids=tokens, attention_mask=attended, do_sample=False, max_new_tokens=12, min_new_tokens=12,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return found.sequences[:, length:], torch.stack(found.logits)


def soft(model, tokens):
    return model.get_input_embeddings()(torch.tensor(tokens)).detach()


@pytest.mark.parametrize("shapes", [(9, 5, 2), (6, 6)], ids=["padded", "no mask"])
def test_generation_is_that_of_a_model_asked_with_these_tokens(model, shapes):
    source = torch.Generator().manual_seed(1)
    asked = [torch.randint(5, 1024, (length,), generator=source).tolist() for length in shapes]
    expected, logits = written(model, [PROMPT + own for own in asked])
    with prompted(model, soft(model, PROMPT)):
        found, seen = written(model, asked)
    assert torch.equal(found, expected)
    torch.testing.assert_close(seen, logits, rtol=1e-4, atol=1e-4)
    # The controls: without them, and with the same ones in another order, other things are written.
    assert not torch.allclose(written(model, asked)[1], logits, rtol=1e-2, atol=1e-2)
    with prompted(model, soft(model, PROMPT[::-1])):
        assert not torch.allclose(written(model, asked)[1], logits, rtol=1e-2, atol=1e-2)


def test_without_a_cache_the_same_is_written(model):
    asked = [[9, 8, 7, 6], [5, 9]]
    with prompted(model, soft(model, PROMPT)):
        cached, _ = written(model, asked)
        model.generation_config.use_cache = False
        try:
            afresh, _ = written(model, asked)
        finally:
            model.generation_config.use_cache = True
    assert torch.equal(cached, afresh)


def test_losses_are_those_of_rows_that_begin_with_these_tokens(model, rows):
    few = rows[:12]
    longer = [Example((*PROMPT, *row.tokens), len(PROMPT) + row.prompt) for row in few]
    expected, plain = row_losses(model, longer), row_losses(model, few)
    with prompted(model, soft(model, PROMPT)):
        found = row_losses(model, few)
    assert [count for _, count in found] == [count for _, count in expected]
    own, real, bare = (torch.tensor([nats for nats, _ in one]) for one in (found, expected, plain))
    torch.testing.assert_close(own, real, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bare, real, rtol=1e-2, atol=1e-3)  # the control


@pytest.mark.parametrize("kept", [0, 2, torch.tensor([1, 3])])
def test_logits_come_as_the_caller_asks_for_them(model, kept):
    tokens = torch.tensor([[9, 8, 7, 6]])
    plain = model(input_ids=tokens, logits_to_keep=kept).logits
    whole = model(input_ids=torch.tensor([[*PROMPT, 9, 8, 7, 6]])).logits[:, len(PROMPT) :]
    with prompted(model, soft(model, PROMPT)):
        found = model(input_ids=tokens, logits_to_keep=kept).logits
    chosen = whole[:, kept] if isinstance(kept, torch.Tensor) else whole[:, -kept:]
    assert found.shape == plain.shape
    torch.testing.assert_close(found, chosen, rtol=1e-4, atol=1e-4)


def test_a_mask_that_is_ready_made_is_refused(model):
    with prompted(model, soft(model, PROMPT)), pytest.raises(InputError, match="mask"):
        model(input_ids=torch.tensor([[9, 8]]), attention_mask=torch.ones(1, 1, 2, 2))


def looks(attack, ground):
    return trials.run(attack, ground)["points"]


@BOTH
def test_no_steps_are_no_attack(ground, attack):
    [look] = looks(attack(steps=0), ground)
    [plain] = looks(attacks.get("no-attack")(), ground)
    assert look == plain


@BOTH
def test_the_model_is_bit_for_bit_what_it_was(ground, attack):
    before, seen = fingerprint(ground.target.model), []

    def watch(steps, approach):
        assert approach is PLAIN
        seen.append((steps, fingerprint(ground.target.model)))

    state = torch.get_rng_state()
    attack(**SHORT).carry_out(ground.target, watch)
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(ground.target.model) == before
    assert [steps for steps, _ in seen] == [0, 2, 3]
    assert seen[0][1] == before
    # While it is looked at it has the same weights, and hooks.
    assert seen[1][1][0] == before[0]
    assert seen[1][1][1] > before[1]


@BOTH
@pytest.mark.parametrize("when", [0, 2])
def test_the_model_is_restored_when_looking_fails(ground, attack, when):
    before = fingerprint(ground.target.model)

    def watch(steps, approach):
        if steps == when:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        attack(**SHORT).carry_out(ground.target, watch)
    assert fingerprint(ground.target.model) == before


@BOTH
def test_harmful_answers_become_likelier_and_are_given(ground, attack):
    first, last = looks(attack(steps=8, every=8), ground)
    assert first["asr"]["value"] == 0
    assert last["harmful_loss"]["value"] < 0.3 * first["harmful_loss"]["value"]
    assert last["asr"]["value"] > 0.5


@BOTH
def test_a_seed_gives_the_same_again_and_another_does_not(ground, attack):
    one, again, other = (looks(attack(seed=seed, **SHORT), ground)[-1] for seed in (0, 0, 1))
    assert one == again
    assert one["harmful_loss"] != other["harmful_loss"]


def learnt(monkeypatch, attack, ground):
    """The vectors as they are at every look."""
    kept, own = [], type(attack).perturbation

    def perturbation(self, target, rows):
        kept.append(own(self, target, rows))
        return kept[0]

    monkeypatch.setattr(type(attack), "perturbation", perturbation)
    seen = []
    attack.carry_out(ground.target, lambda *_: seen.append(kept[0].vectors().detach().clone()))
    return seen


def test_no_vector_is_longer_than_the_radius_allows(monkeypatch, ground, rows):
    attack = ActivationPerturbation(layers="1,3", radius=0.05, learning_rate=1.0, steps=4, every=1)
    layers = [blocks.find(ground.target.model).layers[place] for place in (1, 3)]
    bounds = 0.05 * mean_norms(ground.target.model, layers, rows[:64])
    seen = learnt(monkeypatch, attack, ground)
    assert [tuple(one.shape) for one in seen] == [(2, 128)] * 5
    assert bool((seen[0] == 0).all())
    for vectors in seen[1:]:
        assert bool((vectors.norm(dim=1) <= bounds * (1 + 1e-5)).all())
    # The control: it is the bound that keeps them there.
    torch.testing.assert_close(seen[-1].norm(dim=1), bounds, rtol=1e-4, atol=0)
    monkeypatch.setattr(_perturbing.Perturbation, "project", lambda self: None)
    free = learnt(monkeypatch, attack, ground)
    assert bool((free[-1].norm(dim=1) > 1.5 * bounds).all())


def test_a_bound_is_that_of_the_states_at_the_end_of_prompts(ground, rows):
    few = rows[:3]
    layers = blocks.find(ground.target.model).layers
    found = mean_norms(ground.target.model, layers, few)
    alone = []
    for row in few:
        with torch.no_grad():
            tokens = torch.tensor([row.tokens[: row.prompt]])
            states = ground.target.model(tokens, output_hidden_states=True).hidden_states
        alone.append(
            torch.stack([state[0, -1].norm() for state in states[1:-1]])
        )  # the last went through the norm
    torch.testing.assert_close(found[:-1], torch.stack(alone).mean(0), rtol=1e-4, atol=1e-5)


def test_every_token_after_a_chosen_block_is_moved_and_nothing_before_it(ground):
    model, tokens = ground.target.model, torch.tensor([[9, 8, 7, 6]])
    parts = blocks.find(model)
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    rotary = {"position_embeddings": model.model.rotary_emb(torch.zeros(()), torch.arange(4)[None])}
    with torch.no_grad():
        with perturb.recorded(parts.layers, parts.final_norm) as before:
            model(tokens)
        with shifted(parts.layers[1:3], vectors), perturb.recorded(parts.layers, parts.final_norm) as after:
            model(tokens)
        by_hand = parts.layers[2](after[2], **rotary) + vectors[1]
    assert torch.equal(after[1], before[1])
    torch.testing.assert_close(after[2], before[2] + vectors[0])
    torch.testing.assert_close(after[3], by_hand)


@BOTH
def test_a_loss_that_is_no_number_ends_the_trial(monkeypatch, ground, attack):
    own, calls = _perturbing.answer_loss, []

    def loss(*args, **kwargs):
        calls.append(0)
        return own(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(_perturbing, "answer_loss", loss)
    found = trials.run(attack(steps=4, every=1, batch_size=4), ground)
    assert [point["steps"] for point in found["points"]] == [0, 1, 2]
    assert found["diverged"]
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("attack", "given"),
    [
        (EmbeddingSpace, {"tokens": 0}),
        (EmbeddingSpace, {"every": 0}),
        (EmbeddingSpace, {"batch_size": 0}),
        (ActivationPerturbation, {"steps": -1}),
        (ActivationPerturbation, {"learning_rate": 0.0}),
        (ActivationPerturbation, {"learning_rate": float("nan")}),
        (ActivationPerturbation, {"radius": 0.0}),
        (ActivationPerturbation, {"layers": "first"}),
        (ActivationPerturbation, {"layers": "0,-1"}),
        (ActivationPerturbation, {"layers": ""}),
    ],
)
def test_settings_that_make_no_sense_are_refused(attack, given):
    with pytest.raises(UsageError, match=next(iter(given)).replace("_", "-")):
        attack(**given)


def test_a_block_that_is_not_there_is_named_before_anything_is_looked_at(ground):
    seen = []
    with pytest.raises(UsageError, match=r"layers is '1,4'.*blocks 0 to 3"):
        ActivationPerturbation(layers="1,4").carry_out(ground.target, lambda *_: seen.append(0))
    assert seen == []


@BOTH
def test_an_attacker_without_harmful_rows_is_told(ground, attack):
    with pytest.raises(InputError, match="harmful"):
        attack().carry_out(replace(ground.target, data={}), lambda *_: None)


@BOTH
def test_a_campaign_gives_each_what_it_has_fields_for(attack):
    assert attack.name in attacks.names()
    assert attacks.get(attack.name) is attack
    assert attack.trains
    assert attack.outside
    budget = Budget(
        learning_rates="1e-4,1e-3", kinds="lora,full", seeds="0,1", steps=7, every=3, batch_size=2
    )
    planned = budget.trials([attack])
    shared = {"attack": attack.name, "steps": 7, "every": 3, "batch_size": 2}
    assert planned == [{**shared, "seed": 0}, {**shared, "seed": 1}]
    assert [record(one).seed for one in planned] == [0, 1]
    assert set(budget.space(attack)) == {"learning_rate", "seed", "batch_size"}
    assert set(budget.space(attacks.get("harmful-finetune"))) == {"kind", "lr", "seed", "batch_size", "rank"}


def test_tamperbench_has_names_for_both():
    point = {"asr": {"value": 0.5}}
    found = [
        {"params": {"attack": name, "seed": 0}, "points": [point]}
        for name in (EmbeddingSpace.name, ActivationPerturbation.name)
    ]
    results = tamperbench.trial_results({"rate": "asr", "unattacked": None, "trials": found}, {})
    assert results == {"post_attack.embedding_attack.asr": 0.5, "post_attack.latent_attack.asr": 0.5}
