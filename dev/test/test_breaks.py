"""The lists of breaks.py and gpu_breaks.py, which take too long to be run each time, at least fit the programs."""

import breaks
import gpu_breaks
import pytest


@pytest.mark.parametrize("listed", [breaks, gpu_breaks])
def test_each_break_is_one_place_of_the_program(listed):
    assert listed.stale(listed.SOURCE.read_text()) == []


def test_breaks_of_the_gpu_do_not_overlap():
    assert gpu_breaks.with_switches(gpu_breaks.SOURCE.read_text()).count("broken(") == len(gpu_breaks.BREAKS)
