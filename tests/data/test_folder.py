"""The source `folder`: every way of giving captions, and every way of giving them wrongly."""

import csv
import dataclasses
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fast_goal.data.captions import split_sentences
from fast_goal.data.records import RECORDS, SKIPPED, write_table
from fast_goal.data.sources import known_sources, source_config
from fast_goal.data.sources.folder import join_captions
from fast_goal.errors import ConfigError, DataError

VALUES = {
    "source": "folder",
    "images": "images",
    "captions": "captions.csv",
    "columns": {"image": "image", "caption": "caption", "long_caption": None, "id": None, "split": None},
    "seed": 0,
    "fractions": {"train": 0.8, "val": 0.05, "test": 0.15},
}


class Photos:
    """A folder of images with a table, and the source to read it."""

    def __init__(self, folder: Path):
        self.root, self.out = folder / "photos", folder / "data/datasets/mine"
        (self.root / "images").mkdir(parents=True)

    def image(self, name: str, seed: int | None = None, size: tuple[int, int] = (24, 16)) -> Path:
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) if seed is None else seed
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format="PNG" if path.suffix == ".png" else "JPEG")
        return path

    def csv(self, rows: list, header=("image", "caption"), **options: object) -> None:
        with (self.root / "captions.csv").open("w", newline="", **{"encoding": "utf-8", **options}) as stream:
            csv.writer(stream).writerows([header, *rows])

    def text(self, text: str | bytes, name: str = "captions.csv") -> None:
        (self.root / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def load(self, columns: dict | None = None, **values: object):
        section = {**VALUES, "root": str(self.root), **values, "columns": {**VALUES["columns"], **(columns or {})}}
        function, config = source_config(section, "download.datasets.mine")
        loaded = function(config, "mine", self.out)
        write_table(self.out.parent / "records.parquet", loaded.rows, RECORDS)  # rows and skipped must fit their tables
        write_table(self.out.parent / "skipped.parquet", loaded.skipped, SKIPPED)
        return loaded


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the memory of the inspection is kept
    return Photos(tmp_path)


def reasons(loaded) -> list[tuple[str, int, str]]:
    return [(row["sample"], row["row"], row["reason"]) for row in loaded.skipped]


class TestReading:
    def test_one_row(self, photos):
        path = photos.image("a.jpg", size=(30, 20))
        photos.csv([["a.jpg", "A dog runs. It is brown."]])
        loaded = photos.load()
        assert loaded.rows == [
            {
                "image_id": "a",
                "image_path": "images/a.jpg",
                "width": 30,
                "height": 20,
                "split": loaded.rows[0]["split"],
                "long_caption": "A dog runs. It is brown.",
                "captions": ["A dog runs. It is brown."],
                "source": "folder",
                "content_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        ]
        assert loaded.root == photos.root and not loaded.skipped and loaded.truth is None
        assert loaded.hashes == [{"image_id": "a", "perceptual_hash": str(imagehash.phash(Image.open(path)))}]
        assert json.loads((photos.out / "SOURCE.json").read_text())["root"] == str(photos.root)

    def test_several_rows_keep_their_order_and_are_joined(self, photos):
        photos.image("a.jpg"), photos.image("b.jpg")
        photos.csv([["a.jpg", " a dog runs "], ["b.jpg", "A cat ."], ["a.jpg", 'Two "dogs", really?'], ["a.jpg", "the end"]])
        rows = photos.load().rows
        assert [row["image_id"] for row in rows] == ["a", "b"]
        assert rows[0]["captions"] == ["a dog runs", 'Two "dogs", really?', "the end"]
        assert rows[0]["long_caption"] == 'a dog runs. Two "dogs", really? the end.'
        assert rows[1]["long_caption"] == "A cat ."

    def test_joined_captions_split_into_the_captions(self, photos):
        captions = [
            "A child climbs up a set of stairs .",
            "two men",
            "a girl goes into a house .",
            "Little girl, pink dress",
            "A man smiles!",
        ]
        joined = join_captions(captions)
        assert [s.text.rstrip(". ") for s in split_sentences(joined)] == [c.rstrip(". ") for c in captions]

    def test_long_caption_column(self, photos):
        photos.image("a.jpg"), photos.image("b.jpg"), photos.image("c.jpg")
        photos.csv(
            [
                ["a.jpg", "dog", "A long text."],
                ["a.jpg", "pet", ""],
                ["b.jpg", "cat", ""],
                ["c.jpg", "", "Only long."],
                ["a.jpg", "x", "Other."],
            ],
            ("image", "caption", "text"),
        )
        loaded = photos.load(columns={"long_caption": "text"})
        assert [(r["image_id"], r["long_caption"], r["captions"]) for r in loaded.rows] == [
            ("a", "A long text.", ["dog", "pet", "x"]),
            ("c", "Only long.", []),
        ]
        assert reasons(loaded) == [("a", 6, "second long caption"), ("b", 4, "no long caption")]

    def test_only_long_captions(self, photos):
        photos.image("a.jpg")
        photos.csv([["a.jpg", "A long text."]], ("image", "text"))
        row = photos.load(columns={"caption": None, "long_caption": "text"}).rows[0]
        assert (row["long_caption"], row["captions"]) == ("A long text.", [])

    def test_every_kind_of_table_gives_the_same(self, photos):
        records = [
            {"image": "a.jpg", "caption": 'a dög, "x"', "n": 1},
            {"image": "b.png", "caption": "NA", "n": 2},
            {"image": "a.jpg", "caption": "two\nlines", "n": 3},
        ]
        photos.image("a.jpg"), photos.image("b.png")
        photos.csv([list(r.values()) for r in records], list(records[0]))
        expected = photos.load().rows
        assert expected[1]["captions"] == ["NA"]
        photos.text(json.dumps(records), "c.json")
        photos.text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n", "c.jsonl")
        pd.DataFrame(records).to_parquet(photos.root / "c.parquet")
        for name in ("c.json", "c.jsonl", "c.parquet"):
            assert photos.load(captions=name).rows == expected, name

    def test_lists_of_captions(self, photos):
        photos.image("a.jpg"), photos.image("b.jpg")
        records = [{"image": "a.jpg", "caption": ["one", "two", "one"]}, {"image": "b.jpg", "caption": ["three"]}]
        photos.text(json.dumps(records), "c.json")
        pd.DataFrame(records).to_parquet(photos.root / "c.parquet")
        for name in ("c.json", "c.parquet"):
            loaded = photos.load(captions=name)
            assert [row["captions"] for row in loaded.rows] == [["one", "two"], ["three"]]
            assert reasons(loaded) == [("a", 1, "duplicate caption")]

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_encodings(self, photos, encoding):
        photos.image("a.jpg")
        photos.csv([["a.jpg", "café 🎉"]], encoding=encoding)
        assert photos.load().rows[0]["captions"] == ["café 🎉"]

    def test_own_ids_and_folders(self, photos):
        photos.image("x/a.jpg"), photos.image("y/a.jpg"), photos.image("y/b.v2.jpg")
        photos.csv([["x/a.jpg", "d"], ["./y//a.jpg", "e"], ["y/b.v2.jpg", "f"]])
        assert [row["image_id"] for row in photos.load().rows] == ["x/a", "y/a", "y/b.v2"]
        photos.text(
            json.dumps([{"image": "x/a.jpg", "caption": "d", "n": 5}, {"image": "y/a.jpg", "caption": "d", "n": None}]),
            "c.json",
        )
        assert [row["image_id"] for row in photos.load(captions="c.json", columns={"id": "n"}).rows] == ["5", "y/a"]

    def test_images_beside_the_table(self, photos):
        photos.image("../a.jpg")
        photos.csv([["a.jpg", "d"]])
        assert photos.load(images=".").rows[0]["image_path"] == "a.jpg"


class TestSkipped:
    def test_each_reason(self, photos):
        for name in ("good.jpg", "good.png", "nobody.jpg", "sub/nobody.PNG", "empty.jpg", "cut.jpg"):
            photos.image(name)
        (photos.root / "images/notes.txt").write_text("not an image")
        photos.image(".hidden.jpg")
        cut = photos.root / "images/cut.jpg"
        cut.write_bytes(cut.read_bytes()[:300])
        (photos.root / "images/zero.jpg").touch()
        (photos.root / "images/text.jpg").write_text("no picture")
        (photos.root / "outside.jpg").write_bytes((photos.root / "images/good.jpg").read_bytes())
        photos.csv(
            [
                ["good.jpg", "a dog"],
                ["good.jpg", "  "],
                ["good.jpg", "a dog"],
                ["empty.jpg", ""],
                ["gone.jpg", "a ghost"],
                ["cut.jpg", "half"],
                ["zero.jpg", "nothing"],
                ["text.jpg", "letters"],
                ["../../secret.jpg", "x"],
                ["/etc/passwd", "x"],
                ["", "no name"],
                ["good.png", "another image with the id of the first"],
                ["good.jpg", "too", "many"],
                ["good.jpg"],
                ["../outside.jpg", "below the root"],
                ["a\0b.jpg", "odd name"],
                ["n" * 300 + ".jpg", "long name"],
            ]
        )
        loaded = photos.load()
        assert [(row["image_id"], row["captions"]) for row in loaded.rows] == [
            ("good", ["a dog"]),
            ("../outside", ["below the root"]),
        ]
        found = reasons(loaded)
        assert found[:2] == [("", 14, "unreadable row"), ("", 15, "unreadable row")]
        assert set(found[2:]) == {
            ("good", 3, "empty caption"),
            ("good", 4, "duplicate caption"),
            ("empty", 5, "empty caption"),
            ("empty", 5, "no caption"),
            ("gone", 6, "image missing"),
            ("cut", 7, "unreadable image"),
            ("zero", 8, "unreadable image"),
            ("text", 9, "unreadable image"),
            ("../../secret.jpg", 10, "path outside the data root"),
            ("/etc/passwd", 11, "path outside the data root"),
            ("", 12, "no image named"),
            ("images/good.png", 13, "duplicate id"),
            ("ab", 17, "image missing"),
            ("n" * 300, 18, "unreadable image"),
            ("images/nobody.jpg", -1, "not in the table"),
            ("images/sub/nobody.PNG", -1, "not in the table"),
        }
        assert {row["step"] for row in loaded.skipped} == {"download"}
        detail = {row["sample"]: row["detail"] for row in loaded.skipped}
        assert "Truncated" in detail["cut"] and "0 bytes" in detail["zero"] and "not an image" in detail["text"]
        details = [row["detail"] for row in loaded.skipped]
        assert "3 fields instead of 2" in details[0] and "1 fields instead of 2" in details[1]
        assert detail["images/good.png"] == "the id 'good' belongs to images/good.jpg (row 2)"

    def test_bad_json_rows(self, photos):
        photos.image("a.jpg"), photos.image("b.jpg")
        lines = [
            '{"image": "a.jpg", "caption": "x"}',
            '{"image": "a.jpg", ',
            "[1]",
            '{"image": "b.jpg", "caption": 5}',
            '{"caption": "y"}',
        ]
        photos.text("\n".join(lines), "c.jsonl")
        loaded = photos.load(captions="c.jsonl")
        assert [row["image_id"] for row in loaded.rows] == ["a"]
        assert Counter(reasons(loaded)) == Counter(
            {
                ("", 2, "unreadable row"): 1,
                ("", 3, "unreadable row"): 1,
                ("b", 4, "caption is not text"): 1,
                ("b", 4, "no caption"): 1,
                ("", 5, "no image named"): 1,
            }
        )

    def test_halves_of_surrogates_and_null_bytes(self, photos):
        photos.image("a.jpg")
        photos.text(json.dumps([{"image": "a.jpg", "caption": "half \ud83d of \ud83c\udf89 \u0000 it"}]), "c.json")
        assert photos.load(captions="c.json").rows[0]["captions"] == ["half \ufffd of 🎉  it"]

    def test_a_file_name_that_is_not_utf8(self, photos):
        photos.image("1.jpg")
        photos.csv([["1.jpg", "a dog"]])
        with open(os.fsencode(photos.root / "images") + b"/caf\xe9.jpg", "wb") as stream:  # noqa: PTH123 (a name that is not UTF-8)
            stream.write(b"x")
        assert reasons(photos.load()) == [("images/caf\ufffd.jpg", -1, "not in the table")]

    def test_nothing_left(self, photos):
        photos.csv([["a.jpg", "x"], ["b.jpg", "y"]])
        with pytest.raises(DataError, match=r"download\.datasets\.mine.*none of the images.*image missing: 2 \(first: a row 2"):
            photos.load()
        photos.csv([])
        with pytest.raises(DataError, match="no rows"):
            photos.load()

    def test_a_very_long_caption(self, photos):
        photos.image("a.jpg")
        caption = "A dog runs, and it is brown. " * 1700
        photos.csv([["a.jpg", caption * 4]])
        assert len(photos.load().rows[0]["long_caption"].split()) == 1700 * 7 * 4


class TestTablesThatCannotBeUnderstood:
    def test_wrong_column(self, photos):
        photos.csv([["a.jpg", "x"]], ("file", "caption"))
        with pytest.raises(
            DataError, match=r"captions\.csv.*'image'.*\['file', 'caption'\].*download\.datasets\.mine\.columns\.image"
        ):
            photos.load()

    @pytest.mark.parametrize("key", ["caption", "long_caption", "id", "split"])
    def test_missing_column_names_its_key(self, photos, key):
        photos.csv([["a.jpg", "x"]])
        with pytest.raises(DataError, match=rf"'nix'.*columns\.{key} .*null"):
            photos.load(columns={key: "nix"})

    def test_not_utf8(self, photos):
        text = b"image,caption\na.jpg,a plain one\nb.jpg,caf\xe9 au lait\n"
        for data, at in ((text, 41), (b"\xef\xbb\xbf" + text, 44)):
            photos.text(data)
            assert data.index(b"\xe9") == at
            with pytest.raises(
                DataError, match=rf"captions\.csv: line 3 is not UTF-8 \(byte {at} of the file is 0xe9\).*iconv"
            ):
                photos.load()

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("c.csv", "", "empty"),
            ("c.csv", "\n\n", "no header"),
            ("c.csv", "image,caption,caption\na,b,c\n", "more than once"),
            ("c.csv", 'image,caption\na.jpg,"never closed\nb.jpg,x\n', "line 2 is not valid CSV"),
            ("c.csv", 'image,caption\na.jpg,x\nb.jpg,"a "quote" here"\n', "line 3 is not valid CSV"),
            ("c.json", "{", "not valid JSON"),
            ("c.json", '{"data": []}', "expected a list"),
            ("c.json", '{"image": 1}\n{"image": 2}', r"\.jsonl"),
            ("c.parquet", "PAR1 or so", "parquet"),
            ("c.xlsx", "x", r"\.csv, \.json"),
            ("c.txt", "x", r"\.csv, \.json"),
        ],
    )
    def test_files(self, photos, name, text, message):
        photos.text(text, name)
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            photos.load(captions=name)

    def test_missing_files(self, photos):
        with pytest.raises(DataError, match=r"captions\.csv.*does not exist"):
            photos.load()
        with pytest.raises(DataError, match=r"pictures does not exist.*download\.datasets\.mine\.root"):
            photos.load(images="pictures")

    def test_root_in_a_folder_that_is_rewritten(self, photos):
        photos.out.mkdir(parents=True)
        (photos.out / "images").mkdir()
        with pytest.raises(DataError, match="rewritten"):
            photos.load(root=str(photos.out))


class TestSplits:
    def many(self, photos, count: int = 300) -> None:
        for i in range(count):
            photos.image(f"{i}.png", size=(6, 5))
        photos.csv([[f"{i}.png", "x"] for i in range(count)])

    def test_fractions(self, photos):
        self.many(photos)
        counts = Counter(row["split"] for row in photos.load(fractions={"train": 0.5, "val": 0.2, "test": 0.3}).rows)
        for split, expected in (("train", 150), ("val", 60), ("test", 90)):
            assert abs(counts[split] - expected) < 35  # four standard deviations
        assert {row["split"] for row in photos.load(fractions={"train": 1, "val": 0, "test": 0}).rows} == {"train"}
        assert {row["split"] for row in photos.load(fractions={"train": 0, "val": 0, "test": 1}).rows} == {"test"}

    def test_seed_and_stability(self, photos):
        self.many(photos, 60)
        first = {row["image_id"]: row["split"] for row in photos.load().rows}
        assert first == {row["image_id"]: row["split"] for row in photos.load().rows}
        assert first != {row["image_id"]: row["split"] for row in photos.load(seed=1).rows}
        photos.csv([[f"{i}.png", "x"] for i in reversed(range(40))])  # fewer, in another order
        assert all(first[row["image_id"]] == row["split"] for row in photos.load().rows)

    def test_split_column(self, photos):
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            photos.image(name)
        photos.csv(
            [["a.jpg", "x", "test"], ["b.jpg", "y", "train"], ["c.jpg", "z", "val"], ["a.jpg", "w", "test"]],
            ("image", "caption", "part"),
        )
        rows = photos.load(columns={"split": "part"}).rows
        assert [row["split"] for row in rows] == ["test", "train", "val"]

    @pytest.mark.parametrize("value", ["dev", "", "Train", "pretrain"])
    def test_other_values(self, photos, value):
        photos.image("a.jpg")
        photos.csv([["a.jpg", "x", "train"], ["a.jpg", "y", value]], ("image", "caption", "part"))
        with pytest.raises(DataError, match=rf"captions\.csv: row 3 has '{value}'.*'part'.*train, val, test"):
            photos.load(columns={"split": "part"})

    def test_one_image_in_two_splits(self, photos):
        photos.image("a.jpg")
        photos.csv([["a.jpg", "x", "train"], ["a.jpg", "y", "test"]], ("image", "caption", "part"))
        with pytest.raises(DataError, match=r"a\.jpg.*'train' in row 2.*'test' in row 3"):
            photos.load(columns={"split": "part"})

    def test_copies_stay_in_one_split(self, photos):
        for i in range(40):
            photos.image(f"{i}.jpg", seed=i // 2)
        photos.csv([[f"{i}.jpg", "x"] for i in range(40)])
        loaded = photos.load(fractions={"train": 0.4, "val": 0.3, "test": 0.3})
        splits = {}
        for row in loaded.rows:
            splits.setdefault(row["content_hash"], set()).add(row["split"])
        assert len(splits) == 20 and all(len(values) == 1 for values in splits.values())
        assert any("20 images are copies" in note and "(0 were moved" in note for note in loaded.notes)

        photos.csv([["0.jpg", "x", "test"], ["1.jpg", "x", "train"], ["2.jpg", "x", "train"]], ("image", "caption", "part"))
        loaded = photos.load(columns={"split": "part"})
        assert [row["split"] for row in loaded.rows] == ["test", "test", "train"]
        assert any("1 were moved" in note for note in loaded.notes)
        assert any("'val'" in note for note in loaded.notes)


class TestConfig:
    def test_the_source_is_known(self):
        assert "folder" in known_sources()

    def test_shipped_configuration(self):
        import yaml

        import fast_goal

        path = Path(fast_goal.__file__).parent / "conf/dataset/folder.yaml"
        section = yaml.safe_load(path.read_text())["download"]["datasets"]["photos"]
        _, config = source_config({**section, "root": "somewhere"}, "download.datasets.photos")
        assert dataclasses.asdict(config)["columns"]["image"] == "image"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"source": "foldr"}, r"download\.datasets\.mine\.source = 'foldr'.*folder"),
            ({"source": None}, "source"),
            ({"rot": "x"}, r"download\.datasets\.mine\.rot"),
            ({"fractions": {"train": 0.8, "val": 0.1, "test": 0.2}}, "expected 1"),
            ({"fractions": {"train": 1.2, "val": -0.1, "test": -0.1}}, r"fractions\.train"),
            ({"columns": {**VALUES["columns"], "caption": None}}, "both null"),
            ({"columns": {"image": "image"}}, r"columns\.caption"),
        ],
    )
    def test_errors(self, change, message):
        with pytest.raises(ConfigError, match=message):
            source_config({**VALUES, "root": "x", **change}, "download.datasets.mine")
        with pytest.raises(ConfigError, match=r"download\.datasets\.mine"):
            source_config("folder", "download.datasets.mine")
