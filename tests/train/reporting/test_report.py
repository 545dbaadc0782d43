"""The table of a sweep beside those of others with the same --out."""

import pandas as pd

from residscope.options import with_values
from train.config import TrainConfig
from train.reporting.report import write_table
from train.run import train_all


def test_rows_of_another_sweep_stay_while_its_checkpoints_are_there(config: TrainConfig) -> None:
    def sweep(words: str) -> list[str]:
        swept = with_values(config, steps=2, epochs=None, sweep=(words,), overwrite=True)
        return pd.read_parquet(write_table(config.out, train_all(swept)))["run"].unique().tolist()

    assert sweep("k=1,2") == ["k=1", "k=2"]
    assert sweep("k=2,3") == ["k=1", "k=2", "k=3"]
    config.out.with_name("ckpt.k=1.pt").unlink()
    assert sweep("lr=0.1,0.2") == ["k=2", "k=3", "lr=0.1", "lr=0.2"]
