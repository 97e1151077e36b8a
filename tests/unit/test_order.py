import json

import pytest

from surgery.errors import InputError
from surgery.hub import Source
from surgery.order import check_order, evidence, has_chat_template


def source(tmp_path, name, *, base_model=None, template=None, repository=None):
    folder = tmp_path / name
    folder.mkdir()
    if base_model:
        (folder / "README.md").write_text(f"---\nlicense: mit\nbase_model: {base_model}\n---\n# card\n")
    if template == "file":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    if template == "config":
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return Source(repository or name, folder, repository, "0" * 40 if repository else None)


def test_a_card_that_names_the_base_supports_the_order(tmp_path):
    base = source(tmp_path, "b", repository="org/base")
    aligned = source(tmp_path, "a", base_model="org/base")
    roles = evidence(base, aligned)
    assert len(roles.supports) == 1
    assert not roles.contradicts


def test_a_card_that_names_the_aligned_model_means_swapped(tmp_path):
    base, aligned = source(tmp_path, "b", base_model="[org/a]"), source(tmp_path, "a")
    with pytest.raises(InputError, match=r"look swapped.*--i-checked-the-order"):
        check_order(base, aligned, i_checked_the_order=False)
    assert check_order(base, aligned, i_checked_the_order=True).contradicts


@pytest.mark.parametrize("place", ["file", "config"])
def test_a_chat_template_only_in_base_means_swapped(tmp_path, place):
    base, aligned = source(tmp_path, "b", template=place), source(tmp_path, "a")
    with pytest.raises(InputError, match="only b has a chat template"):
        check_order(base, aligned, i_checked_the_order=False)
    assert check_order(aligned, base, i_checked_the_order=False).supports == ("only b has a chat template",)


def test_without_evidence_the_summary_says_so(tmp_path):
    roles = check_order(source(tmp_path, "b"), source(tmp_path, "a"), i_checked_the_order=False)
    assert roles.summary() == "no evidence in the files for which is which"


@pytest.mark.parametrize(
    "text", ["---\n: [\n---\n", "---\n- a\n---\n", "no front matter", "---\nunclosed: 1\n"]
)
def test_a_card_that_cannot_be_read_is_no_evidence(tmp_path, text):
    base, aligned = source(tmp_path, "b"), source(tmp_path, "a")
    (base.folder / "README.md").write_text(text)
    assert evidence(base, aligned).contradicts == ()


def test_a_broken_tokenizer_config_is_no_chat_template(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert not has_chat_template(tmp_path)
