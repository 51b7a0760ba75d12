"""Tables of kernel choices: written, read back, found by shape, and the ones that ship."""

import json
from pathlib import Path

import pytest

from minivllm.kernels import choices
from minivllm.kernels.choices import LIBRARY, ChoiceTable, ProductChoice, ProductKey

KEY = ProductKey("linear", "bfloat16", 4096, 1024, 4)
CHOICE = ProductChoice("dot", 16, 32, 256, 2, 4, 3, 512)


def test_a_call_takes_the_next_bucket() -> None:
    found = [choices.bucket_of(n) for n in (0, 1, 2, 3, 4, 5, 9, 17, 33, 64, 65, 129)]
    assert found == [None, 1, 2, 4, 4, 8, 16, 32, 64, 64, 128, None]


def test_a_chip_has_a_file_of_its_name(tmp_path: Path) -> None:
    assert choices.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    table = ChoiceTable("NVIDIA H100 80GB HBM3", {KEY: CHOICE, ProductKey("logits", "bfloat16", 9, 8, 1): LIBRARY})
    path = tmp_path / "nvidia-h100-80gb-hbm3.json"
    choices.write_choices(path, table)
    assert choices.load_choices("NVIDIA H100 80GB HBM3", tmp_path) == table
    assert len(path.read_text().splitlines()) == 2 + len(table.products) + 1


def test_a_chip_without_a_file_has_an_empty_table(tmp_path: Path) -> None:
    assert choices.load_choices("NVIDIA A10", tmp_path) == ChoiceTable("NVIDIA A10")


def test_16_bit_types_share_entries() -> None:
    table = ChoiceTable("x", {KEY: CHOICE})
    assert table.product(KEY) == CHOICE
    assert table.product(ProductKey("linear", "float16", 4096, 1024, 4)) == CHOICE
    assert table.product(ProductKey("linear", "float32", 4096, 1024, 4)) is None
    assert table.product(ProductKey("linear", "bfloat16", 4096, 1024, 8)) is None
    assert table.product(ProductKey("logits", "bfloat16", 4096, 1024, 4)) is None


@pytest.mark.parametrize("change", [{"wraps": 4}, {"num_rows": None}], ids=str)
def test_an_entry_that_is_not_understood_is_an_error(tmp_path: Path, change: dict[str, int | None]) -> None:
    path = tmp_path / "x.json"
    choices.write_choices(path, ChoiceTable("x", {KEY: CHOICE}))
    written = json.loads(path.read_text())
    for name, value in change.items():
        if value is None:
            del written["products"][0][name]
        else:
            written["products"][0][name] = value
    path.write_text(json.dumps(written))
    with pytest.raises((TypeError, KeyError)):
        choices.read_choices(path)


def test_two_entries_for_one_product_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    choices.write_choices(path, ChoiceTable("x", {KEY: CHOICE}))
    written = json.loads(path.read_text())
    written["products"] *= 2
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="two entries"):
        choices.read_choices(path)


def test_shipped_tables_can_be_read() -> None:
    """Every one is found by its chip's name, and names kernels that exist in sizes that they take."""
    for path in choices.FOLDER.glob("*.json"):
        table = choices.read_choices(path)
        assert choices.load_choices(table.chip) == table
        for key, choice in table.products.items():
            assert key.op in ("linear", "logits", "gated_linear")
            assert key.num_rows in choices.ROW_BUCKETS
            assert choice.kernel in ("library", "vector", "dot")
            if choice.kernel == "dot":
                assert choice.block_m >= max(16, key.num_rows)
            if choice.kernel == "vector":
                assert choice.block_m == key.num_rows <= 2
            assert choice.ahead * choice.split_k <= key.num_in
