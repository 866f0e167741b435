"""Row specifications: disjoint parts and folds of a data set."""

import numpy as np
import pytest

from dist_tl.datasets.digits import DigitsConfig
from dist_tl.datasets.spec import load_images
from dist_tl.errors import ConfigError
from dist_tl.train.rows import FoldSpec, RowsSpec, SplitSpec, load_rows

DATA = DigitsConfig(classes=(0, 1, 2), limit=60)


def rows_of(part, *, draw_seed=0, data_seed=0, fold=None, labels_per_class=4):
    split = SplitSpec(
        labels_per_class=labels_per_class,
        test_fraction=0.5,
        data_seed=data_seed,
        draw_seed=draw_seed,
        part=part,
    )
    return load_rows(RowsSpec(data=DATA, split=split, fold=fold))


def keys(rows):
    return [image.tobytes() for image in rows.images]


def test_without_a_split_all_rows_are_in_the_order_of_the_data():
    rows = load_rows(RowsSpec(data=DATA))
    np.testing.assert_array_equal(rows.images, load_images(DATA).images)
    assert len(rows) == 60


def test_parts_are_disjoint_and_cover_the_data():
    parts = [rows_of(part) for part in ("train", "pool", "test")]
    together = sorted(key for part in parts for key in keys(part))
    assert together == sorted(keys(load_rows(RowsSpec(data=DATA))))
    assert [len(part) for part in parts] == [12, 18, 30]
    assert np.bincount(parts[0].labels).tolist() == [4, 4, 4]


def test_the_draw_changes_the_labelled_rows_and_not_the_test_rows():
    assert keys(rows_of("train", draw_seed=1)) != keys(rows_of("train"))
    assert keys(rows_of("test", draw_seed=1)) == keys(rows_of("test"))
    assert keys(rows_of("test", data_seed=1)) != keys(rows_of("test"))


def test_folds_divide_the_part_and_hold_out_every_row_once():
    held = []
    for index in range(4):
        fold = FoldSpec(index=index, count=4, seed=9, held_out=True)
        out = rows_of("train", fold=fold)
        kept = rows_of("train", fold=fold.model_copy(update={"held_out": False}))
        assert sorted(keys(out) + keys(kept)) == sorted(keys(rows_of("train")))
        held += keys(out)
    assert sorted(held) == sorted(keys(rows_of("train")))


def test_more_labels_than_rows_are_rejected():
    with pytest.raises(ConfigError, match="labels_per_class: 11"):
        rows_of("train", labels_per_class=11)
