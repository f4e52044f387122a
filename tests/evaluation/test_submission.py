"""The zips that servers take: written from masks, and every fault of one found."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import write_layout
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.submission import ROOTS, check_submission, encode_png, mask_pngs, write_pngs, write_submission


def masks_of(video, position):
    seed = [position, *video.name.encode()]
    return np.random.default_rng(seed).random((video.num_frames, *video.size)) > 0.5


def reader(video, position, indices):
    return bitmask.pack(masks_of(video, position)[list(indices)])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    opened = {}
    for name in ROOTS:
        root = tmp_path_factory.mktemp(name)
        write_layout(name, root, num_videos=2, seed=0)
        opened[name] = open_dataset(name, root, "valid")
    return opened


@pytest.mark.parametrize("name", ROOTS)
def test_zip_holds_every_mask(sources, tmp_path, name):
    source, path = sources[name], tmp_path / "out.zip"
    count = write_submission(source, reader, path, progress=False)
    videos = [source[i] for i in range(len(source))]
    assert count == sum(len(v.expressions) * v.num_frames for v in videos)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == count
        for video in videos:
            for k, expression in enumerate(video.expressions):
                for t, frame in enumerate(video.frame_names):
                    content = archive.read(f"{ROOTS[name]}{video.name}/{expression.id}/{frame}.png")
                    with Image.open(io.BytesIO(content)) as image:
                        assert image.mode == "L"
                        np.testing.assert_array_equal(np.asarray(image), 255 * masks_of(video, k)[t])
    assert check_submission(source, path, progress=False) == count
    assert [f.name for f in tmp_path.iterdir()] == ["out.zip"]


def test_the_same_masks_give_the_same_zip(sources, tmp_path):
    for name in ("a.zip", "b.zip"):
        write_submission(sources["mevis"], reader, tmp_path / name, progress=False)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def rewrite(path, change):
    """Writes the archive again, with {name: content} passed through `change`."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def png(values, mode="L"):
    content = io.BytesIO()
    Image.fromarray(values).convert(mode).save(content, "PNG")
    return content.getvalue()


def test_faults_are_found_and_named(sources, tmp_path):
    source = sources["ref_youtube_vos"]
    video = source[0]
    first = f"Annotations/{video.name}/0/{video.frame_names[0]}.png"
    mask = masks_of(video, 0)[0]

    def drop(files):
        del files[first], files[f"Annotations/{video.name}/10/{video.frame_names[0]}.png"]

    def unroot(files):
        for name in list(files):
            files[name.removeprefix("Annotations/")] = files.pop(name)

    faults = {
        rf"lacks {first} and 1 more": drop,
        r"lacks Annotations/.* and \d+ more": unroot,
        r"holds Annotations/note\.txt, which": lambda files: files.update({"Annotations/note.txt": b"hi"}),
        rf"{first} holds the values \[0, 1\]": lambda files: files.update({first: png(mask.astype(np.uint8))}),
        rf"{first} has 10x10 pixels, the video 48x64": lambda files: files.update(
            {first: encode_png(np.zeros((10, 10), bool))}
        ),
        rf"{first} is a PNG of mode P": lambda files: files.update({first: png(255 * mask.astype(np.uint8), "P")}),
        rf"{first} is damaged": lambda files: files.update({first: files[first][:50]}),
    }
    for message, change in faults.items():
        path = tmp_path / "x.zip"
        path.unlink(missing_ok=True)
        write_submission(source, reader, path, progress=False)
        rewrite(path, change)
        with pytest.raises(UserError, match=message):
            check_submission(source, path, progress=False)

    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"x\.zip: not a zip"):
        check_submission(source, path, progress=False)
    with pytest.raises(UserError, match=r"y\.zip: no such file"):
        check_submission(source, tmp_path / "y.zip", progress=False)


def test_nothing_is_left_when_a_mask_is_missing(sources, tmp_path):
    def broken(video, position, indices):
        raise UserError("masks/1.json: no such file")

    with pytest.raises(UserError, match="no such file"):
        write_submission(sources["mevis"], broken, tmp_path / "x.zip", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_data_sets_without_server_are_refused(tmp_path):
    write_layout("lvvis", tmp_path, num_videos=1, seed=0)
    with pytest.raises(UserError, match="lvvis: there is no server"):
        write_submission(open_dataset("lvvis", tmp_path), reader, tmp_path / "x.zip")


def test_pngs_are_written_as_in_the_zip(sources, tmp_path):
    video = sources["mevis"][0]
    write_pngs(video, reader, tmp_path)
    written = {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*.png")}
    assert written == dict(mask_pngs(video, reader))
    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.png")}
    write_pngs(video, reader, tmp_path)
    assert stamps == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.png")}
