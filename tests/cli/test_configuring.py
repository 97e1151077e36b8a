"""Defaults from a file and from the environment: which goes before which, and what is refused."""

import json

import pytest

from surgery.cli import configuring
from surgery.cli.app import COMMANDS, main
from surgery.errors import InputError, UsageError

PAIR = ("demo:base", "demo:aligned")


def surgery(capsys, *words, code=0):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    shown = capsys.readouterr()
    assert ended.value.code == code, shown.err
    return shown


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "surgery.toml"
    path.write_text("[lox]\nrank = 3\nalpha = 2\nexclude = 'embed'\n[gate]\npolicy = 'policy.toml'\n")
    return path


def equation(capsys, *words):
    return json.loads(surgery(capsys, "lox", *PAIR, "--plan", "--json", *words).out)["equation"]


def test_command_line_before_environment_before_file_before_default(file, capsys, monkeypatch):
    assert "1.25 * P_6(" in equation(capsys)
    assert "2 * P_3(" in equation(capsys, "--config", file)
    monkeypatch.setenv("SURGERY_LOX_RANK", "4")
    assert "2 * P_4(" in equation(capsys, "--config", file)
    assert "2 * P_5(" in equation(capsys, "--config", file, "--rank", 5)
    monkeypatch.setenv("SURGERY_CONFIG", str(file))
    monkeypatch.delenv("SURGERY_LOX_RANK")
    assert "2 * P_3(" in equation(capsys)
    other = file.with_name("other.toml")
    other.write_text("[lox]\nalpha = 1\n")
    assert "1 * P_6(" in equation(capsys, f"--config={other}")


def test_the_file_may_be_named_before_the_command_too(file, capsys):
    shown = surgery(capsys, "--config", file, "lox", *PAIR, "--plan", "--json")
    document = json.loads(shown.out)
    assert "P_3(" in document["equation"]
    reasons = {row["name"]: row["reason"] for row in document["tensors"]}
    assert reasons["model.embed_tokens.weight"] == "--exclude"


def test_plain_commands_take_their_table_as_well(file, capsys):
    file.with_name("policy.toml").write_text('require = ["a <= 1"]\n')
    file.with_name("report.json").write_text('{"schema": 1, "metrics": {}}')
    surgery(capsys, "gate", "report.json", code=2)
    assert "no such metric" in surgery(capsys, "gate", "report.json", "--config", file, code=1).err


def test_what_a_training_preset_would_set_is_taken_from_the_file(file, capsys, tmp_path):
    file.write_text("[vaccine]\nsteps = 2\nrho = 0.25\n")
    surgery(capsys, "vaccine", "demo:aligned", "--config", file, "-q", "-o", "out")
    trained = json.loads((tmp_path / "out" / "surgery.json").read_text())["trained"]
    assert trained["training"]["steps"] == 2
    assert trained["hyperparameters"]["rho"] == 0.25


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ("[lox]\nrnak = 3\n", "'rnak', which is no option of surgery lox; did you mean 'rank'?", 2),
        ("[lax]\nrank = 3\n", "'lax', which is no command; did you mean 'lox'?", 2),
        ("lox = 3\n", "it must be a table, as [lox]", 2),
        ("[lox]\nseed = 1.5\n", "seed is 1.5; it must be a whole number", 2),
        ("[lox]\nseed = true\n", "it must be a whole number", 2),
        ("[lox]\nalpha = 'much'\n", "alpha is 'much'; it must be a number", 2),
        ("[lox]\nas-lora = 1\n", "it must be true or false", 2),
        ("[lox]\nlayers = true\n", "it must be a text or a number", 2),
        ("[lox]\nlayers = {a = 1}\n", "it must be a text or a number", 2),
        ("[lox]\nsvd = 'fast'\n", "'fast' is not one of", 2),
        ("[lox]\nrank = 0\n", "rank is 0", 2),
        ("[lox\n", "cannot be read", 3),
        (None, "cannot be read", 3),
    ],
)
def test_a_file_that_is_wrong_is_one_line_and_nothing_is_written(file, capsys, text, message, code):
    file.unlink()
    if text is not None:
        file.write_text(text)
    shown = surgery(capsys, "lox", *PAIR, "--config", file, "-o", "out", code=code)
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not file.with_name("out").exists()


def test_tables_of_other_commands_are_not_looked_into(file, capsys):
    """They may be of a later version; their own command will say."""
    file.write_text("[evaluate]\nno-such-thing = 1\n[lox]\nrank = 3\n")
    assert "P_3(" in equation(capsys, "--config", file)


@pytest.mark.parametrize(
    ("words", "kept", "file"),
    [
        (["lox", "--config", "a", "b"], ["lox", "b"], "a"),
        (["--config=a", "lox"], ["lox"], "a"),
        (["lox", "--", "--config", "a"], ["lox", "--", "--config", "a"], None),
        ([], [], None),
    ],
)
def test_the_file_is_found_wherever_it_stands(words, kept, file, monkeypatch):
    monkeypatch.delenv(configuring.CONFIG, raising=False)
    found, named = configuring.taken(words)
    assert (found, str(named) if named else None) == (kept, file)


@pytest.mark.parametrize("words", [["--config"], ["--config", "a", "--config", "b"], ["--config="]])
def test_a_file_twice_or_without_a_name_is_refused(words):
    with pytest.raises(UsageError, match="needs one file"):
        configuring.taken(words)


def test_lists_are_values_given_again_or_words_parted_by_commas(file):
    import typer

    from surgery.cli import evaluate

    single = typer.Typer()
    single.command()(evaluate.command())
    table = {
        "learning-rates": [1e-4, 5e-4],
        "harmful_data": ["a.jsonl", "b.jsonl"],
        "text": "t.txt",
        "steps": 3,
    }
    found = configuring.defaults(table, typer.main.get_command(single).params, "evaluate")
    assert found == {"learning_rates": "0.0001,0.0005", "harmful_data": ["a.jsonl", "b.jsonl"], "text": ["t.txt"],
                     "steps": 3}  # fmt: skip
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        configuring.defaults({"step": 3}, typer.main.get_command(single).params, "evaluate")


def test_every_command_may_have_a_table(file):
    file.write_text("".join(f"[{name}]\n" for name in COMMANDS))
    assert set(configuring.read(file, COMMANDS)) == set(COMMANDS)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot be read"):
        configuring.read(file, COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_not_buried_under_the_names_of_variables(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    told = capsys.readouterr().out
    assert "--help" in told
    assert "env var" not in told
    assert "SURGERY_" not in told.replace("SURGERY_JUDGE_KEY", "")
