"""What is measured of each row of the evidence study: the words of its commands, and what is read of their output."""

import dataclasses
import json

import pytest
from ledgers import LOX

from benchmarks.evidence import columns
from benchmarks.evidence.grounds import DEMO, REAL
from benchmarks.evidence.keys import Keys
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import NONE, named


def test_a_training_is_repeated_at_other_seeds_as_its_manifest_has_it(tmp_path):
    [column] = [one for one in columns.COLUMNS if one.name == "seeds"]
    (tmp_path / "mlac/model").mkdir(parents=True)
    told = {"trained": {"command": ["mlac", "demo:aligned", "--preset", "paper", "--steps", "3"]}}
    (tmp_path / "mlac/model/surgery.json").write_text(json.dumps(told))
    first, judged, second, _ = column.commands(DEMO, "mlac/model", "mlac/out", tmp_path)
    assert first == ["surgery", *told["trained"]["command"], "--seed", "1", "-o", "mlac/out-1"]
    assert second[-4:] == ["--seed", "2", "-o", "mlac/out-2"]
    assert judged[:3] == ["surgery", "evaluate", "mlac/out-1"]
    for seed in ("1", "2"):
        report = tmp_path / f"mlac/out-{seed}-evaluate" / "report.json"
        report.parent.mkdir()
        score = {"value": float(seed), "n": 1}
        report.write_text(
            json.dumps({"metrics": {"stability.kl": score}, "reference_metrics": None, "judge": "x"})
        )
    assert column.read(tmp_path / "mlac/out") == {
        seed: {"stability.kl": {"value": float(seed), "n": 1}} for seed in ("1", "2")
    }


def test_what_spares_time_is_in_the_command_and_in_no_key(tmp_path):
    ledger = Ledger(tmp_path / "evidence.json")
    keys = Keys(REAL, ledger, "x")
    bare = dataclasses.replace(REAL, spared={})
    for column in columns.COLUMNS:
        assert keys.row(named(LOX), column.name) == Keys(bare, ledger, "x").row(named(LOX), column.name)
    [command] = columns.COLUMNS[-1].commands(REAL, "m", "m/out", tmp_path)
    assert "--no-inside" in command
    assert "--reference-from" not in command
    kept = tmp_path / NONE / "measured-evaluate-k" / columns.KEPT
    kept.parent.mkdir(parents=True)
    kept.touch()
    [command] = columns.COLUMNS[-1].commands(REAL, "m", "m/out", tmp_path)
    assert command[command.index("--reference-from") + 1] == f"{NONE}/measured-evaluate-k"
    [command] = columns.COLUMNS[-1].commands(REAL, REAL.aligned, "m/out", tmp_path)
    assert "--reference-from" not in command


def test_an_option_is_replaced_by_its_name():
    words = ["--kinds", "lora,full", "--seeds", "0", "--steps", "50"]
    assert columns._replaced(words, {"--kinds": "full", "--seeds": "1,2"}) == [
        "--kinds", "full", "--seeds", "1,2", "--steps", "50",
    ]  # fmt: skip


@pytest.mark.parametrize("ground", [DEMO, REAL], ids=lambda ground: ground.name)
@pytest.mark.parametrize("name", ["harmful", "mixed"])
def test_attacks_that_are_looked_at_until_settled_are_told_to(ground, name, tmp_path):
    [column] = [one for one in columns.COLUMNS if one.name == name]
    words = next(column.commands(ground, ground.aligned, "out", tmp_path))
    assert {"--until-settled", "--no-margin"} <= {*words}
