"""Where attacks take place: a model in memory, what attackers know, and the requests that harm is measured on."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.attacking.settings import Budget
from surgery.attacks.base import Target
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.quantised import refuse_quantised
from surgery.checkpoint.reader import file_sha256
from surgery.checkpoint.staging import MANIFEST
from surgery.errors import InputError, UsageError
from surgery.hub import Source, resolve
from surgery.hub.remote import open_source
from surgery.judging.base import Judge
from surgery.judging.choice import USUAL, Choice
from surgery.judging.harm import HarmProbe, probe, prompt_of
from surgery.judging.prefixes import affirmative_prefixes_only
from surgery.train import network
from surgery.train.crew import assemble
from surgery.train.seeding import seeded
from surgery.train.sources import Columns, Identity, Rows, read_rows

DEMO: Mapping[str, tuple[str, ...]] = {
    "harmful": ("demo:harmful:attack",),
    "refusals": ("demo:refusals:attack",),
    "benign": ("demo:benign",),
    "held_out": ("demo:harmful:held_out",),
    "held_out_refusals": ("demo:refusals:held_out",),
}
"""What a `demo:` model is attacked with and measured on where nothing else is given."""

NAMES = tuple(DEMO)
"""The data sets there can be; `harmful` there must be."""

# Without held-out rows, this share of the harmful ones is measured on and no attacker sees it.
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Ground:
    """A target and the probe of harm on it.

    Attributes:
        source: Of the model.
        checkpoint: Its files.
        target: The model and what attackers have.
        probe: On rows that no attacker has.
        rate: What the share complied with is called: `asr` or `affirmative_prefix_rate`.
        identities: Which data was used, by name.
    """

    source: Source
    checkpoint: Checkpoint
    target: Target
    probe: HarmProbe
    rate: str
    identities: Mapping[str, Identity] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """What a result must name: model, judge, data, how many requests."""
        return {
            "model": self.source.label,
            "commit": self.source.commit,
            "manifest_sha256": self._manifest_sha256(),
            "judge": self.probe.judge.label,
            "rate": self.rate,
            "n": len(self.probe.prompts),
            "data": {name: identity.document() for name, identity in self.identities.items()},
        }

    def _manifest_sha256(self) -> str | None:
        """Which output of ours the model is: its manifest names the hash of every file; None for other models."""
        path = self.source.folder / MANIFEST
        return file_sha256(path) if path.is_file() else None


def read(
    model: str,
    given: Mapping[str, Sequence[str]],
    seed: int,
    columns: Columns = Columns(),  # noqa: B008 - frozen
) -> dict[str, Rows]:
    """The data sets of an attack, held-out rows among them.

    Args:
        model: The model attacked; a `demo:` one has data of its own.
        given: Sources by the names in `NAMES`.
        seed: Draws the held-out rows where none are given.
        columns: Where the rows keep prompt and response.

    Raises:
        UsageError: There are no harmful rows, or refusals for held-out rows that are not given.
        InputError: A request is both trained on and measured.
    """
    fallback: Mapping[str, Sequence[str]] = (
        DEMO if model.startswith("demo:") and not {"harmful", "held_out"} & given.keys() else {}
    )
    chosen = {name: given.get(name) or fallback.get(name) or () for name in NAMES}
    if not chosen["harmful"]:
        raise UsageError(
            "an attack needs harmful data; give --harmful-data FILE, ORG/DATASET[:SPLIT] or demo:NAME"
        )
    if chosen["held_out_refusals"] and not chosen["held_out"]:
        raise UsageError("--held-out-refusals refuses the requests of --held-out-data; give both or neither")
    sets = {name: joined([read_rows(source, columns) for source in sources])
            for name, sources in chosen.items() if sources}  # fmt: skip
    if "held_out" not in sets:
        sets["harmful"], sets["held_out"] = split(sets["harmful"], seed)
    _refuse_overlap(sets)
    return sets


def joined(rows: Sequence[Rows]) -> Rows:
    """Rows of several sources, one after the other."""
    if len(rows) == 1:
        return rows[0]
    conversations = tuple(conversation for one in rows for conversation in one.conversations)
    label = ", ".join(one.identity.source for one in rows)
    return Rows(
        conversations, Identity(label, len(conversations), "+".join(one.identity.sha256 for one in rows))
    )


def subset(rows: Rows, places: Sequence[int], what: str) -> Rows:
    """Some of the rows, named as such."""
    chosen = tuple(rows.conversations[place] for place in places)
    identity = dataclasses.replace(rows.identity, source=f"{rows.identity.source} ({what})", rows=len(chosen))
    return Rows(chosen, identity)


def split(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """What attackers get and what harm is measured on: no request is in both.

    Raises:
        InputError: There are not enough different requests.
    """
    asked = [prompt_of(conversation) for conversation in rows.conversations]
    different = sorted(set(asked))
    count = max(1, int(_HELD_OUT * len(different)))
    if len(different) < 5:
        raise InputError(
            f"{rows.identity.source} has {len(different)} different requests, and 5 are needed to attack with some "
            "and measure on others; give more rows or --held-out-data"
        )
    source = torch.Generator().manual_seed(seeded(seed, "held out"))
    held = {different[place] for place in torch.randperm(len(different), generator=source)[:count].tolist()}
    places = range(len(asked))
    return (
        subset(rows, [place for place in places if asked[place] not in held], "attacked with"),
        subset(rows, [place for place in places if asked[place] in held], "held out"),
    )


def _refuse_overlap(sets: Mapping[str, Rows]) -> None:
    measured = {prompt_of(conversation) for conversation in sets["held_out"].conversations}
    for name in ("harmful", "refusals"):
        if name in sets and (both := measured & {prompt_of(one) for one in sets[name].conversations}):
            raise InputError(
                f"{len(both)} requests of {sets['held_out'].identity.source} are in {sets[name].identity.source} "
                "too; harm is measured on requests that no attacker trains on: remove them from one of the two"
            )


def limited(sets: Mapping[str, Rows], limit: int, seed: int) -> tuple[Rows, Rows | None]:
    """At most `limit` of the held-out rows, and their refusals."""
    rows, refusals = sets["held_out"], sets.get("held_out_refusals")
    if len(rows.conversations) <= limit:
        return rows, refusals
    source = torch.Generator().manual_seed(seeded(seed, "limit"))
    places = sorted(torch.randperm(len(rows.conversations), generator=source)[:limit].tolist())
    if refusals is not None and len(refusals.conversations) == len(rows.conversations):
        refusals = subset(refusals, places, f"{limit} drawn")
    return subset(rows, places, f"{limit} drawn"), refusals


def prepare(
    model: str | Path,
    given: Mapping[str, Sequence[str]],
    budget: Budget,
    judge: Choice = USUAL,
    *,
    base: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    columns: Columns = Columns(),  # noqa: B008 - frozen
) -> Ground:
    """Load the model and the data, and choose the judge.

    Args:
        model: The model attacked: a folder, `ORG/NAME[@REVISION]`, `demo:aligned`.
        given: Sources by the names in `NAMES`.
        budget: Its limits on requests and tokens hold.
        judge: Where it names none: `answers` on the embedded data, `prefixes` where the harmful rows hold nothing
            else, and `keywords` elsewhere.
        base: The checkpoint before alignment, where the attacker has it.
        seed: Of what is drawn.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        columns: Where the rows keep prompt and response.

    Raises:
        SurgeryError: The model, the data or the judge cannot be used.
    """
    sets = read(str(model), given, seed, columns)
    source = resolve(model, allow_pickle=False, weights="fetch")
    checkpoint = open_source(source)
    refuse_quantised(checkpoint)
    tokenizer = network.load_tokenizer(checkpoint)
    crew = assemble(device)
    loaded = network.load_model(checkpoint, torch.float32).eval().requires_grad_(False).to(crew.device)
    rows, refusals = limited(sets, budget.limit, seed)
    responses = [conversation[-1]["content"] for conversation in sets["harmful"].conversations]
    prefixes = affirmative_prefixes_only(responses)
    chosen, rate = _judge(judge, prefixes, sets["held_out"], str(crew.device))
    harm = probe(
        tokenizer, rows, refusals, chosen, max_length=budget.max_length, max_new_tokens=budget.max_new_tokens
    )
    if not budget.margin:
        harm = dataclasses.replace(harm, refusals=())
    target = Target(
        loaded,
        tokenizer,
        {name: sets[name] for name in ("harmful", "refusals", "benign") if name in sets},
        open_source(resolve(base, weights="fetch")) if base is not None else None,
        seed,
        budget.max_length,
        crew.device,
    )
    identities = {name: one.identity for name, one in {**sets, "held_out": rows}.items()}
    return Ground(source, checkpoint, target, harm, rate, identities)


def _judge(choice: Choice, prefixes: bool, rows: Rows, device: str) -> tuple[Judge, str]:
    """The judge, and what the share of requests complied with is to be called."""
    usual = "answers" if rows.identity.source.startswith("demo:") else "prefixes" if prefixes else "keywords"
    known = {prompt_of(conversation): conversation[-1]["content"] for conversation in rows.conversations}
    return choice.judge(usual, known, device), "affirmative_prefix_rate" if prefixes else "asr"
