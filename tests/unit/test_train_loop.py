"""The loop: the gradient of a step does not depend on how it is cut, and a run goes on where it was saved."""

import math
import shutil
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from training_setup import SETS, examples, gradients, plain, rows, trainable

from surgery import resources
from surgery.errors import InputError, ResourceError, UsageError
from surgery.methods.circuit_breakers import CircuitBreakers
from surgery.methods.t_vaccine import TVaccine
from surgery.methods.tar import TAR
from surgery.methods.vaccine import Vaccine
from surgery.testing import tiny_model
from surgery.train import network
from surgery.train.crew import Crew
from surgery.train.feed import Feed
from surgery.train.loop import Diverged, Run, rate_factor
from surgery.train.losses import answer_loss, answered_count
from surgery.train.presets import defaults, fitting, from_preset, whole_fits
from surgery.train.running import immunise
from surgery.train.sft import SFT
from surgery.train.state import ADAPTER, States
from surgery.train.step import Step, Stream, TrainedMethod
from surgery.train.training import Training

METHODS = [SFT(), Vaccine(rho=0.5), TVaccine(rho=0.5, gamma=1), CircuitBreakers()]
# Float32 sums in another order.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def distance(one, other):
    return float((one - other).norm() / other.norm())


def run_of(folder, training, *, method=None, states=None, seed=0):
    method = method or SFT()
    feed = Feed(
        method.streams({name: rows for name, rows in examples().items() if name in method.sets()}, seed),
        training.batch_size,
        seed=seed,
    )
    model = network.load_model(_checkpoint(folder), torch.float32)
    model = network.make_trainable(model, method, training, label="tiny", seed=seed)
    return Run(method, model, feed, training, seed=seed, states=states)


def _checkpoint(folder):
    from surgery.checkpoint.layout import open_checkpoint

    return open_checkpoint(folder, folder.name)


def weights(model):
    return {name: weight.detach().clone() for name, weight in network.carried(model).items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


# Losses.


@torch.no_grad()
def test_the_loss_is_the_mean_over_answered_tokens_of_the_whole_step(folder):
    model = network.load_model(_checkpoint(folder), torch.float32).eval()
    batches = Feed({"aligned": Stream(rows())}, 6, micro=3).step(0)["aligned"]
    count = answered_count(batches, Step(0, 1))
    assert count == sum(int(batch.answered.sum()) for batch in batches)
    total = sum(float(answer_loss(model, batch, count=count)) for batch in batches)
    every = []
    for batch in batches:
        logits = model(input_ids=batch.tokens, attention_mask=batch.attended).logits.log_softmax(-1)
        for row, place in batch.answered.nonzero().tolist():
            every.append(-float(logits[row, place - 1, batch.tokens[row, place]]))
    assert total == pytest.approx(sum(every) / len(every), rel=1e-5)
    means = [float(answer_loss(model, batch, count=int(batch.answered.sum()))) for batch in batches]
    assert total != pytest.approx(
        sum(means) / len(means), rel=1e-5
    )  # control: the mean of means is another number


@torch.no_grad()
def test_padding_and_prompt_never_enter_the_loss(folder):
    model = network.load_model(_checkpoint(folder), torch.float32).eval()
    [batch] = Feed({"aligned": Stream(rows())}, 6).step(0)["aligned"]
    loss = float(answer_loss(model, batch, count=1))
    changed = batch.tokens.where(batch.attended, torch.full_like(batch.tokens, 77))
    assert float(answer_loss(model, type(batch)(changed, batch.attended, batch.answered), count=1)) == loss
    answered = batch.tokens.where(~batch.answered, torch.full_like(batch.tokens, 77))
    assert (
        float(answer_loss(model, type(batch)(answered, batch.attended, batch.answered), count=1)) != loss
    )  # control


# Gradients.


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("micro", [2, 3, 8])
def test_micro_batches_give_the_gradient_of_the_whole_batch(folder, method, micro):
    whole = gradients(trainable(folder, method, plain()), method, plain(), Crew())
    cut = plain(gradient_accumulation=micro)
    assert whole.norm() > 0
    assert distance(gradients(trainable(folder, method, cut), method, cut, Crew()), whole) < ROUNDING


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_gradient_checkpointing_changes_no_gradient(folder, method):
    whole = gradients(trainable(folder, method, plain()), method, plain(), Crew())
    saving = plain(gradient_checkpointing=True)
    model = trainable(folder, method, saving)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert distance(gradients(model, method, saving, Crew()), whole) < ROUNDING


def test_a_norm_per_micro_batch_is_another_gradient(folder):
    """Control of the two above: perturbing each micro-batch by its own norm is seen."""
    method, training = Vaccine(rho=0.5), plain(gradient_accumulation=2)
    whole = gradients(trainable(folder, method, plain()), method, plain(), Crew())

    @dataclass(frozen=True)
    class Apart(Vaccine):
        def backward(self, model, batches, step):
            count = answered_count(batches["aligned"], step)
            for batch in batches["aligned"]:
                share = answered_count([batch], step) / count
                alone = Step(
                    step.number, step.total, step.seed, lambda loss, share=share: (loss * share).backward()
                )
                super().backward(model, {"aligned": [batch]}, alone)
            return {}

    apart = gradients(trainable(folder, method, training), Apart(rho=0.5), training, Crew())
    assert distance(apart, whole) > 100 * ROUNDING
    still = gradients(trainable(folder, method, training), Apart(rho=0.0), training, Crew())
    plainly = gradients(trainable(folder, method, plain()), SFT(), plain(), Crew())
    assert distance(still, plainly) < ROUNDING


def test_gradients_that_no_process_has_stay_none():
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    weights[0].grad = torch.tensor([1.0, 2.0, 3.0])
    Crew(world=2, summed=lambda tensor: 2 * tensor).add_gradients(weights)
    assert weights[0].grad.tolist() == [2.0, 4.0, 6.0]
    assert weights[1].grad is None


# Runs.


def test_the_loss_falls_and_every_term_is_told(folder):
    told = []
    training = plain(steps=12, lr=1e-2)
    history = run_of(folder, training).fit(lambda *words: told.append(words))
    assert [words[:2] for words in told] == [(number, 12) for number in range(1, 13)]
    assert [words[2] for words in told] == history
    assert set(history[0]) == {"loss", "gradient_norm", "lr"}
    assert sum(terms["loss"] for terms in history[-3:]) < sum(terms["loss"] for terms in history[:3])
    assert told[-1][3] == 0


def test_a_run_follows_from_its_seed_and_leaves_torch_s_own_alone(folder):
    training = plain(lora_dropout=0.3)
    torch.manual_seed(11)
    expected = torch.rand(3)
    runs = [run_of(folder, training, seed=seed) for seed in (4, 4, 5)]
    torch.manual_seed(11)
    for run in runs:
        run.fit()
    assert torch.equal(torch.rand(3), expected)
    one, again, other = (weights(run.model) for run in runs)
    assert same(one, again)
    assert not same(one, other)  # control


def test_only_the_adapter_changes(folder):
    run = run_of(folder, plain())
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    run.fit()
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1.0)])
def test_the_rate_rises_then_falls_or_stays(schedule, last):
    training = Training(steps=100, schedule=schedule, warmup=0.1)
    rates = [rate_factor(number, 100, training) for number in range(100)]
    assert rates[:10] == pytest.approx([(number + 1) / 10 for number in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(last, abs=1e-3)
    assert rate_factor(0, 5, Training(warmup=0.0)) == 1.0


# States.


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
@pytest.mark.parametrize(
    "method", [SFT(), TVaccine(gamma=1, redraw_every=2, refresh_every=3)], ids=lambda one: one.name
)
def test_a_run_taken_up_again_ends_in_the_same_bytes(folder, tmp_path, method, full):
    training = plain(full=full, lora_dropout=0.0 if full else 0.2)
    whole = run_of(folder, training, method=method)
    told = whole.fit()

    def stop(done, *_):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_of(folder, training, method=method, states=States(tmp_path, "tiny")).fit(stop)
    states = States(tmp_path, "tiny")
    assert states.last().name == "state-00000004"
    later = run_of(folder, training, method=method, states=states)
    done = []
    assert later.fit(lambda number, *_: done.append(number)) == told
    assert done == [5, 6]
    assert same(weights(later.model), weights(whole.model))
    assert not same(weights(later.model), weights(run_of(folder, training, method=method).model))  # control


def test_a_state_that_is_not_whole_is_not_taken_up(folder, tmp_path):
    states = States(tmp_path, "tiny")
    run = run_of(folder, plain(steps=4), states=states)
    run.fit()
    (tmp_path / "state-00000006.partial").mkdir()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["state-00000004", "state-00000006.partial"]
    assert States(tmp_path, "tiny").last().name == "state-00000004"
    states.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_state_is_an_adapter_that_peft_loads(folder, tmp_path):
    from peft import PeftModel

    run = run_of(folder, plain(lr=1e-2), states=States(tmp_path, "tiny"))
    run.fit()
    model = network.load_model(_checkpoint(folder), torch.float32)
    tokens = torch.arange(2, 12)[None]
    before = model(input_ids=tokens).logits
    loaded = PeftModel.from_pretrained(model, States(tmp_path, "tiny").last()).eval()
    ours = run.model.eval()(input_ids=tokens).logits
    assert torch.equal(loaded(input_ids=tokens).logits, ours)
    assert not torch.equal(before, ours)  # control


def test_a_state_of_another_model_is_refused(folder, tmp_path):
    run_of(folder, plain(), states=States(tmp_path, "tiny")).fit()
    other = plain(lora_targets="q_proj")
    with pytest.raises(InputError, match="saved from another model"):
        run_of(folder, other, states=States(tmp_path, "tiny")).fit()


def test_the_adapter_s_files_are_the_same_in_every_run(folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run_of(folder, plain(), states=States(tmp_path / name, "tiny")).fit()
    one, two = (States(tmp_path / name, "tiny").last() for name in ("one", "two"))
    for file in (ADAPTER, "adapter_config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    assert all("lora_" in name for name in load_file(one / ADAPTER))


@dataclass(frozen=True)
class Explodes(TrainedMethod):
    """A term, or the gradient alone, is infinite at the fourth step."""

    term: str = "loss"
    calls: list = field(default_factory=list)
    name: ClassVar[str] = "explodes"
    title: ClassVar[str] = "Explodes"
    paper: ClassVar[str] = ""
    data: ClassVar[tuple[str, ...]] = ("aligned",)

    def equation(self) -> str:
        return ""

    def prepare(self, model: torch.nn.Module) -> None:
        del model

    def backward(self, model, batches, step) -> dict[str, Any]:
        terms = SFT().backward(model, batches, step)
        if step.number < 3:
            return terms
        if self.term == "gradient_norm":
            next(weight for weight in model.parameters() if weight.grad is not None).grad.fill_(math.inf)
            return terms
        return {**terms, self.term: math.nan}


@pytest.mark.parametrize("term", ["loss", "retain", "gradient_norm"])
def test_a_number_that_is_none_stops_the_run_and_names_the_last_good_state(folder, tmp_path, term):
    run = run_of(folder, plain(), method=Explodes(term), states=States(tmp_path, "tiny"))
    with pytest.raises(Diverged) as caught:
        run.fit()
    assert caught.value.exit_code == 6
    message = str(caught.value)
    assert f"step 4 of 6: {term} is " in message
    assert str(tmp_path / "state-00000002") in message
    assert (tmp_path / "state-00000002" / ADAPTER).is_file()
    assert all(bool(value.isfinite().all()) for value in network.carried(run.model).values())


def test_a_refusal_before_anything_was_saved_leaves_nothing_and_one_after_it_the_state(tmp_path, monkeypatch):
    """Memory may be there later, but there is nothing yet to go on from."""
    real = SFT.backward

    def refuse(at):
        def backward(self, model, batches, step):
            if step.number == at:
                raise ResourceError("too little memory")
            return real(self, model, batches, step)

        monkeypatch.setattr(SFT, "backward", backward)
        with pytest.raises(ResourceError, match="too little memory"):
            immunise(SFT(), model="demo:aligned", output=tmp_path / "out", training=plain(batch_size=4))
        return [path.name for path in tmp_path.iterdir()]

    assert refuse(1) == []
    assert refuse(3) == ["out-adapter.partial"]


# The model.


def test_the_adapter_is_on_every_linear_layer_of_the_blocks_or_on_those_named(folder):
    def targets(**changes):
        model = network.load_model(_checkpoint(folder), torch.float32)
        model = network.make_trainable(model, SFT(), plain(**changes), label="tiny", seed=0)
        return {name.split(".lora_")[0].rpartition(".")[2] for name in network.carried(model)}

    assert targets() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert targets(lora_targets="q_proj, v_proj") == {"q_proj", "v_proj"}
    with pytest.raises(InputError, match="no linear layer 'qkv'; theirs are down_proj"):
        targets(lora_targets="q_proj,qkv")
    with pytest.raises(InputError, match="no linear layer"):
        targets(lora_targets=" ,")


def test_conv1d_of_gpt2_gets_an_adapter_that_learns(tmp_path):
    folder = tiny_model(tmp_path / "gpt2", "gpt2")
    run = run_of(folder, plain(steps=12, lr=1e-2))
    history = run.fit()
    assert sum(terms["loss"] for terms in history[-3:]) < sum(terms["loss"] for terms in history[:3])


def test_full_training_frees_every_weight(folder):
    model = network.load_model(_checkpoint(folder), torch.float32)
    model = network.make_trainable(model, SFT(), plain(full=True), label="tiny", seed=0)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_checkpoint_that_lacks_a_weight_is_refused(folder, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"does not fill 1 parameters of its model, first model\.layers\.1\.mlp"
    ):
        network.load_model(_checkpoint(broken), torch.float32)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    with pytest.raises(InputError, match="no tokenizer"):
        network.load_tokenizer(_checkpoint(folder))


# Options and presets.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"batch_size": -1}, "batch-size is -1"),
        ({"lr": 0.0}, "lr is 0.0; it must be a number above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"warmup": 1.0}, "warmup is 1.0; it must be from 0 to below 1"),
        ({"weight_decay": -0.1}, "weight-decay is -0.1"),
        ({"max_length": 1}, "max-length is 1"),
        ({"full": True, "lora_targets": "q_proj"}, "give one of them"),
    ],
)
def test_options_out_of_range_are_refused(changes, words):
    with pytest.raises(UsageError, match=words.replace(".", r"\.")):
        Training(**changes)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("preset", ["paper", "small"])
def test_presets_make_records_and_what_is_given_wins(method, preset):
    kind = type(method)
    record, training = from_preset(kind, preset)
    for name, value in kind.presets.get(preset, {}).items():
        assert getattr(record if hasattr(record, name) else training, name) == value
    assert from_preset(kind, preset, {"steps": 3, "lr": 0.25})[1].steps == 3
    assert defaults(kind, preset)["seed" if "seed" in defaults(kind, preset) else "steps"]
    with pytest.raises(UsageError, match="has no option depth"):
        from_preset(kind, preset, {"depth": 1})


def test_the_small_preset_is_for_the_embedded_pair_and_small_models():
    assert fitting("demo:aligned", 10**9) == fitting("x", 49_999_999) == "small"
    assert fitting("x", 50_000_000) == "paper"


def test_every_set_has_a_name_that_methods_use():
    assert {name for method in METHODS for name in method.sets()} == set(SETS)


@pytest.mark.parametrize("preset", ["paper", "small"])
def test_a_preset_has_other_rates_for_an_adapter_than_for_all_weights(preset):
    whole, adapter = (from_preset(TAR, preset, {"full": full}) for full in (True, False))
    assert whole[1].lr < adapter[1].lr
    assert whole[0].mixture().rates[0] < adapter[0].mixture().rates[0]
    assert whole[0].inner_steps == adapter[0].inner_steps
    assert from_preset(TAR, preset, {"full": False, "lr": 0.25})[1].lr == 0.25


def test_all_weights_fit_as_far_as_memory_goes(monkeypatch):
    monkeypatch.setattr(resources, "memory_available", lambda: 30 * 10**9)
    assert whole_fits(10**9)
    assert not whole_fits(10**9 + 1)
