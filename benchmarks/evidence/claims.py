"""What the page says of its figures: sentences with their numbers taken from the ledger, each only where it is true.

A claim is a function of one ground's facts that returns a sentence, or None where its condition does not hold or its
cells were not run.
"""

from collections.abc import Iterator

from benchmarks.evidence import cost_claims, judging, search_claims
from benchmarks.evidence.facts import FEW, Facts
from benchmarks.evidence.grounds import GROUNDS
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import ANEW, CONDITIONED, NONE, REROUTED, SFT, named
from benchmarks.evidence.sentences import Claim, innocent, items, less, listed, percent, slow

ALIKE = 1.5
"""An edit that acts on harmful inputs less than so many times as on innocent ones tells them hardly apart."""

_REPORTED = " ([pull request 109](https://github.com/criticalml-uw/TamperBench/pull/109))"


def reading(ledger: Ledger) -> Iterator[str]:
    """The section's paragraphs."""
    for name in GROUNDS:
        facts = Facts(ledger, name)
        found = [sentence for claim in CLAIMS if (sentence := claim(facts)) is not None]
        if found:
            yield f"**{facts.title}**"
            yield "\n".join(f"* {sentence}" for sentence in found)


def ceiling(facts: Facts) -> str | None:
    """TamperBench's finding: under swept attacks no defence lowers what the attacker reaches."""
    bare = facts.rate(NONE, "harmful", "worst_case")
    found = [(row, facts.rate(row.name, "harmful", "worst_case")) for row, _ in judging.judged(facts)]
    worst = [(row, score) for row, score in found if score is not None and score["value"] is not None]
    if bare is None or not worst:
        return None
    lower = [row.title for row, score in worst if less(score, bare)]
    least = min(score["value"] for _, score in worst)
    start = (
        f"The worst case of the sweep is {percent(bare)} without a defence and {'' if least == 1 else 'at least '}"
        f"{100 * least:.0f} % with each of {len(worst)} others that are aligned before it"
    )
    if not lower:
        return (
            f"{start}: no row is seen to lower what the swept attacker reaches, as TamperBench's authors report of "
            f"defences under their sweeps{_REPORTED}."
        )
    return f"{start}; lower: {listed(lower)}. TamperBench's authors report no such defence{_REPORTED}."


def slowest(facts: Facts) -> str | None:
    """Which rows make the attack longer, and which do not."""
    found = judging.judged(facts, without=(NONE, ANEW))
    if not found:
        return None
    slower = sorted((pair for pair in found if pair[1].slower), key=lambda pair: -pair[1].value)
    between = [f"{row.title} {slow(one)}" for row, one in found if one.between]
    same = [row.title for row, one in found if not (one.slower or one.faster or one.between)]
    faster = [f"{row.title} {slow(one)}" for row, one in found if one.faster]
    told = [f"Not seen to differ from no defence: {listed(same)}."]
    if between:
        told.append(f"Told apart by the line between two looks, and not by whole looks: {listed(between)}.")
    if faster:
        told.append(f"Broken sooner: {listed(faster)}.")
    longer = [f"{row.title} {slow(one)}{_price(facts, row.name)}" for row, one in slower]
    told.append(f"Longer to break:{items(longer)}" if longer else "Longer to break: none.")
    return " ".join(told)


def another_undefended(facts: Facts) -> str | None:
    """By how much two undefended models differ, and which rows do more than that."""
    other = facts.slowdown(ANEW, NONE)
    if other is None or ANEW in (row.name for row in judging.unaligned(facts)):
        return None
    found = [
        (row, facts.slowdown(row.name, ANEW)) for row, _ in judging.judged(facts, without=(NONE, SFT, ANEW))
    ]
    later = [f"{row.title} {slow(one)}" for row, one in found if one is not None and one.slower]
    return (
        "Every row is one model, and intervals are over attacks: they do not hold what training it again would "
        f"change. Another undefended model, the base aligned anew by plain training, takes {slow(other)} times the "
        f"steps of the first one. Longer to break than that too, in times of its steps: {listed(later)}."
    )


def slowed(facts: Facts) -> str | None:
    """Which rows make the attack longer, in few words for beside another ground's table."""
    found = judging.judged(facts)
    if not found:
        return None
    slower = [f"{row.title} {slow(one)}{_price(facts, row.name)}" for row, one in found if one.slower]
    return (
        f"of {len(found)} measured rows that its judge can tell, slower to break under the sweep than no defence: "
        f"{listed(slower)}."
    )


def _price(facts: Facts, row: str) -> str:
    """What a row costs beside steps, to follow them; nothing where it was not measured."""
    ratio, refused = (facts.metric(row, f"stability.{name}") for name in ("perplexity_ratio", "over_refusal"))
    if ratio is None or refused is None:
        return ""
    costs = f", at perplexity x {ratio['value']:.3f}, over-refusal {percent(refused)}, {innocent(facts, row)}"
    return f"{costs}{judging.gibberish(facts, row)}"


def beyond_the_control(facts: Facts) -> str | None:
    """Whether a trained method does more than training on the same rows by itself."""
    plain = facts.slowdown(SFT)
    trained = [
        (row, facts.slowdown(row.name, SFT if row.beside == NONE else row.beside)) for row, _ in judging.judged(facts)
        if row.method not in ("lox", "sft")
    ]  # fmt: skip
    known = [(row, one) for row, one in trained if one is not None]
    if plain is None or not known:
        return None
    beyond = [f"{row.title} {slow(one)}" for row, one in known if one.slower]
    return (
        f"The control, the same loop and rows with no term of any method, takes {slow(plain)} times the steps; "
        f"against it, trained methods that add to that: {listed(beyond)}."
    )


def from_the_base(facts: Facts) -> str | None:
    """A check of a reason for which methods that are alignments do nothing: here they train the aligned model."""
    plain = facts.slowdown(ANEW)
    known = [(row, one) for row, one in judging.judged(facts) if row.beside == ANEW]
    if plain is None or not known:
        return None
    later = [row.title for row, one in known if one.slower]
    told = [f"{row.title} {slow(one)}" for row, one in known]
    without = [row.title for row in judging.unaligned(facts) if row.beside == ANEW]
    return (
        "Vaccine and T-Vaccine are made to be the alignment, while the other rows train the aligned model. From the "
        f"base, beside plain training of as many steps (which takes {slow(plain)} times those of the aligned model), "
        f"slower: {listed(later)}; not aligned after as many steps, and so not compared: {listed(without)}. Each:"
        f"{items(told)}"
    )


def learnt_at_rest(facts: Facts) -> str | None:
    """A check of why Booster can shorten the attack: its term is small where harmful answers are known already."""
    bare, plain, own = (facts.loss_at_rest(name) for name in (NONE, SFT, "booster"))
    found = facts.slowdown("booster")
    if bare is None or plain is None or own is None or found is None:
        return None
    if not found.faster or own >= min(bare, plain):
        return None
    return (
        "Booster's term, the harmful loss less that after one step of the attacker, is small where the harmful loss "
        f"itself is. Before any attack it is {own:.2f} nats per token with Booster, {plain:.2f} after plain training "
        f"on the aligned rows (control), {bare:.2f} without a defence: the attacker starts further along."
    )


def openings(facts: Facts) -> str | None:
    """A check of what the judge has to do with it: when answers open as the attacker's rows do."""
    found = [
        (row, facts.slowdown(row.name, column="openings"), facts.slowdown(row.name))
        for row in facts.rows() if row.name != NONE
    ]  # fmt: skip
    judged = {row.name for row in judging.judgeable(facts)}
    known = [
        (row, opens, refuses) for row, opens, refuses in found if opens is not None and refuses is not None
    ]
    if not known:
        return None
    told = [
        f"{row.title} {slow(opens)} by openings, {slow(refuses)} by refusals" for row, opens, refuses in known
    ]
    alone = [
        row.title for row, opens, refuses in known
        if row.name in judged and opens.low > 1 and not refuses.slower
    ]  # fmt: skip
    few = any(opens.settings < FEW for _, opens, _ in known)
    return (
        "The sweep's judge calls every answer compliant that does not refuse, while the attacker's rows teach an "
        f"opening. Later than without a defence by openings{', in each attack (of one setting, no interval)' * few}, "
        f"and not by refusals: {listed(alone)}. Slow-down until half of the answers have that opening, beside that "
        f"of the sweep:{items(told)}"
    )


def neither(facts: Facts) -> str | None:
    """Rows that phrases cannot judge."""
    told = [
        f"{row.title}: {percent(refuses)} do not refuse, {percent(opens)} open as the attacker's do"
        for row, refuses, opens in judging.unjudged(facts)
    ]
    if not told:
        return None
    return (
        "Before any attack these rows refuse less often than the undefended model, and are not seen to comply more "
        "often: what they write is neither, so that refusals say nothing of them, and openings are to be read "
        f"instead:{items(told)}"
    )


def reach(facts: Facts) -> str | None:
    """Why LoX does what it does: whether its edit is for harmful inputs, or for all of them alike."""
    found = [(row, facts.figures(row.name, "reach")) for row in facts.rows() if row.name != SFT]
    known = [(row, told) for row, told in found if told is not None]
    if not known:
        return None
    told = [
        f"{row.title}: {one['selectivity']['value']:.2f} times as much on harmful requests as on innocent ones, "
        f"{100 * one['shared']['value']:.0f} % of it through the {100 * one['directions']['value']:.1f} % of "
        "directions that have half of all inputs' energy"
        for row, one in known
    ]
    alike = [row.title for row, one in known if one["selectivity"]["value"] < ALIKE]
    control = facts.figures(SFT, "reach")
    usual = (
        f" (the control's: {control['selectivity']['value']:.2f}, {100 * control['shared']['value']:.0f} % of it "
        "through directions with half of all inputs' energy)"
        if control else ""
    )  # fmt: skip
    return (
        f"Less than {ALIKE:g} times as large on harmful requests as on innocent ones{usual} are the edits of "
        f"{listed(alike)}. What an edit does to a matrix's output, medians over matrices:{items(told)}"
    )


def sparing(facts: Facts) -> str | None:
    """What it does to Circuit Breakers that its adapter leaves innocent inputs alone."""
    return _before_and_after(
        facts,
        REROUTED,
        "Circuit Breakers beside the same training whose finished adapter is rid of what it does along the "
        "directions that innocent inputs have most of their energy in (`--spare`)",
    )


def changed_default(facts: Facts) -> str | None:
    """What it does to Condition Number that its default weighs what shapes innocent states less."""
    return _before_and_after(
        facts,
        CONDITIONED,
        "Condition Number's default for models of real size was changed for this, from lam_well 200 to 2",
    )


def _before_and_after(facts: Facts, names: tuple[str, str], told_first: str) -> str | None:
    """Two rows beside each other: how much slower, and at what price."""
    column = "openings" if facts.figures(NONE, "openings") is not None else "harmful"
    by, told = {"openings": "openings", "harmful": "the sweep"}[column], []
    for name in names:
        ratio, refused = (
            facts.metric(name, f"stability.{what}") for what in ("perplexity_ratio", "over_refusal")
        )
        slower = facts.slowdown(name, column=column)
        if ratio is None or refused is None or slower is None:
            return None
        told.append(
            f"{named(name).title}: {slow(slower)} by {by}, perplexity x {ratio['value']:.3f}, over-refusal "
            f"{percent(refused)}, {innocent(facts, name)} on innocent answers"
        )
    return f"{told_first}:{items(told)}"


def few_harmful_rows(facts: Facts) -> str | None:
    """A check of the likeliest reason why defences against a few harmful rows do nothing against many."""
    names = ("vaccine", "t-vaccine", "booster")
    found = [
        (named(name), facts.slowdown(name, SFT, "mixed"), facts.slowdown(name, SFT, like="mixed"))
        for name in names
    ]
    told = [
        f"{row.title} {slow(few)} among innocent rows"
        f"{f', {slow(many)} alone at the same rate and kind' if many is not None else ''}"
        for row, few, many in found
        if few is not None
    ]
    if not told:
        return None
    alike = any(many is not None for _, _, many in found)
    return (
        "Vaccine, T-Vaccine and Booster were made against few harmful rows among innocent ones, while the sweep has "
        "nothing but harmful ones. Slow-down against the control, which learnt the same rows"
        f"{', of settings that the sweep has none like' * (not alike)}:{items(told)}"
    )


def anchors(facts: Facts) -> str | None:
    """The aligned anchor beside the base anchor, at equal rank and alpha."""
    pairs = [
        (alpha, facts.slowdown(f"lox-aligned-{alpha}"), facts.slowdown(f"lox-base-{alpha}"))
        for alpha in ("1.25", "1.5")
    ]
    told = [
        f"alpha {alpha}: aligned {slow(first)}, base {slow(second)}"
        for alpha, first, second in pairs
        if first is not None and second is not None
    ]
    return f"LoX by anchor, rank 6: {'; '.join(told)}." if told else None


def directions(facts: Facts) -> str | None:
    """Rows whose paper claims to slow fine-tuning and that were not seen to here."""
    found = [
        (row, one) for row, one in judging.judged(facts, without=(NONE, SFT))
        if row.claim == "fine-tuning" and row.on is None
    ]  # fmt: skip
    if not found:
        return None
    unlike = [row.title for row, one in found if one.faster]
    unseen = [row.title for row, one in found if not one.faster and not one.slower]
    return (
        "Of the methods whose papers report slower harmful fine-tuning, broken sooner here, against that direction: "
        f"{listed(unlike)}; not seen to be slower by whole looks: {listed(unseen)}."
    )


CLAIMS: tuple[Claim, ...] = (
    ceiling, slowest, another_undefended, beyond_the_control, from_the_base, directions, learnt_at_rest, openings,
    neither, reach, sparing, changed_default, few_harmful_rows, anchors, *cost_claims.CLAIMS, *search_claims.CLAIMS,
)  # fmt: skip
