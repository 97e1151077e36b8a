"""What the page says of the searches by a short attack, each sentence only where it is true."""

from benchmarks.evidence import searching
from benchmarks.evidence.facts import Facts
from benchmarks.evidence.rows import named
from benchmarks.evidence.sentences import Claim, items, listed


def places(facts: Facts) -> str | None:
    """Where in the model LoX does what it does, by the search's short attack."""
    alone = [trial for trial in facts.searched if _place(trial)]
    if not alone or not searching.has_unedited(facts.searched):
        return None
    bare = searching.unedited(facts.searched)
    if not _telling(facts):
        return (
            f"The search's short attack breaks every setting at the same look ({searching.told(bare)} unedited): "
            "it tells none apart, and the best of the search is the one with the highest harmful loss among those "
            "within the bounds."
        )
    parts = [f"{searching.setting(trial)}: {searching.told(trial)}" for trial in alone]
    sooner = [_place(trial) for trial in alone if searching.steps(trial) < searching.steps(bare)]
    return (
        f"With LoX on one part alone, broken sooner than unedited ({searching.told(bare)}): {listed(sooner)}. By the "
        f"search's short attack:{items(parts)}"
    )


def _telling(facts: Facts) -> bool:
    """Whether the search's short attack breaks some setting at another look than the others."""
    return len({searching.steps(trial) for trial in facts.searched}) > 1


def _place(trial: searching.Trial) -> str:
    """The one part of the model that a trial edits; empty where it edits all or by depth."""
    params = trial["params"]
    layers = params.get("layers")
    return f"layers {layers}" if layers else str(params.get("include") or "")


def depth(facts: Facts) -> str | None:
    """The early layers alone beside all of them, at equal rank and alpha."""
    if not _telling(facts):
        return None
    told = []
    for trial in facts.searched:
        params = trial["params"]
        whole = searching.trial_of(facts.searched, rank=params["rank"], alpha=params["alpha"])
        if params.get("depth") and whole is not None:
            told.append(
                f"alpha {params['alpha']:g}, depth {params['depth']}: {searching.told(trial)}, all layers "
                f"{searching.told(whole)}"
            )
    return f"LoX by depth, rank 6, by the search's short attack:{items(told)}" if told else None


def other_deltas(facts: Facts) -> str | None:
    """What LoX does where another delta takes the place of `aligned - base`, by the search that has such bases."""
    found = facts.searched
    others = [trial for trial in found if "base" in trial["params"]]
    plain = [trial for trial in found if trial not in others]
    if not others or not plain:
        return None
    try:
        usual = searching.best(plain)
    except searching.NothingChosenError:
        return None
    later = [
        searching.setting(trial)
        for trial in searching.affordable(found)
        if "base" in trial["params"] and searching.steps(trial) > searching.steps(usual)
    ]
    told = [f"{searching.setting(trial)}: {searching.told(trial)}" for trial in others]
    return (
        "Another delta in place of `aligned - base`, beside LoX as it is, by the "
        f"search (unedited: {searching.told(searching.unedited(plain))}; the slowest of LoX within the "
        f"bounds: {searching.setting(usual)}, {searching.told(usual)}). Slower within the bounds: {listed(later)}. "
        f"All of them:{items(told)}"
    )


def strength(facts: Facts) -> str | None:
    """Whether a trained method does more at another strength: the latest break among the settings tried."""
    told, none = [], []
    for name, search in facts.ground.searches.items():
        found = facts.trials(name) if search.method != "lox" else []
        if not found or not searching.has_unedited(facts.searched):
            continue
        last, title = max(found, key=searching.steps), named(search.method).title
        bare = searching.steps(searching.unedited(facts.searched))
        told.append(f"{title}: {searching.told(last)} (of {len(found)})")
        if searching.steps(last) <= bare:
            none.append(title)
    if not told:
        return None
    return (
        "At none of the settings of its strength that were tried broken a look later than undefended: "
        f"{listed(none)}. The latest break over settings, by the search's short attack (undefended: "
        f"{searching.told(searching.unedited(facts.searched))}):{items(told)}"
    )


CLAIMS: tuple[Claim, ...] = (places, depth, other_deltas, strength)
