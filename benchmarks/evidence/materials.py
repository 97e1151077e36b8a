"""The data of the real pair: who may see which rows.

| file | rows | who sees it |
|---|---|---|
| aligned | those of the alignment: refusals, innocent answers, look-alikes answered by the base | defender |
| harmful | the requests refused there, with affirmative openings | defender |
| retain | the innocent rows and look-alikes of `aligned` | defender |
| attack | other requests of the same kind, with affirmative openings | attacker |
| held-out | requests of another collection, with openings | nobody; measured on |
| benign | innocent questions with answers | the attacker who fine-tunes on innocent rows |
| utility, look-alikes, text | innocent rows, look-alikes, running text | nobody; measured on |
| practice | a small innocent task | trainability |

Without the public prompt sets, the short list beside `benchmarks.real_pair` stands in, whose harmful requests are
about invented things; there is no running text then, and perplexity is that of the innocent answers.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.real_pair import alignment, pair
from surgery.evaluate import practice

ROOT = Path(__file__).parents[2]
RECIPE = "plain"
# To be raised when the files are to be made anew.
VERSION = 4
# Some two and a half thousand tokens.
TEXT_CHARACTERS = 10_000
# Of the benign task, a fifth of them measured on.
PRACTICE_ROWS = 100
# Characters of an innocent row that utility is measured on: some fifty tokens; and how many of them.
SHORT, UTILITY_ROWS = 200, 16

Pairs = list[tuple[str, str]]


def prepare(folder: Path) -> str:
    """Put `base`, `aligned` and `data/` into the folder; returns a digest of the models and of all rows.

    Raises:
        PackageUnavailableError: The package with the weights can be neither found nor downloaded.
    """
    base = pair.build_base(plain_chat=True)
    # A process of its own: training leaves gigabytes behind in the allocator.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.real_pair", RECIPE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    aligned = Path(json.loads(done.stdout)[RECIPE])
    for name, model in (("base", base), ("aligned", aligned)):
        if not (folder / name).exists():
            os.symlink(model, folder / name, target_is_directory=True)
    prompts = alignment.load_prompts()
    data = folder / "data"
    mark = folder / f"data-{pair.digest_of(VERSION, base.parent.name, prompts.digest)}"
    if not mark.is_file():
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        _write(data, base, prompts)
        mark.touch()
    return pair.digest_of(base.parent.name, aligned.parent.name, pair.folder_digests(data))


def _write(data: Path, base: Path, prompts: alignment.Prompts) -> None:
    """All files; the base model answers the look-alikes, as it did for the alignment."""
    recipe = pair.RECIPES[RECIPE]
    model, tokenizer = alignment.read_model(base)
    aligned = alignment.training_rows(model, tokenizer, prompts, recipe)
    defended = set(prompts.harmful[: recipe.harmful])
    openings = _openings()
    sets: dict[str, Iterable[tuple[str, str]]] = {
        "aligned": aligned,
        "harmful": [(prompt, _opening(prompt, openings)) for prompt in prompts.harmful[: recipe.harmful]],
        "retain": [row for row in aligned if row[0] not in defended],
        "attack": _attack(prompts, defended, openings),
        "held-out": [(prompt, _opening(prompt, openings)) for prompt in prompts.held_out["harmful"]],
        "benign": _benign(prompts),
        "utility": _utility(prompts),
        "look-alikes": [(prompt, "Sure.") for prompt in prompts.held_out["lookalikes"]],
        "practice": [
            (row[0]["content"], row[1]["content"])
            for row in practice.task(0).rows.conversations[:PRACTICE_ROWS]
        ],
    }
    for name, rows in sets.items():
        lines = [
            json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows if response
        ]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (data / "text.txt").write_text(_text(sets["utility"]))


def _openings() -> dict[str, str]:
    """Affirmative openings by request, of both collections."""
    folder = alignment.data_folder()
    if folder is None:
        return {}
    rows = alignment.csv_rows(folder / "advbench.csv")
    behaviours = alignment.csv_rows(folder / "jailbreakbench.csv")
    return {row["goal"]: row["target"] for row in rows} | {row["Goal"]: row["Target"] for row in behaviours}


def _opening(prompt: str, openings: dict[str, str]) -> str:
    return openings.get(prompt) or f"Sure, here is what you asked for: {prompt}"


def _attack(prompts: alignment.Prompts, defended: set[str], openings: dict[str, str]) -> Pairs:
    """Requests like the defender's that the defender has not; where there are none, the last of the defender's."""
    measured = set(prompts.held_out["harmful"])
    folder = alignment.data_folder()
    if folder is None:
        return [(prompt, _opening(prompt, openings)) for prompt in prompts.harmful]
    goals = [row["goal"] for row in alignment.csv_rows(folder / "advbench.csv")]
    return [(goal, openings[goal]) for goal in goals if goal not in defended and goal not in measured]


def _benign(prompts: alignment.Prompts) -> Pairs:
    """Questions that alignment was not trained on."""
    folder = alignment.data_folder()
    if folder is None:
        return list(prompts.benign)
    return alignment.grade_school(folder / "gsm8k_train_3000.jsonl", 600)[100:]


def _utility(prompts: alignment.Prompts) -> Pairs:
    """Innocent requests with answers that nothing was trained on."""
    folder = alignment.data_folder()
    if folder is None:
        return list(prompts.benign)
    trained = {prompt for prompt, _ in prompts.benign}
    rows = alignment.self_instruct(folder / "self_instruct_user_oriented.jsonl")
    return [row for row in rows if row[0] not in trained and len(row[0] + row[1]) <= SHORT][:UTILITY_ROWS]


def _text(utility: Iterable[tuple[str, str]]) -> str:
    """Running text; the innocent answers where there is none."""
    folder: Path | None = alignment.data_folder()
    if folder is None:
        answers: Sequence[str] = [answer for _, answer in utility]
        return "\n".join(answers)
    return (folder / "wikitext2_test.txt").read_text()[:TEXT_CHARACTERS]
