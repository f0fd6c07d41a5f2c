"""The small files of data sets: tables, JSON, names of photographs, and how their mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpmflow.data.files import Row, find_file, naming, read_json, read_table, read_text


def table(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "pairs.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_table(tmp_path: Path) -> None:
    file = table(tmp_path, '\ufeffa,b,c\r\n\r\n x.jpg ,"1,2",3\n,,\ny.jpg,4;5,6\n')
    rows = read_table(file)
    assert [(row.line, row.fields) for row in rows] == [(3, ["x.jpg", "1,2", "3"]), (5, ["y.jpg", "4;5", "6"])]
    assert str(rows[1]) == f"{file}, line 5"


@pytest.mark.parametrize("text", ["", "\n\n", "x.jpg,1,2\n", "1,2\nx,y\n"])
def test_no_column_names(tmp_path: Path, text: str) -> None:
    file = table(tmp_path, text)
    with pytest.raises(ValueError) as refused:
        read_table(file)
    assert str(refused.value) == f"{file} must begin with a line of column names"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", " lists no pair$"),
        ('a,b\n"x,1\n', ", line 2: must be comma-separated fields: "),
        (b"\xff\xfe\x00a", " must be text: "),
    ],
)
def test_no_table(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_table(table(tmp_path, text))
    assert type(refused.value) is ValueError


def test_fields_of_a_row(tmp_path: Path) -> None:
    row = Row(tmp_path, 7, ["1", "2.5", "-3e2"])
    assert row.numbers(row.fields, "numbers").tolist() == [1, 2.5, -300]
    row.require(3)
    row.require(2, 3)
    with pytest.raises(ValueError, match="line 7: must have 2 or 4 fields, got 3$"):
        row.require(2, 4)
    for fields, message in ((["1", "x"], "points must be numbers: "), (["1", "nan"], "points must be finite$")):
        with pytest.raises(ValueError, match=f"line 7: {message}"):
            row.numbers(fields, "points")


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("null", "NoneType"), ("3.5", "float")])
def test_json_of_another_kind(tmp_path: Path, content: str, kind: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json must hold a JSON object, got {kind}$"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"nul", b"9" * 5000, b"[" * 200_000])
def test_no_json(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json must be (JSON|text): ") as refused:
        read_json(file)
    assert type(refused.value) is ValueError


def test_text_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgrus\xc3\xa9")
    assert read_text(tmp_path / "a.txt") == "grusé"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="^there: has no 'box'$"), naming("there"):
        {}["box"]
    with pytest.raises(ValueError, match="^there: must hold no number so large: int too large "), naming("there"):
        float(10**400)
    with pytest.raises(ValueError, match="^there: wrong$"), naming("there"):
        raise TypeError("wrong")
    with pytest.raises(FileNotFoundError, match="^wrong$"), naming("there"):
        raise FileNotFoundError("wrong")


@pytest.mark.parametrize(
    "name",
    [
        "car(G)/a.png",
        "PF-WILLOW/car(G)/a.png",
        "data/PF-dataset/car(G)/a.png",
        "data\\PF\\car(G)\\a.png",
        "./car(G)/a.png",
    ],
)
def test_a_photograph_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "car(G)").mkdir()
    (tmp_path / "car(G)" / "a.png").touch()
    assert find_file(tmp_path, name, "here") == tmp_path / "car(G)" / "a.png"


def test_the_whole_name_comes_first(tmp_path: Path) -> None:
    for folder in ("car", "x/car"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").touch()
    assert find_file(tmp_path, "x/car/a.png", "here") == tmp_path / "x" / "car" / "a.png"


def test_a_photograph_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()  # its folder always counts
    with pytest.raises(FileNotFoundError) as refused:
        find_file(tmp_path, "PF/car(G)/a.png", "here")
    assert str(refused.value) == f"here: there is no file {tmp_path / 'car(G)' / 'a.png'}"
    (tmp_path / "PF" / "car(G)").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as refused:
        find_file(tmp_path, "PF/car(G)/a.png", "here")
    assert str(refused.value) == f"here: there is no file {tmp_path / 'PF' / 'car(G)' / 'a.png'}"


@pytest.mark.parametrize(
    "name",
    ["../a.png", "car/../../a.png", "/etc/a.png", "\\etc\\a.png", "..\\a.png", "C:\\a.png", "C:a.png", ".", "", 5],
)
def test_a_name_that_leads_elsewhere(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match="^here: must name a file below "):
        find_file(tmp_path, name, "here")
