"""examples/few_shot.py: MAML beats the pre-trained network by ten points."""

import few_shot


def test_maml_beats_pretraining():
    result = few_shot.run(seeds=(0,), steps=200, shown_steps=3, quiet=True)
    maml, baseline = 100 * result.maml[0], 100 * result.baseline[0]
    assert maml[0] < 20
    assert baseline[-1] > 50
    assert maml[-1] - baseline[-1] >= 10
