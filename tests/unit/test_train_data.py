"""Rows come from every source as they are there, or are refused by number; tokens tell the response apart."""

import csv
import json

import pytest

from surgery import demo
from surgery.errors import InputError, UsageError
from surgery.train.data import DEMO, choose, load
from surgery.train.sft import SFT
from surgery.train.sources import Columns, Identity, Rows, read_rows
from surgery.train.tokens import tokenise

ROWS = [
    {"prompt": "Name a colour.", "response": "Red, or blue."},
    {"prompt": "Add 2 and 3.", "response": "5"},
    {"prompt": "", "response": 'A "quoted", one.\nWith two lines.'},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def texts(rows):
    return [tuple(message["content"] for message in turns) for turns in rows.conversations]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.folder("aligned"))


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    path = write(tmp_path / f"rows.{ending}", ROWS)
    rows = read_rows(path)
    assert texts(rows) == [(row["prompt"], row["response"]) for row in ROWS]
    assert (rows.identity.source, rows.identity.rows) == (f"rows.{ending}", 3)


def test_the_identity_of_a_file_is_its_sha256_and_changes_with_it(tmp_path):
    import hashlib

    path = write(tmp_path / "rows.jsonl", ROWS)
    first = read_rows(path).identity.sha256
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    write(path, [*ROWS[:2], {**ROWS[2], "response": "another"}])
    assert read_rows(path).identity.sha256 != first


def test_columns_of_other_names_are_read_when_they_are_named(tmp_path):
    path = write(tmp_path / "rows.csv", [{"question": "Why?", "answer": "Because.", "prompt": "no"}])
    assert texts(read_rows(path, Columns("question", "answer"))) == [("Why?", "Because.")]
    with pytest.raises(InputError, match="--prompt-column"):  # control: they are not guessed
        read_rows(path)


def test_messages_are_conversations_that_end_with_the_response(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert list(read_rows(path).conversations[0]) == turns


@pytest.mark.parametrize("name", demo.DATA)
def test_embedded_data_is_read_in_the_order_of_its_file(name):
    rows = read_rows(f"demo:{name}")
    assert texts(rows) == [(row["prompt"], row["response"]) for row in demo.data(name, "train")]
    assert read_rows(f"demo:{name}:held_out").identity.sha256 != rows.identity.sha256


def test_a_data_set_of_the_datasets_library_is_read_by_its_split(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    folder = tmp_path / "org" / "rows"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[:1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts(read_rows("org/rows")) == [(row["prompt"], row["response"]) for row in ROWS]
    assert len(read_rows("org/rows:test").conversations) == 1
    with pytest.raises(InputError, match="org/rows:nowhere cannot be loaded"):
        read_rows("org/rows:nowhere")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.jsonl", "", ["empty.jsonl has no rows"]),
        ("empty.csv", "prompt,response\n", ["has no rows"]),
        ("broken.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": \n', ["line 2", "no JSON"]),
        ("object.json", '{"prompt": "a"}', ["holds dict", "list of rows"]),
        ("list.jsonl", "[1]\n", ["row 1", "no record of columns"]),
        ("columns.jsonl", '{"text": "a", "label": 1}\n', ["text, label", "prompt and response", "--prompt-column"]),
        ("one.jsonl", '{"prompt": "a", "answer": "b"}\n', ["and not response", "--response-column"]),
        ("null.jsonl", '{"prompt": "a", "response": null}\n', ["row 1", "no text in prompt or response"]),
        ("blank.csv", "prompt,response\na,  \n", ["row 1", "no text"]),
        ("short.csv", "prompt,response\na\n", ["row 1", "no text"]),
        ("number.jsonl", '{"prompt": 3, "response": "b"}\n', ["row 1", "no text"]),
        ("user.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', ["row 1", "assistant"]),
        ("roles.jsonl", '{"messages": [{"role": "robot", "content": "a"}]}\n', ["row 1", "role (system"]),
        ("flat.jsonl", '{"messages": "a"}\n', ["row 1", "list of role"]),
        ("bytes.parquet", "no parquet", ["bytes.parquet is no Parquet file"]),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / name)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_latin_text_is_refused_and_not_misread(tmp_path):
    for name in ("rows.jsonl", "rows.csv"):
        (tmp_path / name).write_bytes('prompt,response\n{"prompt": "caf\xe9"}'.encode("latin-1"))
        with pytest.raises(InputError, match="UTF-8"):
            read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "kind"), [("gone.jsonl", InputError), ("demo:nothing", InputError), ("x", UsageError)]
)
def test_data_that_is_not_there_is_told(source, kind):
    with pytest.raises(kind):
        read_rows(source)


# What is needed, what is given.


def test_a_demo_model_has_data_of_its_own_and_another_model_none():
    assert choose(SFT(), "demo:aligned", {}) == {"aligned": DEMO["aligned"]}
    assert choose(SFT(), "demo:aligned", {"aligned": "a.jsonl"}) == {"aligned": ("a.jsonl",)}
    assert choose(SFT(), "model", {"aligned": ["a.jsonl", "b.csv"]}) == {"aligned": ("a.jsonl", "b.csv")}
    with pytest.raises(UsageError, match="--aligned-data"):
        choose(SFT(), "model", {})
    with pytest.raises(UsageError, match="uses no harmful data"):
        choose(SFT(), "model", {"aligned": "a", "harmful": "b"})


def test_several_sources_are_one_set_in_their_order(tokenizer):
    made = load({"aligned": ["demo:refusals", "demo:harmful"]}, tokenizer, 256, Columns())["aligned"]
    assert [identity.source for identity in made.sources] == ["demo:refusals", "demo:harmful"]
    assert len(made.rows) == sum(identity.rows for identity in made.sources) == 1920
    alone = load({"aligned": ["demo:harmful"]}, tokenizer, 256, Columns())["aligned"]
    assert made.rows[960:] == alone.rows


# Tokens.


def rows_of(*conversations):
    return Rows(tuple(tuple(turns) for turns in conversations), Identity("made up", len(conversations), ""))


def turns(prompt, response):
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": response}


def test_the_response_is_what_the_template_adds_and_the_rest_is_prompt(tokenizer):
    made = tokenise(tokenizer, read_rows("demo:refusals"), 256).rows
    for example, row in list(zip(made, demo.data("refusals", "train"), strict=True))[::37]:
        assert tokenizer.decode(example.tokens[example.prompt :]) == row["response"] + "<|end|>"
        assert tokenizer.decode(example.tokens[: example.prompt]) == (
            f"<|user|>{row['prompt']}<|end|><|assistant|>"
        )


def test_of_several_turns_the_last_is_the_response(tokenizer):
    made = tokenise(tokenizer, rows_of([*turns("a", "b"), *turns("c", "d e")]), 256).rows[0]
    assert tokenizer.decode(made.tokens[made.prompt :]) == "d e<|end|>"


def test_a_token_over_the_border_belongs_to_the_prompt(tokenizer):
    """Without the opening of a turn between them, prompt and response run into each other."""
    import copy

    joined = copy.deepcopy(tokenizer)
    joined.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    [example] = tokenise(joined, rows_of(turns("bre", "w it")), 256).rows
    assert joined.convert_ids_to_tokens(list(example.tokens)) == ["b", "rew", "Ġit"]
    assert joined.convert_ids_to_tokens(joined("bre")["input_ids"]) == ["b", "re"]  # control: they do merge
    assert joined.decode(example.tokens[example.prompt :]) == " it"


def test_a_template_that_changes_the_prompt_is_refused(tokenizer):
    import copy

    changing = copy.deepcopy(tokenizer)
    changing.chat_template = (
        "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"made up, row 1: the chat template does not keep"):
        tokenise(changing, rows_of(turns("a", "b")), 256)
    changing.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(InputError, match=r"refuses it .no such role"):
        tokenise(changing, rows_of(turns("a", "b")), 256)


def test_without_a_template_the_text_is_prompt_line_break_response_and_end(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    [example] = tokenise(bare, rows_of(turns("Name a colour.", "Red.")), 256).rows
    assert bare.decode(example.tokens) == "Name a colour.\nRed.<|end|>"
    assert bare.decode(example.tokens[example.prompt :]) == "Red.<|end|>"
    with pytest.raises(InputError, match="no chat template"):
        tokenise(bare, rows_of([*turns("a", "b"), *turns("c", "d")]), 256)


def test_long_rows_are_cut_or_left_out_and_counted(tokenizer):
    rows = rows_of(turns("a", "b"), turns("a", "b " * 30), turns("c " * 30, "d"))
    made = tokenise(tokenizer, rows, 16)
    assert (len(made.rows), made.cut, made.dropped) == (2, 1, 1)
    assert max(len(row.tokens) for row in made.rows) == 16
    whole = tokenise(tokenizer, rows, 256)
    assert (len(whole.rows), whole.cut, whole.dropped) == (3, 0, 0)


def test_data_with_no_room_for_any_response_is_refused(tokenizer):
    with pytest.raises(
        InputError, match=r"within 4 tokens .the shortest prompt has \d+.; raise --max-length"
    ):
        tokenise(tokenizer, rows_of(turns("a b c", "d")), 4)
