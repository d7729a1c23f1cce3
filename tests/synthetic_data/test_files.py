"""A synthetic set as other programs read it: torchvision's ImageFolder, numpy, tarfile; whole or
not at all."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastdcgan.errors import InputError
from fastdcgan.synthetic_data.files import refuse_taken, write_set

CLASSES = ("cat", "dog", "eel")
SETS = list(np.random.default_rng(0).integers(0, 256, (3, 300, 4, 4, 3), np.uint8))
MANIFEST = {"per_class": 300, "counts": {}, "source": {}}


def write(out, kind, sets=SETS, **options):
    told = []
    write_set(
        out, kind, sets, CLASSES, MANIFEST, shard=options.get("shard", 400), advance=told.append
    )
    assert sum(told) == sum(map(len, sets))
    assert json.loads((out / "manifest.json").read_text()) == MANIFEST
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_folder_is_torchvisions(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    write(tmp_path / "set", "folder", [some[:5, ..., :1] for some in SETS])
    found = datasets.ImageFolder(tmp_path / "set")
    assert (tuple(found.classes), len(found)) == (CLASSES, 15)
    for index, (image, label) in enumerate(found):
        assert label == index // 5
        assert np.array_equal(np.asarray(image)[..., 0], SETS[label][index % 5, ..., 0])


def test_an_npz_is_numpys(tmp_path):
    write(tmp_path / "deep" / "set", "npz")
    with np.load(tmp_path / "deep" / "set" / "images.npz", allow_pickle=False) as found:
        assert np.array_equal(found["images"], np.concatenate(SETS))
        assert np.array_equal(found["labels"], np.arange(3).repeat(300))
        assert tuple(found["classes"]) == CLASSES


def test_shards_are_tars_with_mixed_classes(tmp_path):
    write(tmp_path / "set", "webdataset")
    names = [f"{i:06d}.tar" for i in range(3)]
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [*names, "manifest.json"]
    labels, images = [], []
    for name in names:
        with tarfile.open(tmp_path / "set" / name) as shard:
            members = [(m.name, shard.extractfile(m).read()) for m in shard]
        for (png, picture), (cls, label) in zip(members[::2], members[1::2], strict=True):
            key = f"{len(labels):06d}"
            assert (png, cls) == (f"{key}.png", f"{key}.cls")
            images.append(np.asarray(Image.open(io.BytesIO(picture))))
            labels.append(int(label))
    assert np.bincount(labels).tolist() == [300] * 3
    assert all(60 < labels[:300].count(label) < 140 for label in range(3))
    for label, some in enumerate(SETS):
        mine = [image.tobytes() for image, own in zip(images, labels, strict=True) if own == label]
        assert sorted(mine) == sorted(image.tobytes() for image in some)


def test_what_is_there_is_refused_or_replaced_as_a_whole(tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    refuse_taken(out, force=False)
    write(out, "webdataset")
    with pytest.raises(InputError, match="set exists already"):
        refuse_taken(out, force=False)
    refuse_taken(out, force=True)
    (tmp_path / ".set.0.set.tmp" / "old").mkdir(parents=True)  # of a process that was killed
    write(out, "npz")
    assert sorted(p.name for p in out.iterdir()) == ["images.npz", "manifest.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "of another program"}')
    with pytest.raises(InputError, match="is no set of this command"):
        refuse_taken(tmp_path / "mine", force=True)


def test_a_failure_leaves_what_was_there(tmp_path):
    write(tmp_path / "set", "npz")
    before = (tmp_path / "set" / "images.npz").read_bytes()

    def full_disk(done):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_set(tmp_path / "set", "folder", SETS, CLASSES, {}, shard=1, advance=full_disk)
    assert (tmp_path / "set" / "images.npz").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
