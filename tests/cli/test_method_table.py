"""The table of methods and architectures in the docs is the one that the tests made."""

import json

import matrix


def test_the_page_has_the_table_of_the_tests(request):
    found = json.loads(matrix.GOLDEN.read_text())
    assert set(found) == set(matrix.ARCHITECTURES)
    page = matrix.PAGE.read_text()
    before, _, rest = page.partition(matrix.BEGIN)
    shown, _, after = rest.partition(matrix.END)
    wanted = f"\n{matrix.table(found)}\n"
    if request.config.getoption("--update-goldens"):
        matrix.PAGE.write_text(f"{before}{matrix.BEGIN}{wanted}{matrix.END}{after}")
        shown = wanted
    assert shown == wanted
