"""What an adapter is kept out of: the directions by themselves, in a whole run, and what cannot have them."""

from statistics import median

import pytest
import torch
from safetensors.torch import load_file
from training_setup import plain, rows, trainable

from surgery import card
from surgery.checkpoint.layout import open_checkpoint
from surgery.cli import training_output
from surgery.errors import UsageError
from surgery.methods.circuit_breakers import CircuitBreakers
from surgery.methods.vaccine import Vaccine
from surgery.options import Options
from surgery.testing import tiny_model
from surgery.train import network, sparing
from surgery.train.crew import Crew
from surgery.train.running import immunise
from surgery.train.training import Training

pytestmark = pytest.mark.usefixtures("one_thread")

SHARE = 0.8
# All tokens of these, so that whoever computes the inputs again has the same.
ROWS = rows(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def inputs_of(folder):
    """What every linear layer of the blocks is given on the rows, by its name: (tokens, in), float64."""
    model = network.load_model(open_checkpoint(folder, "tiny"), torch.float32).eval()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_hook(
                lambda module, given, out, name=name: found.setdefault(name, []).append(given[0][0].double())
            )
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row.tokens]))
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("shape", [(300, 20), (15, 40)], ids=["many tokens", "few tokens"])
def test_the_fewest_directions_that_carry_the_share(shape):
    source = torch.Generator().manual_seed(1)
    scales = torch.logspace(0, -3, shape[1])
    inputs = torch.randn(shape, generator=source) * scales
    found = sparing.leading(inputs, SHARE)
    values, right = torch.linalg.svd(inputs.double(), full_matrices=False)[1:]
    count = found.shape[1]
    energy = values.square().cumsum(0) / values.square().sum()
    assert energy[count - 1] >= SHARE
    assert count == 1 or energy[count - 2] < SHARE
    assert count < len(values)
    expected = right[:count].T @ right[:count]
    torch.testing.assert_close(found @ found.T, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 1), (0.8, 2), (0.81, 3), (1.0, 4)])
def test_the_fewest_directions_that_carry_a_share_of_a_moment(share, count):
    values = torch.tensor([5.0, 3.0, 1.5, 0.5], dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(7)).double())[0]
    found = sparing.carrying(turned @ values.diag() @ turned.T, share - 1e-12)
    assert found.shape == (4, count)
    torch.testing.assert_close((turned[:, :count].T @ found).abs(), torch.eye(count, dtype=torch.float64))


@pytest.mark.parametrize("held", [2**30, 1], ids=["at once", "block by block"])
def test_directions_are_those_of_the_bare_model_whatever_its_adapter_does(folder, monkeypatch, held):
    monkeypatch.setattr(sparing, "_BYTES", held)
    model = trainable(folder, CircuitBreakers(), plain(), noise=1.0)
    found = named(sparing.directions(model, ROWS, SHARE, seed=3))
    expected = inputs_of(folder)
    prefix = "base_model.model."
    assert {name.removeprefix(prefix) for name in found} <= expected.keys()
    assert len(found) == sum(hasattr(module, "lora_A") for module in model.modules())
    for name, basis in found.items():
        wanted = sparing.leading(expected[name.removeprefix(prefix)], SHARE)
        assert basis.shape == wanted.shape, name
        torch.testing.assert_close(basis @ basis.T, wanted @ wanted.T, rtol=0, atol=1e-5)


def named(directions):
    return {name: basis for names, basis in directions for name in names}


def along(factors, name, basis):
    """How much of a layer's update, B A, acts along directions, 0 to 1."""
    whole = update(factors, name)
    return float((whole @ basis).norm() / whole.norm())


def update(factors, name):
    """B A of a layer, (out, in), float64."""
    down, up = (factors[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
    return up @ down


def test_a_trained_adapter_does_nothing_along_them(tmp_path, monkeypatch, capsys):
    """By the files that a run leaves, also one that was taken up again; without the option it acts along them."""
    monkeypatch.chdir(tmp_path)
    known, told, directions = {}, {}, sparing.directions

    def noted(model, rows, share, *, seed):
        found = [*directions(model, rows, share, seed=seed)]
        known.update(named(found))
        return iter(found)

    def trained(output, spare, progress=None):
        training = plain(steps=6, batch_size=4, lr=5e-3, spare=spare)
        method, options = CircuitBreakers(form="relative"), Options(as_lora=True)
        done = immunise(
            method, model="demo:aligned", output=output, training=training, options=options, progress=progress
        )
        assert done.record["training"]["spare"] == spare
        told[output] = done.record.get("spared")
        training_output.outcome(done)
        return load_file(done.output / "adapter_model.safetensors")

    def stop(done, *_):
        if done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(sparing, "directions", noted)
    spared = trained("spared", SHARE)
    assert len(known) == len(spared) // 2
    assert max(along(spared, name, basis) for name, basis in known.items()) < 1e-6
    with pytest.raises(KeyboardInterrupt):
        trained("again", SHARE, stop)
    again = trained("again", SHARE)
    assert all(torch.equal(again[name], spared[name]) for name in spared)
    usual = trained("usual", 0.0)
    assert min(along(usual, name, basis) for name, basis in known.items()) > 0.02
    # Once, at the end: training itself was the same, up to the last step.
    for name, basis in known.items():
        down, up = (f"{name}.lora_{factor}.weight" for factor in "AB")
        assert torch.equal(spared[up], usual[up])
        wide = usual[down].double()
        torch.testing.assert_close(spared[down], (wide - wide @ basis @ basis.T).float())
    # What was taken out, told by the record and the summary.
    assert told["again"] == told["spared"]
    assert told["usual"] is None
    updates = {name: update(usual, name) for name in known}
    taken = sum(float((updates[name] @ basis).square().sum()) for name, basis in known.items())
    whole = sum(float(one.square().sum()) for one in updates.values())
    assert told["spared"]["energy"] == pytest.approx(taken / whole, rel=1e-9)
    assert told["spared"]["directions"] == median(basis.shape[1] / basis.shape[0] for basis in known.values())
    said = capsys.readouterr().out
    assert said.count("spared  ") == 2
    assert f"with {100 * taken / whole:.2f} % of the edit's energy" in said
    assert f"| taken out by spare | {taken / whole:.1%} of the edit's energy |" in card._training(
        {"spared": told["spared"]}
    )


def test_a_run_warns_of_what_its_last_step_shows(tmp_path):
    training = plain(steps=1, batch_size=4)
    done = immunise(CircuitBreakers(), model="demo:aligned", output=tmp_path / "out", training=training)
    assert [note for note in done.notes if "rerouting is 1.00 at the last step" in note]


@pytest.mark.parametrize("given", [{"spare": 1.0}, {"spare": -0.1}, {"spare": 0.5, "full": True}])
def test_shares_that_make_no_sense_are_refused(given):
    with pytest.raises(UsageError, match="spare"):
        Training(**given)


def test_a_method_without_retain_rows_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="Vaccine has none"):
        immunise(Vaccine(), model="demo:aligned", output="out", training=Training(spare=0.5))
    assert not [*tmp_path.iterdir()]


def test_a_model_that_is_cut_over_processes_is_refused():
    with pytest.raises(UsageError, match="without FSDP"):
        sparing.require(CircuitBreakers(), Crew(sharded=True))
