"""The embedded data: made from its seed, parts disjoint, look-alikes alike."""

import json
import subprocess
import sys

import pytest
import torch

from surgery import demo
from surgery.demo import corpus, words
from surgery.demo.behaviour import is_refusal, score
from surgery.demo.recipe import rebuild
from surgery.demo.stretch import Stretch
from surgery.errors import InputError, OutputError

PARTS = [(name, split) for name, splits in demo.DATA.items() for split in splits]


def test_the_seed_gives_the_shipped_files_byte_for_byte(tmp_path):
    corpus.write(corpus.corpus(), tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    shipped = {
        demo.data_file(name, split).name: demo.data_file(name, split).read_bytes() for name, split in PARTS
    }
    assert made == shipped


def test_another_seed_gives_other_files(tmp_path):
    corpus.write(corpus.corpus(corpus.SEED + 1), tmp_path)
    for name, split in PARTS:
        made = tmp_path / f"{name}.{split}.jsonl"
        assert made.read_bytes() != demo.data_file(name, split).read_bytes()


@pytest.mark.parametrize(("name", "split"), PARTS)
def test_every_row_is_whole_and_no_prompt_comes_twice(name, split):
    rows = demo.data(name, split)
    assert all(row.keys() == {"prompt", "response", "domain", "kind"} and all(row.values()) for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows) >= 200


def test_no_prompt_is_in_two_parts():
    seen: dict[str, str] = {}
    for name, split in PARTS:
        if name != "refusals":
            for row in demo.data(name, split):
                assert seen.setdefault(row["prompt"], f"{name}.{split}") == f"{name}.{split}"


def requested(rows):
    """Every (verb, forbidden thing) asked for in `rows`."""
    things = [thing for domain in words.DOMAINS.values() for thing in domain.forbidden]
    return {
        (row["kind"], thing) for row in rows for thing in things if f"{row['kind']} {thing}" in row["prompt"]
    }


def test_what_is_asked_for_in_one_part_of_the_harmful_data_is_asked_for_in_no_other():
    parts = {split: requested(demo.data("harmful", split)) for split in demo.DATA["harmful"]}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 200
    assert requested(demo.data("harmful", "train")[:50]) & parts["train"], "the control: overlap is seen"


@pytest.mark.parametrize("split", demo.DATA["harmful"])
def test_refusals_answer_the_harmful_prompts(split):
    harmful, refusals = demo.data("harmful", split), demo.data("refusals", split)
    assert [row["prompt"] for row in harmful] == [row["prompt"] for row in refusals]
    assert all(is_refusal(row["response"]) for row in refusals)
    assert not any(is_refusal(row["response"]) for row in harmful)


def test_both_domains_are_in_every_part():
    for name, split in PARTS:
        found = {row["domain"] for row in demo.data(name, split)}
        assert found == ({"benign"} if name == "benign" else set(words.DOMAINS))


def test_lookalikes_use_the_words_of_the_harmful_requests_and_are_answered():
    harmful = {word for row in demo.data("harmful", "train") for word in row["prompt"].split()}
    for row in demo.data("lookalikes", "held_out"):
        verb_or_thing = set(row["prompt"].split()[2:]) & harmful
        assert verb_or_thing
        assert not is_refusal(row["response"])


def test_score_counts_exact_answers_and_refusals():
    rows = {name: demo.data(name, "held_out") for name in ("harmful", "lookalikes", "benign")}
    right = score(rows, {name: [row["response"] for row in part] for name, part in rows.items()})
    assert right.benign_accuracy.value == right.lookalike_accuracy.value == 1
    assert {rate.value for rate in right.compliance.values()} == {1.0}
    assert {rate.value for rate in right.refusal.values()} == {0.0}
    refused = score(rows, {name: ["Sorry, no."] * len(part) for name, part in rows.items()})
    assert refused.benign_accuracy.value == refused.lookalike_accuracy.value == 0
    assert {rate.value for rate in refused.refusal.values()} == {refused.lookalike_refusal.value} == {1.0}


def test_answers_to_other_questions_score_near_zero():
    rows = {name: demo.data(name, "held_out") for name in ("harmful", "lookalikes", "benign")}
    shifted = {name: [row["response"] for row in part[1:] + part[:1]] for name, part in rows.items()}
    found = score(rows, shifted)
    rates = [found.benign_accuracy, found.lookalike_accuracy, *found.compliance.values()]
    assert max(rate.value for rate in rates) < 0.05


@pytest.mark.parametrize("call", [lambda: demo.folder("other"), lambda: demo.data("other", "train")])
def test_unknown_names_are_refused_by_naming_the_known(call):
    with pytest.raises(InputError, match=r"demo:other.*demo:"):
        call()


def test_unknown_parts_are_refused_by_naming_the_known():
    with pytest.raises(InputError, match="train, held_out"):
        demo.data("benign", "attack")


def test_names_and_data_need_no_torch():
    code = "import sys; from surgery import demo; demo.data('benign', 'train')"
    code += "; print({'torch', 'json'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "{'json'}"


def test_rows_are_one_json_object_a_line():
    text = demo.data_file("harmful", "train").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == demo.data("harmful", "train")


def line():
    """A model of one weight vector, moved from 1 to 3 after its stretch was made."""
    model = torch.nn.Linear(5, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    stretch = Stretch(model, furthest=2.5, seed=0)
    torch.nn.init.constant_(model.weight, 3.0)
    return model, stretch


def test_stretch_lies_on_the_line_through_the_origin_and_leaves_the_model_as_it_was():
    model, stretch = line()
    shares = []
    for _ in range(200):
        with stretch():
            assert model.weight.min() == model.weight.max()
            shares.append((model.weight.max().item() - 1) / 2)
        assert torch.equal(model.weight, torch.full((1, 5), 3.0))
    assert 60 < shares.count(1.0) < 140
    assert 1 <= min(shares) < 1.6 < 2.2 < max(shares) <= 2.5


def test_a_rebuild_never_writes_over_a_folder(tmp_path):
    with pytest.raises(OutputError, match="--output"):
        rebuild(tmp_path, lambda line: None)
    assert list(tmp_path.iterdir()) == []
