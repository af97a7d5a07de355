"""Data sets from folders and lists: keys, classes, splits, and every way to be refused."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from fpt_fast.images import ImageSetError, list_images, load_image_set
from fpt_fast.records import ImageSet


def touch(root: Path, *names: str) -> Path:
    """Listing never opens an image, so empty files do."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number}.png" for number in range(count)]


def keys(images: ImageSet, split: str | None = None) -> list[str]:
    return [item.key for item in images.items if split in (None, item.split)]


def write_list(root: Path, lines: Sequence[str], name: str = "list.csv") -> Path:
    path = root / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class TestSplitFolders:
    def test_keys_classes_and_splits(self, tmp_path: Path) -> None:
        names = ["train/dog/1.png", "train/cat/1.png", "val/cat/1.png", "test/dog/1.png"]
        images = load_image_set(touch(tmp_path, *names))
        assert keys(images) == sorted(names)
        assert images.classes == ("cat", "dog")
        by_key = {item.key: item for item in images.items}
        assert [by_key[name].label for name in names] == [1, 0, 0, 1]
        assert [by_key[name].split for name in names] == ["train", "train", "val", "test"]
        assert all(item.path == tmp_path / item.key for item in images.items)
        assert images.root == tmp_path and images.root.is_absolute()

    def test_one_name_in_two_classes_and_splits_is_four_images(self, tmp_path: Path) -> None:
        """The published code keyed features by file stem, and they shared them silently."""
        folders = ("train/a", "train/b", "val/a", "test/b")
        images = load_image_set(touch(tmp_path, *(f"{folder}/x.png" for folder in folders)))
        assert len(set(keys(images))) == 4

    def test_classes_are_in_order_of_name_like_image_folder(self, tmp_path: Path) -> None:
        touch(tmp_path, *(f"train/{name}/x.png" for name in ("10", "9", "B", "a")))
        assert load_image_set(tmp_path).classes == ("10", "9", "B", "a")

    def test_nested_folders_extensions_and_hidden_files(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        kept = ["train/a/1.PNG", "train/a/deep/er/2.jpeg", "train/a/3.JPG", "train/a/x.png/4.tif"]
        kept += ["train/a/5.tiff", "train/a/6.bmp", "train/a/7.webp", "train/b/größe 1.png"]
        dropped = ["train/a/.8.png", "train/.c/9.png", "train/a/.git/10.png"]
        touch(tmp_path, *kept, *dropped, "train/a/notes.txt", "train/a/x.svg", "train/loose.png")
        images = load_image_set(tmp_path)
        assert keys(images) == sorted(kept)
        assert "2 files that are not images are ignored" in caplog.text
        assert "1 files outside the class folders are ignored" in caplog.text

    def test_val_comes_from_train_where_there_is_none(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        touch(tmp_path, *numbered("train/a", 16), *numbered("train/b", 8), "test/a/0.png")
        images = load_image_set(tmp_path)
        assert keys(images, "test") == ["test/a/0.png"]
        val = keys(images, "val")
        assert all(key.startswith("train/") for key in val)
        assert sum("/a/" in key for key in val) == 2 and sum("/b/" in key for key in val) == 1
        assert "no val split" in caplog.text and "13 % of train" in caplog.text
        assert keys(load_image_set(tmp_path, ratios=(1, 0, 0)), "val") == []

    def test_without_test_the_test_split_is_empty(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        touch(tmp_path, "train/a/0.png", "train/b/0.png", "val/a/0.png")
        assert load_image_set(tmp_path).of_split("test") == ()
        assert "no test split" in caplog.text

    def test_a_class_may_lack_in_val_but_not_in_train(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/a/0.png", "train/b/0.png", "val/a/0.png", "test/c/0.png")
        with pytest.raises(ImageSetError, match=r"class 'c' .* no images in the train split"):
            load_image_set(tmp_path)

    @pytest.mark.parametrize("folder", ["train/b", "val/b"])
    def test_empty_class(self, tmp_path: Path, folder: str) -> None:
        touch(tmp_path, "train/a/0.png", "train/c/0.png", "val/a/0.png", f"{folder}/notes.txt")
        with pytest.raises(ImageSetError, match=f"{folder} has no images .1 other files"):
            load_image_set(tmp_path)

    def test_one_class_only(self, tmp_path: Path) -> None:
        with pytest.raises(ImageSetError, match="one class only .a."):
            load_image_set(touch(tmp_path, "train/a/0.png", "val/a/0.png"))

    @pytest.mark.parametrize("other", ["validation", "Test", "dev"])
    def test_misnamed_split(self, tmp_path: Path, other: str) -> None:
        touch(tmp_path, "train/a/0.png", "train/b/0.png", f"{other}/a/0.png")
        with pytest.raises(ImageSetError, match=other):
            load_image_set(tmp_path)

    def test_other_folders_are_mentioned(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        touch(tmp_path, "train/a/0.png", "train/b/0.png", "masks/a/0.png")
        assert len(load_image_set(tmp_path).items) == 2
        assert "masks" in caplog.text

    def test_links_are_followed_but_not_in_circles(self, tmp_path: Path) -> None:
        touch(tmp_path / "data", "train/a/0.png", "train/b/0.png")
        touch(tmp_path / "elsewhere", "1.png")
        (tmp_path / "data/train/a/linked").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "data/train/a/circle").symlink_to(tmp_path / "data/train/a")
        found = keys(load_image_set(tmp_path / "data", ratios=(1, 0, 0)))
        assert found == ["train/a/0.png", "train/a/linked/1.png", "train/b/0.png"]

    def test_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/a/0.png", "train/b/0.png")
        os.close(os.open(os.fsencode(tmp_path) + b"/train/a/\xff.png", os.O_CREAT))
        with pytest.raises(ImageSetError, match="not valid UTF-8"):
            load_image_set(tmp_path)


class TestClassFolders:
    def test_divided_by_ratio(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "fpt_fast")
        touch(tmp_path, *numbered("a", 50), *numbered("b", 20), *numbered("c", 3))
        images = load_image_set(tmp_path)
        for name, counts in {"a": (35, 5, 10), "b": (14, 2, 4), "c": (1, 1, 1)}.items():
            found = [
                sum(key.startswith(f"{name}/") for key in keys(images, split))
                for split in ("train", "val", "test")
            ]
            assert tuple(found) == counts
        assert "divided by ratios" in caplog.text

    def test_the_same_for_the_same_seed_wherever_it_lies(self, tmp_path: Path) -> None:
        names = [*numbered("a", 20), *numbered("b", 9)]
        first = load_image_set(touch(tmp_path / "one", *names))
        second = load_image_set(touch(tmp_path / "two", *reversed(names)))
        assert [(i.key, i.split) for i in first.items] == [(i.key, i.split) for i in second.items]
        other = load_image_set(tmp_path / "one", seed=1)
        assert keys(other) == keys(first) and keys(other, "test") != keys(first, "test")

    def test_does_not_depend_on_the_order_of_the_file_system(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        touch(tmp_path, *numbered("a", 20), *numbered("b", 9))
        expected = load_image_set(tmp_path)
        listed = Path.iterdir
        monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path), reverse=True))
        assert load_image_set(tmp_path) == expected

    @pytest.mark.parametrize("name", ["val", "Train", "testing", "valid"])
    def test_split_folders_without_train(self, tmp_path: Path, name: str) -> None:
        touch(tmp_path, f"{name}/a/0.png", "other/a/0.png")
        with pytest.raises(ImageSetError, match=f"{name!r} but no folder 'train'"):
            load_image_set(tmp_path)

    def test_loose_images_only(self, tmp_path: Path) -> None:
        with pytest.raises(ImageSetError, match="no class folders"):
            load_image_set(touch(tmp_path, "0.png", "1.png"))

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ImageSetError, match="no such file or directory"):
            load_image_set(tmp_path / "nowhere")

    @pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.5, 0.4, 0.2), (0, 0.5, 0.5), (1.2, 0, -0.2)])
    def test_bad_ratios(self, tmp_path: Path, ratios: Sequence[float]) -> None:
        touch(tmp_path, *numbered("a", 3), *numbered("b", 3))
        with pytest.raises(ImageSetError, match="ratios must be shares"):
            load_image_set(tmp_path, ratios=ratios)


class TestList:
    def test_with_splits(self, tmp_path: Path) -> None:
        touch(tmp_path, "x/1.png", "x/2.png", "y 3.png", "4.jpg")
        lines = ["path,label,split", "x/1.png,sick,train", "./x/2.png,well,train"]
        lines += ["y 3.png,well,val", "", f"{tmp_path}/4.jpg,sick,Test"]
        images = load_image_set(write_list(tmp_path, lines))
        assert images.root == tmp_path
        assert images.classes == ("sick", "well")
        assert [(item.key, item.label, item.split) for item in images.items] == [
            ("4.jpg", 0, "test"),
            ("x/1.png", 0, "train"),
            ("x/2.png", 1, "train"),
            ("y 3.png", 1, "val"),
        ]

    def test_without_splits_is_divided(self, tmp_path: Path) -> None:
        names = [*numbered("a", 10), *numbered("b", 10)]
        touch(tmp_path, *names)
        lines = ["path,label", *(f"{name},{name[0]}" for name in names)]
        images = load_image_set(write_list(tmp_path, lines))
        assert [len(images.of_split(split)) for split in ("train", "val", "test")] == [14, 2, 4]
        (tmp_path / "list.csv").unlink()
        assert images.items == load_image_set(tmp_path).items

    def test_integer_labels_are_in_numerical_order(self, tmp_path: Path) -> None:
        touch(tmp_path, *numbered("x", 4))
        lines = ["path,label,split"]
        lines += [f"x/{i}.png,{label},train" for i, label in enumerate(("10", "9", "09", "-1"))]
        images = load_image_set(write_list(tmp_path, lines), ratios=(1, 0, 0))
        assert images.classes == ("-1", "9", "10")
        assert [item.label for item in images.items] == [2, 1, 1, 0]

    def test_mixed_labels_are_in_order_of_name(self, tmp_path: Path) -> None:
        touch(tmp_path, *numbered("x", 3))
        lines = ["path,label,split"]
        lines += [f"x/{i}.png,{label},train" for i, label in enumerate(("10", "9", "b"))]
        images = load_image_set(write_list(tmp_path, lines), ratios=(1, 0, 0))
        assert images.classes == ("10", "9", "b")

    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_other_columns_delimiters_and_byte_order_mark(
        self, tmp_path: Path, delimiter: str
    ) -> None:
        touch(tmp_path, "größe, 1.png", "2.png")
        lines = ["\ufeff" + delimiter.join(["id", "grade", "file", "fold"])]
        lines += [delimiter.join(["7", "a", '"größe, 1.png"', "train"])]
        lines += [delimiter.join(["8", "b", "2.png", "train"])]
        images = load_image_set(
            write_list(tmp_path, lines),
            path_column="file",
            label_column="grade",
            split_column="fold",
        )
        assert keys(images) == ["2.png", "größe, 1.png"]

    def test_relative_list_path_and_linked_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        touch(tmp_path / "real", "1.png", "2.png")
        (tmp_path / "link").symlink_to("real")
        lines = ["path,label,split", "1.png,a,train", f"{tmp_path}/real/2.png,b,train"]
        write_list(tmp_path / "real", lines)
        monkeypatch.chdir(tmp_path)
        images = load_image_set(Path("link/list.csv"))
        assert keys(images) == ["1.png", "2.png"]
        assert images.root == tmp_path / "link"

    ROWS = {
        "row 3: 1.png is already in row 2": "./1.png,a,train",
        "row 3: no file 9.png": "9.png,a,train",
        "row 3: ../out.png is outside": "../out.png,a,train",
        "row 3: /etc/passwd is outside": "/etc/passwd,a,train",
        "row 3: folder is a directory": "folder,a,train",
        "row 3: no path": ",a,train",
        "row 3: 2.png has no label": "2.png, ,train",
        "row 3: split must be one of train, val, test, got 'valid'": "2.png,b,valid",
        "row 3: split must be one of train, val, test, got ''": "2.png,b,",
        "row 3: expected 3 cells, got 4": "2.png,b,train,x",
        "one class only": "2.png,a,train",
        "class 'b' .* no images in the train split": "2.png,b,test",
    }

    @pytest.mark.parametrize("message", ROWS)
    def test_bad_row(self, tmp_path: Path, message: str) -> None:
        touch(tmp_path, "data/1.png", "data/2.png", "data/folder/x.png", "out.png")
        path = write_list(
            tmp_path / "data", ["path,label,split", "1.png,a,train", self.ROWS[message]]
        )
        with pytest.raises(ImageSetError, match=message):
            load_image_set(path)

    def test_bad_rows_are_reported_together(self, tmp_path: Path) -> None:
        lines = ["path,label", *(f"{i}.png,a" for i in range(30))]
        with pytest.raises(ImageSetError) as caught:
            load_image_set(write_list(tmp_path, lines))
        assert "row 2: no file 0.png" in str(caught.value)
        assert "row 21: no file 19.png" in str(caught.value)
        assert "... and 10 more" in str(caught.value) and "20.png" not in str(caught.value)

    def test_no_train_rows(self, tmp_path: Path) -> None:
        touch(tmp_path, "1.png", "2.png")
        path = write_list(tmp_path, ["path,label,split", "1.png,a,val", "2.png,b,test"])
        with pytest.raises(ImageSetError, match="no image is in the train split"):
            load_image_set(path)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("file,label", r"must have the column 'path' \(--path-column\), got 'file', 'label'$"),
            ("", "got an empty file"),
            ("path,label,path", "column 'path' more than once"),
        ],
    )
    def test_bad_header(self, tmp_path: Path, header: str, message: str) -> None:
        with pytest.raises(ImageSetError, match=message):
            load_image_set(write_list(tmp_path, [header]))

    def test_a_column_that_is_not_there_is_named_with_what_may_have_been_meant(
        self, tmp_path: Path
    ) -> None:
        touch(tmp_path, "1.png")
        path = write_list(tmp_path, ["path,Patient,opacity,lines", "1.png,P1,1,0"])
        for asked, message in (
            (
                {"label_columns": ("opacty", "lines"), "patient_column": "patient"},
                r"must have the column 'opacty' \(--label-columns\) and 'patient' "
                r"\(--patient-column\), got 'path', 'Patient', 'opacity', 'lines'; did you mean "
                r"'opacity' instead of 'opacty'\?; did you mean 'Patient' instead of 'patient'\?$",
            ),
            (
                {},
                r"must have the column 'label' \(--label-column\), got 'path', .*'lines'; what "
                r"images show may also be several findings, --label-columns, or a number, "
                r"--value-column$",
            ),
            ({"value_column": "age"}, r"the column 'age' \(--value-column\), got .*'lines'$"),
        ):
            with pytest.raises(ImageSetError, match=message):
                load_image_set(path, **asked)
        with pytest.raises(ImageSetError, match="must have the column 'file', got 'path', .*'$"):
            list_images([path], path_column="file")

    def test_a_split_column_that_was_asked_for_must_be_there(self, tmp_path: Path) -> None:
        touch(tmp_path, "1.png")
        path = write_list(tmp_path, ["path,label", "1.png,a"])
        with pytest.raises(
            ImageSetError,
            match=r"must have the column 'fold' \(--split-column\), got 'path', 'label'",
        ):
            load_image_set(path, split_column="fold")

    def test_no_rows(self, tmp_path: Path) -> None:
        with pytest.raises(ImageSetError, match="lists no images"):
            load_image_set(write_list(tmp_path, ["path,label"]))

    def test_not_a_list(self, tmp_path: Path) -> None:
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
        with pytest.raises(ImageSetError, match="not a CSV list"):
            load_image_set(tmp_path / "x.png")


class TestListImages:
    def test_images_folders_and_lists(self, tmp_path: Path) -> None:
        touch(tmp_path, "a/2.png", "a/1.png", "a/deep/0.JPG", "a/notes.txt", "b.png", "c/d.png")
        path = write_list(tmp_path, ["path", "c/d.png", "a/1.png"])
        found = list_images([tmp_path / "b.png", tmp_path / "a", path])
        names = [found_path.relative_to(tmp_path).as_posix() for found_path in found]
        assert names == ["b.png", "a/1.png", "a/2.png", "a/deep/0.JPG", "c/d.png"]

    def test_relative_list_does_not_reach_outside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        touch(tmp_path, "out.png", "in/1.png")
        write_list(tmp_path / "in", ["path", "../out.png"])
        monkeypatch.chdir(tmp_path / "in")
        with pytest.raises(ImageSetError, match="row 2: .* outside"):
            list_images([Path("list.csv")])

    def test_nothing_to_list(self, tmp_path: Path) -> None:
        with pytest.raises(ImageSetError, match="no such file"):
            list_images([tmp_path / "x.png"])
        with pytest.raises(ImageSetError, match="no images in"):
            list_images([touch(tmp_path, "notes.txt")])
