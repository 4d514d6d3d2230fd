"""examples/demo.py: the table and the picture, from made-up results."""

import data_cleaning
import demo
import few_shot
import threshold_tuning
import torch


def test_table_and_picture(tmp_path):
    errors = {"learned weights": torch.tensor([0.1, 0.2])}
    wrong = torch.tensor([[True, False], [False, True]])
    cleaning = data_cleaning.Result(torch.rand(2, 5) + 1, [0.9, 0.95], torch.rand(2, 2), wrong, errors)
    shots = few_shot.Result(torch.rand(2, 7), torch.rand(2, 7), torch.rand(2, 5))
    scores = {name: torch.rand(2) for name in ("as trained", "random search", "CMA-ES")}
    curves = {name: torch.rand(2, 4) for name in ("random search", "CMA-ES")}
    tuning = threshold_tuning.Result(curves, scores, {"CMA-ES": torch.tensor([0.9, 0.92])})
    text = demo.table(cleaning, shots, tuning)
    assert "0.900    0.950    0.925" in text
    assert "10.0     20.0     15.0" in text
    assert "90.0     92.0     91.0" in text
    demo.picture(cleaning, shots, tuning, tmp_path / "made" / "demo.png")
    assert (tmp_path / "made" / "demo.png").stat().st_size > 10_000
