import io
from pathlib import Path

import pytest
from PIL import Image

from loadtest.errors import PicturesMissing
from loadtest.payload import drawn, from_folder


def test_drawn_smears_are_jpeg_of_the_size_and_differ() -> None:
    payloads = drawn(4, seed=3, width=96, height=64, upright_every=2)
    sizes = []
    for payload in payloads:
        assert payload.media_type == "image/jpeg"
        with Image.open(io.BytesIO(payload.body)) as picture:
            assert picture.format == "JPEG"
            sizes.append(picture.size)
    assert sizes == [(96, 64), (64, 96)] * 2
    assert len({payload.body for payload in payloads}) == 4
    assert drawn(4, seed=3, width=96, height=64, upright_every=2) == payloads


def test_a_folder_s_pictures_are_sent_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.JPG").write_bytes(b"not looked into")
    (tmp_path / "below" / "b.png").write_bytes(b"b")
    (tmp_path / "notes.txt").write_bytes(b"no")
    found = {payload.name: (payload.body, payload.media_type) for payload in from_folder(tmp_path, seed=0)}
    assert found == {"a.JPG": (b"not looked into", "image/jpeg"), "below/b.png": (b"b", "image/png")}


def test_of_a_large_folder_a_part_is_taken_by_the_seed(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(bytes(10))
    names = [payload.name for payload in from_folder(tmp_path, seed=1, most_bytes=55)]
    assert len(names) == 5
    assert names == [payload.name for payload in from_folder(tmp_path, seed=1, most_bytes=55)]
    assert names != [payload.name for payload in from_folder(tmp_path, seed=2, most_bytes=55)]


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_without_pictures_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PicturesMissing, match=f"{name}: no pictures"):
        from_folder(tmp_path / name, seed=0)
