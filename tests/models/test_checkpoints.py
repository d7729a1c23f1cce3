"""Reading weights: every naming of the nets that is in use, every way a file can be wrong."""

import argparse
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdcgan.errors import InputError
from fastdcgan.models import (
    Discriminator,
    Generator,
    SNGANDiscriminator,
    TF28Discriminator,
    TF28Generator,
    build,
    discriminator_from,
    generator_from,
    load_weights,
    read_state_dict,
)


def small_nets(seed=0, size=32, nz=3, ngf=2, ndf=2, channels=3):
    torch.manual_seed(seed)
    netG, netD = build("dcgan", size=size, nz=nz, ngf=ngf, ndf=ndf, channels=channels)
    for buffer in (*netG.buffers(), *netD.buffers()):
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return netG, netD


def assert_same(net, expected):
    found = net.state_dict()
    assert list(found) == list(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


class BoltsGenerator(nn.Module):
    """The module tree of lightning-bolts: blocks of convolution, BatchNorm, activation."""

    def __init__(self, nz, ngf, channels):
        super().__init__()

        def block(ci, co, stride, padding):
            conv = nn.ConvTranspose2d(ci, co, 4, stride, padding, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(co), nn.ReLU())

        last = nn.ConvTranspose2d(ngf, channels, 4, 2, 1, bias=False)
        self.gen = nn.Sequential(
            block(nz, ngf * 8, 1, 0),
            block(ngf * 8, ngf * 4, 2, 1),
            block(ngf * 4, ngf * 2, 2, 1),
            block(ngf * 2, ngf, 2, 1),
            nn.Sequential(last, nn.Tanh()),
        )

    def forward(self, z):
        return self.gen(z)


class BoltsDiscriminator(nn.Module):
    """Its first block has an Identity in BatchNorm's place."""

    def __init__(self, ndf, channels):
        super().__init__()

        def block(ci, co, norm):
            conv = nn.Conv2d(ci, co, 4, 2, 1, bias=False)
            return nn.Sequential(conv, norm, nn.LeakyReLU(0.2))

        self.disc = nn.Sequential(
            block(channels, ndf, nn.Identity()),
            block(ndf, ndf * 2, nn.BatchNorm2d(ndf * 2)),
            block(ndf * 2, ndf * 4, nn.BatchNorm2d(ndf * 4)),
            block(ndf * 4, ndf * 8, nn.BatchNorm2d(ndf * 8)),
            nn.Sequential(nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid()),
        )

    def forward(self, x):
        return self.disc(x).view(-1)


class BoltsSystem(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = BoltsGenerator(5, 2, 3)
        self.discriminator = BoltsDiscriminator(2, 3)


def test_lightning_bolts_checkpoint_gives_both_nets(tmp_path):
    torch.manual_seed(0)
    theirs = BoltsSystem()
    path = tmp_path / "epoch=3.ckpt"
    torch.save({"epoch": 3, "state_dict": theirs.state_dict(), "optimizer_states": []}, path)
    theirs.eval()
    z = torch.randn(2, 5, 1, 1)
    netG, netD = generator_from(path).eval(), discriminator_from(path).eval()
    images = theirs.generator(z)
    torch.testing.assert_close(netG(z), images)
    torch.testing.assert_close(netD.probability(images), theirs.discriminator(images))
    again = Discriminator(ndf=2)
    load_weights(again, path)  # a discriminator takes the discriminator's entries
    assert_same(again, netD.state_dict())


def test_ignite_checkpoint_gives_both_nets(tmp_path):
    netG, netD = small_nets()
    path = tmp_path / "networks_1.pt"
    torch.save(
        {
            name: {key.replace("main.", "net."): value for key, value in net.state_dict().items()}
            for name, net in (("netG", netG), ("netD", netD))
        },
        path,
    )
    assert_same(generator_from(path), netG.state_dict())
    assert_same(discriminator_from(path), netD.state_dict())


@given(
    parts=st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=4),
    inside=st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=2),
    owner=st.sampled_from(["", "netG", "generator"]),
    naming=st.sampled_from(["main", "net", "gen"]),
    wrappers=st.lists(st.sampled_from(["state_dict", "model", "netG", "generator"]), max_size=3),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_prefixes_stack_in_any_order(parts, inside, owner, naming, wrappers):
    netG, netD = small_nets()

    def renamed(key):
        _, index, name = key.split(".", 2)
        stem = f"gen.{int(index) // 3}.{int(index) % 3}" if naming == "gen" else f"{naming}.{index}"
        first, rest = stem.split(".", 1)
        middle = len(parts) // 2
        names = [*parts[:middle], owner, *parts[middle:], first, *inside, rest, name]
        return ".".join(filter(None, names))

    found = {renamed(key): value for key, value in netG.state_dict().items()}
    if owner:
        other = "netD." if owner == "netG" else "discriminator."
        found |= {other + key: value for key, value in netD.state_dict().items()}
    for wrapper in wrappers:
        found = {wrapper: found, "epoch": 7}
    empty, _ = small_nets(seed=1)
    load_weights(empty, found)
    assert_same(empty, netG.state_dict())
    assert_same(generator_from(found), netG.state_dict())


def test_wrapped_nets_are_filled():
    netG, netD = small_nets()
    for wrap in (nn.DataParallel, torch.compile, lambda n: torch.compile(nn.DataParallel(n))):
        emptyG, emptyD = small_nets(seed=1)
        load_weights(wrap(emptyG), wrap(netG).state_dict())
        load_weights(wrap(emptyD), {"netG": netG.state_dict(), "netD": netD.state_dict()})
        assert_same(emptyG, netG.state_dict())
        assert_same(emptyD, netD.state_dict())


def test_reading_twice_changes_nothing():
    netG, netD = small_nets()
    for net, name in ((netG, "netG"), (netD, "netD")):
        once = read_state_dict(net.state_dict(), name=name)
        assert list(once) == list(net.state_dict()) == list(read_state_dict(once, name=name))


def test_any_name_that_stands_in_the_source_can_be_taken():
    first, second = small_nets(0)[0], small_nets(1)[0]
    both = {"netG": first.state_dict(), "ema": second.state_dict()}
    assert_same(generator_from(both), first.state_dict())
    assert_same(generator_from(both, name="ema"), second.state_dict())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_load_to_float32(tmp_path, suffix, dtype):
    netG, _ = small_nets()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in netG.state_dict().items()}
    path = tmp_path / f"netG.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    expected = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    for source in (path, str(path)):
        assert_same(generator_from(source), expected)
    empty, _ = small_nets(seed=1)
    load_weights(empty, path)
    assert_same(empty, expected)


def test_old_checkpoint_without_num_batches_tracked(tmp_path):
    netG, _ = small_nets()
    state = {k: v for k, v in netG.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    empty, _ = small_nets(seed=1)
    empty(torch.randn(2, 3))
    load_weights(empty, tmp_path / "old.pth")
    assert_same(empty, netG.state_dict())
    assert_same(generator_from(tmp_path / "old.pth"), netG.state_dict())


def test_loading_keeps_memory_format():
    netG, _ = small_nets()
    empty = small_nets(seed=1)[0].to(memory_format=torch.channels_last)
    load_weights(empty, netG.state_dict())
    assert empty.main[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(empty, netG.state_dict())


@given(
    size=st.sampled_from([32, 64, 128, 256]),
    nz=st.integers(1, 5),
    ngf=st.integers(1, 3),
    ndf=st.integers(1, 3),
    channels=st.integers(1, 4),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_nets_are_inferred_from_shapes(size, nz, ngf, ndf, channels):
    netG, netD = small_nets(0, size, nz, ngf, ndf, channels)
    before = torch.get_rng_state()
    foundG, foundD = generator_from(netG.state_dict()), discriminator_from(netD.state_dict())
    assert torch.equal(torch.get_rng_state(), before), "opening a file drew random numbers"
    assert isinstance(foundG, Generator)
    assert isinstance(foundD, Discriminator)
    assert (foundG.size, foundG.nz, foundG.ngf, foundG.channels) == (size, nz, ngf, channels)
    assert (foundD.size, foundD.ndf, foundD.channels) == (size, ndf, channels)
    assert_same(foundG, netG.state_dict())
    assert_same(foundD, netD.state_dict())


@pytest.mark.parametrize("channels", [1, 3])
def test_tf28_nets_are_inferred_from_shapes(channels):
    netG, netD = TF28Generator(6, channels), TF28Discriminator(channels)
    foundG, foundD = generator_from(netG.state_dict()), discriminator_from(netD.state_dict())
    assert isinstance(foundG, TF28Generator)
    assert isinstance(foundD, TF28Discriminator)
    assert (foundG.nz, foundG.channels, foundD.channels) == (6, channels, channels)
    assert_same(foundG, netG.state_dict())
    assert_same(foundD, netD.state_dict())


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("classes", [None, ("a", "b")])
def test_nets_without_norm_and_sngans_discriminator_are_found_by_their_shapes(size, classes):
    netG = Generator(size, 5, 3, 3, norm="none", classes=classes)
    netD = SNGANDiscriminator(size, 2, 1, classes=classes)
    foundG, foundD = generator_from(netG.state_dict()), discriminator_from(netD.state_dict())
    assert (foundG.norm, foundG.size, foundG.nz, foundG.ngf) == ("none", size, 5, 3)
    assert type(foundD) is SNGANDiscriminator
    assert (foundD.size, foundD.ndf, foundD.channels) == (size, 2, 1)
    assert_same(foundG, netG.state_dict())
    assert_same(foundD, netD.state_dict())


def test_built_net_shares_no_memory_with_its_source():
    netG, _ = small_nets()
    found = generator_from(netG.state_dict())
    found.main[0].weight.data.zero_()
    assert netG.main[0].weight.any()


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mismatch_names_keys_and_shapes():
    netG, _ = small_nets(ngf=2)
    wide, _ = small_nets(ngf=4)
    before = {k: v.clone() for k, v in netG.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(netG, wide.state_dict())
    text = one_line(caught)
    assert "the given state dict does not fit Generator: " in text
    assert "main.0.weight is (3, 16, 4, 4), expected (3, 8, 4, 4)" in text
    assert "main.1.weight is (16,), expected (8,), " in text
    assert " and 13 more. " in text
    assert_same(netG, before)


def test_missing_and_unexpected_keys_are_named(tmp_path):
    netG, _ = small_nets()
    state = netG.state_dict()
    state["extra.weight"] = state.pop("main.3.weight")
    torch.save(state, tmp_path / "netG.pth")
    with pytest.raises(InputError) as caught:
        load_weights(netG, tmp_path / "netG.pth")
    text = one_line(caught)
    assert text.startswith(str(tmp_path / "netG.pth"))
    assert "; unexpected extra.weight (8, 4, 4, 4). " in text
    assert "does not fit Generator: missing main.3.weight (8, 4, 4, 4); " in text
    assert "more" not in text.removeprefix(str(tmp_path))


def test_the_other_nets_file_is_refused():
    netG, netD = small_nets()
    with pytest.raises(InputError, match=r"unexpected main\.2\.weight \(4, 2, 4, 4\), "):
        load_weights(netG, netD.state_dict())
    with pytest.raises(InputError, match="holds another net than asked for"):
        generator_from(netD.state_dict())
    with pytest.raises(InputError, match="holds another net than asked for"):
        discriminator_from(netG.state_dict())
    netG, netD = TF28Generator(), TF28Discriminator()
    with pytest.raises(InputError, match="the given state dict "):
        generator_from(netD.state_dict())
    with pytest.raises(InputError, match="the given state dict "):
        discriminator_from(netG.state_dict())


def test_pickled_code_is_not_run(tmp_path):
    netG, _ = small_nets()
    contents = [{"state_dict": netG.state_dict(), "args": argparse.Namespace(nz=3)}, netG]
    for content in contents:
        torch.save(content, tmp_path / "netG.pth")
        with pytest.raises(InputError, match="needs pickled code") as caught:
            generator_from(tmp_path / "netG.pth")
        assert "state_dict()" in one_line(caught)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"\x89PNG\r\n\x1a\n" + bytes(64), pickle.dumps({"a": 1}, protocol=2)],
    ids=["empty", "text", "png", "pickle"],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_of_another_kind(tmp_path, content, suffix):
    path = tmp_path / f"netG.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"netG\.") as caught:
        read_state_dict(path)
    one_line(caught)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, suffix, share):
    netG, _ = small_nets()
    path = tmp_path / f"netG.{suffix}"
    if suffix == "pth":
        torch.save(netG.state_dict(), path)
    else:
        safetensors.torch.save_file(netG.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"netG\.") as caught:
        read_state_dict(path)
    one_line(caught)


def test_what_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    cases = [
        (lambda: read_state_dict(tmp_path / "no.pth"), r"no\.pth is not a file"),
        (lambda: read_state_dict(tmp_path), "is not a file"),
        (lambda: read_state_dict(tmp_path / "tensor.pth"), "holds a Tensor, not a state dict"),
        (lambda: read_state_dict({"epoch": 3}), "holds no tensors for netG"),
        (lambda: generator_from({"fc.weight": torch.zeros(2)}), "its first key: fc.weight"),
        (lambda: discriminator_from({}), "holds no tensors for netD"),
        (
            lambda: generator_from({"main.0.weight": torch.zeros(2, 2, 4, 4)}),
            r"shapes: image size 4 ",
        ),
        (lambda: generator_from(nn.Linear(2, 2).state_dict()), "its first key: weight"),
    ]
    for call, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            call()
        one_line(caught)
