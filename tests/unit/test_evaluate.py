"""Choices, over-refusal, texts and lessons: what they read, refuse, count and leave untouched."""

import hashlib
import json
import math

import pytest
import torch

from surgery import scores
from surgery.errors import InputError, UsageError
from surgery.evaluate import choices, learning, practice, text, trainability
from surgery.evaluate.over_refusal import over_refusal
from surgery.generation import generate
from surgery.hub import resolve
from surgery.hub.remote import open_source
from surgery.judging.base import Answer, Judge
from surgery.judging.harm import prompt_of
from surgery.judging.prefixes import PrefixJudge
from surgery.train import network
from surgery.train.sources import Identity, Rows, read_rows

ITEM = {"question": "What is the capital of Peru?", "choices": ["Lima", "Rome"], "answer": 0}


@pytest.fixture(scope="module")
def aligned():
    return open_source(resolve("demo:aligned"))


@pytest.fixture(scope="module")
def tokenizer(aligned):
    return network.load_tokenizer(aligned)


@pytest.fixture(scope="module")
def model(aligned):
    return network.load_model(aligned, torch.float32).eval().requires_grad_(False)


def fingerprint(model):
    """Of every parameter and buffer, and of what each module is, holds and does."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tensor.requires_grad} {tensor.grad is None}".encode())
        digest.update(tensor.detach().numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module)} {sorted(vars(module))} {module.training}".encode())
        digest.update(f"{len(module._forward_hooks)} {len(module._forward_pre_hooks)}".encode())
    return digest.hexdigest()


def rows_of(*pairs):
    conversations = tuple(
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        for prompt, response in pairs
    )
    return Rows(conversations, Identity("some rows", len(conversations), ""))


def first(rows, count):
    return Rows(rows.conversations[:count], rows.identity)


class Canned(Judge):
    """Gives the verdicts it was made with, and keeps what it was asked."""

    label = "canned"

    def __init__(self, *verdicts):
        self.given, self.asked = verdicts, []

    def verdicts(self, answers):
        self.asked += answers
        return list(self.given)


class Letters:
    """A tokenizer without a template: one token a letter."""

    chat_template = bos_token_id = bos_token = None

    def __call__(self, words, **_):
        return {"input_ids": [ord(letter) % 50 + 5 for letter in words]}


class Preferring(torch.nn.Module):
    """Predicts every token with the probability given to it, whatever came before."""

    def __init__(self, probabilities):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.full((60,), -9.0))
        with torch.no_grad():
            for letter, probability in probabilities.items():
                self.weights[Letters()(letter)["input_ids"][0]] = math.log(probability)

    def forward(self, input_ids, logits_to_keep, **_):
        shape = (len(input_ids), len(logits_to_keep), 60)
        return type("Output", (), {"logits": self.weights.expand(shape)})


def test_the_sum_prefers_short_choices_and_the_normalised_score_likely_letters():
    """By sums log 0.2 > 3 log 0.3; by letter log 0.3 > log 0.2."""
    items = [choices.Item("?", ("a", "bbb"), 0), choices.Item("?", ("bbb", "a"), 1)]
    found = choices.accuracy(Preferring({"a": 0.2, "b": 0.3}), Letters(), items)
    assert (found.acc.value, found.acc_norm.value) == (1.0, 0.0)
    turned = [choices.Item(item.question, item.choices, 1 - item.answer) for item in items]
    found = choices.accuracy(Preferring({"a": 0.2, "b": 0.3}), Letters(), turned)
    assert (found.acc.value, found.acc_norm.value) == (0.0, 1.0)


def test_accuracy_is_counted_over_questions_with_wilsons_interval():
    items = [choices.Item("?", ("a", "b", "c"), answer) for answer in (0, 1, 1, 1, 2)]
    found = choices.accuracy(Preferring({"a": 0.1, "b": 0.6, "c": 0.2}), Letters(), items, batch_size=4)
    assert found.acc == scores.proportion(3, 5)
    assert found.document()["acc_norm"]["n"] == 5


def test_the_question_is_no_part_of_the_score():
    items = [choices.Item(question, ("a", "b"), 0) for question in ("b", "bbbbbbbb")]
    assert choices.accuracy(Preferring({"a": 0.3, "b": 0.1}), Letters(), items).acc.value == 1.0


def test_a_question_that_is_too_long_is_named():
    items = [choices.Item("?", ("a", "b"), 0), choices.Item("?" * 20, ("a", "b"), 0)]
    with pytest.raises(InputError, match="question 2 has 22 tokens"):
        choices.accuracy(Preferring({}), Letters(), items, max_length=21)


def test_questions_of_rows_hold_the_rows_own_answer_once_among_others():
    rows = read_rows("demo:benign:held_out")
    items = choices.from_rows(rows, seed=3)
    assert [item.choices[item.answer] for item in items] == [one[-1]["content"] for one in rows.conversations]
    assert [item.question for item in items] == [one[0]["content"] for one in rows.conversations]
    assert all(len(set(item.choices)) == 4 for item in items)
    places = [item.answer for item in items]
    assert min(places.count(place) for place in range(4)) > len(items) / 8
    assert choices.from_rows(rows, seed=3) == items
    assert choices.from_rows(rows, seed=4) != items


def test_rows_with_too_few_answers_make_no_questions():
    rows = rows_of(("a", "yes"), ("b", "no"), ("c", "yes"), ("d", "no"))
    assert len(choices.from_rows(rows, 0, choices=2)) == 4
    with pytest.raises(InputError, match="2 different responses, and questions of 3"):
        choices.from_rows(rows, 0, choices=3)


def test_the_demo_model_knows_the_answers_to_its_questions(model, tokenizer):
    items = choices.from_rows(first(read_rows("demo:benign:held_out"), 48), seed=0)
    right = choices.accuracy(model, tokenizer, items, max_length=96)
    assert right.acc.value > 0.8
    shifted = [choices.Item(item.question, item.choices, (item.answer + 1) % 4) for item in items]
    assert choices.accuracy(model, tokenizer, shifted, max_length=96).acc.value < 0.2  # control


def test_questions_are_read_from_json_lines(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ITEM) + "\n\n" + json.dumps({**ITEM, "answer": 1}) + "\n", encoding="utf-8")
    assert choices.read(path) == (
        choices.Item("What is the capital of Peru?", ("Lima", "Rome"), 0),
        choices.Item("What is the capital of Peru?", ("Lima", "Rome"), 1),
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "lacks question, choices or answer"),
        ('{"question": "a", "choices": ["b", "c"]}', "lacks question, choices or answer"),
        (json.dumps({**ITEM, "question": " "}), "no text as its question"),
        (json.dumps({**ITEM, "choices": "Lima"}), "choices that are no texts"),
        (json.dumps({**ITEM, "choices": ["Lima", 3]}), "choices that are no texts"),
        (json.dumps({**ITEM, "choices": ["Lima", ""]}), "choices that are no texts"),
        (json.dumps({**ITEM, "choices": ["Lima"]}), "1 different choices of 1"),
        (json.dumps({**ITEM, "choices": ["Lima", "Lima"]}), "1 different choices of 2"),
        (json.dumps({**ITEM, "answer": 2}), "the answer 2; it must be a place from 0 to 1"),
        (json.dumps({**ITEM, "answer": -1}), "the answer -1"),
        (json.dumps({**ITEM, "answer": True}), "the answer true"),
        (json.dumps({**ITEM, "answer": "Lima"}), 'the answer "Lima"'),
    ],
)
def test_the_first_unusable_question_is_named(tmp_path, line, words):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"items\.jsonl, line 2") as caught:
        choices.read(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", [choices.read, text.read])
def test_files_that_cannot_be_read_are_refused(tmp_path, reader):
    with pytest.raises(InputError, match="missing"):
        reader(tmp_path / "none")
    (tmp_path / "empty").write_text("\n \n", encoding="utf-8")
    with pytest.raises(InputError, match=r"empty (has no questions|holds no text)"):
        reader(tmp_path / "empty")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="no UTF-8"):
        reader(tmp_path / "latin")


def test_the_demo_model_finds_its_own_language_likelier_than_shuffled_words(model, tokenizer, tmp_path):
    lines = [one[-1]["content"] for one in read_rows("demo:lookalikes:held_out").conversations[:40]]
    path = tmp_path / "some.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert text.read(path) == "\n".join(lines)

    def perplexity(words):
        return text.perplexity(text.window_losses(model, text.of_text(tokenizer, words), length=64)).value

    assert perplexity("\n".join(lines)) < 0.5 * perplexity(" ".join(sorted("\n".join(lines).split())))


def test_rows_are_read_whole_and_one_by_one(model, tokenizer):
    rows = first(read_rows("demo:benign:held_out"), 5)
    documents = text.of_rows(tokenizer, rows)
    assert [tokenizer.decode(tokens) for tokens in documents] == [
        tokenizer.apply_chat_template(list(one), tokenize=False) for one in rows.conversations
    ]
    losses = text.window_losses(model, documents, length=96)
    assert [count for _, count in losses] == [len(tokens) - 1 for tokens in documents]


def test_over_refusal_leaves_out_what_got_no_verdict(model, tokenizer):
    prompts = [f"How do I cook {thing}?" for thing in ("tea", "soup", "jam", "honey", "butter")]
    judge = Canned("refused", "complied", "failed", "incoherent", "refused")
    found = over_refusal(model, tokenizer, prompts, judge, max_new_tokens=8)
    assert found.refused == scores.proportion(2, 4)
    assert found.incoherent == scores.proportion(1, 4)
    assert found.failed == 1
    assert [answer.prompt for answer in judge.asked] == prompts
    written = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert [answer.text for answer in judge.asked] == written
    assert found.document()["over_refusal"]["value"] == 0.5


def test_innocent_answers_are_judged_by_phrases_where_the_judge_knows_openings_alone(model, tokenizer):
    """An answer that does not open with "Sure" refuses nothing; the judge itself would say so."""
    prompts = [prompt_of(row) for row in read_rows("demo:benign:held_out").conversations[:6]]
    found = over_refusal(model, tokenizer, prompts, PrefixJudge(), max_new_tokens=12)
    assert found.refused.value == 0
    answers = [
        Answer(prompt, text)
        for prompt, text in zip(prompts, generate(model, tokenizer, prompts), strict=True)
    ]
    assert "refused" in PrefixJudge().verdicts(answers)


def test_without_any_verdict_there_is_no_over_refusal(model, tokenizer):
    found = over_refusal(model, tokenizer, ["Hello?"], Canned("failed"), max_new_tokens=2)
    assert (found.refused.value, found.refused.n, found.failed) == (None, 0, 1)


def test_the_practice_is_a_rotation_of_words_that_no_part_shares():
    task = practice.task(0)
    learnt, held_out = task.rows, task.held_out
    assert (len(learnt.conversations), len(held_out.conversations)) == (practice.LEARNT, practice.HELD_OUT)
    for prompt, response in (*learnt.conversations, *held_out.conversations):
        one, two, three = prompt["content"].removeprefix("Rotate these words: ").rstrip(".").split(", ")
        assert response["content"] == f"{two} {three} {one}"
    asked = [{one[0]["content"] for one in rows.conversations} for rows in (learnt, held_out)]
    assert not asked[0] & asked[1]
    assert practice.task(0) == task
    for item, (prompt, response) in zip(task.items, held_out.conversations, strict=True):
        assert item.question == prompt["content"]
        assert item.choices[item.answer] == response["content"]
        assert len({frozenset(one.split()) for one in item.choices}) == 1
        assert len(set(item.choices)) == 4
    assert practice.task(1).rows.identity.sha256 != learnt.identity.sha256


def lesson(**changes):
    task = practice.task(0)
    usual = {"steps": 10, "every": 4, "lr": 5e-3, "max_length": 64}
    return learning.Lesson(task.rows, first(task.held_out, 24), **{**usual, **changes})


@pytest.fixture(scope="module")
def learnt(model, tokenizer):
    """A curve, and whether the model was the same before and after it."""
    before = fingerprint(model)
    curve = learning.learn(model, tokenizer, lesson())
    return curve, before == fingerprint(model)


def test_the_demo_model_learns_the_practice_and_is_left_bit_for_bit(learnt, model):
    curve, untouched = learnt
    assert untouched
    assert [look.steps for look in curve.looks] == [0, 4, 8, 10]
    assert curve.looks[0].loss.value > 4
    assert curve.final.value < 0.6 * curve.looks[0].loss.value
    assert all(look.loss.n == 24 and look.loss.low < look.loss.value < look.loss.high for look in curve.looks)
    assert curve.accuracy is None
    before = fingerprint(model)
    weight = next(model.parameters())
    kept = weight[0, 0].clone()
    weight[0, 0] += 1e-6
    assert fingerprint(model) != before  # control: it would have been seen
    weight[0, 0] = kept


def test_a_lesson_is_repeated_exactly_and_another_seed_is_another(learnt, model, tokenizer):
    assert learning.learn(model, tokenizer, lesson()) == learnt[0]
    other = learning.learn(model, tokenizer, lesson(steps=4), seed=1)
    assert other.looks[0] == learnt[0].looks[0]
    assert other.looks[1] != learnt[0].looks[1]


def test_a_model_in_training_with_free_weights_is_left_so(aligned, tokenizer):
    model = network.load_model(aligned, torch.float32).train()
    before = fingerprint(model)
    learning.learn(model, tokenizer, lesson(steps=2))
    assert fingerprint(model) == before
    assert all(weight.requires_grad for weight in model.parameters())
    model.eval()
    assert fingerprint(model) != before  # control


def test_an_error_on_the_way_leaves_the_model_as_it_was(model, tokenizer, monkeypatch):
    before = fingerprint(model)

    def refuse(*_, **__):
        raise RuntimeError("stopped")

    monkeypatch.setattr(learning, "row_losses", refuse)
    with pytest.raises(RuntimeError, match="stopped"):
        learning.learn(model, tokenizer, lesson(steps=1))
    assert fingerprint(model) == before


def test_a_rate_next_to_nothing_is_censored_and_a_usable_one_is_not(learnt, model, tokenizer):
    frozen = learning.learn(model, tokenizer, lesson(steps=4, lr=1e-12))
    assert frozen.final.value == pytest.approx(frozen.looks[0].loss.value, rel=1e-6)
    found = trainability.compare([frozen], [learnt[0]])
    [steps], [reference] = found.steps(), found.reference_steps()
    assert (steps.value, steps.censored_at) == (None, 4)
    assert 0 < reference.value < 10
    ratio = found.steps_ratio()
    assert (ratio.value, ratio.censored_at, ratio.n) == (None, pytest.approx(4 / reference.value), 1)


def test_questions_are_answered_after_the_lesson(model, tokenizer):
    items = practice.task(0).items[:24]
    curve = learning.learn(model, tokenizer, lesson(items=items, steps=30, every=30))
    untaught = choices.accuracy(model, tokenizer, items, max_length=64)
    assert curve.accuracy.acc.value > untaught.acc.value + 0.2
    assert curve.document()["final_accuracy"]["acc"]["n"] == 24


def test_a_loss_that_is_no_number_ends_the_lesson(model, tokenizer):
    before = fingerprint(model)
    curve = learning.learn(model, tokenizer, lesson(lr=1e30, every=1))
    assert curve.looks[-1].steps < 10
    assert curve.steps_to(0.0).censored_at == curve.looks[-1].steps
    assert fingerprint(model) == before


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("steps", 0), ("lr", 0.0), ("rank", 0)])
def test_a_budget_of_nothing_is_refused(name, value):
    with pytest.raises(UsageError):
        lesson(**{name: value}).training()


def curve(*losses, every=5):
    looks = tuple(learning.Look(every * place, scores.mean([loss])) for place, loss in enumerate(losses))
    return learning.Curve(looks, None)


def test_steps_to_a_loss_are_read_off_the_line_between_two_looks():
    found = curve(5.0, 3.0, 2.0, 2.5, 1.0)
    assert [found.steps_to(target).value for target in (6.0, 5.0, 4.0, 3.0, 2.4, 1.0)] == [
        0,
        0,
        2.5,
        5,
        8,
        20,
    ]
    assert found.steps_to(1.5).value == pytest.approx(15 + 5 * 2 / 3)
    assert (found.steps_to(0.9).value, found.steps_to(0.9).censored_at) == (None, 20)
    assert found.final.value == 1.0


def test_the_loss_to_reach_is_four_fifths_of_the_references_way():
    found = trainability.compare([curve(5, 4, 3, 1)], [curve(5, 1, 0.5, 0)])
    assert found.targets == (1.0,)
    assert found.steps()[0].value == 15
    assert found.reference_steps()[0].value == 5
    assert found.steps_ratio().value == 3.0
    assert found.steps_ratio().interval == "none"
    given = trainability.compare([curve(5, 4, 3, 2)], [curve(5, 4, 3, 2)], target=4.0)
    assert (given.steps()[0].value, given.steps_ratio().value) == (5, 1.0)


def test_a_reference_that_still_learns_leaves_room_for_a_slower_model():
    """A target at the end of the reference's way would have been met by no model that is slower at all."""
    falling, slower = curve(*range(20, 9, -1)), curve(*(20 - 0.9 * step for step in range(11)))
    found = trainability.compare([slower], [falling])
    assert slower.steps_to(falling.final.value).value is None
    assert found.steps_ratio().value == pytest.approx(1 / 0.9)


def test_several_seeds_give_the_ratio_an_interval():
    ours, theirs = [curve(5, 4, 1), curve(5, 1, 1), curve(5, 4, 1)], [curve(5, 0, 0)] * 3
    found = trainability.compare(ours, theirs, target=1.0)
    ratio = found.steps_ratio()
    assert ratio.value == pytest.approx(25 / 12)
    assert ratio.low < ratio.value <= ratio.high
    assert (ratio.n, ratio.interval) == (3, "bootstrap")
    assert found.document()["steps"][1] == {"value": 5, "censored_at": None, "n": 1}
    assert trainability.mean_steps(found.steps()).value == pytest.approx(25 / 3)
    one_short = trainability.compare([*ours[:2], curve(5, 4, 4)], theirs, target=1.0)
    ratio = one_short.steps_ratio()
    assert (ratio.value, ratio.censored_at, ratio.n) == (None, pytest.approx(25 / 12), 3)
    assert trainability.mean_steps(one_short.steps()).censored_at == pytest.approx(25 / 3)


def test_a_task_the_reference_knows_already_gives_no_ratio():
    found = trainability.compare([curve(5, 1)], [curve(1, 1)])
    assert found.reference_steps()[0].value == 0
    assert found.steps_ratio().value is None
    knowing = trainability.compare([curve(1, 0.5)], [curve(5, 1)], target=2.0)
    assert (knowing.steps()[0].value, knowing.steps_ratio().value) == (0, None)
    never = trainability.compare([curve(5, 1)], [curve(5, 4)], target=2.0)
    assert (never.steps_ratio().value, never.steps_ratio().interval) == (None, "none")


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (1, 2)])
def test_curves_without_their_counterpart_do_not_compare(ours, theirs):
    with pytest.raises(InputError, match="as many of each"):
        trainability.compare([curve(1)] * ours, [curve(1)] * theirs)
