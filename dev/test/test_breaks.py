"""The lists of breaks.py and gpu_breaks.py, which take too long to be run each time, at least fit the programs."""

import breaks
import gpu_breaks
import places
import pytest


@pytest.mark.parametrize("listed", [breaks, gpu_breaks])
def test_each_break_is_one_place_of_the_program(listed):
    assert places.stale(listed.SOURCE.read_text(), listed.BREAKS) == []


def test_breaks_of_the_gpu_do_not_overlap():
    assert gpu_breaks.with_switches(gpu_breaks.SOURCE.read_text()).count("broken(") == len(gpu_breaks.BREAKS)


@pytest.mark.parametrize("listed", [breaks, gpu_breaks])
def test_word_that_matches_no_break(listed):
    with pytest.raises(SystemExit, match="^error: nothing of this kind: no break has this in its name$"):
        places.choose(listed.SOURCE, listed.BREAKS, ["LayerNorm", "nothing of this kind"])
