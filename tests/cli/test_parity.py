"""The command and the Python API are the same records: options, defaults and results cannot drift apart."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import surgery
from surgery import methods
from surgery.cli.app import app, main
from surgery.methods.base import WeightEdit
from surgery.options import Options
from surgery.testing import tiny_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"))


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def weights(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "name", [name for name in methods.names() if issubclass(methods.get(name), WeightEdit)]
)
def test_every_field_is_an_option_with_the_same_default(name):
    shown = CliRunner().invoke(app, [name, "--help"]).output
    squeezed = " ".join(shown.split())
    for record in (methods.get(name), Options):
        for field in dataclasses.fields(record):
            option = "--" + field.name.replace("_", "-")
            assert option in squeezed
            if field.default not in (None, False):
                after = squeezed.split(option, 1)[1]
                assert f"[default: {field.default}]" in after.split(" --")[0] or str(field.default) in after


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"rank": 3, "alpha": 1.5}, {"seed": 7, "rounding": "stochastic"}),
        ({"rank": "auto", "max_rank": 4, "anchor": "base"}, {"dtype": "float32"}),
        ({"rank": "full", "include": "mlp", "layers": "0:1"}, {"rounding": "nearest"}),
        ({"edit": "linear", "exclude": "mlp", "svd": "exact", "tol": 1e-4}, {"rounding": "compensated"}),
    ],
    ids=str,
)
def test_the_command_writes_what_the_api_writes(pair, tmp_path, fields, options):
    base, aligned = pair
    surgery.apply(
        surgery.LoX(**fields), base=base, model=aligned, output=tmp_path / "api", options=Options(**options)
    )
    words = [
        word for key, value in {**fields, **options}.items() for word in (f"--{key.replace('_', '-')}", value)
    ]
    assert run("lox", base, aligned, *words, "-o", tmp_path / "cli", "-q") == 0
    assert weights(tmp_path / "api") == weights(tmp_path / "cli")
    assert weights(tmp_path / "api") != weights(aligned)  # control
    assert (tmp_path / "api/surgery.json").read_bytes() == (tmp_path / "cli/surgery.json").read_bytes()


def test_the_main_job_on_two_local_folders(pair, tmp_path, monkeypatch, capsys):
    base, aligned = pair
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "aligned").symlink_to(aligned)
    assert run("lox", "base", "aligned", "--rank", 6, "--alpha", 1.5) == 0
    assert (tmp_path / "aligned-lox-r6-a1.5" / "model.safetensors").is_file()
    shown = capsys.readouterr()
    assert "W = W_aligned + 1.5 * P_6(W_aligned - W_base)" in shown.out
    assert "W = W_base + 2.5 * P_6(W_aligned - W_base)" in shown.out
    assert "aligned-lox-r6-a1.5" in shown.out
    assert "no evidence in the files" in shown.out
    progress, *warnings = shown.err.splitlines()
    assert progress == "[1/1] model.safetensors"
    assert all(line.startswith("warning: ") for line in warnings)
    assert run("lox", "base", "aligned", "--rank", 6, "--alpha", 1.5) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_json_is_one_document_on_stdout(pair, tmp_path, capsys):
    base, aligned = pair
    assert run("lox", base, aligned, "-o", tmp_path / "out", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [
        "output", "equation", "edited", "copied", "unchanged", "energy_kept", "retention", "noise_to_edit",
        "certified_error_max", "seconds", "peak_rss_bytes", "bytes_written", "manifest",
    ]  # fmt: skip
    assert document["edited"] > 0
    assert document["manifest"] == str(tmp_path / "out" / "surgery.json")


def test_a_plan_accounts_for_every_tensor_and_reads_and_writes_nothing(pair, tmp_path, capsys, monkeypatch):
    from surgery.checkpoint.reader import Reader

    def forbidden(*arguments):
        raise AssertionError("a plan read tensor data")

    monkeypatch.setattr(Reader, "read", forbidden)
    monkeypatch.setattr(Reader, "raw", forbidden)
    base, aligned = pair
    assert run("lox", base, aligned, "-o", tmp_path / "out", "--plan", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) >= {
        "tensors", "bytes_read", "bytes_written", "disk_free", "memory_bytes", "seconds_estimate", "equation",
    }  # fmt: skip
    assert len(document["tensors"]) == 21
    assert set(document["tensors"][0]) == {"name", "action", "reason", "shape", "dtype", "rank"}
    assert list(tmp_path.iterdir()) == []
    assert run("lox", base, aligned, "-o", tmp_path / "out", "--plan") == 0
    assert "model.norm.weight" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="read tensor data"):  # control
        main(["lox", str(base), str(aligned), "-o", str(tmp_path / "out"), "-q"])


def test_quiet_prints_nothing_but_warnings(pair, tmp_path, capsys):
    base, aligned = pair
    assert run("lox", base, aligned, "-o", tmp_path / "one", "-q", "--dtype", "float32") == 0
    assert capsys.readouterr() == ("", "")
    assert run("lox", base, aligned, "-o", tmp_path / "two", "-q", "--anchor", "base") == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "is dropped (--anchor base)" in shown.err


def test_verify_knows_identical_from_changed(pair, tmp_path, capsys):
    base, aligned = pair
    assert run("lox", base, aligned, "-o", tmp_path / "out", "-q") == 0
    assert run("verify", tmp_path / "out", "--recompute", "--strict") == 0
    shown = capsys.readouterr().out
    assert "the repeated edit is identical" in shown
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run("verify", tmp_path / "out") == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_help_answers_for_every_command():
    for words in ([], ["lox"], ["verify"]):
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0
    assert CliRunner().invoke(app, ["--version"]).output == f"surgery {surgery.__version__}\n"


def test_the_card_s_own_commands_work_in_the_output(pair, tmp_path, monkeypatch, capsys):
    base, aligned = pair
    assert run("lox", base, aligned, "-o", tmp_path / "out", "-q") == 0
    monkeypatch.chdir(tmp_path / "out")
    assert "    surgery verify .\n" in (tmp_path / "out/README.md").read_text()
    assert run("verify", ".") == 0


def test_an_overruled_order_is_told_on_stderr_in_the_card_and_in_the_command(pair, tmp_path, capsys):
    base, aligned = pair
    (tmp_path / "base").symlink_to(base)
    named = tmp_path / "aligned"
    named.mkdir()
    for file in aligned.iterdir():
        (named / file.name).write_bytes(file.read_bytes())
    (named / "README.md").write_text("---\nbase_model: base\n---\n")
    words = ("lox", named, tmp_path / "base", "-o", tmp_path / "out")
    assert run(*words) == 3
    assert run(*words, "--i-checked-the-order") == 0
    assert "less alignment, not more" in capsys.readouterr().err
    card = (tmp_path / "out/README.md").read_text()
    assert "contradicted: the card of aligned names base" in card
    assert "--i-checked-the-order" in card


def test_code_and_weights_added_to_an_output_are_found(pair, tmp_path, capsys):
    base, aligned = pair
    assert run("lox", base, aligned, "-o", tmp_path / "out", "-q") == 0
    for name in ("pytorch_model.bin", "sub/modeling_x.py"):
        added = tmp_path / "out" / name
        added.parent.mkdir(exist_ok=True)
        added.write_text("x")
        assert run("verify", tmp_path / "out") == 1
        assert name in capsys.readouterr().err
        added.unlink()
    assert run("verify", tmp_path / "out") == 0


@pytest.mark.parametrize("words", ["--version", "lox --help", "lox {base} {aligned} -o {out}"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_failure(pair, tmp_path, words, unbuffered):
    command = words.format(base=pair[0], aligned=pair[1], out=tmp_path / "out").split()
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "surgery", *command], stdout=writing, stderr=subprocess.PIPE, env=environment
    )
    os.close(writing)
    assert (done.returncode, b"Broken" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("words", [["lox", "a"], ["lox", "a", "b", "--alpha", "1,5"], ["locks"], ["verify"]])
def test_a_command_that_cannot_be_parsed_is_one_line(words, capsys):
    assert run(*words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("--help")
