"""Nets with classes: against the papers' formulas written out in plain PyTorch; built again from
their weights; fused; and what they refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastdcgan import models
from fastdcgan.errors import InputError
from fastdcgan.models.conditional import EMBEDDING, by_class
from fastdcgan.training.checkpoints import save_weights
from fastdcgan_kernels import findings, fuse
from fastdcgan_kernels.modules.block import stat_groups

NAMES = ("bag", "boot", "coat")
LABELS = torch.tensor([2, 0, 1, 2])


def nets(net="dcgan", **more):
    torch.manual_seed(0)
    size = 32 if net == "dcgan" else 28
    built = models.build(net, size=size, nz=6, ngf=4, ndf=4, channels=1, classes=NAMES, **more)
    return tuple(each.double() for each in built)


@pytest.mark.parametrize("net", ["dcgan", "tf28"])
def test_g_is_the_plain_net_of_z_about_the_labels_place(net):
    netG, _ = nets(net)
    z = torch.randn(4, 6, dtype=torch.float64)
    images = netG(z, LABELS)
    sizes = {"size": 32, "ngf": 4} if net == "dcgan" else {}
    kind = models.Generator if net == "dcgan" else models.TF28Generator
    plain = kind(nz=6, channels=1, **sizes).double()
    plain.main.load_state_dict(netG.main.state_dict())
    one_hot = F.one_hot(LABELS, 3).double()
    table = netG.embedding.weight.detach().clone().requires_grad_()
    e = one_hot @ table
    expected = plain(z + 5 * e / e.square().sum(1, keepdim=True).sqrt())
    torch.testing.assert_close(images, expected, rtol=1e-12, atol=1e-12)
    images.square().sum().backward()
    expected.square().sum().backward()
    assert table.grad.abs().sum(1).min() > 0, "each class learns"
    torch.testing.assert_close(netG.embedding.weight.grad, table.grad, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(netG.main.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("net", "more"),
    [("dcgan", {}), ("dcgan", {"spectral_norm": True, "norm_d": "none"}), ("tf28", {})],
)
def test_ds_logit_is_psi_and_the_projection(net, more):
    """psi(x) + e(y)^T phi(x), Miyato & Koyama, equation 4, and its gradient of second order."""
    _, netD = nets(net, **more)
    netD.eval()  # without dropout
    x = torch.randn(4, 1, netD.size, netD.size, dtype=torch.float64, requires_grad=True)
    logits = netD(x, LABELS)
    psi, phi = netD.main(x).reshape(4, 1 + EMBEDDING).split([1, EMBEDDING], dim=1)
    e = torch.stack([netD.embedding.weight[label] for label in LABELS.tolist()])
    expected = torch.stack([psi[i, 0] + e[i].dot(phi[i]) for i in range(4)])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    found = []
    for out in (logits, expected):
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        netD.zero_grad()
        slope.square().sum().backward(retain_graph=True)
        found.append([p.grad.clone() for p in netD.parameters() if p.grad is not None])
    weight = next(p for name, p in netD.named_parameters() if name.startswith("embedding"))
    assert weight.grad.abs().sum(1).min() > 0, "a penalty reaches each class"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_spectral_norm_bounds_the_embedding_too():
    _, netD = nets(spectral_norm=True)
    assert torch.linalg.matrix_norm(netD.embedding.weight, 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_fused_they_compute_the_same(impl, monkeypatch):
    """By the C++ kernels of the CPU, or by Triton's in the interpreter; D of two batches."""
    if impl == "auto":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FASTDCGAN_IMPL", "reference")
    z, labels = torch.randn(4, 6), LABELS
    plain = [net.float().to(memory_format=torch.channels_last) for net in nets()]
    fused = [fuse(copy.deepcopy(net)) for net in plain]
    assert all(f.fused for net in fused for f in findings(net))
    found = []
    for netG, netD in (plain, fused):
        images = netG(z, labels)
        if netG is plain[0]:
            logits = torch.cat([netD(images[:2], labels[:2]), netD(images[2:], labels[2:])])
        else:
            with stat_groups(2):
                logits = netD(images, labels)
        logits.square().sum().backward()
        gradients = [p.grad for net in (netG, netD) for p in net.parameters()]
        found.append([images, logits, *gradients])
        monkeypatch.setenv("FASTDCGAN_IMPL", impl)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("net", "more"),
    [
        ("dcgan", {}),
        ("dcgan", {"spectral_norm": True, "minibatch_std": True, "norm_d": "none"}),
        ("tf28", {"spectral_norm": True}),
    ],
)
def test_nets_are_built_again_from_their_weights_with_the_names(net, more, tmp_path):
    for built, rebuild in zip(
        nets(net, **more), (models.generator_from, models.discriminator_from), strict=True
    ):
        built = built.float().eval()
        save_weights(built, tmp_path / "net.safetensors", step=3)
        again = rebuild(tmp_path / "net.safetensors").eval()
        assert again.classes == NAMES
        assert rebuild(built.state_dict()).classes == ("0", "1", "2"), "names are not weights"
        assert rebuild({**built.state_dict(), "classes": list(NAMES)}).classes == NAMES
        x = (
            torch.randn(4, 6)
            if rebuild is models.generator_from
            else torch.randn(4, 1, *[again.size] * 2)
        )
        assert torch.equal(again(x, LABELS), built(x, LABELS))


def test_without_classes_nothing_is_there():
    torch.manual_seed(0)
    netG, netD = models.build("dcgan", size=32, nz=6, ngf=4, ndf=4, channels=1)
    assert netG.classes is netD.classes is None
    assert not [k for net in (netG, netD) for k in net.state_dict() if not k.startswith("main.")]
    assert netG.main[0].in_channels == 6
    assert netD.main[-1].out_channels == 1


def test_mistakes_are_refused():
    netG, netD = nets()
    z, x = torch.randn(4, 6).double(), torch.randn(4, 1, 32, 32).double()
    with pytest.raises(InputError, match="no labels were given to a generator of 3 classes"):
        netG(z)
    with pytest.raises(InputError, match="no labels were given to a discriminator"):
        netD(x)
    with pytest.raises(InputError, match=r"shape \(3,\).* for 4 images"):
        netG(z, LABELS[:3])
    with pytest.raises(InputError, match="float32"):
        netD(x, LABELS.float())
    with pytest.raises(InputError, match="a generator without classes"):
        models.Generator(32, 6, 4, 1)(torch.randn(4, 6), LABELS)
    for classes in (["one"], ["a", "a"], []):
        with pytest.raises(InputError, match="2 classes or more"):
            models.Generator(32, 6, 4, 1, classes=classes)


@pytest.mark.parametrize(("count", "rows"), [(2, 8), (3, 9), (10, 10), (40, 32)])
def test_a_sheet_has_rows_of_one_class_and_columns_of_one_z(count, rows):
    z, labels = by_class(torch.randn(64, 6, 1, 1), [str(i) for i in range(count)])
    table = labels.view(rows, 8)
    assert (table == table[:, :1]).all()
    assert table.unique().tolist() == list(range(min(count, 32)))
    each = rows // min(count, 32)
    assert torch.equal(z[: 8 * each], z[-8 * each :])
    assert len(z) == len(labels)
