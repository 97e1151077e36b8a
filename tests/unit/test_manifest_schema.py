"""`docs/manifest.schema.json` describes the manifests that are written, and no others."""

import copy
import json
from pathlib import Path

import pytest

import surgery
from surgery.methods.circuit_breakers import CircuitBreakers
from surgery.train.running import immunise
from surgery.train.training import Training

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/manifest.schema.json").read_text())
PAIR = {"base": "demo:base", "model": "demo:aligned"}
KINDS = ["edit", "adapter", "merge", "trained", "trained adapter"]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """A real one of every kind."""
    place = tmp_path_factory.mktemp("manifests")
    surgery.apply(surgery.LoX(rank=6, alpha=1.5), **PAIR, output=place / "edit")
    surgery.apply(
        surgery.LoX(rank=2), **PAIR, output=place / "adapter", options=surgery.Options(as_lora=True)
    )
    both = [place / "adapter", place / "adapter"]
    surgery.merge("demo:aligned", both, weights=(0.5, 0.75), output=place / "merge")
    training = Training(steps=1, batch_size=2, keep_adapter=True, spare=0.5)
    immunise(CircuitBreakers(), model="demo:aligned", output=place / "trained", training=training)
    (place / "trained-adapter").rename(place / "trained adapter")
    return {kind: json.loads((place / kind / "surgery.json").read_text()) for kind in KINDS}


def valid(document):
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(document)


def parts(document, path=()):
    """Every object in a document whose fields are fixed, by its path."""
    free = ("files", "hyperparameters", "training", "losses", "data", "settings")
    if isinstance(document, dict):
        yield path
        for key, value in document.items():
            if key not in free:
                yield from parts(value, (*path, key))


def at(document, path):
    for key in path:
        document = document[key]
    return document


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_manifest_is_described(manifests, kind):
    errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifests[kind]))
    assert errors == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_extra_field_is_refused_wherever_fields_are_fixed(manifests, kind):
    assert valid(manifests[kind])
    for path in parts(manifests[kind]):
        if path[:1] == ("trained",) and len(path) == 1:
            continue  # methods may record more of a training
        document = copy.deepcopy(manifests[kind])
        at(document, path)["extra"] = 1
        assert not valid(document), path


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_field_is_refused(manifests, kind):
    assert valid(manifests[kind])
    optional = {
        ("inputs", "adapter-2"),
        ("inputs", "adapter", "ancestor"),
        ("inputs", "adapter-2", "ancestor"),
    }
    for path in parts(manifests[kind]):
        if path[:1] == ("trained",):
            continue
        for key in at(manifests[kind], path):
            if (*path, key) in optional:
                continue
            document = copy.deepcopy(manifests[kind])
            del at(document, path)[key]
            assert not valid(document), (*path, key)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2),
        (("options", "alpha"), -0.5),
        (("options", "anchor"), "elsewhere"),
        (("options", "rank"), 0),
        (("inputs", "base", "commit"), "0" * 40),
        (("inputs", "base", "repository"), "org/name"),
        (("files", "model.safetensors", "sha256"), "F" * 64),
        (("files", "../x"), {"size": 1, "sha256": "0" * 64}),
        (("threads",), "1"),
    ],
)
def test_a_wrong_value_is_refused(manifests, path, value):
    document = copy.deepcopy(manifests["edit"])
    assert valid(document)
    at(document, path[:-1])[path[-1]] = value
    assert not valid(document)


def test_a_pinned_repository_is_described(manifests):
    document = copy.deepcopy(manifests["edit"])
    document["inputs"]["base"] |= {"repository": "org/name", "commit": "0" * 40}
    assert valid(document)


def test_the_options_are_those_of_the_method(manifests):
    """A new option without a line in the schema is noticed here, and not by a reader of the schema."""
    described = SCHEMA["$defs"]["edit"]["properties"]["options"]["properties"]
    shared = SCHEMA["$defs"]["run"]["properties"]
    assert {*described, *shared} == set(manifests["edit"]["options"])
