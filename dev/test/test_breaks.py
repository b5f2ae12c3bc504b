"""The list of breaks.py, which takes too long to be run each time, at least fits the program."""

from breaks import SOURCE, stale


def test_each_break_is_one_place_of_the_program():
    assert stale(SOURCE.read_text()) == []
