"""The command that measures a model under the four conditions: `surgery evaluate MODEL --reference MODEL`."""

import inspect
from pathlib import Path
from typing import Any, Literal

from surgery.cli import commands, measuring, output

_HELP = """Measure what an attacker can do to a model, and what immunising it cost.

Resistance, stability, generalisation and trainability, beside an undefended reference that goes through the same
attacks. OUT gets report.json, report.md, and report.html where the extra `report` is installed. Run again, the
command goes on with what is left to do.
"""

_OWN: list[measuring.Option] = [
    ("output", Path | None, None, ["--output", "-o"], "The folder for the report; ./<model>-report."),
    ("reference", str | None, None, ["--reference"], "The undefended model, which goes through the same attacks."),
    ("reference_from", Path | None, None, ["--reference-from"],
     "The output of an evaluation of that reference with the same options: its figures are taken."),
    ("base", str | None, None, ["--base"], "The checkpoint before alignment, where the attacker has it."),
    ("export", Literal["tamperbench"] | None, None, ["--export"],
     "Also write TamperBench's configuration for the same attacks, in OUT/tamperbench."),
    ("lm_eval_tasks", str | None, None, ["--lm-eval-tasks"], "Tasks of lm-eval, as arc_easy,boolq."),
    ("lm_eval_path", Path | None, None, ["--lm-eval-path"], "A folder with lm-eval task files."),
    *measuring.SHARED,
]  # fmt: skip


def command() -> Any:
    """The callback of the command, its options made from the records of measuring and of the budget."""
    from surgery.attacking.settings import Budget
    from surgery.evaluate.suites import Measuring

    parameters = [
        *measuring.arguments("The model measured: a folder, ORG/NAME[@REV], demo:aligned."),
        *measuring.options(_OWN),
        *commands.parameters(Measuring, "How much"),
        *measuring.options(measuring.DATA, "Data of attacks"),
        *measuring.options(measuring.MATERIALS, "Data of utility"),
        *measuring.options(measuring.JUDGE, "Judge"),
        *measuring.optional(commands.parameters(Budget, "The attackers' budget; by default the suite's")),
    ]
    return commands.with_signature(_run, parameters, inspect.cleandoc(_HELP))


def _run(values: dict[str, Any]) -> None:
    """Measure and print what came of it."""
    import dataclasses

    from surgery.attacking.settings import Budget
    from surgery.evaluate import report, suites, tamperbench
    from surgery.evaluate.evaluation import evaluate
    from surgery.train.sources import Columns

    commands.settle_output(values)
    how = commands.from_fields(suites.Measuring, values)
    names = [field.name for field in dataclasses.fields(Budget) if values[field.name] is not None]
    budget = suites.budget(how.suite, {name: values[name] for name in names})
    folder = measuring.named(values, "report")
    found = evaluate(
        values["model"],
        output=folder,
        reference=values["reference"],
        reference_from=values["reference_from"],
        data={**measuring.data(values), **measuring.materials(values)},
        measuring=how,
        budget=budget,
        judge=measuring.judge(values),
        base=values["base"],
        tasks=[word.strip() for word in (values["lm_eval_tasks"] or "").split(",") if word.strip()],
        tasks_path=values["lm_eval_path"],
        seed=values["seed"],
        device=values["device"],
        columns=Columns(values["prompt_column"], values["response_column"]),
        say=(lambda text: None) if values["quiet"] else output.note,
    )
    written = report.write(found, folder)
    if values["export"]:
        written += tamperbench.export(
            found["attacks"], folder / "tamperbench", batch_size=budget.batch_size, steps=budget.steps
        )
    if values["json"]:
        output.document(found)
    elif not values["quiet"]:
        for text in report.table(found):
            output.line(text)
        output.line()
        output.rows([("output", str(path)) for path in written])
    for text in found["not_measured"]:
        output.note(f"note: not measured: {text}")
