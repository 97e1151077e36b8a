"""What the page of the evidence study says of its figures turns with them."""

import math

import pytest
from ledgers import LOX, done, evaluated, filled, harmful, mean, put, searched, share, swept, trial

from benchmarks.evidence import claims, cost_claims, page, plot, search_claims, sentences
from benchmarks.evidence.facts import Facts
from benchmarks.evidence.grounds import DEMO, GROUNDS, REAL, SEARCH
from benchmarks.evidence.keys import BUILD
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import ANEW, CONDITIONED, NONE, REROUTED, SFT, named
from surgery.scores import proportion


@pytest.fixture
def ledger(tmp_path):
    return filled(tmp_path / "evidence.json")


def test_claims_say_what_the_figures_say(ledger):
    found = Facts(ledger, "demo")
    assert "no row is seen to lower" in claims.ceiling(found)
    assert "LoX" in claims.slowest(found)
    slower = f"{named(LOX).title} {sentences.slow(found.slowdown(LOX))}, at perplexity x "
    assert slower in claims.slowest(found)
    assert "; before any attack" not in claims.slowest(found)
    assert "over-refusal 0 %, KL 0.02 nats." in claims.slowed(found)
    unattacked = ledger.cell("demo", LOX, "harmful")["figures"]["unattacked"]
    unattacked["incoherent"] = share(0.1)
    assert "; before any attack" not in claims.slowest(Facts(ledger, "demo"))
    unattacked["incoherent"] = share(0.75)
    told = claims.slowest(Facts(ledger, "demo"))
    assert "; before any attack 75 % of its answers to harmful requests are gibberish" in told
    assert "| 75 % (65 to 85) |" in page.page(ledger)
    assert "missed" in cost_claims.aim(found)
    assert "above that, by the point: none" in cost_claims.over_refusal(found)
    assert claims.anchors(found) is None


def test_a_reason_is_held_against_its_check(ledger):
    assert claims.few_harmful_rows(Facts(ledger, "demo")) is None
    for row, steps in ((SFT, 4), ("vaccine", 16)):
        put(ledger, row, "mixed", done(harmful([trial(steps)])))
    put(ledger, "vaccine", "harmful", done(harmful([trial(4)])))
    told = claims.few_harmful_rows(Facts(ledger, "demo"))
    assert "Vaccine 4.00 (n 1) among innocent rows, 1.00 (n 1) alone" in told


def test_an_alignment_of_the_base_is_held_against_the_plain_one(ledger):
    assert claims.from_the_base(Facts(ledger, "demo")) is None
    for row, steps in ((ANEW, 8), ("vaccine-anew", 8), ("t-vaccine-anew", 32)):
        put(ledger, row, "harmful", done(harmful(swept(steps))))
    found = Facts(ledger, "demo")
    told = claims.from_the_base(found)
    assert f"slower: {named('t-vaccine-anew').title}; not aligned after as many steps" in told
    assert f"{named('vaccine-anew').title} 1.00 (1.00 to 1.00, n 9)" in told
    assert ", beside plain alignment of the base (control) |" in page.page(ledger)
    assert found.slowdown("vaccine-anew", NONE).value > 1
    assert f"add to that: {named('t-vaccine-anew').title} 4.00" in claims.beyond_the_control(found)
    assert claims.from_the_base(Facts(ledger, "real")) is None
    at_rest = harmful([trial(1)])
    at_rest["unattacked"][at_rest["rate"]] = share(0.9, 40)
    put(ledger, "t-vaccine-anew", "harmful", done(at_rest))
    told = claims.from_the_base(Facts(ledger, "demo"))
    assert f"and so not compared: {named('t-vaccine-anew').title}. Each:" in told
    assert "slower: none;" in told
    assert named("t-vaccine-anew").title not in claims.slowest(Facts(ledger, "demo"))


def test_what_openings_say_is_held_against_what_refusals_say(ledger):
    assert claims.openings(Facts(ledger, "real")) is None
    for row, refusals, opens in ((NONE, 4, 4), (LOX, 4, 8), ("lox-base-1.5", 4, 4)):
        put(ledger, row, "harmful", done(harmful([trial(refusals)])), REAL)
        put(ledger, row, "openings", done(harmful([trial(opens)])), REAL)
    told = claims.openings(Facts(ledger, "real"))
    assert "LoX, rank 6, alpha 1.5, aligned anchor 2.00 (n 1) by openings, 1.00 (n 1) by refusals" in told
    assert "and not by refusals: LoX, rank 6, alpha 1.5, aligned anchor. Slow-down" in told
    assert claims.openings(Facts(ledger, "demo")) is None


def test_claims_turn_with_the_figures(ledger):
    cells = ledger.ground("demo")["rows"][LOX]
    cells["harmful"]["figures"] = harmful(swept(32), 0.3)
    cells["evaluate"]["figures"] = evaluated(over_refusal=0.5)
    found = Facts(ledger, "demo")
    assert "; lower: LoX" in claims.ceiling(found)
    assert "50 %" in cost_claims.over_refusal(found)
    assert "the slowest to break is Plain fine-tuning" in cost_claims.aim(found)


def test_an_aim_that_is_reached_is_said_to_be(ledger):
    cells = ledger.ground("demo")["rows"][LOX]
    cells["harmful"]["figures"] = harmful(swept(32))
    told = cost_claims.aim(Facts(ledger, "demo"))
    assert "is reached by: LoX" in told
    assert "(KL 0.02 nats); by the whole interval" in told
    cells["harmful"]["figures"]["unattacked"]["incoherent"] = share(0.3)
    told = cost_claims.aim(Facts(ledger, "demo"))
    assert "(KL 0.02 nats; before any attack 30 % of its answers to harmful requests are gibberish)" in told


def test_nothing_is_claimed_of_an_empty_ledger(tmp_path):
    empty = Ledger(tmp_path / "none.json")
    for ground in GROUNDS:
        assert [claim for claim in claims.CLAIMS if claim(Facts(empty, ground)) is not None] == []
    assert "*not run*" in page.page(empty)


def test_other_deltas_are_held_against_the_slowest_of_lox_as_it_is(ledger):
    assert search_claims.other_deltas(Facts(ledger, "real")) is None
    plain = [searched(6, 0.0, 6), searched(6, 1.5, 12), searched(6, 3.0, 30, perplexity=1.5)]
    others = [
        searched(6, 4.0, 15, base="cleaned"),
        searched(6, 8.0, 40, perplexity=1.1, base="cleaned"),
        searched(6, 2.0, 12, base="falling"),
    ]
    put(ledger, SEARCH, "search-0", done({"judge": "x", "trials": plain}), REAL)
    assert search_claims.other_deltas(Facts(ledger, "real")) is None
    put(ledger, SEARCH, "search-1", done({"judge": "x", "trials": others}), REAL)
    told = search_claims.other_deltas(Facts(ledger, "real"))
    assert "the slowest of LoX within the bounds: rank 6, alpha 1.5, 12 steps" in told
    assert "Slower within the bounds: rank 6, alpha 4.0, base cleaned. All of them:\n  * " in told


def test_an_edit_that_is_for_every_request_alike_is_said_to_be(ledger):
    assert claims.reach(Facts(ledger, "real")) is None

    def told(selectivity):
        figures = {"selectivity": selectivity, "shared": 0.9, "directions": 0.01, "change": 0.02}
        return done({name: {"value": value, "low": None} for name, value in figures.items()} | {"n": 3})

    for row, selectivity in ((LOX, 1.2), ("lox-base-1.5", 4.0)):
        put(ledger, row, BUILD, done({}), REAL)
        put(ledger, row, "reach", told(selectivity), REAL)
    found = claims.reach(Facts(ledger, "real"))
    assert "1.20 times as much on harmful requests as on innocent ones, 90 % of it through the 1.0 %" in found
    assert "are the edits of LoX, rank 6, alpha 1.5, aligned anchor. What" in found
    assert "| 2.0e-02 | 4.00 | 0.90 | 0.010 |" in page.page(ledger)


def test_the_price_of_the_same_training_at_other_seeds_is_told_beside_its_own(ledger):
    assert cost_claims.seeds(Facts(ledger, "demo")) is None
    put(ledger, "mlac", "evaluate", done(evaluated(over_refusal=0.25, perplexity=1.02)))
    assert cost_claims.seeds(Facts(ledger, "demo")) is None
    others = {"1": evaluated(over_refusal=0.0)["metrics"], "2": evaluated(perplexity=1.1)["metrics"]}
    put(ledger, "mlac", "seeds", done(others))
    told = cost_claims.seeds(Facts(ledger, "demo"))
    assert "again, at seeds 1 and 2;" in told
    assert (
        "MLAC (bounded) over-refusal 25 %, 0 % and 0 %, perplexity x 1.020, 1.000 and 1.100, KL 0.02, 0.02 and 0.02."
        in told
    )


@pytest.mark.parametrize(("ground", "column"), [(REAL, "openings"), (DEMO, "harmful")])
@pytest.mark.parametrize(
    ("claim", "names"), [(claims.sparing, REROUTED), (claims.changed_default, CONDITIONED)]
)
def test_what_holding_a_method_back_does_is_told_before_and_after(ledger, ground, column, claim, names):
    for row, steps, perplexity in ((NONE, 4, 1.0), (names[0], 16, 1.1), (names[1], 8, 1.01)):
        assert claim(Facts(ledger, ground.name)) is None
        put(ledger, row, column, done(harmful([trial(steps)])), ground)
        put(ledger, row, "evaluate", done(evaluated(0.25, perplexity)), ground)
    told = claim(Facts(ledger, ground.name))
    how = {"openings": "openings", "harmful": "the sweep"}[column]
    before, after = (named(name).title for name in names)
    assert f"{before}: 4.00 (n 1) by {how}, perplexity x 1.100, over-refusal 25 %, KL 0.02 nats on" in told
    assert f"{after}: 2.00 (n 1) by {how}, perplexity x 1.010" in told


def test_shares_are_told_apart_by_the_interval_of_their_difference():
    """Newcombe's own example, 56 of 70 against 48 of 80: from 0.0524 to 0.3339."""
    more, fewer, near = (proportion(*counts).document() for counts in ((56, 70), (48, 80), (54, 80)))
    assert sentences.less(fewer, more)
    assert not sentences.less(more, fewer)
    assert fewer["high"] > more["low"]  # intervals overlap, and yet they differ
    ends = math.hypot(more["value"] - more["low"], fewer["high"] - fewer["value"])
    assert more["value"] - fewer["value"] - ends == pytest.approx(0.0524, abs=5e-5)
    assert not sentences.less(near, more)


def test_a_model_that_neither_refuses_nor_complies_is_not_called_broken(ledger):
    def before(value):
        return {"unattacked": {"asr": share(value, 32)}}

    for row, refusals, opens in ((NONE, 0.1, 0.1), (LOX, 0.8, 0.1), ("lox-base-1.5", 0.4, 0.4)):
        put(ledger, row, "harmful", done(harmful([trial(4)]) | before(refusals)), REAL)
        put(ledger, row, "benign", done(harmful([trial(None)], refusals) | before(refusals)), REAL)
        put(ledger, row, "openings", done(harmful([trial(4)]) | before(opens)), REAL)
    told = claims.neither(Facts(ledger, "real"))
    assert told.endswith(
        "LoX, rank 6, alpha 1.5, aligned anchor: 80 % do not refuse, 10 % open as the attacker's do"
    )
    assert "LoX" not in claims.slowest(Facts(ledger, "real")).replace(
        "LoX, rank 6, alpha 1.5, base anchor", ""
    )
    assert [title for title, *_ in plot.points(ledger)["real"]] == ["LoX, rank 6, alpha 1.5, base anchor"]
    told = cost_claims.benign(Facts(ledger, "real"))
    assert told.endswith("to less with none; to more with LoX, rank 6, alpha 1.5, base anchor 40 %.")
    assert claims.neither(Facts(ledger, "demo")) is None


def test_what_neither_refuses_nor_complies_is_known_by_any_attack_of_that_judge(ledger):
    for row, refusals in ((NONE, 0.1), (LOX, 0.8)):
        for column, rate in (("benign", refusals), ("openings", 0.1)):
            told = {"unattacked": {"asr": share(rate, 32)}}
            put(ledger, row, column, done(harmful([trial(4)]) | told), REAL)
    assert "80 % do not refuse" in claims.neither(Facts(ledger, "real"))


def test_the_aim_is_told_by_openings_where_they_are_measured(ledger):
    assert cost_claims.aim_by_openings(Facts(ledger, "demo")) is None
    for row, opens in ((NONE, 4), (LOX, 16)):
        put(ledger, row, "openings", done(harmful([trial(opens, seed=seed) for seed in (0, 1)])), REAL)
        put(ledger, row, "evaluate", done(evaluated()), REAL)
    told = cost_claims.aim_by_openings(Facts(ledger, "real"))
    assert told.startswith("By openings, within perplexity +2 %")
    title = named(LOX).title
    assert f"reached by: {title} (KL 0.02 nats). Perplexity is" in told
    put(ledger, LOX, "evaluate", done(evaluated(perplexity=1.5)), REAL)
    assert "there is no measured row" in cost_claims.aim_by_openings(Facts(ledger, "real"))


def test_rows_are_held_against_another_undefended_model_too(ledger):
    assert claims.another_undefended(Facts(ledger, "demo")) is None
    alike = ledger.cell("demo", NONE, "harmful")["figures"]
    for other, later in ((alike, named(LOX).title), (harmful(swept(16)), "none")):
        put(ledger, ANEW, "harmful", done(other))
        told = claims.another_undefended(Facts(ledger, "demo"))
        assert f"in times of its steps: {later}" in told
    assert named(ANEW).title not in claims.slowest(Facts(ledger, "demo"))


def test_what_a_few_harmful_rows_do_is_held_against_the_same_attack_without_innocent_ones(ledger):
    put(ledger, SFT, "mixed", done(harmful([trial(4)])))
    put(ledger, "booster", "mixed", done(harmful([trial(16)])))
    told = [trial(8), *(one for one in swept(4) if one["kind"] == "full")]
    put(ledger, "booster", "harmful", done(harmful(told)))
    found = claims.few_harmful_rows(Facts(ledger, "demo"))
    assert "Booster 4.00 (n 1) among innocent rows, 2.00 (n 1) alone at the same rate and kind" in found
    put(ledger, "booster", "harmful", done(harmful(told[1:])))
    found = claims.few_harmful_rows(Facts(ledger, "demo"))
    assert found.endswith("Booster 4.00 (n 1) among innocent rows")


def test_booster_that_shortens_the_attack_is_asked_what_it_knew_before(ledger):
    def attacked(steps, loss):
        told = harmful(swept(steps))
        told["unattacked"]["harmful_loss"] = mean(loss)
        return done(told)

    for row, loss in ((NONE, 1.0), (SFT, 0.9)):
        ledger.cell("demo", row, "harmful")["figures"]["unattacked"]["harmful_loss"] = mean(loss)
    for steps, loss, told in ((1, 0.25, True), (1, 0.95, False), (16, 0.25, False)):
        put(ledger, "booster", "harmful", attacked(steps, loss))
        found = claims.learnt_at_rest(Facts(ledger, "demo"))
        assert (found is not None) == told
        assert not told or "it is 0.25 nats per token with Booster, 0.90 after plain training" in found


def test_shares_below_the_undefended_models_are_held_against_the_control(ledger):
    for row, value in ((NONE, 0.9), (SFT, 0.9), (LOX, 0.1)):
        put(ledger, row, "benign", done(harmful([trial(None)], worst=value)))
    title = named(LOX).title
    assert f"less with {title} 10 %; to more with none. Less than the control's 90 % as well: {title}." in (
        cost_claims.benign(Facts(ledger, "demo"))
    )
    put(ledger, SFT, "benign", done(harmful([trial(None)], worst=0.1)))
    told = cost_claims.benign(Facts(ledger, "demo"))
    assert told.endswith("Less than the control's 10 % as well: none.")
    for row in (NONE, SFT, LOX):
        put(ledger, row, "benign", done(harmful([trial(None)], worst=0.0)))
    assert cost_claims.benign(Facts(ledger, "demo")).endswith("Nothing can lie below 0 %.")


def test_a_search_that_tells_no_setting_apart_is_said_to(ledger):
    alike = [
        searched(6, 0.0, 6),
        searched(6, 1.5, 6, layers="0:1"),
        searched(6, 1.5, 6, depth="0:0.5"),
        searched(6, 1.5, 6),
    ]
    put(ledger, SEARCH, "search-0", done({"judge": "x", "trials": alike}))
    assert "it tells none apart" in search_claims.places(Facts(ledger, "demo"))
    assert search_claims.depth(Facts(ledger, "demo")) is None
    put(ledger, SEARCH, "search-0", done({"judge": "x", "trials": [*alike[:3], searched(6, 1.5, 9)]}))
    assert "tells none apart" not in search_claims.places(Facts(ledger, "demo"))
    assert "depth 0:0.5" in search_claims.depth(Facts(ledger, "demo"))
