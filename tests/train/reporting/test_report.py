"""A run in words, and the table of a sweep."""

from dataclasses import replace

import pandas as pd

from residscope.options import with_values
from train.config import TrainConfig
from train.objective.recipes import best_lr
from train.reporting.report import describe, table_of, write_table
from train.run import train_all


def test_rows_of_another_sweep_stay_while_its_checkpoints_are_there(config: TrainConfig) -> None:
    def sweep(words: str) -> list[str]:
        swept = with_values(config, steps=2, epochs=None, sweep=(words,), overwrite=True)
        return pd.read_parquet(write_table(config.out, train_all(swept)))["run"].unique().tolist()

    assert sweep("k=1,2") == ["k=1", "k=2"]
    assert sweep("k=2,3") == ["k=1", "k=2", "k=3"]
    config.out.with_name("ckpt.k=1.pt").unlink()
    assert sweep("lr=0.1,0.2") == ["k=2", "k=3", "lr=0.1", "lr=0.2"]


def test_the_table_of_a_sweep_says_what_has_settled(config: TrainConfig) -> None:
    results = train_all(with_values(config, steps=2, epochs=None, sweep=("k=1,2,3",)))
    curves = [
        [{"step": 75, "vectors": 750, "ratio": ratio}, {"step": 100, "vectors": 1000, "ratio": 2.0}]
        for ratio in (1.99, 1.5)
    ]
    lines = table_of([replace(r, curve=c) for r, c in zip(results, [*curves, []], strict=True)]).splitlines()
    column = lines[1].split().index("settled") - len(lines[1].split())
    assert [line.split()[column] for line in lines[2:]] == ["yes", "no", "-"]


def test_the_rate_of_a_single_layer_is_compared_with_that_of_its_share(config: TrainConfig) -> None:
    """One of L layers sees an L-th of each batch and of the run."""
    (plain, *_) = train_all(with_values(config, steps=2, epochs=None, per_layer="each"))
    plan = plain.plan
    share = 1 / len(plan.stream_layers or ())
    lr = 20 * best_lr(plan.model.n_latents, plan.chosen.batch_size * share, plan.vectors * share)
    assert plain.validation is not None
    bad = replace(
        plain, plan=replace(plan, chosen=replace(plan.chosen, lr=lr)), validation=plain.validation._replace(fvu=2.0)
    )
    assert "an FVU above 1, at 20 times the default rate" in describe(bad)


def test_relu_has_no_k(config: TrainConfig) -> None:
    topk, relu = train_all(with_values(config, steps=2, epochs=None, sweep=("activation=topk,relu",)))
    assert [f" latents, k {topk.plan.model.k}, after" in describe(run) for run in (topk, relu)] == [True, False]
    assert " latents, after" in describe(relu)
    table = pd.read_parquet(write_table(config.out, [topk, relu]))
    assert str(table["active_at_most"].dtype) == "Int64"
    found = dict(zip(table["activation"], table["active_at_most"], strict=True))
    assert found == {"topk": topk.plan.model.k, "relu": pd.NA}
