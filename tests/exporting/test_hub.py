"""The Hugging Face Hub, offline: its mixin and its own reader of cards, on folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastdcgan import models
from fastdcgan.exporting.card import Facts, card, facts_of
from fastdcgan.training import TrainConfig

huggingface_hub = pytest.importorskip("huggingface_hub")
from fastdcgan.exporting import hub  # noqa: E402


def trained(net):
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
    return net.eval()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A Hub that is a folder."""

    def create(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload(self, *, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, tmp_path / "online" / repo_id)
        return f"https://huggingface.co/{repo_id}/commit/0"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    return tmp_path / "online"


@pytest.mark.parametrize(
    ("kind", "net", "shape"),
    [
        (hub.HubGenerator, models.Generator(size=32, nz=6, ngf=4, channels=1), (2, 6)),
        (hub.HubDiscriminator, models.Discriminator(size=32, ndf=4), (2, 3, 32, 32)),
        (
            hub.HubDiscriminator,
            models.Discriminator(size=32, ndf=4, norm="none", spectral_norm=True),
            (2, 3, 32, 32),
        ),
        (
            hub.HubSNGANDiscriminator,
            models.SNGANDiscriminator(size=32, ndf=4),
            (2, 3, 32, 32),
        ),
        (
            hub.HubGenerator,
            models.Generator(size=32, nz=6, ngf=4, norm="none"),
            (2, 6),
        ),
        (hub.HubTF28Generator, models.TF28Generator(nz=6, channels=3), (2, 6)),
        (hub.HubTF28Discriminator, models.TF28Discriminator(), (2, 1, 28, 28)),
    ],
)
def test_pushed_and_taken_back(online, kind, net, shape):
    net = trained(net)
    assert "commit" in str(kind.of(net).push_to_hub("me/net"))
    folder = online / "me" / "net"
    names = {path.name for path in folder.iterdir()}
    generator = hasattr(net, "nz")
    assert names == {"README.md", "config.json", "model.safetensors"} | (
        {"samples.png"} if generator else set()
    )
    back = kind.from_pretrained(folder)
    assert not back.training
    assert isinstance(back, type(net))
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(back(x), net(x))
    read = huggingface_hub.ModelCard.load(folder / "README.md")
    assert read.data.library_name == "fastdcgan"
    assert "model_hub_mixin" in read.data.tags


def test_weights_that_do_not_fit_are_an_error(tmp_path):
    hub.HubGenerator.of(trained(models.Generator(size=32, nz=6, ngf=4))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["main.1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        hub.HubGenerator.from_pretrained(tmp_path)


def test_the_card_says_what_is_known_and_no_path(tmp_path):
    recipe = TrainConfig(data="/home/someone/secret/birds", image_size=32, out=tmp_path / "secret")
    (tmp_path / "config.json").write_text(recipe.to_json())
    rows = [
        {"step": 10, "kid": 0.5, "fid": 300.0, "features": "lite0", "n": 64},
        {"step": 20, "kid": 0.25, "fid": 200.0, "features": "lite0", "n": 64},
        {"step": 30, "kid": 0.125, "fid": 100.0, "features": "lite0", "n": 64},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4'
    (tmp_path / "evaluations.jsonl").write_text(text)
    facts = facts_of(
        tmp_path, steps=25, license="other", license_name="birds-1.0", license_link="https://b.org"
    )
    net = models.Generator(size=32, nz=6, ngf=4)
    (tmp_path / "README.md").write_text(card(net, facts, ["model.safetensors", "model.onnx"]))
    read = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert (read.data.license, read.data.license_name) == ("other", "birds-1.0")
    assert read.data.license_link == "https://b.org"
    assert read.data.pipeline_tag == "unconditional-image-generation"
    scores = {one.metric_type: one.metric_value for one in read.data.eval_results}
    assert scores == {"fid": 200.0, "kid": 0.25}, "those of step 20, the last at or before 25"
    assert read.data.eval_results[0].dataset_name == "birds"
    for said in ("trained for 25 steps", "HubGenerator", "model.onnx", '"batch_size": 64', "MIT"):
        assert said in read.text, said
    for hidden in ("secret", "someone", str(tmp_path)):
        assert hidden not in read.content


def test_a_card_without_a_run():
    text = card(models.Discriminator(size=32, ndf=4), Facts(), ["model.pt"])
    read = huggingface_hub.ModelCard(text)
    assert read.data.license == "unknown"
    assert read.data.eval_results is None
    assert "the logit" in read.text


@pytest.mark.parametrize("data", ["fashion-mnist:/home/secret", "torchvision:CIFAR10:/home/secret"])
def test_data_is_named_without_its_folder(data):
    text = card(models.Generator(size=32), Facts(recipe=TrainConfig(data=data)), [])
    assert "secret" not in text
    assert ("fashion-mnist" in text) or ("CIFAR10" in text)
