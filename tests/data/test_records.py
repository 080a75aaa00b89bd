"""Tables and data sets: what is written comes back, what does not fit is refused with file and column."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fast_goal.data.records import (
    OBJECTS,
    PAIRS,
    RECORDS,
    REGIONS,
    SKIPPED,
    TRUTH,
    captions_of,
    load_dataset,
    load_skipped,
    read_table,
    remove_dataset,
    write_dataset,
    write_table,
)
from fast_goal.errors import ConfigError, DataError


def record(image_id: str, split: str = "train", **values: object) -> dict:
    return {
        "image_id": image_id,
        "image_path": f"images/{image_id}.jpg",
        "width": 40,
        "height": 30,
        "split": split,
        "long_caption": "A red ball. A café with ”quotes” 🎉.",
        "captions": ["a ball", "a café"],
        "source": "folder",
        "content_hash": image_id * 4,
        **values,
    }


def truth_row(image_id: str) -> dict:
    return {
        "image_id": image_id, "sentence_index": 0, "char_start": 0, "char_end": 11,
        "x1": 1, "y1": 2.5, "x2": 9.0, "y2": 8.0, "label": "ball",
    }  # fmt: skip


def object_row(image_id: str) -> dict:
    return {
        "image_id": image_id, "object_index": 0, "label": "ball", "colour": "red", "pattern": "plain", "size": "large",
        "x1": 1.0, "y1": 2.5, "x2": 9.0, "y2": 8.0,
    }  # fmt: skip


BOX = {"x1": 0.0, "y1": 0.0, "x2": 9.0, "y2": 9.0}
SKIPPED_ROW = {"sample": "c", "row": 7, "step": "download", "reason": "image missing", "detail": "images/c.jpg"}


class TestTables:
    @pytest.mark.parametrize(
        ("schema", "rows"),
        [
            (RECORDS, [record("a"), record("b", captions=[])]),
            (TRUTH, [truth_row("a")]),
            (OBJECTS, [object_row("a")]),
            (SKIPPED, [SKIPPED_ROW]),
            (
                REGIONS,
                [
                    {
                        "image_id": "a",
                        "region_index": 0,
                        "x1": 0,
                        "y1": 0,
                        "x2": 1.5,
                        "y2": 2,
                        "kind": "centre",
                        "label": "",
                        "score": 1.0,
                    }
                ],
            ),
            (
                PAIRS,
                [
                    {
                        "image_id": "a",
                        "rank": 1,
                        "sentence_index": 0,
                        "sentence": "s",
                        "char_start": 0,
                        "char_end": 1,
                        "region_index": 3,
                        "x1": 0.0,
                        "y1": 0.0,
                        "x2": 1.0,
                        "y2": 1.0,
                        "kind": "detector",
                        "similarity": 0.25,
                        "weight": 1.0,
                    }
                ],
            ),
        ],
    )
    def test_round_trip(self, tmp_path, schema, rows):
        path = tmp_path / "new" / "t.parquet"
        for form in (rows, pd.DataFrame(rows), iter(rows)):
            write_table(path, form, schema)
            frame = read_table(path, schema)
            assert list(frame.columns) == schema.names
            assert frame.to_dict("records") == rows
        write_table(path, frame.iloc[:0], schema)
        assert len(read_table(path, schema)) == 0
        write_table(path, [], schema)
        assert list(read_table(path, schema).columns) == schema.names
        assert [entry.name for entry in path.parent.iterdir()] == ["t.parquet"]

    def test_lists_are_lists(self, tmp_path):
        write_table(tmp_path / "t.parquet", [record("a")], RECORDS)
        assert isinstance(read_table(tmp_path / "t.parquet", RECORDS)["captions"][0], list)

    def test_unknown_column(self, tmp_path):
        with pytest.raises(DataError, match=r"t\.parquet.*colour"):
            write_table(tmp_path / "t.parquet", [record("a", colour="red")], RECORDS)

    @pytest.mark.parametrize(
        "change", [{"width": "wide"}, {"captions": "text"}, {"width": 1.5}, {"split": 3}, {"long_caption": "\ud800"}]
    )
    def test_wrong_type_on_write(self, tmp_path, change):
        with pytest.raises(DataError, match=rf"t\.parquet.*{next(iter(change))}"):
            write_table(tmp_path / "t.parquet", [record("a", **change)], RECORDS)
        assert not list(tmp_path.iterdir())

    def test_empty_value(self, tmp_path):
        with pytest.raises(DataError, match=r"long_caption.*record 1"):
            write_table(tmp_path / "t.parquet", [record("a"), record("b", long_caption=None)], RECORDS)

    def test_missing_column_on_write(self, tmp_path):
        row = record("a")
        del row["width"]
        with pytest.raises(DataError, match="'width'"):
            write_table(tmp_path / "t.parquet", [row], RECORDS)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match=r"regions\.parquet does not exist.*`flism`"):
            read_table(tmp_path / "regions.parquet", REGIONS)

    def test_not_parquet(self, tmp_path):
        path = tmp_path / "t.parquet"
        path.write_text("image,caption")
        with pytest.raises(DataError, match=r"t\.parquet.*parquet.*`download`"):
            read_table(path, RECORDS)

    def test_missing_and_mistyped_columns_on_read(self, tmp_path):
        path = tmp_path / "t.parquet"
        table = pa.Table.from_pylist([SKIPPED_ROW])
        pq.write_table(table.drop_columns("reason"), path)
        with pytest.raises(DataError, match=r"t\.parquet: the column 'reason' is missing.*`download`"):
            read_table(path, SKIPPED)
        pq.write_table(pa.Table.from_pylist([{**SKIPPED_ROW, "row": "seven"}]), path)
        with pytest.raises(DataError, match=r"t\.parquet: the column 'row' is .*string, expected int64.*`download`"):
            read_table(path, SKIPPED)

    def test_failed_write_keeps_the_old_table(self, tmp_path):
        path = tmp_path / "t.parquet"
        write_table(path, [SKIPPED_ROW], SKIPPED)
        with pytest.raises(DataError):
            write_table(path, [{**SKIPPED_ROW, "row": "x"}], SKIPPED)
        assert len(read_table(path, SKIPPED)) == 1


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    return tmp_path


class TestDataset:
    def test_round_trip(self, project):
        rows = [record("b"), record("a", "test"), record("c", "pretrain", long_caption="")]
        write_dataset("scenes", "photos", rows, [SKIPPED_ROW], [truth_row("b")], [object_row("b")], source="scenes")
        dataset = load_dataset("scenes")
        assert dataset.records.to_dict("records") == rows
        assert dataset.truth.to_dict("records") == [truth_row("b")]
        assert dataset.objects["colour"].tolist() == ["red"]
        assert (dataset.name, dataset.source, dataset.root.as_posix()) == ("scenes", "scenes", "photos")
        assert load_skipped("scenes").to_dict("records") == [SKIPPED_ROW]
        assert dataset.split("train", "pretrain")["image_id"].tolist() == ["b", "c"]
        assert dataset.split("pretrain", "train").index.tolist() == [0, 1]
        assert dataset.split("val").empty and list(dataset.split("val").columns) == RECORDS.names
        with pytest.raises(DataError, match="trian"):
            dataset.split("trian")

    def test_path_of_records_in_every_form(self, project):
        write_dataset("d", "photos", [record("a")], [], source="folder")
        dataset = load_dataset("d")
        expected = dataset.root / "images/a.jpg"
        assert dataset.path("images/a.jpg") == expected
        assert dataset.path(dataset.records.iloc[0]) == expected
        assert dataset.path(record("a")) == expected
        assert dataset.path(next(dataset.records.itertuples())) == expected

    def test_root_is_relative_only_below_the_project(self, project, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        for root, expected in ((project / "photos", "photos"), ("photos/../photos", "photos"), (elsewhere, str(elsewhere))):
            write_dataset("d", root, [record("a")], [], source="folder")
            assert str(load_dataset("d").root) == expected

    def test_no_truth_left_from_before(self, project):
        write_dataset("d", "photos", [record("a")], [], [truth_row("a")], [object_row("a")], source="scenes")
        write_dataset("d", "photos", [record("a")], [], source="folder")
        dataset = load_dataset("d")
        assert dataset.truth is None and dataset.objects is None

    def test_digest(self, project):
        def digest(*rows: dict) -> str:
            write_dataset("d", "photos", rows, [], source="folder")
            return load_dataset("d").digest

        first = digest(record("a"), record("b"))
        assert first == digest(record("a"), record("b"))
        others = [
            digest(record("b"), record("a")),
            digest(record("a")),
            digest(record("a"), record("b", captions=["a ball a café"])),
            digest(record("a"), record("b", content_hash="0")),
            digest(record("a"), record("b", split="val")),
        ]
        assert len({first, *others}) == 6

    def test_duplicate_id(self, project):
        with pytest.raises(DataError, match=r"'a'.*more than one"):
            write_dataset("d", "photos", [record("a"), record("b"), record("a")], [], source="folder")

    @pytest.mark.parametrize(
        ("table", "more"),
        [
            ("choices", {**BOX, "group": "add", "caption": "a ball", "foils": ["a box"]}),
            ("labels", {**BOX, "label": "ball"}),
            ("masks", {"mask_path": "masks/a.png", "content_hash": "0"}),
        ],
    )
    def test_a_question_of_an_image_that_was_left_out(self, project, table, more):
        rows = [{"image_id": name, "suite": "toys", **more} for name in "aab"]
        write_dataset("d", "photos", [record("a"), record("b")], [], source="folder", **{table: rows})
        assert getattr(load_dataset("d"), table).to_dict("records") == rows
        message = rf"d, of the source 'folder': 1 rows of the table {table} .* row 2 \(suite 'toys', image_id 'b'\).*leave out"
        with pytest.raises(DataError, match=message):
            write_dataset("d", "photos", [record("a")], [], source="folder", **{table: rows})

    def test_unknown_split(self, project):
        with pytest.raises(DataError, match=r"'a'.*'dev'"):
            write_dataset("d", "photos", [record("a", "dev")], [], source="folder")

    @pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "metrics", "photos_skipped", "photos_truth", ".x", "a.b"])
    def test_names_that_are_no_file_names(self, project, name):
        with pytest.raises(ConfigError, match="name"):
            write_dataset(name, "photos", [record("a")], [], source="folder")

    def test_unknown_dataset(self, project):
        with pytest.raises(DataError, match=r"data/records/photos\.json.*`download`.*none yet"):
            load_dataset("photos")
        write_dataset("scenes", "photos", [record("a")], [], source="scenes")
        with pytest.raises(DataError, match="here: scenes"):
            load_dataset("photos")

    def test_remove(self, project):
        generated = project / "data/datasets/made/images"
        generated.mkdir(parents=True)
        write_dataset("made", generated.parent, [record("a")], [], [truth_row("a")], source="scenes")
        own = project / "data/datasets/own"
        own.mkdir()
        (own / "SOURCE.json").write_text("{}")
        (own / "mine.txt").write_text("keep")
        write_dataset("own", "photos", [record("a")], [], source="folder")
        remove_dataset("made")
        remove_dataset("own")
        assert not generated.parent.exists()
        assert [path.name for path in own.iterdir()] == ["mine.txt"]
        assert not list((project / "data/records").iterdir())
        assert (project / "photos").is_dir()


def test_the_captions_of_each_record():
    records = pd.DataFrame({"long_caption": ["one two", " "], "captions": [["a", "", "b"], []]})
    assert captions_of(records, "long") == [["one two"], []]
    assert captions_of(records, "short") == [["a", "b"], []]
