"""BigDocs' rows in the schemas of its subsets."""

from alignvlm_jax.data.formats.conversation import FormatOptions, Refused
from tests.data.formats.samples import bigdocs_row, embedded, image_bytes, read_all, write_parquet


def texts(found):
    return ["".join(part.get("text", "*") for part in message["content"]) for message in found.messages]


def test_questions_and_answers_take_turns(tmp_path):
    found = read_all("bigdocs", write_parquet(tmp_path / "ArxivOCR.parquet", [bigdocs_row(i) for i in range(9)]))
    assert [f.id for f in found] == [f"b{i}" for i in range(9)]
    assert found[4].images == [image_bytes(4)] and found[4].source == "ArxivOCR"
    assert texts(found[4]) == ["*Question 4?", "Answer 4", "And then?", "Nothing."]
    assert found[4].where.endswith("ArxivOCR.parquet: row 5")


def test_other_names_of_the_columns(tmp_path):
    row = {"identifier": "x", "images": [embedded(1), embedded(2)], "query": "Compare.", "annotations": ["a", "b"]}
    (found,) = read_all("bigdocs", write_parquet(tmp_path / "a.parquet", [row | {"dataset_name": "Bench"}]))
    assert (found.id, found.source) == ("x", "Bench")
    assert found.images == [image_bytes(1), image_bytes(2)]
    assert texts(found) == ["**Compare.", "a"]  # the first of several correct answers


def test_a_subset_whose_images_are_files(tmp_path):
    row = {"sample_id": "c1", "img_path": "train/1.jpg", "queries": ["Read."], "annotations": ["STOP"]}
    (found,) = read_all("bigdocs", write_parquet(tmp_path / "a.parquet", [row]))
    assert found.images == ["train/1.jpg"]
    row = bigdocs_row(1, image={"bytes": None, "path": "train/2.jpg"})
    assert read_all("bigdocs", write_parquet(tmp_path / "b.parquet", [row]))[0].images == ["train/2.jpg"]


def test_image_without_a_question(tmp_path):
    rows = [bigdocs_row(0, queries=[], annotations=["The text."])]
    (found,) = read_all("bigdocs", write_parquet(tmp_path / "a.parquet", rows))
    assert texts(found) == ["*", "The text."]


def test_row_with_unequal_columns_is_refused(tmp_path):
    rows = [bigdocs_row(0, annotations=["only one"]), bigdocs_row(1, annotations=None), bigdocs_row(2)]
    found = read_all("bigdocs", write_parquet(tmp_path / "a.parquet", rows))
    assert [isinstance(f, Refused) for f in found] == [True, True, False]
    assert found[0].id == "b0" and "2 queries for 1 annotations" in found[0].why


def test_slices_are_complete_row_groups(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [bigdocs_row(i) for i in range(10)], rows_per_group=2)
    found = read_all("bigdocs", path, FormatOptions(records_per_shard=5))
    assert [f.id for f in found] == [f"b{i}" for i in range(10)]
