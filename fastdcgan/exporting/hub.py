"""The nets with `from_pretrained`, `save_pretrained` and `push_to_hub`, by the Hugging Face Hub's
own mixin. A file apart, because it needs huggingface_hub (extra `export`), which the nets do not.

    from fastdcgan.exporting.hub import HubGenerator

    net = HubGenerator.from_pretrained("USER/NAME")  # or a folder
    images = net(torch.randn(16, net.nz))
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn

from fastdcgan import models
from fastdcgan.exporting.card import Facts, card, is_generator, sizes_of
from fastdcgan.exporting.samples import save_samples

Net = TypeVar("Net", bound="_OnHub")


class _OnHub(PyTorchModelHubMixin):
    """What the mixin leaves open: our card, its picture, and weights that must fit."""

    facts: Facts = Facts()
    """For the card; set it on the net to say more."""

    @classmethod
    def of(cls: type[Net], net: nn.Module) -> Net:
        """This class with the weights of `net`, shared, in eval mode."""
        with torch.device("meta"):
            made: Any = cls(**sizes_of(net))
        made.load_state_dict(net.state_dict(), assign=True)
        return made.eval()  # type: ignore[no-any-return]

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Any:
        # The mixin's default is to leave out what does not fit, and say nothing.
        return super()._from_pretrained(strict=strict, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        save_samples(self, save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        net: Any = self
        files = ["model.safetensors"] + ["samples.png"] * is_generator(net)
        return ModelCard(card(net, self.facts, files))


class HubGenerator(models.Generator, _OnHub):
    """`Generator`, to and from the Hub."""


class HubDiscriminator(models.Discriminator, _OnHub):
    """`Discriminator`, to and from the Hub."""


class HubSNGANDiscriminator(models.SNGANDiscriminator, _OnHub):
    """`SNGANDiscriminator`, to and from the Hub."""


class HubTF28Generator(models.TF28Generator, _OnHub):
    """`TF28Generator`, to and from the Hub."""


class HubTF28Discriminator(models.TF28Discriminator, _OnHub):
    """`TF28Discriminator`, to and from the Hub."""
