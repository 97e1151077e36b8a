"""The evidence study: every method on the demo pair and on a real model, under swept attacks, in one repeatable run.

rows       what is done to the aligned model: nothing, LoX, each trained method, their combinations
columns    what is measured of each, every one by a command of `surgery` that a reader can run
grounds    the two pairs, their data, the attackers' budgets
ledger     docs/evidence.json: each cell with its command, its figures, how long it took
study      runs what the ledger lacks
claims     what the page says of the figures, each sentence with the condition under which it is true
page, plot docs/evidence.md, its plot, the README's table: made from the ledger alone
"""
