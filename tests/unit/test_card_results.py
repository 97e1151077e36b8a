"""The card tells what a report holds, number for number, and nothing in a report can become more than text."""

import copy
import hashlib
import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import surgery
from surgery import card_duties, card_text
from surgery.errors import InputError
from surgery.evaluate.report import by_condition
from surgery.pushing.guarding import is_our_card
from surgery.releasing import card_results, leaderboard, rebuild
from surgery.testing import tiny_pair

HOSTILE = (
    "a|b",
    "first\n\n# second\n\n| x | y |\n|---|---|\n",
    "<script>alert(1)</script><!--",
    "---\nlicense: mit\n---",
    "`code` **bold** [link](https://evil.example) ![i](x)",
    "\u202e\x1b[31m\r\n\t",
    "https://evil.example www.evil.example",
    "* item\n+ item\n1. item\n> quote\n    code\n```\nfence",
    "&lt;b&gt; &#124; \\| \\",
    "-",
    "",
)


def score(value, low, high, n=50, interval="wilson"):
    return {"value": value, "n": n, "low": low, "high": high, "interval": interval}


METRICS = {
    "resistance.steps_to_break": {"value": None, "censored_at": 123, "n": 7},
    "resistance.harmful-finetune.asr": score(0.125, 0.0625, 0.25, 48),
    "resistance.worst_case_asr": score(0.8125, 0.57, 0.934, 16),
    "stability.perplexity": score(7.321, 6.5, 8.75, 31, "bootstrap"),
    "stability.kl": score(0.0125, 0.0025, 0.075, 33, "bootstrap"),
    "generalisation.worst_case_asr": score(0.375, 0.3, 0.4, 17),
    "trainability.final_loss": score(1.5, None, None, 1, "none"),
}
REFERENCE = {
    "resistance.steps_to_break": {"value": 20, "censored_at": None, "n": 7},
    "resistance.worst_case_asr": score(1.0, 0.806, 1.0, 16),
    "stability.perplexity": score(7.25, 6.25, 8.5, 31, "bootstrap"),
}


def document(**changes):
    found = {
        "schema": 1,
        "version": "0.1.0",
        "model": "out",
        "commit": None,
        "judge": "keywords v1",
        "rate": "asr",
        "n": 16,
        "data": {"held_out": {"source": "rows.jsonl", "rows": 16, "sha256": "0" * 64}},
        "reference": {"model": "org/aligned", "commit": "f" * 40},
        "suite": "quick",
        "budget": {"attacks": "harmful-finetune,prefill", "learning_rates": "5e-4", "kinds": "lora", "seeds": "0,1",
                   "steps": 123, "batch_size": 8, "search": 0, "threshold": 0.5},
        "metrics": METRICS,
        "reference_metrics": REFERENCE,
        "not_measured": ["over-refusal: no --look-alikes-data"],
        "attacks": {"failed": []},
    }  # fmt: skip
    return {**copy.deepcopy(found), **changes}


def write(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(document(**changes)))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    base, aligned = tiny_pair(place)
    (aligned / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags: [chat]\n---\n# aligned\n")
    surgery.apply(surgery.LoX(rank=6, alpha=1.5), base=base, model=aligned, output=place / "out")
    return place


@pytest.fixture
def output(made, tmp_path):
    """An output of its own for each test, whose inputs lie beside it."""
    place = tmp_path / "place"
    shutil.copytree(made, place)
    account = json.loads((place / "out/surgery.run.json").read_text())
    account["sources"] = {role: str(place / role) for role in account["sources"]}
    (place / "out/surgery.run.json").write_text(json.dumps(account))
    return place / "out"


def manifest_hash(output):
    return hashlib.sha256((output / "surgery.json").read_bytes()).hexdigest()


def about(output, **changes):
    """A report on that output."""
    return write(output.parent / "report", manifest_sha256=manifest_hash(output), **changes)


def parsed(text):
    return MarkdownIt("commonmark").enable("table").parse(text)


def cells(text):
    """Rows of every table, as a reader sees them."""
    rows, inside = [], False
    for token in parsed(text):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("td_open", "th_open", "td_close", "th_close"):
            inside = token.type.endswith("open")
        elif inside:
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_every_score_of_the_report_is_in_the_card_and_no_other(output):
    found = rebuild(output, about(output))
    assert (found.evaluated, found.notes, found.leaderboard) == (True, (), None)
    shown = [row for row in cells(found.card.read_text()) if len(row) == 3 and row[0] != "measure"]
    wanted = [row for rows in by_condition(document()).values() for row in rows]
    assert sorted(map(tuple, shown)) == sorted(wanted)
    assert ["steps_to_break", "not within 123 (trials 7)", "20 (trials 7)"] in shown
    for text in (
        "7.321 (n 31, 6.5 to 8.75)",
        "37.5 % (n 17, 30 to 40)",
        "12.5 % (n 48, 6.25 to 25)",
        "1.5 (n 1)",
    ):
        assert any(text in row for row in shown)


def test_the_worst_case_is_said_first_and_heads_its_table(output):
    text = rebuild(output, about(output)).card.read_text()
    first = text.split("## Evaluation\n\n")[1].split("\n")[0]
    assert "81.2 % (n 16, 57 to 93.4), its reference 100 % (n 16, 80.6 to 100)" in first
    resistance = text.split("### Resistance")[1].splitlines()
    assert resistance[4].startswith("| worst_case_asr | 81.2 %")
    assert "not within 123" in text.split("### ")[0]


def test_budget_judge_reference_and_limits_are_told(output):
    text = rebuild(
        output, about(output, attacks={"failed": [{"params": {"attack": "prefill"}}]})
    ).card.read_text()
    rows = {row[0]: row[1] for row in cells(text) if len(row) == 2}
    assert rows["judge"] == "keywords v1"
    assert rows["reference, attacked alike"] == "org/aligned@" + "f" * 40
    for name in ("attacks", "learning_rates", "kinds", "seeds", "steps", "threshold"):
        assert rows[name.replace("_", " ")] == str(document()["budget"][name])
    assert rows["suite"] == "quick"
    assert rows["data, held out"] == "rows.jsonl, 16 rows"
    assert "over-refusal: no" in text
    assert "1 trials of attacks failed" in text
    assert not re.search("immuni[sz]ed", text, re.IGNORECASE)
    assert "Not evaluated" not in text


def test_without_a_report_the_card_says_not_evaluated(output):
    first = (output / "README.md").read_bytes()
    assert b"Not evaluated." in first
    found = rebuild(output)
    assert not found.evaluated
    assert found.card.read_bytes() == first
    rebuild(output, about(output))
    assert (output / "README.md").read_bytes() != first
    rebuild(output)
    assert (output / "README.md").read_bytes() == first


def test_without_a_reference_there_is_no_column_for_it(output):
    text = rebuild(output, about(output, reference=None, reference_metrics=None)).card.read_text()
    assert all(len(row) == 2 for row in cells(text))
    assert "its reference" not in text
    assert "none: nothing to compare with" in text


def test_without_attacks_nothing_is_said_of_resistance(output):
    only = {name: one for name, one in METRICS.items() if name.startswith("stability")}
    text = rebuild(output, about(output, metrics=only, reference_metrics={})).card.read_text()
    assert "No attack was carried out" in text
    assert "Worst case" not in text


def test_the_same_report_gives_the_same_bytes(output):
    first = rebuild(output, about(output)).card.read_bytes()
    assert rebuild(output, about(output)).card.read_bytes() == first
    assert [path.name for path in output.iterdir() if "partial" in path.name] == []
    assert surgery.verify(output).files > 0


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_in_its_cell(output, text):
    clean = rebuild(output, about(output)).card.read_text()
    changes = {
        "model": text, "judge": text, "suite": text, "version": text, "n": text, "not_measured": [text],
        "reference": {"model": text, "commit": text}, "data": {"held_out": {"source": text, "rows": text}},
        "budget": {**document()["budget"], "attacks": text, "steps": [text], "threshold": {text: text}},
        "metrics": {**METRICS, f"stability.{text}": score(1.0, 0.5, 1.5)},
    }  # fmt: skip
    found = rebuild(output, about(output, **changes)).card.read_text()
    was, now = cells(clean), cells(found)
    assert len(now) == len(was) + 1
    assert [len(row) for row in now if len(row) != 3] == [len(row) for row in was if len(row) != 3]
    kinds = [token.type for token in parsed(found)]
    assert kinds.count("heading_open") == [token.type for token in parsed(clean)].count("heading_open")
    inner = {child.type for token in parsed(found) for child in token.children or []}
    assert not {"html_block", "blockquote_open", "ordered_list_open"} & set(kinds)
    assert not {"html_inline", "image"} & inner
    assert "https://evil" not in found
    assert "<script" not in found
    assert yaml.safe_load(found.split("---\n")[1]) == yaml.safe_load(clean.split("---\n")[1])
    assert found.count("\n---\n") == 1
    assert is_our_card(found)
    judge = dict(row for row in now if len(row) == 2)["judge"]
    readable = "".join(character if character.isprintable() else " " for character in text)
    assert judge == " ".join(readable.split())


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_back_as_it_was(text):
    shown = card_text.plain(text)
    assert "\n" not in shown
    [row] = cells(f"| a | b |\n|---|---|\n| {shown} | end |\n")[1:]
    readable = "".join(character if character.isprintable() else " " for character in text)
    assert row == [" ".join(readable.split()), "end"]


def test_long_text_is_cut():
    assert len(card_text.plain("x" * 10**6)) < 500


@pytest.mark.parametrize("hash_of", ["0" * 64, None, 7])
def test_a_report_on_another_model_is_refused(output, hash_of):
    report = write(output.parent / "other", manifest_sha256=hash_of)
    before = (output / "README.md").read_bytes()
    with pytest.raises(InputError, match=r"is about another model.*needed.*surgery evaluate"):
        rebuild(output, report)
    assert (output / "README.md").read_bytes() == before


def test_a_report_that_does_not_say_which_output_is_noted(output):
    found = rebuild(output, write(output.parent / "old"))
    assert "does not say which output it measured" in found.notes[0]
    assert "does not say by its hash which output it measured" in found.card.read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": None},
        {"not_measured": "text"},
        {"judge": 3},
        {"reference": {"commit": "x"}},
        {"metrics": {"resistance.worst_case_asr": {"value": 1.0}}},
        {"metrics": {"stability.x": {"value": 10**400, "n": 1, "low": None, "high": None}}},
        {"metrics": {"stability.x": {"value": "|", "n": 1, "low": None, "high": None}}},
        {"metrics": {"stability.x": {"value": None, "censored_at": None, "n": 1}}},
        {"reference_metrics": {"stability.x": {"value": 1.0, "low": None, "high": None}}},
    ],
    ids=str,
)
def test_a_report_that_is_none_is_refused(output, changes):
    with pytest.raises(InputError, match=r"report\.json"):
        rebuild(output, about(output, **changes))


def test_results_of_other_tools_are_refused(output, tmp_path):
    (tmp_path / "report.json").write_text('{"defense.asr": 0.5}')
    with pytest.raises(InputError, match="no report of surgery evaluate"):
        rebuild(output, tmp_path / "report.json")


@pytest.mark.parametrize("content", [b"# mine\n", b"\xff\xfe", b"---\ntags: [surgery]\n---\nmy own words\n"])
def test_a_card_of_somebody_else_is_kept(output, content):
    (output / "README.md").write_bytes(content)
    with pytest.raises(InputError, match=r"README\.md was not written by surgery.*move it away"):
        rebuild(output, about(output))
    assert (output / "README.md").read_bytes() == content


def test_a_card_that_is_missing_is_written(output):
    before = (output / "README.md").read_bytes()
    (output / "README.md").unlink()
    assert rebuild(output).card.read_bytes() == before


def test_where_the_parent_is_gone_the_card_keeps_its_licence(output):
    text = (output / "README.md").read_text()
    (output.parent / "aligned").rename(output.parent / "elsewhere")
    found = rebuild(output)
    assert found.card.read_text() == text
    assert "those of the card here" in found.notes[0]
    (output / "README.md").unlink()
    assert "add them" in rebuild(output).notes[0]


def test_a_parent_on_the_hub_is_read_at_its_commit_without_its_weights(output, hub):
    files = {path.name: path.read_bytes() for path in (output.parent / "aligned").iterdir()}
    repository = hub.create("org/aligned")
    pinned = repository.commit({**files, "README.md": b"---\nlicense: llama3.1\nlanguage: de\n---\n"})
    manifest = json.loads((output / "surgery.json").read_text())
    manifest["inputs"]["aligned"] |= {"repository": "org/aligned", "commit": pinned}
    (output / "surgery.json").write_text(json.dumps(manifest))
    repository.commit({"README.md": b"---\nlicense: other\n---\n"})
    data = ModelCard(rebuild(output).card.read_text()).data
    assert (data.license, data.language, data.base_model) == ("llama3.1", "de", "org/aligned")
    assert not {name for name in hub.fetched() if name.endswith(".safetensors")}
    hub.repositories.clear()
    found = rebuild(output)
    assert ModelCard(found.card.read_text()).data.license == "llama3.1"


def test_a_stale_signature_is_dropped_and_a_valid_one_kept(output):
    (output / "model.sig").write_text("{}")
    assert rebuild(output).notes == ()
    assert (output / "model.sig").exists()
    assert "sign again" in rebuild(output, about(output)).notes[0]
    assert not (output / "model.sig").exists()


def test_a_folder_that_surgery_did_not_write_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no surgery\.json"):
        rebuild(tmp_path)


def test_the_front_matter_is_what_the_hubs_client_reads(output):
    text = rebuild(output, about(output)).card.read_text()
    data = ModelCard(text).data
    assert (data.license, data.language, data.library_name) == ("mit", "en", "transformers")
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("aligned", "finetune")
    assert data.tags == ["surgery", "lox", "safety", "chat"]
    assert yaml.safe_load(text.split("---\n")[1]) == data.to_dict()


def with_parent(output, front, *files):
    """The card, the parent's front matter being this."""
    (output.parent / "aligned/README.md").write_text(f"---\n{front}---\n")
    manifest = json.loads((output / "surgery.json").read_text())
    manifest["files"] |= {name: {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()} for name in files}
    for name in files:
        (output / name).write_bytes(b"")
    (output / "surgery.json").write_text(json.dumps(manifest))
    found = rebuild(output)
    return found.card.read_text(), found.notes


@pytest.mark.parametrize(
    "front",
    [
        *(
            f"license: {name}\n"
            for name in ("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")
        ),
        "license: other\nlicense_name: Llama-3.1-community\nlicense_link: LICENSE\n",
        "license: [llama3.2]\n",
    ],
)
def test_llama_licences_have_their_duties_told(output, front):
    text, notes = with_parent(output, front, "LICENSE.txt", "USE_POLICY.md")
    section = text.split("## Licence\n\n")[1].split("\n## ")[0]
    assert "Built with Llama" in section
    assert 'must begin with "Llama"' in section
    assert "`aligned` does not begin so" in section
    assert "Carried from the parent: `LICENSE.txt`, `USE_POLICY.md`" in section
    assert ("Built with Meta Llama 3" in section) == (front == "license: llama3\n")
    assert "out does not" in notes[0]
    data = ModelCard(text).data
    assert data.to_dict().items() >= yaml.safe_load(front).items()


def test_llama_files_that_are_missing_are_asked_for(output):
    text, _ = with_parent(output, "license: llama3.2\n")
    assert "No LICENSE, NOTICE or USE_POLICY file" in text


def test_other_licences_have_no_such_section(output):
    text, notes = with_parent(output, "license: apache-2.0\n")
    assert ("## Licence" in text, notes) == (False, ())
    assert card_duties.begins_with_llama("org/Llama-3.2-1B-LoX")


def test_the_citation_names_paper_and_tool(output):
    text = (output / "README.md").read_text()
    block = text.split("```bibtex\n")[1].split("```")[0]
    assert "url = {https://arxiv.org/abs/2506.15606}" in block
    assert "@misc{model-surgery" in block
    assert block.count("{") == block.count("}")


def test_a_paper_that_is_no_link_is_not_cited():
    manifest = {"method": "lox", "paper": "https://x}\n```\n# heading", "versions": {"surgery": "1"}}
    assert card_duties.citation(manifest).count("@misc") == 1


BENCHMARKS = {
    "stability.lm_eval.gsm8k.exact_match.strict-match": score(0.2767, 0.25, 0.3, 1319),
    "stability.lm_eval.gsm8k.exact_match.flexible-extract": score(0.28, 0.25, 0.3, 1319),
    "stability.lm_eval.mmlu_pro.exact_match.custom-extract": score(0.74, 0.7, 0.8, 64),
    "stability.lm_eval.hellaswag.acc_norm": score(0.5, 0.4, 0.6, 10042),
}


def test_whole_runs_of_registered_benchmarks_go_to_leaderboards(output):
    found = rebuild(output, about(output, metrics={**METRICS, **BENCHMARKS}))
    assert found.leaderboard == output / ".eval_results/surgery.yaml"
    [entry] = parse_eval_result_entries(yaml.safe_load(found.leaderboard.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 27.67)
    assert "25 to 30" in entry.notes
    assert "mmlu_pro was run on 64 of its 12032 documents" in found.notes[0]
    assert surgery.verify(output).files > 0
    assert rebuild(output).leaderboard is None
    assert not (output / ".eval_results").exists()


def test_results_of_somebody_else_are_left_alone(output):
    folder = output / ".eval_results"
    folder.mkdir()
    (folder / "hle.yaml").write_text("- mine\n")
    rebuild(output, about(output, metrics={**METRICS, **BENCHMARKS}))
    rebuild(output)
    assert [path.name for path in folder.iterdir()] == ["hle.yaml"]
    (output / leaderboard.FILE).write_text("- mine\n")
    with pytest.raises(InputError, match="not written by surgery"):
        rebuild(output, about(output))
    assert (output / leaderboard.FILE).read_text() == "- mine\n"


def test_a_report_is_read_from_its_folder_or_file(output):
    folder = about(output)
    assert card_results.read(folder) == card_results.read(folder / "report.json")
